"""Generation: prompts in, completions out, many at a time.

    generator = Generator(model, tokenizer, Sampling(temperature=0.8), slots=16, stop=("\\n\\n",))
    for samples in generator.complete([Request(prompt_ids(tokenizer, "Once upon"), samples=3)]):
        print([sample.text for sample in samples])

A pool of slots decodes together, each at its own position; a slot is filled again as soon as its sequence ends. A
prompt is prefilled once for all its samples. Random numbers come from (seed, request, sample, position) alone, and a
row's logits do not depend on its neighbours (generation/decode.py), so in float32 on a CPU a completion is the same
at any number of slots, in any order, in any company.

A sequence that has called a tool leaves its slot with its keys and values. The tool runs in a thread while others go
on; its result is prefilled behind the call, and the sequence takes the next free slot.

Tokens in, tokens out: `token_ids` are what the model saw and chose; text is only ever made from them.

`StopMatcher` holds back text that may become a stop string; `describe_throughput` sets the speed beside the memory's.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from llmkit.errors import UserError
from llmkit.generation.decode import Decoder, Prefix
from llmkit.generation.next_token import Sampling, choose_tokens, uniforms
from llmkit.generation.step_graphs import Record
from llmkit.generation.tool_calls import CallQueue, OpenCall, ToolUse
from llmkit.io.progress import counted, quantity
from llmkit.model.narrow_weights import Weights
from llmkit.model.transformer import Transformer
from llmkit.tokenizer.encoding import DecodeStream, Tokenizer
from llmkit.tools.toolbox import ToolResult

OPEN_REQUESTS = 16  # times the slots: how far reading may run ahead of a completion that is not done
DRAWS = 128  # random numbers made at a time
KEPT_PROMPTS = 4  # whose keys and values wait for an equal prompt
BEYOND_CACHES = 64 * 2**20  # bytes of weights: fewer stay in a processor's cache, and memory is not what they wait for
WORTH_MEASURING = 1.0  # seconds of decoding


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back an end that may be the beginning of one.

    The stop string that is complete first wins, so the result does not depend on where the pieces end.

    >>> matcher = StopMatcher(["\\n\\n", "END"])
    >>> matcher.push("one\\n"), matcher.push("two E"), matcher.push("N"), matcher.push("D three"), matcher.stopped
    ('one', '\\ntwo ', '', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text; return what is certain to be in front of any stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """Return the text that was held back, after the last piece."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    prompt_ids   its tokens; for a server whose tokenizer is not here its text, or messages
    samples      how many continuations
    max_tokens   of each; None goes on to the end of the context
    seed         of the random numbers
    number       tells requests with the same seed apart; 64 bits
    where        names the prompt in errors: "prompts.jsonl:3"
    """

    prompt_ids: Sequence[Any]
    samples: int = 1
    max_tokens: int | None = None
    seed: int = 0
    number: int = 0
    where: str = "prompt"


@dataclass(frozen=True)
class Completion:
    """One continuation.

    text                what the tokens say, up to a stop string; special tokens, calls of tools and their results
                        say nothing
    token_ids           all tokens, the end token, those of a stop string, calls and results among them
    finish_reason       "stop" after an end token or stop string, "length" after `max_tokens` or the context's end,
                        "tool_limit" after a call too many, "no_tool" after one of a tool that is not there (in chats)
    logprobs            of each token, natural: under softmax(logits / temperature), at temperature 0
                        softmax(logits), over the model's whole vocabulary; 0 where not sampled
    truncated_logprobs  under the distribution drawn from, after top-k, top-p and min-p; 0 where not sampled
    sampled             whether the model chose the token; False for results of tools
    tool_calls          {"tool", "input", "result"} of each call, with "failed": true where the result is an error
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]
    truncated_logprobs: list[float]
    sampled: list[bool]
    tool_calls: list[dict[str, Any]]


_Open = dict[int, list[Completion | None]]  # by request: its samples, None for those that are not done
CALL = "call"  # where else a finish reason stands: the sequence waits for a tool


class _Token(NamedTuple):
    id: int
    logprob: float
    truncated_logprob: float


@dataclass
class _Running:
    """One sample on its way."""

    index: int  # of the request
    sample: int
    request: Request
    max_tokens: int  # of its own
    room: int  # for all that follows the prompt
    decoding: DecodeStream
    stops: StopMatcher
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated_logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    own: int = 0  # tokens sampled
    texts: list[str] = field(default_factory=list)
    call: OpenCall | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    _draws: tuple[int, np.ndarray] | None = None

    @property
    def position(self) -> int:
        """Position of the last token; its slot holds all before it."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1

    @property
    def full(self) -> bool:
        """True if no token may follow."""
        return self.own >= self.max_tokens or len(self.token_ids) >= self.room

    def append(self, token: _Token, sampled: bool = True) -> None:
        self.token_ids.append(token.id)
        self.logprobs.append(token.logprob)
        self.truncated_logprobs.append(token.truncated_logprob)
        self.sampled.append(sampled)
        self.own += sampled

    def next_uniform(self) -> float:
        """The random number of the token to come."""
        block, at = divmod(len(self.token_ids), DRAWS)
        if self._draws is None or self._draws[0] != block:
            request = self.request
            self._draws = block, uniforms(request.seed, request.number, self.sample, block * DRAWS, DRAWS)
        return self._draws[1][at]

    def completion(self, reason: str) -> Completion:
        fields = self.logprobs, self.truncated_logprobs, self.sampled, self.tool_calls
        return Completion("".join(self.texts), self.token_ids, reason, *fields)


_Held = tuple[_Running, Prefix]


class Generator:
    """Continues prompts with one model.

    slots    sequences decoded at a time
    stop     strings that end a completion and are left out of it
    end_ids  tokens that end a completion; None takes those that the model and the tokenizer name
    name     of the model, in errors
    tools    what it may call
    weights  how the decoder holds matrices (model/narrow_weights.py)
    record   what records its steps, None for nothing (generation/decode.py)
    """

    def __init__(
        self,
        model: Transformer,
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
        self.decoder = Decoder(model, slots, weights, record)
        self._tokenizer, self._sampling, self.slots, self._stop, self._name = tokenizer, sampling, slots, stop, name
        self._end_ids = frozenset(end_tokens(model, tokenizer) if end_ids is None else end_ids)
        self._context = model.config.max_position_embeddings
        self._tools = tools
        self._prompts: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()  # the last ones
        self.tokens = 0  # chosen so far
        self.steps = 0  # of the decoder
        self.rows = 0  # sequences in all of them
        self.on_text: Callable[[int, int, str], None] | None = None  # (request, sample, text) as text is decided
        # (request, sample, call, what the model sees of its result) as a tool is called, None, and as it has answered
        self.on_call: Callable[[int, int, Mapping[str, Any], str | None], None] | None = None

    def complete(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """The samples of each request, in the order of the requests, as `complete_each` makes them."""
        return (samples for _, samples in self.complete_each(requests))

    def complete_each(
        self, requests: Iterable[Request], ordered: bool = True
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(number, samples) of each request, which are read as slots become free; in their order, or as they end.

        Raises UserError for a prompt that leaves no room in the context, and for logits that are no numbers.
        """
        running: list[_Running] = []  # slot i holds running[i]
        done: _Open = {}
        more = True
        fresh = self._begin(requests, done)
        calls = CallQueue[_Held](self._tools, self.slots)
        answered: deque[tuple[_Held, ToolResult]] = deque()
        try:
            while True:
                answered.extend(calls.answered(at_least_one=not running and not answered and not more))
                while len(running) < self.slots:
                    if answered:
                        entry = self._resume(*answered.popleft(), done)
                    elif more and len(done) < OPEN_REQUESTS * self.slots and len(calls) < self.slots:
                        entry = next(fresh, None)
                        more = entry is not None
                    else:
                        break
                    if entry is not None:
                        self._enter(*entry, running, done, calls)
                for index in finished(done, ordered):
                    yield index, [completion for completion in done.pop(index) if completion is not None]
                if running:
                    self._step(running, done, calls)
                elif not more and not calls and not answered:
                    return
        finally:
            calls.close()

    def _begin(self, requests: Iterable[Request], done: _Open) -> Iterator[tuple[_Running, Prefix]]:
        """Every sample of every request with its prefilled prompt; the prompt is computed when first asked for."""
        for index, request in enumerate(requests):
            length = len(request.prompt_ids)
            if length == 0:
                raise UserError(f"{request.where}: an empty prompt, and no beginning token to start from")
            if length >= self._context:
                raise UserError(
                    f"{request.where}: the prompt is {counted(length, 'token')} long and the model's context is "
                    f"{self._context}, a new token included; shorten the prompt"
                )
            room = self._context - length
            limit = min(request.max_tokens or room, room)
            done[index] = [None] * request.samples
            prefix = self._prefill(tuple(request.prompt_ids))
            for sample in range(request.samples):
                decoding = self._tokenizer.stream(request.prompt_ids, skip_specials=True)
                yield _Running(index, sample, request, limit, room, decoding, StopMatcher(self._stop)), prefix

    def _prefill(self, prompt: tuple[int, ...]) -> Prefix:
        """Prefill a prompt; equal prompts that follow closely share the result."""
        prefix = self._prompts.pop(prompt, None) or self.decoder.prefill(list(prompt))
        self._prompts[prompt] = prefix
        if len(self._prompts) > KEPT_PROMPTS:
            self._prompts.popitem(last=False)
        return prefix

    def _enter(
        self, sequence: _Running, prefix: Prefix, running: list[_Running], done: _Open, calls: CallQueue
    ) -> None:
        """Choose a sequence's next token, and give it a slot if it goes on."""
        (token,) = self._choose(prefix.logits_1V, [sequence])
        reason = self._take(sequence, token)
        if reason is None:
            self.decoder.load(len(running), prefix)
            running.append(sequence)
        else:
            self._leave(sequence, reason, prefix, done, calls)

    def _step(self, running: list[_Running], done: _Open, calls: CallQueue) -> None:
        """One token for each running sequence; the last slot moves into one that is left."""
        logits = self.decoder.step([s.token_ids[-1] for s in running], [s.position for s in running])
        self.steps += 1
        self.rows += len(running)
        tokens = self._choose(logits, running)
        for slot in range(len(running) - 1, -1, -1):
            sequence = running[slot]
            reason = self._take(sequence, tokens[slot])
            if reason is not None:
                prefix = self.decoder.hold(slot, sequence.position) if reason == CALL else None
                self._leave(sequence, reason, prefix, done, calls)
                last = running.pop()
                if slot < len(running):
                    self.decoder.move(len(running), slot, last.position)
                    running[slot] = last

    def _choose(self, logits_BV: torch.Tensor, sequences: list[_Running]) -> list[_Token]:
        # A model may have more rows than its tokenizer has tokens, to be a multiple of 64: nobody trained them.
        draws = np.array([sequence.next_uniform() for sequence in sequences])
        choice = choose_tokens(logits_BV, draws, self._sampling, self._tokenizer.vocab_size)
        if not all(choice.sound.tolist()):
            raise UserError(
                f"{self._name}: its logits are not finite numbers; are there NaN among its weights? Train it again, "
                "or use an earlier checkpoint"
            )
        self.tokens += len(sequences)
        columns = choice.tokens.tolist(), choice.logprobs.tolist(), choice.truncated_logprobs.tolist()
        return [_Token(*row) for row in zip(*columns, strict=True)]

    def _take(self, sequence: _Running, token: _Token) -> str | None:
        """Append a token; why the sequence ends with it, or `CALL`, or None where it goes on."""
        sequence.append(token)
        ended, tools, open_call = token.id in self._end_ids, self._tools, sequence.call
        if ended:
            text = ""
        elif tools is not None and token.id in tools.starts:
            sequence.call = OpenCall(tools.starts[token.id], [])
            text = sequence.stops.push(sequence.decoding.finish())
        elif tools is not None and open_call is not None:
            if token.id == tools.ends[open_call.tool]:
                if not tools.has(open_call.tool):
                    return self._last_text(sequence, "no_tool")
                if len(sequence.tool_calls) >= tools.max_calls:
                    return self._last_text(sequence, "tool_limit")
                return self._last_text(sequence, "length") if sequence.full else CALL
            open_call.token_ids.append(token.id)
            text = ""
        else:
            if tools is not None and token.id in tools.others:
                tools.unavailable_calls[tools.others[token.id]] += 1
            text = sequence.stops.push(sequence.decoding.push([token.id]))
        self._give(sequence, text)
        if sequence.stops.stopped:
            return "stop"
        if ended or sequence.full:
            return self._last_text(sequence, "stop" if ended else "length")
        return None

    def _last_text(self, sequence: _Running, reason: str) -> str:
        """Give out what was held back at the end; a stop string in it is the reason of the end."""
        text = sequence.stops.push(sequence.decoding.finish())
        self._give(sequence, text + sequence.stops.finish())
        return "stop" if sequence.stops.stopped else reason

    def _give(self, sequence: _Running, text: str) -> None:
        if text:
            sequence.texts.append(text)
            if self.on_text is not None:
                self.on_text(sequence.index, sequence.sample, text)

    def _leave(
        self, sequence: _Running, reason: str, prefix: Prefix | None, done: _Open, calls: CallQueue[_Held]
    ) -> None:
        """A sequence is done, or waits for a tool with its keys and values."""
        if reason != CALL:
            done[sequence.index][sequence.sample] = sequence.completion(reason)
            return
        assert self._tools is not None and sequence.call is not None and prefix is not None
        text = self._tools.input_of(sequence.call)
        sequence.tool_calls.append({"tool": sequence.call.tool, "input": text})
        if self.on_call is not None:
            self.on_call(sequence.index, sequence.sample, sequence.tool_calls[-1], None)
        calls.submit(sequence.call.tool, text, (sequence, prefix))
        sequence.call = None

    def _resume(self, waiting: _Held, result: ToolResult, done: _Open) -> _Held | None:
        """Prefill a tool's result behind the call; None where it leaves no room for a token more."""
        sequence, earlier = waiting
        assert self._tools is not None
        sequence.tool_calls[-1] |= {"result": result.text, **({"failed": True} if result.failed else {})}
        ids = self._tools.result_ids(result, sequence.room - len(sequence.token_ids) - 1)
        if self.on_call is not None:
            seen = self._tokenizer.decode(ids, skip_specials=True)
            self.on_call(sequence.index, sequence.sample, sequence.tool_calls[-1], seen)
        if not ids:
            done[sequence.index][sequence.sample] = sequence.completion(self._last_text(sequence, "length"))
            return None
        prefix = self.decoder.extend(earlier, [sequence.token_ids[-1], *ids])
        for token in ids:
            sequence.append(_Token(token, 0.0, 0.0), sampled=False)
        return sequence, prefix


def finished(done: Mapping[int, Sequence[Completion | None]], ordered: bool) -> list[int]:
    """The requests whose samples are all there; if `ordered`, those that none before them keeps waiting."""

    def whole(index: int) -> bool:
        return None not in done[index]

    return list(takewhile(whole, done) if ordered else filter(whole, done))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt by the folder's own rule about the beginning token; an empty prompt is that token."""
    return tokenizer.encode_prompt(text) or [tokenizer.document_bounds()[0]]


def end_tokens(model: Transformer, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text, by the model's configuration and by the tokenizer's."""
    ids = {*model.config.eos_token_ids, tokenizer.eos_id, tokenizer.end_of_text_id}
    return {i for i in ids if i is not None}


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.8,
) -> str:
    """The continuation of one prompt, for a look at a model in training, which is left as it was.

    The model's context bounds the text; packing the weights costs about as much as one step over them.
    """
    generator = Generator(model, tokenizer, Sampling(temperature), slots=1)
    request = Request(prompt_ids(tokenizer, prompt), max_tokens=max_tokens, seed=seed)
    return next(generator.complete([request]))[0].text


def describe_throughput(generator: Generator, seconds: float) -> str:
    """Such as "1.2k tokens at 96 tok/s, 91% of the slots in use, 18.3 GB/s: 84% of the memory's bandwidth".

    The bandwidth is given for decoding on a CPU, of weights that no cache holds, for long enough: measuring what the
    memory can do takes 0.1 s. It counts what a step must read, weights, keys and values, by the time of the steps.
    """
    phrases = [f"{counted(generator.tokens, 'token')} at {quantity(generator.tokens / max(seconds, 1e-9))} tok/s"]
    if generator.steps and generator.slots > 1:
        phrases.append(f"{generator.rows / (generator.steps * generator.slots):.0%} of the slots in use")
    decoder = generator.decoder
    if decoder.device.type == "cpu" and decoder.weight_bytes > BEYOND_CACHES and decoder.seconds > WORTH_MEASURING:
        rate = decoder.bytes_read / decoder.seconds
        phrases.append(f"{rate / 1e9:.1f} GB/s: {rate / read_bandwidth():.0%} of the memory's bandwidth")
    return ", ".join(phrases)


def read_bandwidth(size: int = 1 << 27) -> float:
    """Bytes a second at which the threads in use read memory, the best of three: 128 MiB, more than caches hold."""
    data, best = torch.ones(size // 4), 0.0
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        best = max(best, size / (time.perf_counter() - started))
    return best
