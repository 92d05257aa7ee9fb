"""A model that is asked for replies which a program reads: the writer of questions, and the judge of answers.

    model = ChatModel(sampler, seed=0)
    for name, answers in model.ask([("first", ["Is 7 prime? Say yes or no."])], yes_or_no): ...

A prompt whose reply `read` cannot read is asked once again, with another seed. Text between <think>
and </think> is no part of a reply.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

from llmkit.formats.conversations import message
from llmkit.generation.next_token import request_number
from llmkit.generation.requests import Request
from llmkit.generation.sampler import Sampler
from llmkit.generation.served_models import shortened

THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
REPLY_TOKENS = 2048  # at most: a model may think aloud first
EMPTY_GROUPS = 8  # read in a row before those that are answered are given

K = TypeVar("K")
T = TypeVar("T")


class Missing(Enum):
    """Why a prompt has no answer."""

    UNREADABLE = "unreadable reply"
    TOO_LONG = "longer than the model's context"


class ChatModel:
    """Asks a sampler; `unread` is the last reply that could not be read, where there was one."""

    def __init__(self, sampler: Sampler, seed: int, max_tokens: int = REPLY_TOKENS) -> None:
        self.sampler, self._seed, self._max_tokens = sampler, seed, max_tokens
        self.unread: str | None = None

    def ask(
        self, groups: Iterable[tuple[K, Sequence[str]]], read: Callable[[str], T | None]
    ) -> Iterator[tuple[K, list[T | Missing]]]:
        """Each name and what `read` makes of the replies to its prompts, in order; `read` gives None for unreadable.

        Groups are read as there is room, so that who makes them may work while others are answered.
        """
        groups = iter(groups)
        waiting: deque[tuple[K, list[Any]]] = deque()  # None for an answer that is not there yet
        again: deque[tuple[list[Any], int, str, int]] = deque()
        more = True

        def prompts() -> Iterator[tuple[list[Any], int, str, int]]:
            nonlocal more
            empty = 0
            for name, texts in groups:
                answers = [None] * len(texts)
                waiting.append((name, answers))
                yield from ((answers, place, text, 0) for place, text in enumerate(texts))
                while again:
                    yield again.popleft()
                empty = 0 if texts else empty + 1
                if empty == EMPTY_GROUPS:
                    return
            more = False

        def replies(asked: Iterable[tuple[list[Any], int, str, int]]) -> Iterator[tuple[K, list[Any]]]:
            under_way: deque[tuple[list[Any], int, str, int]] = deque()

            def requests() -> Iterator[Request]:
                for asking in asked:
                    under_way.append(asking)
                    prompt = self.sampler.encode([message("user", asking[2])])
                    yield Request(prompt, 1, self._max_tokens, self._seed + asking[3], request_number(prompt))

            for samples in self.sampler.complete(requests()):
                answers, place, text, tries = under_way.popleft()
                answers[place] = read(THOUGHTS.sub("", samples[0].text)) if samples else Missing.TOO_LONG
                if answers[place] is None:
                    self.unread = samples[0].text
                    if tries == 0:
                        again.append((answers, place, text, 1))
                    else:
                        answers[place] = Missing.UNREADABLE
                yield from whole()

        def whole() -> Iterator[tuple[K, list[Any]]]:
            while waiting and None not in waiting[0][1]:
                yield waiting.popleft()

        while more or again:
            yield from replies(prompts() if more else [again.popleft() for _ in range(len(again))])
            yield from whole()

    def cost(self) -> str:
        """Describe what the replies have cost, with an example of those that could not be read."""
        unread = "" if self.unread is None else f"; unreadable, for example: {shortened(self.unread)!r}"
        return f"{self.sampler.name}: {self.sampler.usage}{unread}"
