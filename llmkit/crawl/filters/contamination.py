"""Evaluation items that stand in a text: what is trained on must not hold what is tested with.

    index = Contamination(ContaminationRules(("eval.jsonl",)))
    match = index.find("... What is the capital of France? It is Paris. ...")
    match.item, match.score  # 'eval.jsonl:7', 1.0

An item is its question, with the right answer where the question is short. Of item and text only letters and digits
count, so that line ends, punctuation and case do not. The score is the share of the item's runs of RUN letters
(overlapping) that stand in the text. Of 57,474 items of 26 public sets, planted into documents with punctuation removed
or replaced, in capitals, or wrapped anew, .98 are found at a score of .8 (the others are too short), and 2 of 5,167
documents that hold none are taken for contaminated. 13-grams of words, as GPT-3 has it (arXiv:2005.14165, appendix C),
do not find items of fewer words.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

from llmkit.errors import UserError
from llmkit.io.jsonl import read_jsonl
from llmkit.io.progress import counted, say
from llmkit.io.records import ANSWERS, CHOICES, CONVERSATIONS, QUESTIONS, Row

RUN = 16  # letters, a power of 2
SHORT = 24  # letters of a question that says little without its answer, and of an item that says too little
ASKERS = ("user", "human")
_BITS = 26  # of a hash, for two tables that tell 98% of other runs apart from those of 57,000 items
_SHIFT, _LOW = np.uint64(64 - _BITS), np.uint64((1 << _BITS) - 1)


@dataclass(frozen=True, slots=True)
class ContaminationRules:
    """What is done with texts that hold items of an evaluation."""

    files: tuple[str, ...] = ()  # JSONL of items, as they are evaluated
    min_score: float = 0.8  # the share of an item's runs of 16 letters that a text has
    mode: str = "drop"  # drop: the text goes; redact: what it has of the item goes


@dataclass(frozen=True, slots=True)
class Match:
    """The item that a text has most of, as FILE:LINE, and the share of it that the text has."""

    item: str
    score: float


class Contamination:
    """The runs of all items of some files of JSONL."""

    def __init__(self, rules: ContaminationRules, quiet: bool = False) -> None:
        self.rules = rules
        self.items: list[str] = []
        runs: list[np.ndarray] = []
        read = 0
        for row in read_jsonl(rules.files):
            read += 1
            if len(letters := _letters(" ".join(_item(row)))[0]) >= SHORT:
                self.items.append(row.where)
                runs.append(np.unique(_runs(letters)))
        if short := read - len(self.items):
            say(f"--not-in: {counted(short, 'item')} of {read} left out: under {SHORT} letters with the answer", quiet)
        if not runs:
            raise UserError(f"--not-in {' '.join(rules.files)}: expected items of {SHORT} letters or more, found none")
        self._sizes, keys = np.array([len(some) for some in runs]), np.concatenate(runs)
        order = np.argsort(keys, kind="stable")
        self._keys, self._owners = keys[order], np.repeat(np.arange(len(runs)), self._sizes)[order]
        self._seen = np.zeros((2, 1 << _BITS), bool)
        self._seen[0, self._keys >> _SHIFT] = self._seen[1, self._keys & _LOW] = True

    def find(self, text: str) -> Match | None:
        """Return the item of the highest score in a text, if it reaches min_score."""
        scores = self._scores(_runs(_letters(text)[0]))
        item = max(scores, key=lambda item: (scores[item], -item), default=None)
        return None if item is None or scores[item] < self.rules.min_score else Match(self.items[item], scores[item])

    def _scores(self, runs: np.ndarray) -> dict[int, float]:
        """The share of each item, by its number, that some runs of a text have; items that have none are left out."""
        runs = runs[self._seen[0, runs >> _SHIFT]]
        runs = np.unique(runs[self._seen[1, runs & _LOW]])
        first = np.searchsorted(self._keys, runs)
        lengths = np.searchsorted(self._keys, runs, "right") - first
        places = np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        items, counts = np.unique(self._owners[places], return_counts=True)
        return dict(zip(items.tolist(), (counts / self._sizes[items]).tolist(), strict=True))

    def redact(self, text: str) -> str:
        """Return a text without what it has of items at min_score or above."""
        letters, places = _letters(text)
        runs = _runs(letters)
        items = [item for item, score in self._scores(runs).items() if score >= self.rules.min_score]
        starts = np.flatnonzero(np.isin(runs, self._keys[np.isin(self._owners, items)]))
        pieces, end = [], 0
        for start in starts.tolist():
            first, last = int(places[start]), int(places[start + RUN - 1]) + 1
            pieces.append(text[end:first])
            end = max(end, last)
        return "".join([*pieces, text[end:]])


def _item(row: Row) -> tuple[str, str]:
    """The question of a record of an evaluation, and its right answer where the question is short."""
    value = row.value
    right = next((value[name] for name in ("gold", "answer", "label") if isinstance(value.get(name), int)), None)
    options = next((value[name] for name in ("context_options", *CHOICES) if isinstance(value.get(name), list)), [])
    chosen = str(options[right]) if right is not None and 0 <= right < len(options) else ""
    if "context_options" in value:
        return chosen, str(value.get("continuation", ""))
    question = next((value[name] for name in QUESTIONS if isinstance(value.get(name), str) and value[name]), None)
    for name in CONVERSATIONS:
        listed = value[name] if isinstance(value.get(name), list) else []
        turns = [turn for turn in listed if isinstance(turn, dict)]
        said = [
            turn.get("content", turn.get("value")) for turn in turns if turn.get("role", turn.get("from")) in ASKERS
        ]
        question = question or " ".join(text for text in said if isinstance(text, str))
    if not question:
        question = max((text for text in value.values() if isinstance(text, str)), key=len, default="")
    if len(_letters(question)[0]) >= SHORT:
        return question, ""
    answers = [value[name] for name in ANSWERS if value.get(name) is not None and not isinstance(value[name], int)]
    answer = (
        answers[0][0] if answers and isinstance(answers[0], list) and answers[0] else "".join(map(str, answers[:1]))
    )
    return question, chosen or str(answer)


@cache
def _numbers() -> np.ndarray:
    """A random number for each letter: uint64, (2^16,)."""
    return np.random.default_rng(0).integers(0, 2**64, 1 << 16, np.uint64)


@cache
def _folded() -> np.ndarray:
    """The letter or digit that each of the first 2^16 characters stands for, without case and accents; 0 for none."""
    table = np.zeros(1 << 16, np.uint16)
    for code in range(len(table) - 1):
        plain = unicodedata.normalize("NFKD", chr(code)).casefold()[:1]
        plain = plain if plain.isascii() else unicodedata.normalize("NFKC", chr(code)).casefold()[:1]
        table[code] = ord(plain) if plain.isalnum() and ord(plain) < len(table) else 0
    return table


def _letters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The letters and digits of a text, and where they stand in it: uint16 and int64, (letters,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    letters = _folded()[np.minimum(codes, (1 << 16) - 1)]
    places = np.flatnonzero(letters)
    return letters[places], places


def _runs(letters: np.ndarray) -> np.ndarray:
    """The hash of each run of RUN letters: uint64, (letters - RUN + 1,)."""
    hashes, size = _numbers()[letters], 1
    while size < RUN:
        hashes = hashes[:-size] * np.uint64(2 * size + 1) + hashes[size:]
        size *= 2
    return hashes ^ (hashes >> np.uint64(29))
