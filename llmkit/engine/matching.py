"""`--judge match`: is an answer right, wrong or no answer, by comparing words with the answers that are known.

    judge = MatchJudge()
    judge("The capital of France is Paris.", "What is the capital of France?", ["Paris"])   # "right"

An answer is right where its words are those of an accepted answer; or where, small words and words of the question
left out,
- one of the two has all words of the other: words may be missing or added, none may be replaced;
- the F1 of their words (Rajpurkar et al. 2016, arXiv:1606.05250) is at least `f1`;
- their numbers are the same, in the same order; where a year is the answer, a date in that year will do;
- nothing is denied (`not`, `never`) and no choice is left open (`or`).
Compared is all that was said, and its first sentence where the rest takes nothing back. `evasive` is an answer that
is empty, says that it does not know, or says no more than the question did; it is never right. The phrases of
evasion stand in matching.json, by language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from llmkit.engine.normalising import KNOWN, is_number, is_sign, is_spaceless, words
from llmkit.questions import Question

RIGHT, WRONG, EVASIVE = "right", "wrong", "evasive"
VERDICTS = (RIGHT, WRONG, EVASIVE)
UNREADABLE = "unreadable"  # no verdict: the reply of a model that judges could not be read
# one word missing of three passes (0.8), one of two does not (0.67): "Kennedy" is not "Robert Kennedy"
F1 = 0.7
REPEATED = 3  # words of the question in a row, all of it, from which on it is a repetition


def _listed(name: str) -> frozenset[str]:
    return frozenset(word for entry in KNOWN[name] for word in words(entry))


# Words by which an answer is made a sentence: they tell nothing. Before, after, under, over and the like do.
SMALL = _listed("small")
DENIALS = _listed("denials")  # with the words that leave a choice open
TAKEN_BACK = DENIALS | _listed("retractions")
MONTHS = _listed("months")
SENTENCE_END = re.compile("(?<=\\w{3}[.!?])\\s+|(?<=[\u3002\uff01\uff1f\u0964])|\\s*\\n\\s*")


class Answered(NamedTuple):
    """A question and responses to it; `details` are of whoever has them judged."""

    question: Question
    responses: Sequence[str]
    details: Any = None


class Judge(Protocol):
    """Judges answers; `name` is for reports."""

    name: str

    def judge_each(self, answered: Iterable[Answered]) -> Iterator[tuple[Answered, list[str]]]:
        """Each question with the verdicts on its responses, one of `VERDICTS` or `UNREADABLE`, in order."""
        ...


class MatchJudge:
    """Judges by comparing words; `f1` is the least F1 that passes, `refusals` are answers that say nothing."""

    name = "match"

    def __init__(self, f1: float = F1, refusals: Iterable[str] = ()) -> None:
        self.f1, self._refusals = f1, {words(text) for text in refusals}

    def __call__(self, response: str, question: str, answers: Sequence[str]) -> str:
        """One of `VERDICTS`."""
        said, asked, accepted = words(response), words(question), [words(answer) for answer in answers]
        accepted = [one for one in accepted if one]
        if not said:
            same = is_sign(response) and response.strip() in answers
            return RIGHT if same else EVASIVE
        if said in accepted:
            return RIGHT
        if said in self._refusals:
            return EVASIVE
        if any(holds(said, phrase) and not any(holds(one, phrase) for one in accepted) for phrase in evasions()):
            return EVASIVE
        if not _told(_without(said, asked)):
            return EVASIVE
        if any(
            self._matches(_without(words(text), asked), asked, one) for text in _readings(response) for one in accepted
        ):
            return RIGHT
        offered = any(set(one) <= set(asked) for one in accepted)
        return WRONG if offered or set(_told(said)) - set(asked) else EVASIVE

    def judge_each(self, answered: Iterable[Answered]) -> Iterator[tuple[Answered, list[str]]]:
        """See `Judge`."""
        for one in answered:
            yield one, [self(response, one.question.question, one.question.answers) for response in one.responses]

    def _matches(self, said: tuple[str, ...], asked: tuple[str, ...], answer: tuple[str, ...]) -> bool:
        """Whether the words said are those of one accepted answer, all but for small words and the question's."""
        if DENIALS & set(said) - set(answer) - set(asked):
            return False
        if set(answer) <= set(asked):  # a choice that the question offers: all its words count
            return self._same(_told(said), _told(answer))
        said = tuple(word for word in said if word in answer or not _echoes(word, asked))
        beyond = tuple(
            word for word in _told(answer) if word not in asked
        )  # "24" of "24 points", asked how many points
        return self._same(_told(said), _told(answer)) or (bool(beyond) and self._same(_told(said), beyond))

    def _same(self, said: tuple[str, ...], answer: tuple[str, ...]) -> bool:
        if len(answer) == 1 and _is_year(answer[0]) and MONTHS & set(said):
            said = tuple(word for word in said if word not in MONTHS and not _is_day(word))
        if [*filter(is_number, said)] != [*filter(is_number, answer)]:
            return False
        if any(map(is_spaceless, answer)) and not holds(said, answer):
            return False  # characters in another order are another word
        one, other = Counter(said), Counter(answer)
        shared = (one & other).total()
        if shared < min(one.total(), other.total()):
            return False
        return shared > 0 and 2 * shared / (one.total() + other.total()) >= self.f1


@cache
def evasions() -> tuple[tuple[str, ...], ...]:
    """The words of every phrase of evasion in matching.json."""
    return tuple(dict.fromkeys(words(phrase) for some in KNOWN["evasions"].values() for phrase in some))


def _readings(response: str) -> Iterable[str]:
    """What may count as the answer: all of it, and the first sentence, unless the rest takes it back."""
    yield response
    first, *rest = SENTENCE_END.split(response.strip())
    if rest and not TAKEN_BACK & {word for text in rest for word in words(text)}:
        yield first


def _told(said: tuple[str, ...]) -> tuple[str, ...]:
    """The words less the small ones; all of them where none is left."""
    return tuple(word for word in said if word not in SMALL) or said


def _without(said: tuple[str, ...], asked: tuple[str, ...]) -> tuple[str, ...]:
    """What was said beside a repetition of the whole question."""
    if len(asked) >= REPEATED:
        for start in range(len(said) - len(asked) + 1):
            if said[start : start + len(asked)] == asked:
                return said[:start] + said[start + len(asked) :]
    return () if said == asked else said


def _echoes(word: str, asked: tuple[str, ...]) -> bool:
    """Whether a word is one of the question's, or another form of it: "scored" of "score"."""
    if word in asked or len(word) < 4:
        return word in asked
    stems = {word[: len(word) - cut] for cut in range(3) if len(word) - cut >= 4}
    return any(one[: len(one) - cut] in stems for one in asked for cut in range(3))


def holds(said: tuple[str, ...], phrase: tuple[str, ...]) -> bool:
    """Whether the words of a phrase stand in what was said, one after the other."""
    if phrase[0] not in said:
        return False
    return any(said[start : start + len(phrase)] == phrase for start in range(len(said) - len(phrase) + 1))


def _is_year(word: str) -> bool:
    return is_number(word) and word[1:].isdigit() and 1000 <= int(word[1:]) <= 2100


def _is_day(word: str) -> bool:
    return is_number(word) and word[1:].isdigit() and 1 <= int(word[1:]) <= 31
