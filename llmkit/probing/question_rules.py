"""Questions made from the sentences of a passage, without a language model.

A sentence of a known build becomes a question: "The tower was opened in 1889." asks "When was the tower opened?".
Of any other, a date, number, place or name is blanked: "Fill in the blank: ...". All is done by English patterns, so
some questions are clumsy, and none asks for more than a sentence says; a sentence that begins with a pronoun, whose
meaning stands elsewhere, is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from llmkit.errors import UserError
from llmkit.formats.questions import Question
from llmkit.text.passages import Passage

BLANK = "_____"
CLOZE = "Fill in the blank: "
FEWEST, MOST = 6, 40  # words of a sentence: shorter ones tell too little to ask, of longer ones too much is asked

MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
YEAR = r"(?:1[0-9]{3}|20[0-9]{2})"
DATE = rf"(?:{MONTH} \d{{1,2}}, {YEAR}|\d{{1,2}} {MONTH} {YEAR}|{MONTH} {YEAR})"
NUMBER = (
    r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?: (?:thousand|million|billion|trillion))?"
    r"|(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty)"
)
CAPITAL = r"[A-Z](?:['\u2019][A-Z])?[\w-]*\w(?!['\u2019(\w])"
NAME = rf"{CAPITAL}(?: (?:(?:of|the|de|von|van|da|del|du|la) )?(?:{CAPITAL}|[A-Z]\.))*"
THING = rf"(?:(?:The|A|An) (?:[\w\u2019'-]+ ){{0,4}}?[\w\u2019'-]+|{NAME})"
PAST = (
    "[a-z]+ed|won|wrote|became|led|built|made|held|gave|took|began|sang|spoke|fought|found|sold|drew|taught|ran|wore|"
    "brought|bought|met|left|lost|kept|beat|chose"
)

SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bNo)(?<!\bJr)(?<!\bSr)(?<!\bvs)(?<!\bProf)"
    r"(?<=[^\s.!?])[.!?]+[\"\u201d')\]]*\s+(?=[\"\u201c'(]*[A-Z0-9])"
)
# where the meaning of a sentence's beginning stands in another one, or where it is no statement
POINTING = re.compile(
    r"(?:It|He|She|They|We|I|You|This|That|These|Those|Its|His|Her|Their|Our|My|Your|Here|Then|Thus|But|And|Or|So|Such|"
    r"Both|Another|Other|Others|One|Some|However|Therefore|Also|What|Who|When|Where|Which|Why|How|If)\b"
)
QUOTED = re.compile("[\"\u201c\u201d]|(?:^|\\s)['\u2018]|\\[|\\]|https?:|_{3}")


class Written(NamedTuple):
    """A question, its answer, and what kind it is."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class _Build:
    """A sentence's pattern, and the question and the answer that its match gives."""

    pattern: re.Pattern[str]
    write: Callable[[re.Match[str]], Written]


def ask_about(passages: Sequence[Passage], source: str, most: int, seed: int) -> list[Question]:
    """At most `most` questions about each passage. Raises UserError where there are none; `source` is its place."""
    if not passages:
        raise UserError(f"{source}: expected documents with text to ask about, found none")
    questions = [question for passage in passages for question in write_questions(passage, most, seed)]
    if not questions:
        raise UserError(
            f"{source}: found no sentence to make a question of; it takes one of {FEWEST} to {MOST} words with a name, "
            "a date or a number. Give questions by --questions"
        )
    return questions


def write_questions(passage: Passage, most: int, seed: int) -> list[Question]:
    """At most `most` questions about a passage, one a sentence; which, depends on the seed and the passage.

    Questions proper come before blanks, which come in where there are too few.
    """
    drafts = [written for sentence in sentences(passage.text) if (written := write_question(sentence))]
    unlike = {written.question: written for written in drafts}  # a sentence may be there twice

    def drawn(written: Written) -> tuple[bool, bytes]:
        key = blake2b(f"{seed} {passage.name} {written.question}".encode(), digest_size=8).digest()
        return written.kind.startswith("cloze"), key

    chosen = set(sorted(unlike.values(), key=drawn)[:most])
    return [
        Question(
            one.question, (one.answer,), passage.text, passage.name, one.kind, "", f"{passage.where}, {passage.name}"
        )
        for one in unlike.values()
        if one in chosen
    ]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, without their final mark; a line's end ends one, too, if it had a mark.

    >>> list(sentences("Dr. Ada B. Lovelace wrote it. It ran in 1843. Did it?"))
    ['Dr. Ada B. Lovelace wrote it', 'It ran in 1843']
    """
    for paragraph in re.split(r"\n\s*\n", text):
        ends = [(mark.start(), mark.end()) for mark in SENTENCE_END.finditer(paragraph)]
        starts = [0, *(end for _, end in ends)]
        for start, stop in zip(starts, [*(end for _, end in ends), len(paragraph)], strict=True):
            sentence = " ".join(paragraph[start:stop].split())
            if sentence.endswith(".") and not sentence.endswith(".."):
                yield sentence[:-1]


def write_question(sentence: str) -> Written | None:
    """The question that a sentence without its final mark allows, or None.

    >>> write_question("The tower of the town was opened in 1889")
    Written(question='When was the tower of the town opened?', answer='1889', kind='when')
    >>> write_question("In spring the people of Arles walk to the sea, all 50,000 of them")
    Written(question='Fill in the blank: In spring the people of Arles walk to the sea, all _____ of them.', \
answer='50,000', kind='cloze: number')
    """
    if not FEWEST <= len(sentence.split()) <= MOST or POINTING.match(sentence) or QUOTED.search(sentence):
        return None
    for build in BUILDS:
        if match := build.pattern.fullmatch(sentence):
            written = build.write(match)
            if _keeps_its_answer(written):
                return written
    return _blanked(sentence)


def _blanked(sentence: str) -> Written | None:
    for kind, pattern in BLANKS:
        for match in pattern.finditer(sentence):
            answer = match["answer"]
            text = f"{CLOZE}{sentence[: match.start('answer')]}{BLANK}{sentence[match.end('answer') :]}."
            written = Written(text, answer, f"cloze: {kind}")
            if _keeps_its_answer(written):
                return written
    return None


def _keeps_its_answer(written: Written) -> bool:
    """True if the question does not tell its own answer."""
    return re.search(rf"(?<!\w){re.escape(written.answer)}(?!\w)", written.question, re.IGNORECASE) is None


def _inside(subject: str) -> str:
    """A subject in the middle of a sentence: "The tower" becomes "the tower"."""
    return re.sub(r"\A(?:The|An?)\b", lambda match: match[0].lower(), subject)


def _when(match: re.Match[str]) -> Written:
    return Written(f"When {match['verb']} {_inside(match['thing'])} {match['rest']}?", match["answer"], "when")


def _where(match: re.Match[str]) -> Written:
    return Written(f"Where {match['verb']} {_inside(match['thing'])} {match['rest']}?", match["answer"], "where")


def _who(match: re.Match[str]) -> Written:
    return Written(f"Who or what {match['verb']} {match['rest']}?", match["answer"], "who")


def _how_many(match: re.Match[str]) -> Written:
    did = {"has": "does", "have": "do", "had": "did"}[match["verb"]]
    return Written(f"How many {match['rest']} {did} {_inside(match['thing'])} have?", match["answer"], "how many")


def _how_many_there(match: re.Match[str]) -> Written:
    return Written(f"How many {match['rest']} {match['verb']} there{match['more']}?", match["answer"], "how many")


REST = r"(?P<rest>[a-z][^,;:()]*?)"
BUILDS = (
    _Build(re.compile(rf"(?P<thing>{THING}) (?P<verb>was|were) {REST} (?:in|on) (?P<answer>{DATE}|{YEAR})"), _when),
    _Build(
        re.compile(rf"(?P<thing>{THING}) (?P<verb>was|were|is|are) {REST} (?:in|at|near) (?P<answer>{NAME})"), _where
    ),
    _Build(
        re.compile(
            rf"There (?P<verb>are|were) (?:about )?(?P<answer>{NUMBER}) {REST}(?P<more> (?:in|on|at) [^,;:()]+)?"
        ),
        _how_many_there,
    ),
    _Build(re.compile(rf"(?P<thing>{THING}) (?P<verb>has|have|had) (?:about )?(?P<answer>{NUMBER}) {REST}"), _how_many),
    _Build(re.compile(rf"(?P<answer>{NAME}) (?P<verb>was|is) (?P<rest>the [^,;:()]+)"), _who),
    _Build(re.compile(rf"(?P<answer>{NAME}) (?P<verb>{PAST}) (?P<rest>[^,;:()]+)"), _who),
)
BLANKS = (
    ("date", re.compile(rf"\b(?P<answer>{DATE})\b")),
    ("year", re.compile(rf"\b(?P<answer>{YEAR})\b(?![,.]\d)")),
    ("number", re.compile(rf"(?<![\w.,-])(?P<answer>{NUMBER})(?![\w-]|[.,]\d)")),
    ("place", re.compile(rf"\b(?:in|at|from|near|to) (?P<answer>{NAME})")),
    ("name", re.compile(rf"(?<![\w'\u2019.])[a-z][\w\u2019'-]*,? (?P<answer>{NAME})")),  # whole
)
