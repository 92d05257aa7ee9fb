"""Completions from a model behind `openai:URL#NAME`, with the interface of `Generator`.

    served = open_served("openai:http://localhost:8000/v1#qwen", "chat/", timeout=120, retries=6)
    sampler = served.sampler(Sampling(temperature=0.8), concurrency=8)
    for samples in sampler.complete([Request(served.encode("Once upon"), samples=3, max_tokens=64)]): ...

With a folder prompts are sent as ids of its tokenizer, and ids come back where the server tells them; the two must
have one tokenizer, which is checked by what comes back. Without a folder text is continued and messages are answered,
by the server's own tokenizer and template. Each sample is a request of its own with a seed of its own, which comes
from (seed, request, sample): where a server honours seeds, a text does not depend on its neighbours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, as_record
from llmkit.generation.generator import Completion, Request, finished, prompt_ids
from llmkit.generation.next_token import Sampling, uniforms
from llmkit.generation.served_models import (
    OpenAIClient,
    Prompt,
    PromptTooLong,
    Refused,
    Reply,
    ServerError,
    parse_address,
)
from llmkit.io.progress import counted
from llmkit.tokenizer.chat import ChatFormat, has_chat_tokens, has_own_template
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import chat_format

OPEN_SAMPLES, OPEN_REQUESTS = 2, 16  # times the requests at a time: asked for ahead, and read ahead of one not done
SHOWN = 60  # characters of a text that is not what was expected
UNKNOWN = "\ufffd"  # in place of bytes that are no character


def open_served(engine: str, folder: str | None, *, timeout: float, retries: int, flag: str = "--engine") -> Served:
    """The model behind `openai:URL#NAME`, and the tokenizer of a folder. Raises UserError; asks the server nothing."""
    server = OpenAIClient(parse_address(engine, flag), timeout, retries)
    return Served(server, None if folder is None else load_tokenizer(folder))


@dataclass(frozen=True)
class Served:
    """A model behind a server, and its tokenizer where it is known."""

    server: OpenAIClient
    tokenizer: Tokenizer | None

    @cached_property
    def chat(self) -> ChatFormat | None:
        """Chat format of the tokenizer here; None where the server makes tokens of messages."""
        try:
            return None if self.tokenizer is None else chat_format(self.tokenizer)
        except UserError as error:
            raise UserError(f"{error}; or leave MODEL out, so that the server's own template is used") from None

    @property
    def is_assistant(self) -> bool:
        """True unless the tokenizer here has no chat format."""
        return self.tokenizer is None or has_own_template(self.tokenizer) or has_chat_tokens(self.tokenizer)

    def encode(self, text: str) -> Prompt:
        """A text to continue, as it is sent."""
        return text if self.tokenizer is None else prompt_ids(self.tokenizer, text)

    def encode_messages(self, messages: Sequence[Message]) -> Prompt:
        """A conversation to answer, as it is sent."""
        return as_record(messages) if self.chat is None else self.chat.encode(messages, prompt=True).token_ids.tolist()

    @property
    def identity(self) -> dict[str, Any]:
        """Values that a resumed run must have in common with its beginning."""
        return {
            "the model": self.server.address.name,
            "the tokenizer": None if self.tokenizer is None else self.tokenizer.sha256[:16],
        }

    def sampler(self, sampling: Sampling, **details: Any) -> ServedSampler:
        """`details` are those of `ServedSampler`."""
        return ServedSampler(self.server, sampling, tokenizer=self.tokenizer, **details)


class ServedSampler:
    """Continues prompts with a model behind a server; for its users it is a `Generator`.

    concurrency  requests under way at most
    stop         strings that end a completion and are left out of it
    tokenizer    of the prompts where they are token ids; None where they are text or messages
    logprobs     whether the log-probabilities of tokens are needed: under softmax(logits / temperature) or
                 softmax(logits), as the server has it
    token_ids    whether the ids of tokens are needed
    end_ids      where ids are needed: the tokens of which one ends each completion that ends by itself
    skip_long    have no samples of a prompt that is longer than the server's context, instead of an error

    Where the server does not tell them, `token_ids`, `logprobs` and `sampled` of a completion are empty;
    `truncated_logprobs` always are.
    """

    def __init__(
        self,
        server: OpenAIClient,
        sampling: Sampling,
        *,
        concurrency: int,
        stop: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        logprobs: bool = False,
        token_ids: bool = False,
        end_ids: Collection[int] = (),
        skip_long: bool = False,
    ) -> None:
        self._server, self._concurrency, self._stop, self._tokenizer = server, concurrency, stop, tokenizer
        self._temperature, self._skip_long = sampling.temperature, skip_long
        self._needs_logprobs, self._needs_ids, self._end_ids = logprobs, token_ids, frozenset(end_ids)
        self._details = _details(sampling, stop, tokenizer is not None)
        self.tokens = 0  # chosen so far
        self.weights: str | None = None  # the version that answers must be of, where the server names one
        self.on_text: Callable[[int, int, str], None] | None = None  # (request, sample, text) as text comes

    @property
    def left_out(self) -> dict[str, int]:
        """Answers of which a part is not in the text, counted by that part: reasoning, or calls of tools."""
        return self._server.usage.left_out

    def complete(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """The samples of each request, in the order of the requests."""
        return (samples for _, samples in self.complete_each(requests))

    def complete_each(
        self, requests: Iterable[Request], ordered: bool = True
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(number, samples) of each request, which are read as there is room; in their order, or as they end.

        Raises ServerError where a request has failed for good, UserError for a prompt that is too long.
        """
        done: dict[int, list[Completion | None]] = {}
        results: SimpleQueue[tuple[int, int, Completion | BaseException]] = SimpleQueue()
        stopped, running = threading.Event(), 0

        def work(index: int, sample: int, request: Request) -> None:
            def give(text: str) -> None:
                if stopped.is_set():
                    raise InterruptedError  # ends the stream, which nobody reads any more
                assert self.on_text is not None
                self.on_text(index, sample, text)

            try:
                results.put((index, sample, self._sample(request, sample, None if self.on_text is None else give)))
            except BaseException as error:
                results.put((index, sample, error))

        def take() -> None:
            index, sample, result = results.get()
            if isinstance(result, PromptTooLong) and self._skip_long:
                done.update({index: []} if index in done else {})  # the first of its samples says so
            elif isinstance(result, BaseException):
                raise result
            elif done.get(index):
                done[index][sample] = result
                self.tokens += len(result.token_ids)

        # its threads are daemons: who interrupts the program does not wait for the server
        with ThreadPool(self._concurrency) as pool:
            try:
                for index, request in enumerate(requests):
                    done[index] = [None] * request.samples
                    for sample in range(request.samples):
                        pool.apply_async(work, (index, sample, request))
                    running += request.samples
                    while running > OPEN_SAMPLES * self._concurrency or len(done) > OPEN_REQUESTS * self._concurrency:
                        take()
                        running -= 1
                        for number in finished(done, ordered):
                            yield number, [completion for completion in done.pop(number) if completion is not None]
                for _ in range(running):
                    take()
                    for number in finished(done, ordered):
                        yield number, [completion for completion in done.pop(number) if completion is not None]
            finally:
                stopped.set()

    def _sample(self, request: Request, sample: int, on_text: Callable[[str], object] | None) -> Completion:
        if request.max_tokens is None:
            raise UserError(f"{request.where}: --max-tokens none: a server needs a number")
        if not request.prompt_ids:
            raise UserError(f"{request.where}: an empty prompt, which a server has nothing to answer to")
        try:
            reply = self._server.ask(
                request.prompt_ids,
                seed=sample_seed(request.seed, request.number, sample),
                max_tokens=request.max_tokens,
                temperature=self._temperature,
                logprobs=self._needs_logprobs,
                on_text=on_text,
                **self._details,
            )
        except PromptTooLong:
            if self._skip_long:
                raise
            raise UserError(
                f"{request.where}: the prompt, with --max-tokens {request.max_tokens}, is longer than the context of "
                f"{self._server.address.model}; shorten the prompt"
            ) from None
        except Refused as error:
            if self._tokenizer is None:
                raise
            raise Refused(f"{error}; does it take token ids? Without MODEL it is sent text") from None
        self._check(request, reply)
        ids, logprobs = reply.token_ids or [], reply.logprobs or []
        return Completion(
            reply.text, ids, reply.finish_reason, logprobs if self._needs_logprobs else [], [], [True] * len(ids), []
        )

    def _check(self, request: Request, reply: Reply) -> None:
        """Raise ServerError for an answer that is not what was asked for."""
        ids, logprobs, where = reply.token_ids, reply.logprobs, self._server.place
        strange = reply.finish_reason not in ("stop", "length")
        if strange and (self._needs_ids or reply.finish_reason in ("abort", "error")):
            raise ServerError(
                f"{where}: {request.where}: expected a completion that ends by stop or length, found "
                f"{reply.finish_reason or 'none'!r}"
            )
        if self.weights is not None and reply.weights not in (None, self.weights):
            raise ServerError(f"{where}: answers by weights {reply.weights!r}, expected {self.weights!r}")
        if self._needs_ids and not ids:
            raise ServerError(
                f"{where}: expected the ids of tokens, found none; serve the model by vLLM or SGLang of 2026, which "
                "give them (return_token_ids)"
            )
        if self._tokenizer is not None:
            _check_tokenizer(self._tokenizer, request.prompt_ids, reply, where)
        if self._needs_logprobs and logprobs is None:
            raise ServerError(f"{where}: expected log-probabilities, found none; the server does not give them")
        least = len(ids) if ids is not None else reply.tokens - 1  # some do not count the end token
        if self._needs_logprobs and logprobs is not None and len(logprobs) < least:
            raise ServerError(
                f"{where}: {request.where}: expected log-probabilities of {counted(least, 'token')}, found "
                f"{len(logprobs)}"
            )
        if self._end_ids and reply.finish_reason == "stop" and not self._stop and ids and ids[-1] not in self._end_ids:
            raise ServerError(
                f"{where}: {request.where}: expected an end token last ({sorted(self._end_ids)}), found {ids[-1]}: "
                "a policy that never sees it does not learn to stop"
            )


def _details(sampling: Sampling, stop: Sequence[str], by_tokens: bool) -> dict[str, Any]:
    """Collect the fields of a request beside prompt, seed, length, temperature and log-probabilities.

    Servers that take token ids know the fields beyond OpenAI's, and have defaults of their own for them (vLLM those
    of the model's generation_config.json): there all are named. Others may refuse a field that they do not know, so
    they get what the user asked for.
    """
    details: dict[str, Any] = {"top_p": sampling.top_p, "stop": list(stop) or None}
    extra: dict[str, Any] = {"top_k": sampling.top_k, "min_p": sampling.min_p}
    if by_tokens:
        off = {"top_k": -1, "min_p": 0.0}
        details["top_p"] = sampling.top_p or 1.0
        extra = {name: off[name] if value is None else value for name, value in extra.items()}
        extra |= {"repetition_penalty": 1.0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    extra = {name: value for name, value in extra.items() if value is not None}
    details = {name: value for name, value in details.items() if value is not None}
    return details | ({"extra_body": extra} if extra else {})


def _check_tokenizer(tokenizer: Tokenizer, sent: Any, reply: Reply, where: str) -> None:
    """Raise ServerError where the server's tokens are not those of the tokenizer here."""

    def fault(reason: str) -> ServerError:
        return ServerError(f"{where}: has another tokenizer than {tokenizer.path.parent}: {reason}; serve that folder")

    if reply.prompt_ids is not None and reply.prompt_ids != list(sent):
        raise fault(f"it saw a prompt of {counted(len(reply.prompt_ids), 'token')} where other {len(sent)} were sent")
    if reply.token_ids is None:
        return
    if strange := [token for token in reply.token_ids if not 0 <= token < tokenizer.vocab_size]:
        raise fault(f"it answers with token {strange[0]} of {tokenizer.vocab_size}")
    stream = tokenizer.stream(sent, skip_specials=True)
    ours, theirs = stream.push(reply.token_ids) + stream.finish(), reply.text
    if not _plain(ours).startswith(_plain(theirs)):  # it ends before a stop string, whose tokens are there
        raise fault(f"its tokens say {ours[:SHOWN]!r} here, and {theirs[:SHOWN]!r} there")


def _plain(text: str) -> str:
    """A text without what decoders treat differently: bytes that are no character, spaces at its ends."""
    return text.replace(UNKNOWN, "").strip()


def sample_seed(seed: int, request: int, sample: int) -> int:
    """The seed of one sample of a request, below 2^31, which every server takes."""
    return int(uniforms(seed, request, sample, 0, 1)[0] * 2**31)
