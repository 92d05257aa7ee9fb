"""Prompts in, answers out, from an assistant's folder or a model behind a server.

    model = open_chat_model("judge/", "--judge", settings)
    model.check()
    for name, answers in model.ask([("first", ["Is 7 prime? Say yes or no."])], yes_or_no, temperature=0.3): ...

A prompt whose answer `read` cannot read is asked once again, with another seed. Text between <think>
and </think> is no part of an answer.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.generator import Generator, Request
from llmkit.generation.loaded_model import open_model
from llmkit.generation.next_token import Sampling, request_number
from llmkit.generation.served_models import (
    EXAMPLE,
    SCHEME,
    OpenAIClient,
    PromptTooLong,
    Usage,
    parse_address,
    shortened,
)
from llmkit.io.resume import fingerprint
from llmkit.model.devices import is_small, threads

THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
OPEN_PROMPTS = 2  # times those answered at a time: how far asking runs ahead of the answer that is waited for

K = TypeVar("K")
T = TypeVar("T")


class Missing(Enum):
    """Why a prompt has no answer."""

    UNREADABLE = "unreadable reply"
    TOO_LONG = "longer than the model's context"


Read = Callable[[str], "T | None"]
Groups = Iterable[tuple[K, Sequence[str]]]
Answers = Iterator[tuple[K, "list[T | Missing]"]]


@dataclass(frozen=True)
class ChatSettings:
    """Settings of requests to chat models.

    max_tokens            of an answer
    seed                  of the first try; the second has the next one
    dtype, device, slots  of a folder
    concurrency           requests to a server under way at most
    timeout, retries      of a request: see `OpenAIClient`
    """

    max_tokens: int
    seed: int
    dtype: str = "auto"
    device: str = "auto"
    slots: int = 16
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6


class ChatModel(Protocol):
    """Answers prompts.

    name      for people and reports
    identity  what a resumed run must have in common
    usage     what it was asked so far
    unread    the last reply that could not be read, where there was one
    """

    name: str
    identity: str
    usage: Usage
    unread: str | None

    def check(self) -> None:
        """Raise UserError where it cannot be asked."""
        ...

    def ask(self, groups: Groups[K], read: Read[T], temperature: float) -> Answers[K, T]:
        """Each name and what `read` makes of the answers to its prompts, in order; `read` gives None for unreadable.

        Groups are read as there is room, so that who makes them may work while others are answered.
        """
        ...


def open_chat_model(spec: str, flag: str, settings: ChatSettings) -> ChatModel:
    """A folder, or `openai:URL#model`; `flag` is named in errors. Raises UserError for what is neither."""
    if spec.startswith(SCHEME):
        address = parse_address(spec, flag)
        return ServedChatModel(OpenAIClient(address, settings.timeout, settings.retries), settings)
    if not Path(spec).is_dir():
        raise UserError(f"{flag}: expected the folder of a model, or {EXAMPLE}, found {spec}")
    return FolderChatModel(spec, settings)


class ServedChatModel:
    """A model behind a server."""

    def __init__(self, server: OpenAIClient, settings: ChatSettings) -> None:
        self._server, self._settings, self.usage, self.unread = server, settings, server.usage, None
        self.name = self.identity = server.address.name

    def check(self) -> None:
        """Raise UserError where the server is down."""
        self._server.check()

    def ask(self, groups: Groups[K], read: Read[T], temperature: float) -> Answers[K, T]:
        """See `ChatModel`. Raises ServerError where a request has failed for good."""
        waiting: deque[tuple[K, list[AsyncResult[T | Missing]]]] = deque()
        most = OPEN_PROMPTS * self._settings.concurrency
        # its threads are daemons: who interrupts the program does not wait for the server
        with ThreadPool(self._settings.concurrency) as pool:
            for name, prompts in groups:
                waiting.append((name, [pool.apply_async(self._answer, (text, read, temperature)) for text in prompts]))
                while waiting and (_ready(waiting[0]) or sum(len(results) for _, results in waiting) > most):
                    yield _collected(waiting.popleft())
            while waiting:
                yield _collected(waiting.popleft())

    def _answer(self, prompt: str, read: Read[T], temperature: float) -> T | Missing:
        settings = self._settings
        details: dict[str, Any] = {"max_tokens": settings.max_tokens, "temperature": temperature}
        messages = [{"role": "user", "content": prompt}]
        for seed in (settings.seed, settings.seed + 1):
            try:
                reply = self._server.ask(messages, seed=seed, **details).text
            except PromptTooLong:
                return Missing.TOO_LONG
            answer = read(without_thoughts(reply))
            if answer is not None:
                return answer
            self.unread = reply
        return Missing.UNREADABLE


def _ready(waiting: tuple[Any, list[AsyncResult[T]]]) -> bool:
    return all(result.ready() for result in waiting[1])


def _collected(waiting: tuple[K, list[AsyncResult[T]]]) -> tuple[K, list[T]]:
    name, results = waiting
    return name, [result.get() for result in results]


class FolderChatModel:
    """An assistant's folder; its weights are there while it is asked."""

    def __init__(self, folder: str, settings: ChatSettings) -> None:
        self._opened, self._settings = open_model(folder, settings.device, settings.dtype), settings
        self._chat = self._opened.chat
        self.name, self.identity, self.usage, self.unread = folder, fingerprint(folder), Usage(), None
        small = is_small(self._opened.config.parameter_count, self._opened.device)
        self._threads = 1 if small else torch.get_num_threads()  # which another model may have lowered when it is asked

    def check(self) -> None:
        """All that could be wrong was found when it was opened."""

    def ask(self, groups: Groups[K], read: Read[T], temperature: float) -> Answers[K, T]:
        """See `ChatModel`."""
        settings, most = self._settings, OPEN_PROMPTS * self._settings.slots
        generator = self._opened.generator(Sampling(temperature), settings.slots)
        batch: list[tuple[K, Sequence[str]]] = []
        for name, prompts in groups:
            batch.append((name, prompts))
            if max(len(batch), sum(len(some) for _, some in batch)) >= most:
                yield from self._ask_all(generator, batch, read)
                batch = []
        yield from self._ask_all(generator, batch, read)

    def _ask_all(self, generator: Generator, groups: Sequence[tuple[K, Sequence[str]]], read: Read[T]) -> Answers[K, T]:
        prompts = [text for _, texts in groups for text in texts]
        answers = self._answers(generator, prompts, read, self._settings.seed)
        again = [index for index, answer in enumerate(answers) if answer is Missing.UNREADABLE]
        second = self._answers(generator, [prompts[index] for index in again], read, self._settings.seed + 1)
        for index, answer in zip(again, second, strict=True):
            answers[index] = answer
        following = iter(answers)
        for name, texts in groups:
            yield name, [next(following) for _ in texts]

    def _answers(self, generator: Generator, prompts: Sequence[str], read: Read[T], seed: int) -> list[T | Missing]:
        answers: list[T | Missing] = [Missing.TOO_LONG] * len(prompts)
        requests: dict[int, Request] = {}
        for index, text in enumerate(prompts):
            ids = self._chat.encode([message("user", text)], prompt=True).token_ids.tolist()
            if len(ids) < self._opened.config.max_position_embeddings:
                requests[index] = Request(ids, 1, self._settings.max_tokens, seed, request_number(ids))
        with torch.inference_mode(), threads(self._threads):
            completions = [completion for (completion,) in generator.complete(requests.values())]
        for index, completion in zip(requests, completions, strict=True):
            answer = read(without_thoughts(completion.text))
            answers[index] = Missing.UNREADABLE if answer is None else answer
            self.unread = completion.text if answer is None else self.unread
        self.usage.requests += len(requests)
        self.usage.prompt_tokens += sum(len(request.prompt_ids) for request in requests.values())
        self.usage.completion_tokens += sum(len(completion.token_ids) for completion in completions)
        return answers


def cost(model: ChatModel) -> str:
    """Describe the cost of a model's replies, with an example of those that could not be read."""
    unread = "" if model.unread is None else f"; unreadable, for example: {shortened(model.unread)!r}"
    return f"{model.name}: {model.usage}{unread}"


def without_thoughts(reply: str) -> str:
    """A reply less what its model thought aloud.

    >>> without_thoughts("<think>{...} or not?</think> VERDICT: right")
    ' VERDICT: right'
    """
    return THOUGHTS.sub("", reply)
