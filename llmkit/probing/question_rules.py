"""Questions from the sentences of a passage, without a language model.

A sentence that matches a pattern becomes a question: "The tower was opened in 1889." gives "When was the tower
opened?". In other sentences a date, number, place or name is blanked: "Fill in the blank: ...". The patterns are for
English; some questions are clumsy, and none asks for more than one sentence says. Sentences that begin with a pronoun,
which refers to another sentence, are skipped.

This module also cuts documents into passages, at paragraph borders, and samples them by a seed.

    for passage in sample_passages(read_documents(["docs.jsonl"]), count=200, seed=0): ...
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count as count_from
from operator import itemgetter
from typing import NamedTuple

from llmkit.errors import UserError
from llmkit.formats.questions import Question
from llmkit.io.records import Row

CHARACTERS = 1500  # at most in a passage of several paragraphs: about 300 words
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
BLANK = "_____"
CLOZE = "Fill in the blank: "
FEWEST, MOST = 6, 40  # words of a sentence: shorter ones say too little, longer ones too much

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
# beginnings that refer to another sentence, or are no statement
POINTING = re.compile(
    r"(?:It|He|She|They|We|I|You|This|That|These|Those|Its|His|Her|Their|Our|My|Your|Here|Then|Thus|But|And|Or|So|Such|"
    r"Both|Another|Other|Others|One|Some|However|Therefore|Also|What|Who|When|Where|Which|Why|How|If)\b"
)
QUOTED = re.compile("[\"\u201c\u201d]|(?:^|\\s)['\u2018]|\\[|\\]|https?:|_{3}")


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage; `name` is the document's id, url or number and the passage's number, `where` the document's place."""

    text: str
    name: str
    where: str


def cut_passages(text: str, characters: int = CHARACTERS) -> Iterator[str]:
    """Join neighbouring paragraphs up to `characters`; a longer paragraph is one passage.

    Paragraphs are separated by blank lines, or by line ends if there are none.

    >>> list(cut_passages("One.\\nTwo.\\nThree.", characters=10))
    ['One.\\nTwo.', 'Three.']
    """
    text = text.replace("\r\n", "\n").strip()
    border = BLANK_LINE if BLANK_LINE.search(text) else re.compile(r"\n")
    joint = "\n\n" if border is BLANK_LINE else "\n"
    passage = ""
    for paragraph in filter(None, map(str.strip, border.split(text))):
        if passage and len(passage) + len(joint) + len(paragraph) > characters:
            yield passage
            passage = ""
        passage = passage + joint + paragraph if passage else paragraph
    if passage:
        yield passage


def sample_passages(documents: Iterable[Row], count: int, seed: int) -> list[Passage]:
    """Sample `count` passages of all documents uniformly, and return them in document order.

    The sample depends only on the seed, the texts and their order; at most `count` passages are in memory.
    """

    def keyed() -> Iterator[tuple[bytes, int, Passage]]:
        order = count_from(0)
        for number, row in enumerate(documents, 1):
            document = row.value.get("id") or row.value.get("url") or number
            for part, text in enumerate(cut_passages(row.value["text"]), 1):
                index = next(order)
                key = blake2b(f"{seed} {index} {text}".encode(), digest_size=8).digest()
                yield key, index, Passage(text, f"{document}/{part}", row.where)

    sample = heapq.nsmallest(count, keyed())
    return [passage for _, _, passage in sorted(sample, key=itemgetter(1))]


class Written(NamedTuple):
    """A question, its answer and its kind."""

    question: str
    answer: str
    kind: str


def ask_about(passages: Sequence[Passage], source: str, most: int, seed: int) -> list[Question]:
    """Write at most `most` questions about each passage. Raises UserError, with `source`, if there are none."""
    if not passages:
        raise UserError(f"{source}: expected documents with text to ask about, found none")
    questions = [question for passage in passages for question in write_questions(passage, most, seed)]
    if not questions:
        raise UserError(
            f"{source}: expected a sentence of {FEWEST} to {MOST} words with a name, a date or a number, found none; "
            "give questions with --questions"
        )
    return questions


def write_questions(passage: Passage, most: int, seed: int) -> list[Question]:
    """Write at most `most` questions about a passage, one per sentence, chosen by the seed.

    Blanks are used only if there are too few other questions.
    """
    drafts = [written for sentence in sentences(passage.text) if (written := write_question(sentence))]
    distinct = {written.question: written for written in drafts}  # sentences may repeat

    def drawn(written: Written) -> tuple[bool, bytes]:
        key = blake2b(f"{seed} {passage.name} {written.question}".encode(), digest_size=8).digest()
        return written.kind.startswith("cloze"), key

    chosen = set(sorted(distinct.values(), key=drawn)[:most])
    where = f"{passage.where}, {passage.name}"
    return [
        Question(written.question, (written.answer,), passage.text, passage.name, written.kind, "", where)
        for written in distinct.values()
        if written in chosen
    ]


def sentences(text: str) -> Iterator[str]:
    """Yield the statements of a text, without their full stop.

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
    """Turn a sentence, without its full stop, into a question; None if no pattern fits.

    >>> write_question("The tower of the town was opened in 1889")
    Written(question='When was the tower of the town opened?', answer='1889', kind='when')
    >>> write_question("In spring the people of Arles walk to the sea, all 50,000 of them")
    Written(question='Fill in the blank: In spring the people of Arles walk to the sea, all _____ of them.', \
answer='50,000', kind='cloze: number')
    """
    if not FEWEST <= len(sentence.split()) <= MOST or POINTING.match(sentence) or QUOTED.search(sentence):
        return None
    for kind, template, pattern in BUILDS:
        if match := pattern.fullmatch(sentence):
            fields = {name: value or "" for name, value in match.groupdict().items()}
            fields["thing"] = ARTICLE.sub(lambda article: article[0].lower(), fields.get("thing", ""))
            fields["does"] = {"has": "does", "have": "do", "had": "did"}.get(fields["verb"], "")
            written = Written(template.format_map(fields), fields["answer"], kind)
            if _hides_its_answer(written):
                return written
    for kind, pattern in BLANKS:
        for match in pattern.finditer(sentence):
            text = f"{CLOZE}{sentence[: match.start('answer')]}{BLANK}{sentence[match.end('answer') :]}."
            written = Written(text, match["answer"], f"cloze: {kind}")
            if _hides_its_answer(written):
                return written
    return None


def _hides_its_answer(written: Written) -> bool:
    """True if the question does not contain its answer."""
    return re.search(rf"(?<!\w){re.escape(written.answer)}(?!\w)", written.question, re.IGNORECASE) is None


ARTICLE = re.compile(r"\A(?:The|An?)\b")
REST = r"(?P<rest>[a-z][^,;:()]*?)"
# kind, question and sentence; "does" is the auxiliary of a question with "have"
BUILDS = tuple(
    (kind, template, re.compile(pattern))
    for kind, template, pattern in (
        (
            "when",
            "When {verb} {thing} {rest}?",
            rf"(?P<thing>{THING}) (?P<verb>was|were) {REST} (?:in|on) (?P<answer>{DATE}|{YEAR})",
        ),
        (
            "where",
            "Where {verb} {thing} {rest}?",
            rf"(?P<thing>{THING}) (?P<verb>was|were|is|are) {REST} (?:in|at|near) (?P<answer>{NAME})",
        ),
        (
            "how many",
            "How many {rest} {verb} there{more}?",
            rf"There (?P<verb>are|were) (?:about )?(?P<answer>{NUMBER}) {REST}(?P<more> (?:in|on|at) [^,;:()]+)?",
        ),
        (
            "how many",
            "How many {rest} {does} {thing} have?",
            rf"(?P<thing>{THING}) (?P<verb>has|have|had) (?:about )?(?P<answer>{NUMBER}) {REST}",
        ),
        ("who", "Who or what {verb} {rest}?", rf"(?P<answer>{NAME}) (?P<verb>was|is) (?P<rest>the [^,;:()]+)"),
        ("who", "Who or what {verb} {rest}?", rf"(?P<answer>{NAME}) (?P<verb>{PAST}) (?P<rest>[^,;:()]+)"),
    )
)
BLANKS = (
    ("date", re.compile(rf"\b(?P<answer>{DATE})\b")),
    ("year", re.compile(rf"\b(?P<answer>{YEAR})\b(?![,.]\d)")),
    ("number", re.compile(rf"(?<![\w.,-])(?P<answer>{NUMBER})(?![\w-]|[.,]\d)")),
    ("place", re.compile(rf"\b(?:in|at|from|near|to) (?P<answer>{NAME})")),
    ("name", re.compile(rf"(?<![\w'\u2019.])[a-z][\w\u2019'-]*,? (?P<answer>{NAME})")),  # the full name
)
