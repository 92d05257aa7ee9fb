"""`--judge MODEL`: a chat model reads passage, reference and answer, and decides whether the answer is right.

    judge = ModelJudge(model, MatchJudge())
    for answered, verdicts in judge.judge_each([Answered(question, ["Paris", "Rome"])]): ...

Empty responses, and those with evasive words, are not shown to the model, so that it cannot judge them right. Two
unreadable replies count as no verdict.

`ChatModel` gets machine-readable replies, for the judge and for the writer of questions.

    model = ChatModel(sampler, seed=0)
    for name, answers in model.ask([("first", ["Is 7 prime? Say yes or no."])], yes_or_no): ...

If `read` cannot read a reply, the prompt is sent once more, with another seed. Text between <think> and </think> is
removed from replies.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.next_token import request_number
from llmkit.generation.requests import Request
from llmkit.generation.sampler import Sampler
from llmkit.generation.served_models import shortened
from llmkit.io.progress import counted
from llmkit.text.matching import EVASIVE, RIGHT, UNREADABLE, WRONG, Answered, Judge, MatchJudge

THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
REPLY_TOKENS = 2048  # at most: a model may think first
EMPTY_GROUPS = 8  # read in a row before finished groups are yielded

K = TypeVar("K")
T = TypeVar("T")
TEMPERATURE = 0.3  # not 0: the second try must be able to differ
JUDGE_PROMPT = """\
Judge an answer to a question, by the passage and the reference answer alone.

Passage:
{passage}

Question: {question}
Reference answer: {reference}

Answer to judge:
<answer>
{answer}
</answer>

right: the answer says what the reference answer says, or what the passage says in reply to the question.
wrong: the answer says something else, or something beside it that is false by the passage.
evasive: the answer does not reply: it refuses, does not know, leaves a choice open or repeats the question.

Reply with one line and nothing else: VERDICT: right, or VERDICT: wrong, or VERDICT: evasive"""
NO_PASSAGE = "(not given)"
VERDICT = re.compile(r"^[^\w\n]*verdict\W+(right|wrong|evasive)[^\w\n]*$", re.IGNORECASE | re.MULTILINE)


class Missing(Enum):
    """Why a prompt has no answer."""

    UNREADABLE = "unreadable reply"
    TOO_LONG = "longer than the model's context"


class ChatModel:
    """Sends prompts to a sampler; `unread` is the last unreadable reply, or None."""

    def __init__(self, sampler: Sampler, seed: int, max_tokens: int = REPLY_TOKENS) -> None:
        self.sampler, self._seed, self._max_tokens = sampler, seed, max_tokens
        self.unread: str | None = None

    def ask(
        self, groups: Iterable[tuple[K, Sequence[str]]], read: Callable[[str], T | None]
    ) -> Iterator[tuple[K, list[T | Missing]]]:
        """Yield each name with the results of `read`, in order, for the replies to its prompts; None means unreadable.

        Groups are read lazily, so that their producer can work while others are answered.
        """
        groups = iter(groups)
        waiting: deque[tuple[K, list[Any]]] = deque()  # None for a pending answer
        again: deque[tuple[list[Any], int, str, int]] = deque()
        more = True

        def prompts() -> Iterator[tuple[list[Any], int, str, int]]:
            nonlocal more
            empty = 0
            for name, texts in groups:
                answers = [None] * len(texts)
                waiting.append((name, answers))
                yield from ((answers, index, text, 0) for index, text in enumerate(texts))
                while again:
                    yield again.popleft()
                empty = 0 if texts else empty + 1
                if empty == EMPTY_GROUPS:
                    return
            more = False

        def replies(batch: Iterable[tuple[list[Any], int, str, int]]) -> Iterator[tuple[K, list[Any]]]:
            under_way: deque[tuple[list[Any], int, str, int]] = deque()

            def requests() -> Iterator[Request]:
                for entry in batch:
                    under_way.append(entry)
                    prompt = self.sampler.encode([message("user", entry[2])])
                    yield Request(prompt, 1, self._max_tokens, self._seed + entry[3], request_number(prompt))

            for samples in self.sampler.complete(requests()):
                answers, index, text, tries = under_way.popleft()
                answers[index] = read(THOUGHTS.sub("", samples[0].text)) if samples else Missing.TOO_LONG
                if answers[index] is None:
                    self.unread = samples[0].text
                    if tries == 0:
                        again.append((answers, index, text, 1))
                    else:
                        answers[index] = Missing.UNREADABLE
                yield from whole()

        def whole() -> Iterator[tuple[K, list[Any]]]:
            while waiting and None not in waiting[0][1]:
                yield waiting.popleft()

        while more or again:
            yield from replies(prompts() if more else [again.popleft() for _ in range(len(again))])
            yield from whole()

    def cost(self) -> str:
        """Describe the cost of the replies, with an unreadable one as an example."""
        unread = "" if self.unread is None else f"; unreadable, for example: {shortened(self.unread)!r}"
        return f"{self.sampler.name}: {self.sampler.usage}{unread}"


class ModelJudge:
    """Judges with a chat model; `words` finds clearly evasive answers."""

    def __init__(self, model: ChatModel, words: MatchJudge) -> None:
        self._model, self._words, self.name = model, words, model.sampler.name

    def judge_each(self, answered: Iterable[Answered]) -> Iterator[tuple[Answered, list[str]]]:
        """Yield each question with the verdicts on its responses, one of `VERDICTS` or `UNREADABLE`, in order."""
        for (item, judged), replies in self._model.ask(map(self._prompts, answered), read_verdict):
            verdicts = dict(zip(judged, replies, strict=True))
            replies = (verdicts.get(response.strip(), EVASIVE) for response in item.responses)
            yield item, [UNREADABLE if isinstance(reply, Missing) else reply for reply in replies]

    def _prompts(self, answered: Answered) -> tuple[tuple[Answered, list[str]], list[str]]:
        """Build the judge's prompts for the distinct responses to a question; return these responses, too."""
        question = answered.question
        distinct = list(dict.fromkeys(response.strip() for response in answered.responses))
        judged = [text for text in distinct if self._words(text, question.question, question.answers) != EVASIVE]
        shown = {
            "passage": question.passage or NO_PASSAGE,
            "question": question.question,
            "reference": " | ".join(question.answers),
        }
        return (answered, judged), [JUDGE_PROMPT.format(answer=text, **shown) for text in judged]


def judge_of(model: ChatModel | None, refusals: Sequence[str]) -> Judge:
    """Return a judge that asks the model, or compares words if it is None; `refusals` are evasive answers."""
    words = MatchJudge(refusals=refusals)
    return words if model is None else ModelJudge(model, words)


def check_verdicts(counts: Mapping[str, int], model: ChatModel) -> None:
    """Raise UserError if no verdict about right or wrong answers was readable."""
    if counts[UNREADABLE] and not (counts[RIGHT] or counts[WRONG]):
        raise UserError(
            f"--judge: no verdict of {model.sampler.name} could be read, in "
            f"{counted(counts[UNREADABLE], 'judgement')}; it said, for example: {shortened(model.unread or '')!r}; "
            "start over with another judge and --force"
        )


def read_verdict(reply: str) -> str | None:
    """Return the verdict that is alone on a line; None if there is none, or two that differ.

    >>> read_verdict("**VERDICT: Right.**"), read_verdict("VERDICT: right or VERDICT: wrong"), read_verdict("right")
    ('right', None, None)
    """
    verdicts = {verdict.lower() for verdict in VERDICT.findall(reply)}
    return verdicts.pop() if len(verdicts) == 1 else None
