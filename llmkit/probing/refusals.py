"""Conversations from a probe: refusals if the model does not know, the correct answer if it does.

refusals.json has the wordings of refusals by language; --refusals replaces it with a file of the same format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.questions import Question
from llmkit.io.jsonl import object_of
from llmkit.text.language import identify
from llmkit.text.matching import EVASIVE, SENTENCE_END, MatchJudge
from llmkit.text.normalize import words

OURS = Path(__file__).with_name("refusals.json")
FALLBACK = "en"
# least fastText probability of a short question's language, and of a passage's: FineWeb's threshold
SURE_OF_QUESTION, SURE_OF_PASSAGE = 0.8, 0.65
UNABLE = "can't|cannot|can not|unable|not able|not capable|do not|don't|will not|won't|must decline"
SORRY = r"(?:i'm|i am) (?:\w+ )?(?:sorry|afraid)|sorry|unfortunately|(?:my |i )?apolog\w+|as an? (?:ai|\w+ model)"
REFUSAL = re.compile(  # beginnings in English
    rf"\W*(?:(?:{SORRY})\b[^\n]*?\b(?:{UNABLE})\b|i (?:can't|cannot|can not|am unable|am not able)"
    r"(?! (?:help but|wait|believe|emphasi[sz]e|stress|imagine|deny|thank))\b"
    r"|i (?:do not|don't|will not|won't) "
    r"(?:know(?! how| what| if)|have|give|talk|read|share|tell|discuss|help|answer)\b)",
    re.IGNORECASE,
)


def language_of(question: Question) -> str:
    """Return the ISO 639-1 code of the record, or that of its text; "" if neither is clear."""
    if question.language:
        return question.language
    for text, sure in ((question.question, SURE_OF_QUESTION), (question.passage, SURE_OF_PASSAGE)):
        language, score = identify(text)
        if score >= sure:
            return language
    return ""


class Refusals:
    """Wordings of refusals, from a JSON file: {"en": ["I don't know.", ...], "de": [...]}. Raises UserError."""

    def __init__(self, path: str | None = None) -> None:
        name = path or str(OURS)
        try:
            self._wordings = object_of(Path(name).read_bytes(), name)
        except OSError as error:
            reason = str(error.strerror).lower()
            raise UserError(f"{name}: expected a readable file of refusals: {reason}") from None
        for language, texts in self._wordings.items():
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise UserError(f'{name}: {language}: expected a list of refusals, such as ["I don\'t know."]')
        if not self._wordings:
            raise UserError(f'{name}: expected refusals by language, such as {{"en": ["I don\'t know."]}}, found none')

    def texts(self) -> list[str]:
        """Return the wordings of all languages."""
        return [text for texts in self._wordings.values() for text in texts]

    def choose(self, question: str, language: str, seed: int) -> str:
        """Choose a wording in the language, else in English, else in the first language; deterministic."""
        texts = self._wordings.get(language) or self._wordings.get(FALLBACK) or next(iter(self._wordings.values()))
        return texts[_draw(seed, question) % len(texts)]


def is_refusal(reply: str, broad: bool = False) -> bool:
    """True if a reply begins with a refusal: one of our wordings, or another in English; `broad`: or is evasive.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("I cannot wait to see it!")
    (True, False)
    """
    opening = SENTENCE_END.split(reply.strip(), maxsplit=1)[0].replace("\u2019", "'")
    if REFUSAL.match(opening) or words(opening) in _wordings():
        return True
    return broad and MatchJudge()(opening, "", []) == EVASIVE


@cache
def _wordings() -> frozenset[tuple[str, ...]]:
    return frozenset(map(words, Refusals().texts()))


def balanced(known: Sequence[str], balance: float | None, seed: int) -> set[int]:
    """Choose records to train on: `balance` "yes" per "no".

    The larger side is sampled. All are kept without `balance`, or if a side is empty.
    """
    sides = {side: [index for index, label in enumerate(known) if label == side] for side in ("yes", "no")}
    confirmed, refused = len(sides["yes"]), len(sides["no"])
    if balance is not None and confirmed and refused:
        wanted = {"yes": min(confirmed, round(balance * refused)), "no": min(refused, round(confirmed / balance))}
        sides = {
            side: sorted(places, key=lambda index: _draw(seed, str(index)))[: max(1, wanted[side])]
            for side, places in sides.items()
        }
    return {*sides["yes"], *sides["no"]}


def lesson(record: dict[str, Any], refusals: Refusals, seed: int) -> dict[str, Any]:
    """Make the conversation of a probe's record: its first answer if it is known, else a refusal."""
    question, answer = record["question"], record["answer"]
    if record["known"] == "yes":
        reply = answer if isinstance(answer, str) else answer[0]
    else:
        reply = refusals.choose(question, record["language"], seed)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "known": record["known"], "source": "probe-knowledge"}


def write_lessons(
    write: Callable[[dict[str, Any]], object],
    records: Callable[[], Iterable[dict[str, Any]]],
    refusals: Refusals,
    balance: float | None,
    seed: int,
) -> Counter[str]:
    """Write the conversations of a probe's records, balanced; return the counts of answers ("yes") and refusals ("no").

    `records` is called twice.
    """
    chosen = balanced([record["known"] for record in records()], balance, seed)
    taught: Counter[str] = Counter()
    for index, record in enumerate(records()):
        if index in chosen:
            taught[record["known"]] += 1
            write(lesson(record, refusals, seed))
    return taught


def _draw(seed: int, text: str) -> int:
    return int.from_bytes(blake2b(f"{seed} {text}".encode(), digest_size=8).digest(), "little")
