"""`--judge MODEL`: a chat model reads passage, reference and answer, and says whether the answer is right.

    judge = ModelJudge(model, MatchJudge())
    for answered, verdicts in judge.judge_each([Answered(question, ["Paris", "Rome"])]): ...

Responses that are empty, or evasive by their words, are never shown to the model, so that it cannot judge them right.
A reply that cannot be read, twice, is no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llmkit.errors import UserError
from llmkit.generation.served_models import shortened
from llmkit.io.progress import counted
from llmkit.probing.chat_model import ChatModel, Missing
from llmkit.text.matching import EVASIVE, RIGHT, UNREADABLE, WRONG, Answered, Judge, MatchJudge

TEMPERATURE = 0.3  # not 0: the second try must be able to say something else
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


class ModelJudge:
    """Judges by asking a chat model; `words` tells what is evasive beyond doubt."""

    def __init__(self, model: ChatModel, words: MatchJudge) -> None:
        self._model, self._words, self.name = model, words, model.sampler.name

    def judge_each(self, answered: Iterable[Answered]) -> Iterator[tuple[Answered, list[str]]]:
        """Each question with the verdicts on its responses, one of `VERDICTS` or `UNREADABLE`, in order."""
        for (item, judged), replies in self._model.ask(map(self._prompts, answered), read_verdict):
            verdicts = dict(zip(judged, replies, strict=True))
            replies = (verdicts.get(response.strip(), EVASIVE) for response in item.responses)
            yield item, [UNREADABLE if isinstance(reply, Missing) else reply for reply in replies]

    def _prompts(self, answered: Answered) -> tuple[tuple[Answered, list[str]], list[str]]:
        """Build a judge's prompts for the distinct responses to a question, and list these responses."""
        question = answered.question
        unlike = list(dict.fromkeys(response.strip() for response in answered.responses))
        judged = [text for text in unlike if self._words(text, question.question, question.answers) != EVASIVE]
        shown = {
            "passage": question.passage or NO_PASSAGE,
            "question": question.question,
            "reference": " | ".join(question.answers),
        }
        return (answered, judged), [JUDGE_PROMPT.format(answer=text, **shown) for text in judged]


def judge_of(model: ChatModel | None, refusals: Sequence[str]) -> Judge:
    """The judge that a model is, or that of words; `refusals` are answers that say nothing."""
    words = MatchJudge(refusals=refusals)
    return words if model is None else ModelJudge(model, words)


def check_verdicts(counts: Mapping[str, int], model: ChatModel) -> None:
    """Raise UserError for a judge that said nothing which could be read, about answers that are right or wrong."""
    if counts[UNREADABLE] and not (counts[RIGHT] or counts[WRONG]):
        raise UserError(
            f"--judge: no verdict of {model.sampler.name} could be read, in "
            f"{counted(counts[UNREADABLE], 'judgement')}; it said, for example: {shortened(model.unread or '')!r}; "
            "start again with another judge and --force"
        )


def read_verdict(reply: str) -> str | None:
    """The verdict that stands alone on a line; None where there is none, or two that differ.

    >>> read_verdict("**VERDICT: Right.**"), read_verdict("VERDICT: right or VERDICT: wrong"), read_verdict("right")
    ('right', None, None)
    """
    verdicts = {verdict.lower() for verdict in VERDICT.findall(reply)}
    return verdicts.pop() if len(verdicts) == 1 else None
