"""Completions by a local model: a `Sampler` (generation/sampler.py) that decodes many sequences at once.

    generator = Generator(model, tokenizer, Sampling(temperature=0.8), slots=16, stop=("\\n\\n",))
    for samples in generator.complete([Request(generator.encode("Once upon"), samples=3)]):
        print([sample.text for sample in samples])

Continuous batching: the slots of a pool decode together, each at its own position, and a slot is refilled as soon as
its sequence ends. A prompt is prefilled once for all its samples, in pieces between the decode steps of other sequences
(`PrefixCache`). Random numbers depend on (seed, request, sample, position) alone, and a row's logits do not depend on
its neighbours (generation/decode.py), so in float32 on a CPU a completion does not depend on slots, order or
neighbours.

A sequence that calls a tool leaves its slot and keeps its keys and values. The tool runs in a thread while other
sequences continue; its result is prefilled after the call, and the sequence takes the next free slot.
Tokens in, tokens out: `token_ids` are what the model saw and chose; text is only decoded from them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch

from llmkit.errors import UserError
from llmkit.formats.conversations import Message
from llmkit.generation.decode import KEPT_BYTES, Decoder, Prefix, PrefixCache, Record
from llmkit.generation.next_token import Sampling, choose_tokens, likeliest
from llmkit.generation.requests import Completion, OnCall, OnDone, OnText, Request, StopMatcher, Usage, finished
from llmkit.generation.sequence import CALL, RunningSequence
from llmkit.generation.tool_calls import Functions, ToolUse, unavailable_notes
from llmkit.generation.transformers_decoder import TransformersDecoder
from llmkit.io.progress import counted, quantity
from llmkit.model.config import ModelConfig
from llmkit.model.devices import Precision, Weights, is_small, threads
from llmkit.model.folder import load_model
from llmkit.model.transformer import Transformer
from llmkit.model.transformers_backend import TransformersModel
from llmkit.tokenizer.chat import ChatFormat
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.tokenizer.templates import chat_format
from llmkit.tools.toolbox import ToolResult

OPEN_REQUESTS = 16  # per slot: how far reading may run ahead of the oldest unfinished request
THREADS = 8  # for tools, which mostly wait


@dataclass(frozen=True)
class ModelFolder:
    """A model that is not loaded yet, with its device and precision."""

    path: str
    config: ModelConfig
    device: torch.device
    precision: Precision


class Generator:
    """Completes prompts with one model.

    model    a model, whose weights are copied now, or a folder, loaded at the first completion
    slots    sequences decoded at once
    stop     stop strings, which are left out of the completion
    end_ids  tokens that end a completion; None: those of the model and the tokenizer
    name     of the model, in errors and reports
    tools    that the model may call
    weights  format of the decoder's matrices (model/quantized.py)
    record   captures decode steps; None never does (generation/decode.py)
    """

    def __init__(
        self,
        model: Transformer | ModelFolder,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        slots: int = 16,
        stop: Sequence[str] = (),
        end_ids: Iterable[int] | None = None,
        name: str = "the model",
        tools: ToolUse | None = None,
        weights: Weights = "dense",
        record: Record | Literal["auto"] | None = "auto",
    ) -> None:
        self.config, self.tokenizer, self.sampling, self.name = model.config, tokenizer, sampling, name
        self.slots, self.stop, self.tools = slots, stop, tools
        self._record: Record | Literal["auto"] | None = record
        self.end_ids = end_tokens(model.config, tokenizer) if end_ids is None else frozenset(end_ids)
        self.context: int | None = model.config.max_position_embeddings
        self.identity: Mapping[str, Any] = {}
        self.usage, self.steps, self.rows = Usage(), 0, 0  # rows: sequences, summed over all steps
        self.loading = self.seconds = 0.0  # loading weights; loading and generating, without the caller's work
        self.prefixes = PrefixCache()
        if isinstance(model, ModelFolder):
            self.device, self.precision, self._folder = model.device, model.precision, model
        else:
            self.device = model.embed_tokens.device
            self.precision = Precision(model.embed_tokens.dtype, weights)
            self.decoder = open_decoder(model, slots, weights, record)
        small = is_small(model.config.parameter_count, self.device)
        self._threads = 1 if small else torch.get_num_threads()  # saved, because another model may lower it

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder; a folder's weights are loaded on first use."""
        started = time.perf_counter()
        precision, backend = self.precision, self.config.backend
        model = load_model(self._folder.path, dtype=precision.dtype, device=self.device, backend=backend)
        decoder = open_decoder(model, self.slots, precision.weights, self._record)
        self.loading = time.perf_counter() - started
        return decoder

    @cached_property
    def chat(self) -> ChatFormat:
        """Chat format of the model. Raises UserError for a base model, which would not answer a question but continue
        it."""
        chat = chat_format(self.tokenizer)
        if chat.end_id not in self.end_ids:
            raise UserError(
                f"{self.name}: a base model, which has not learnt to end a turn; fine-tune it with llmkit sft, or "
                "use sample --shots assistant -p, or evaluate without --chat"
            )
        return chat

    @property
    def is_assistant(self) -> bool:
        """True if the model has a chat format."""
        with suppress(UserError):
            return self.chat is not None
        return False

    def check(self) -> None:
        """Do nothing: a folder is checked when it is opened."""

    def encode(self, prompt: str | Sequence[Message], tools: Functions | None = None) -> list[int]:
        """Encode a text to continue or a conversation to answer; `tools` replace the generator's."""
        if isinstance(prompt, str):
            return prompt_ids(self.tokenizer, prompt)
        schemas = functions.schemas if (functions := tools or self.tools) is not None else ()
        return self.chat.encode(prompt, prompt=True, tools=schemas).token_ids.tolist()

    def complete(
        self,
        requests: Iterable[Request | None],
        *,
        on_text: OnText | None = None,
        on_call: OnCall | None = None,
        on_done: OnDone | None = None,
    ) -> Iterator[list[Completion]]:
        """See `Sampler.complete`. Raises UserError for logits that are not finite."""
        with self.computing():
            pool = Pool(self, requests, on_text, on_call)
        try:
            more, announced = True, set[int]()  # requests already passed to `on_done`, ahead of earlier ones
            while more:
                with self.computing():
                    more = pool.advance()
                for index, samples in pool.done.items():
                    if on_done is not None and index not in announced and None not in samples:
                        announced.add(index)
                        on_done(index, [completion for completion in samples if completion is not None])
                complete = list(finished(pool.done))
                for index, samples in complete:
                    announced.discard(index)
                    yield samples
                if not complete:
                    with self.computing():
                        pool.wait()
        finally:
            pool.close()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradients, on one thread if the model is too small for two; never held across a `yield`."""
        started = time.perf_counter()
        with torch.inference_mode(), threads(self._threads):
            yield
        self.seconds += time.perf_counter() - started

    def plan(self) -> Iterator[str]:
        """Describe the model and its memory, in lines."""
        config, size = self.config, self.precision.dtype.itemsize
        packed = {"dense": size, "half": 2, "int8": 1}[self.precision.weights]
        a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        yield (
            f"{self.name}: {config.model_type}, {quantity(config.parameter_count)} parameters, context {self.context}, "
            f"{self.precision.name} on {self.device}"
        )
        loading = f", {quantity(config.parameter_count * size)}B more while loading" * (str(self.device) == "cpu")
        caches = quantity(self.slots * config.max_position_embeddings * a_token)
        yield (
            f"memory: {quantity(config.parameter_count * packed)}B of weights{loading}, and up to {caches}B of keys "
            f"and values for {counted(self.slots, 'sequence')} and {quantity(KEPT_BYTES)}B of cached prompt prefixes"
        )

    def describe(self) -> Iterator[str]:
        """Describe what was done: "1.2k tokens at 96 tok/s, 91% of the slots in use, after 2.1 s of loading"."""
        yield from unavailable_notes([self.tools.unavailable_calls] if self.tools else [])
        tokens = self.usage.completion_tokens
        phrases = [f"{counted(tokens, 'token')} at {quantity(tokens / max(self.seconds - self.loading, 1e-9))} tok/s"]
        if self.steps and self.slots > 1:
            phrases.append(f"{self.rows / (self.steps * self.slots):.0%} of the slots in use")
        yield f"{', '.join(phrases)}, after {self.loading:.1f} s of loading"


class Pool:
    """Sequences in slots, waiting for a tool, or done. A request of None means that none is available now."""

    def __init__(
        self,
        generator: Generator,
        requests: Iterable[Request | None],
        on_text: OnText | None,
        on_call: OnCall | None,
    ) -> None:
        self._of, self._decoder = generator, generator.decoder
        self._on_text, self._on_call = on_text, on_call
        self.running: list[RunningSequence] = []  # running[i] is in slot i
        self.done: dict[int, list[Completion | None]] = {}  # by request: its samples, None if unfinished
        self._workers: ThreadPoolExecutor | None = None
        self._calls: dict[Future[list[ToolResult]], tuple[RunningSequence, Prefix]] = {}  # running
        self._fresh = self._begin(requests)
        self._more = True  # whether requests may follow
        self._prefilling = False

    def advance(self) -> bool:
        """Fill the free slots, then sample one token for each running sequence; return False after the last one."""
        while len(self.running) < self._of.slots:
            if (answered := next((call for call in self._calls if call.done()), None)) is not None:
                entry = self._resume(*self._calls.pop(answered), answered.result())
            elif self.may_begin:
                try:
                    entry = next(self._fresh)
                except StopIteration:
                    self._more = False
                    continue
                if entry is None:
                    break
            else:
                break
            if entry is None:
                continue
            sequence, prefix = entry
            ((token, logprob, truncated),) = self._choose(prefix.logits_1V, [sequence])
            reason = sequence.take(token, logprob, truncated)
            if reason is None:
                self._decoder.load(len(self.running), prefix)
                self.running.append(sequence)
            else:
                self._leave(sequence, reason, prefix)
        if not (running := self.running):
            return bool(self._more or self._calls)
        positions = [sequence.position for sequence in running]
        for slot, (sequence, position) in enumerate(zip(running, positions, strict=True)):
            if self._decoder.needs_new_prefill(position, position + 1):
                self._decoder.load(slot, self._decoder.prefill([*sequence.request.prompt, *sequence.token_ids]))
        logits = self._decoder.step([sequence.token_ids[-1] for sequence in running], positions)
        self._of.steps += 1
        self._of.rows += len(running)
        tokens = self._choose(logits, running)
        for slot in range(len(running) - 1, -1, -1):
            sequence, (token, logprob, truncated) = running[slot], tokens[slot]
            reason = sequence.take(token, logprob, truncated)
            if reason is not None:
                prefix = self._decoder.hold(slot, sequence.position) if reason == CALL else None
                self._leave(sequence, reason, prefix)
                self._vacate(slot)
        return bool(self.running or self._more or self._calls)

    def cancel(self, index: int) -> None:
        """Drop an unfinished request and free its slots."""
        del self.done[index]
        with self._of.computing():
            for slot in range(len(self.running) - 1, -1, -1):
                if self.running[slot].index == index:
                    self._vacate(slot)

    def wait(self) -> None:
        """Wait for a tool if nothing else can run."""
        if not self.busy and self._calls:
            wait(self._calls, return_when=FIRST_COMPLETED)

    @property
    def may_begin(self) -> bool:
        """True if there is room for a prompt."""
        slots = self._of.slots
        return self._more and len(self.done) < OPEN_REQUESTS * slots and len(self._calls) < slots

    @property
    def busy(self) -> bool:
        """True if a sequence or a prompt waits for a step."""
        return bool(self.running) or (self._prefilling and self.may_begin)

    @property
    def idle(self) -> bool:
        """True if no sequence, prompt or tool is in progress."""
        return not (self.busy or self._calls)

    def close(self) -> None:
        """Start no more tool calls; running ones end by their own limits."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, requests: Iterable[Request | None]) -> Iterator[tuple[RunningSequence, Prefix] | None]:
        """Yield each sample of each request with its prefilled prompt, and None to let others step or if no request is
        available; equal prompts in succession share one prefill."""
        generator, index = self._of, -1
        for request in requests:
            if request is None:
                yield None
                continue
            index += 1
            room = self._decoder.config.max_position_embeddings - len(request.prompt)
            if room <= 0 or not request.prompt:
                self.done[index] = []
                continue
            limit = min(request.max_tokens or room, room)
            self.done[index] = [None] * request.samples
            for prefix in generator.prefixes.prefill(self._decoder, list(request.prompt)):
                self._prefilling = len(prefix) < len(request.prompt)
                if self._prefilling:
                    yield None  # running sequences step before the next piece
                if index not in self.done:  # cancelled
                    break
            self._prefilling = False
            if index not in self.done:
                continue
            generator.usage.requests += 1
            generator.usage.prompt_tokens += len(request.prompt)
            tools = request.tools if isinstance(request.tools, ToolUse) else generator.tools
            tools = None if request.constraint else tools
            stops = (*generator.stop, *request.stop)
            for sample in range(request.samples):
                if index not in self.done:  # cancelled
                    break
                decoding = generator.tokenizer.stream(request.prompt, skip_specials=True)
                sequence = RunningSequence(
                    index,
                    sample,
                    request,
                    max_tokens=limit,
                    room=room,
                    decoding=decoding,
                    stops=StopMatcher(stops),
                    tools=tools,
                    tokenizer=generator.tokenizer,
                    end_ids=generator.end_ids,
                    on_text=self._on_text,
                    constraint=request.constraint and request.constraint.copy(),
                )
                if tools is not None:
                    sequence.call = tools.open_call(request.prompt)
                    sequence.opening = StopMatcher(tools.openers) if tools.form is not None else None
                yield sequence, prefix

    def _vacate(self, slot: int) -> None:
        """Free a slot by moving the last running sequence into it."""
        last = self.running.pop()
        if slot < len(self.running):
            self._decoder.move(len(self.running), slot, last.position)
            self.running[slot] = last

    def _choose(self, logits_BV: torch.Tensor, sequences: list[RunningSequence]) -> list[tuple[int, float, float]]:
        """Sample the next token of each sequence; return it with its log-probabilities before and after truncation."""
        # A model may have more rows than its tokenizer has tokens, to be a multiple of 64: these rows are untrained.
        draws = np.array([sequence.next_uniform() for sequence in sequences])
        chosen: list[tuple[int, float, float]] = [(0, 0.0, 0.0)] * len(sequences)
        samplings = [sequence.request.sampling or self._of.sampling for sequence in sequences]
        groups = [
            (sampling, bool(sequence.constraint)) for sampling, sequence in zip(samplings, sequences, strict=True)
        ]
        alike = groups.count(groups[0]) == len(groups)  # mostly one object: comparing is cheaper than hashing
        for group in groups[:1] if alike else dict.fromkeys(groups):
            rows = [row for row, other in enumerate(groups) if alike or other == group]
            logits, allowed = logits_BV if alike else logits_BV[rows], None
            if group[1]:
                masks = [constraint.allowed() for row in rows if (constraint := sequences[row].constraint)]
                allowed = torch.from_numpy(np.stack(masks)).to(logits.device)
            choice = choose_tokens(logits, draws[rows], group[0], self._of.tokenizer.vocab_size, allowed)
            if not all(choice.sound.tolist()):
                raise UserError(
                    f"{self._of.name}: its logits are not finite; do its weights contain NaN? Train it "
                    "again, or use an earlier checkpoint"
                )
            columns = choice.tokens.tolist(), choice.logprobs.tolist(), choice.truncated_logprobs.tolist()
            for row, token in zip(rows, zip(*columns, strict=True), strict=True):
                chosen[row] = token
        for row, (sequence, sampling) in enumerate(zip(sequences, samplings, strict=True)):
            if count := sequence.request.top_logprobs:
                top = likeliest(logits_BV[row : row + 1], count, sampling.temperature, self._of.tokenizer.vocab_size)
                sequence.top_logprobs += top
        self._of.usage.completion_tokens += len(sequences)
        return chosen

    def _leave(self, sequence: RunningSequence, reason: str, prefix: Prefix | None) -> None:
        """Record a finished sequence, or start its tool calls and set it aside with its keys and values."""
        if reason != CALL:
            self.done[sequence.index][sequence.sample] = sequence.completion(reason)
            return
        assert sequence.tools is not None and prefix is not None
        for tool, text in sequence.calls:
            sequence.tool_calls.append({"tool": tool, "input": text})
            if self._on_call is not None:
                self._on_call(sequence.index, sequence.sample, sequence.tool_calls[-1], None)
        if self._workers is None:
            self._workers = ThreadPoolExecutor(min(self._of.slots, THREADS), thread_name_prefix="tool")
        self._calls[self._workers.submit(sequence.tools.run, sequence.calls)] = sequence, prefix

    def _resume(
        self, sequence: RunningSequence, earlier: Prefix, results: list[ToolResult]
    ) -> tuple[RunningSequence, Prefix] | None:
        """Prefill the results of tools after their calls; return None if they leave no room for another token."""
        if sequence.tools is None or sequence.index not in self.done:  # cancelled
            return None
        ids, seen = sequence.tools.result_ids(sequence.calls, results, sequence.room - len(sequence.token_ids) - 1)
        for call, result, text in zip(sequence.tool_calls[-len(results) :], results, seen, strict=True):
            call |= {"result": result.text, **({"failed": True} if result.failed else {})}
            if self._on_call is not None:
                self._on_call(sequence.index, sequence.sample, call, text)
        if not ids:
            self._leave(sequence, sequence.finish("length"), None)
            return None
        if self._decoder.needs_new_prefill(len(earlier), len(earlier) + 1 + len(ids)):
            prefix = self._decoder.prefill([*sequence.request.prompt, *sequence.token_ids, *ids])
        else:
            prefix = self._decoder.extend(earlier, [sequence.token_ids[-1], *ids])
        sequence.append_results(ids)
        return sequence, prefix


def open_decoder(model: Transformer, slots: int, weights: Weights, record: Record | Literal["auto"] | None) -> Decoder:
    """Return our decoder of a model, or the one with transformers' cache."""
    if isinstance(model, TransformersModel):
        return cast(Decoder, TransformersDecoder(model))  # same interface
    return Decoder(model, slots, weights, record)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a prompt, with a BOS token if the folder's tokenizer adds one; an empty prompt becomes that token."""
    return tokenizer.encode_prompt(text) or [tokenizer.document_bounds()[0]]


def end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text, from the model's configuration and the tokenizer."""
    return frozenset({*config.eos_token_ids, tokenizer.eos_id, tokenizer.end_of_text_id} - {None})


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.8,
) -> str:
    """Return the continuation of one prompt, as a sample of a model in training, which is left unchanged.

    The text ends at the model's context at the latest; packing the weights costs about as much as one step.
    """
    generator = Generator(model, tokenizer, Sampling(temperature), slots=1)
    ids = generator.encode(prompt)
    (samples,) = generator.complete([Request(ids, max_tokens=max_tokens, seed=seed)])
    if not samples:
        raise UserError(f"the prompt is {counted(len(ids), 'token')} long and the model's context {generator.context}")
    return samples[0].text
