"""What a completion says in the end: its answer as text or as the letter of a choice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from llmkit.problems import MARKER, boxed

# "the answer is (B)", "Answer: B", "The final answer is: B"; the last one counts
ANNOUNCED = re.compile(r"\banswer(?:\s+is\b(?!\s+not\b)|\s*[:=])[\s:*]*", re.IGNORECASE)
DENIAL = re.compile(r"\b(?:not|never|neither|nor|cannot|except|wrong|incorrect|false)\b|n['\u2019]t\b", re.IGNORECASE)
NAMED = re.compile(r"(?<![\w'\u2019])([A-Z])(?![\w'\u2019])(?!(?<=[AI])\s+(?!(?:or|nor|and|but|is|was)\b)[a-z])")
QUOTES = " \t\r\n\"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb"


def unasked(completion: str, prompt: str) -> str:
    """The completion without repetitions of the whole prompt, where that is three words or more."""
    asked = prompt.strip()
    return completion.replace(asked, "\n") if len(asked.split()) >= 3 else completion


def marked(completion: str) -> str | None:
    """What stands after ####, "" where several of them differ; else what is boxed last, as MATH's solutions mean it.

    >>> marked("2 + 2 = 4\\n#### 4"), marked("#### 4\\n#### 5"), marked(r"\\boxed{3} \\boxed{4}"), marked("four")
    ('4', '', '4', None)
    """
    parts = completion.split(MARKER)[1:]
    if not parts:
        return next(reversed(boxed(completion)), None)
    found = {part.strip(" \t").partition("\n")[0].strip() for part in parts}
    return found.pop() if len(found) == 1 else ""


def statement(completion: str) -> str:
    """What is said in the end: what is marked, else what is announced by "the answer is", else the last line."""
    said = marked(completion)
    if said is not None:
        return said
    places = list(ANNOUNCED.finditer(completion))
    if places:
        rest = completion[places[-1].end() :].strip()
        return rest.splitlines()[0] if rest else ""
    lines = completion.strip().splitlines()
    return lines[-1].strip() if lines else ""


def plain(text: str) -> str:
    """Text as it is compared: without case, quotes and emphasis around it and a final point, white space as one blank.

    >>> plain(' **"Yes  indeed."** ')
    'yes indeed'
    """
    text = " ".join(unicodedata.normalize("NFC", text).split()).strip(QUOTES)
    return (text[:-1] if text.endswith((".", "!")) and len(text) > 1 else text).strip(QUOTES).casefold()


def says(completion: str, answer: str) -> bool:
    """Whether the answer is the whole completion, or what it says in the end.

    Deliberately strict: "It is Paris" is not "Paris"; the verifier `match` takes both.
    """
    wanted = plain(answer)
    return bool(wanted) and wanted in (plain(completion), plain(statement(completion)))


def chosen(completion: str, options: Sequence[tuple[str, str]]) -> str | None:
    """The letter of the option that a completion chooses; None where it chooses none, or leaves it open.

    Accepted are the letter ("B", "(b)", "B)", "B. text", "The answer is B"), and the text of an option alone. Of the
    last statement only one letter may be named, and nothing denied: "A or B", "not A, but B" choose nothing.
    """
    said = statement(completion).strip(QUOTES)
    alone = re.fullmatch(r"[(\[]?([A-Za-z])[)\].:]{0,2}", said)
    letters = [letter for letter, _ in options]
    if alone:
        return alone[1].upper() if alone[1].upper() in letters else None
    texts = [letter for letter, text in options if plain(text) and plain(text) == plain(said)]
    if texts:
        return texts[0] if len(texts) == 1 else None
    labelled = re.match(r"[(\[]?([A-Z])[)\].:]{1,2}\s*(.+)", said, re.DOTALL)
    if labelled and any(letter == labelled[1] and plain(text) == plain(labelled[2]) for letter, text in options):
        return labelled[1]
    # an A before a word in small letters is an article, and an I a pronoun
    named = NAMED.findall(said)
    found = {letter for letter in named if letter in letters}
    return found.pop() if len(found) == 1 and not DENIAL.search(said) else None
