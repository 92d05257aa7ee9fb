"""Generation: prompts in, completions out, many at a time.

    generator = Generator(model, tokenizer, Sampling(temperature=0.8), slots=16, stop=("\\n\\n",))
    for samples in generator.complete([Request(prompt_ids(tokenizer, "Once upon"), samples=3)]):
        print([sample.text for sample in samples])

A pool of slots decodes together, each at its own position; a slot is filled again as soon as its sequence ends. A
prompt is prefilled once for all its samples. Random numbers come from (seed, request, sample, position) alone, and a
row's logits do not depend on its neighbours (engine/decoding.py), so in float32 on a CPU a completion is the same
at any number of slots, in any order, in any company.

Tokens in, tokens out: `token_ids` are what the model saw and chose; text is only ever made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmkit.engine.decoding import Decoder, Prefix
from llmkit.engine.sampling import Sampling, choose_tokens, uniforms
from llmkit.errors import UserError
from llmkit.model.transformer import Transformer
from llmkit.tokenizer.encoding import DecodeStream, Tokenizer

OPEN_REQUESTS = 16  # times the slots: how far reading may run ahead of a completion that is not done
DRAWS = 128  # random numbers made at a time


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    samples      how many continuations
    max_tokens   of each; None goes on to the end of the context
    seed         of the random numbers
    number       tells requests with the same seed apart; 64 bits
    where        names the prompt in errors: "prompts.jsonl:3"
    """

    prompt_ids: Sequence[int]
    samples: int = 1
    max_tokens: int | None = None
    seed: int = 0
    number: int = 0
    where: str = "prompt"


@dataclass(frozen=True)
class Completion:
    """One continuation.

    text           what the tokens say, up to a stop string; special tokens say nothing
    token_ids      all tokens chosen, the end token and those of a stop string among them
    finish_reason  "stop" after an end token or stop string, "length" after `max_tokens` or the context's end
    """

    text: str
    token_ids: list[int]
    finish_reason: str


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and gives out no text that could still become one.

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
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


_Open = dict[int, list[Completion | None]]  # by request: its samples, None for those that are not done


@dataclass
class _Running:
    """One sample on its way."""

    index: int  # of the request
    sample: int
    request: Request
    max_tokens: int
    decoding: DecodeStream
    stops: StopMatcher
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    _draws: np.ndarray | None = None

    @property
    def position(self) -> int:
        """Where the last token chosen stands; its slot holds all before it."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1

    def next_uniform(self) -> float:
        """The random number of the token to come."""
        at = len(self.token_ids)
        if self._draws is None or at % DRAWS == 0:
            request = self.request
            self._draws = uniforms(request.seed, request.number, self.sample, at // DRAWS * DRAWS, DRAWS)
        return self._draws[at % DRAWS]


class Generator:
    """Continues prompts with one model.

    slots    sequences decoded at a time
    stop     strings that end a completion and are left out of it
    end_ids  tokens that end a completion; None takes those that the model and the tokenizer name
    name     of the model, in errors
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
    ) -> None:
        self._decoder = Decoder(model, slots)
        self._tokenizer, self._sampling, self._slots, self._stop, self._name = tokenizer, sampling, slots, stop, name
        self._end_ids = frozenset(end_tokens(model, tokenizer) if end_ids is None else end_ids)
        self._context = model.config.max_position_embeddings
        self.tokens = 0  # chosen so far
        self.steps = 0  # of the decoder
        self.on_text: Callable[[int, int, str], None] | None = None  # (request, sample, text) as text is decided

    def complete(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """The samples of each request, in the order of the requests, which are read as slots become free.

        Raises UserError for a prompt that leaves no room in the context, and for logits that are no numbers.
        """
        running: list[_Running] = []  # slot i holds running[i]
        done: _Open = {}
        given, more = 0, True
        fresh = self._begin(requests, done)
        while True:
            while more and len(running) < self._slots and len(done) < OPEN_REQUESTS * self._slots:
                entry = next(fresh, None)
                if entry is None:
                    more = False
                    break
                sequence, prefix = entry
                (token,) = self._choose(prefix.logits_1V, [sequence])
                if not self._take(sequence, token, done):
                    self._decoder.load(len(running), prefix)
                    running.append(sequence)
            while given in done and None not in done[given]:
                yield [completion for completion in done.pop(given) if completion is not None]
                given += 1
            if running:
                self._step(running, done)
            elif not more:
                return

    def _begin(self, requests: Iterable[Request], done: _Open) -> Iterator[tuple[_Running, Prefix]]:
        """Every sample of every request with its prefilled prompt; the prompt is computed when first asked for."""
        for index, request in enumerate(requests):
            length = len(request.prompt_ids)
            if length == 0:
                raise UserError(f"{request.where}: an empty prompt, and no beginning token to start from")
            if length >= self._context:
                raise UserError(
                    f"{request.where}: the prompt is {length} tokens long and the model's context is "
                    f"{self._context}, a new token included; shorten the prompt"
                )
            limit = min(request.max_tokens or self._context, self._context - length)
            done[index] = [None] * request.samples
            prefix = self._decoder.prefill(list(request.prompt_ids))
            for sample in range(request.samples):
                decoding = self._tokenizer.stream(request.prompt_ids, skip_specials=True)
                yield _Running(index, sample, request, limit, decoding, StopMatcher(self._stop)), prefix

    def _step(self, running: list[_Running], done: _Open) -> None:
        """One token for each running sequence; the last slot moves into one that ends."""
        logits = self._decoder.step([s.token_ids[-1] for s in running], [s.position for s in running])
        self.steps += 1
        tokens = self._choose(logits, running)
        for slot in range(len(running) - 1, -1, -1):
            if self._take(running[slot], tokens[slot], done):
                last = running.pop()
                if slot < len(running):
                    self._decoder.move(len(running), slot, last.position)
                    running[slot] = last

    def _choose(self, logits_BV: torch.Tensor, sequences: list[_Running]) -> list[int]:
        # A model may have more rows than its tokenizer has tokens, to be a multiple of 64: nobody trained them.
        draws = np.array([sequence.next_uniform() for sequence in sequences])
        chosen, sound = choose_tokens(logits_BV[:, : self._tokenizer.vocab_size], draws, self._sampling)
        if not all(sound.tolist()):
            raise UserError(
                f"{self._name}: its logits are not finite numbers; are there NaN among its weights? Train it again, "
                "or use an earlier checkpoint"
            )
        self.tokens += len(sequences)
        return chosen.tolist()

    def _take(self, sequence: _Running, token: int, done: _Open) -> bool:
        """Append a token; True when the sequence has ended with it."""
        sequence.token_ids.append(token)
        ended = token in self._end_ids
        text = "" if ended else sequence.stops.push(sequence.decoding.push([token]))
        full = len(sequence.token_ids) >= sequence.max_tokens
        if (ended or full) and not sequence.stops.stopped:
            text += sequence.stops.push(sequence.decoding.finish())
            text += sequence.stops.finish()
        if text:
            sequence.texts.append(text)
            if self.on_text is not None:
                self.on_text(sequence.index, sequence.sample, text)
        stopped = ended or sequence.stops.stopped
        if stopped or full:
            reason = "stop" if stopped else "length"
            completion = Completion("".join(sequence.texts), sequence.token_ids, reason)
            done[sequence.index][sequence.sample] = completion
        return stopped or full


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt by the folder's own rule about the beginning token; an empty prompt is that token."""
    return tokenizer.encode_prompt(text) or [tokenizer.document_bounds()[0]]


def end_tokens(model: Transformer, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text, by the model's configuration and by the tokenizer's."""
    named = model.config.eos_token_id
    ids = {*named} if isinstance(named, tuple) else {named}
    return {i for i in ids | {tokenizer.eos_id, tokenizer.end_of_text_id} if i is not None}


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
