"""Find evaluation items in texts, to keep test data out of training data.

    index = Contamination(ContaminationRules(("eval.jsonl",)))
    index.find("... What is the capital of France? It is Paris. ...")  # [Match('eval.jsonl:7', 1.0)]

An item is its question, with the right answer if the question is short. Only letters and digits are compared, so line
breaks, punctuation and case do not matter. The score is the share of the item's overlapping runs of RUN letters that
occur together in the text. Recall at a score of .8 is .992 for 3,000 of 70,851 items of 26 public sets, planted into
documents as they are, in capitals, re-wrapped, or with punctuation removed or replaced (the rest are too short). False
positives: 2 of 5,167 documents, 3 with 99,623 items of 45 sets. GPT-3's 13-grams of words (arXiv:2005.14165,
appendix C) do not find items of fewer words.
"""

from __future__ import annotations

import math
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.questions import answers_of, unfolded
from llmkit.io.jsonl import read_jsonl, write_json
from llmkit.io.progress import Progress, counted, say
from llmkit.io.records import ANSWERS, CHOICES, CONVERSATIONS, QUESTIONS, Row

RUN = 16  # letters, a power of 2
SHORT = 24  # letters; a shorter question is combined with its answer
SHORTEST = 18  # letters; a shorter item, with its answer, is left out
OF_PIQA = ("goal", "sol1")  # question, and an answer that may be wrong: the records have no label
OF_BLIMP = "sentence_good"
ASKERS = ("user", "human")
_BITS = 26  # hash bits of each of two bit tables, which reject 98% of runs that are in none of 57,000 items
_SHIFT, _LOW = np.uint64(64 - _BITS), np.uint64((1 << _BITS) - 1)
_BYTE, _BIT = np.uint64(3), np.uint64(7)
# limits for texts that are lists of items: items examined together, places of a run; 1 MB with 2,635 of BBH took 41 s
MOST_ITEMS, MOST = 500, 100
APART = 200  # letters allowed between a short question and its answer
ARRAYS = ("_lengths", "_sizes", "_keys", "_owners", "_seen")  # shared between processes
LISTED = 100  # documents listed per item in a report
REPORT = "contamination.json"  # file in a run folder
OF_FILE = f".{REPORT}"  # suffix to the name of an output file


@dataclass(frozen=True, slots=True)
class ContaminationRules:
    """Texts that contain evaluation items."""

    files: tuple[str, ...] = ()  # JSONL of evaluation items
    min_score: float = 0.8  # share of an item's runs of 16 letters that the text contains
    mode: str = "drop"  # drop: drop the text; redact: cut the item out


class Match(NamedTuple):
    """An item found in a text, as FILE:LINE, and the share of it that the text contains."""

    item: str
    score: float


@dataclass
class Findings:
    """Items found in documents, for a report."""

    documents: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # documents, by item
    _listed: dict[str, list[tuple[Any, float]]] = field(default_factory=dict)
    _highest: dict[str, float] = field(default_factory=dict)

    def add(self, document: Any, matches: Iterable[tuple[str, float]]) -> None:
        """Record the matches of a document, given by its id or place."""
        self.documents += 1
        for item, score in matches:
            self.counts[item] += 1
            self._highest[item] = max(score, self._highest.get(item, 0.0))
            if self.counts[item] <= LISTED:
                self._listed.setdefault(item, []).append((document, score))

    def __str__(self) -> str:
        """Summarize the counts in words."""
        return f"{counted(len(self.counts), 'item')} in {counted(self.documents, 'document')}"

    def write(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Write a report, most frequent items first, and return its numbers of documents and items."""
        items = [
            {
                "item": item,
                "documents": count,
                "score": round(self._highest[item], 4),
                "in": [{"id": document, "score": round(score, 4)} for document, score in self._listed[item]],
            }
            for item, count in self.counts.most_common()
        ]
        write_json(path, {"documents": self.documents, "items": items})
        return {"documents": self.documents, "items": len(items)}


class Contamination:
    """An index of the runs of all items of some JSONL files."""

    _folder: tempfile.TemporaryDirectory[str] | str | None = None  # the arrays' files, once they are shared

    def __init__(self, rules: ContaminationRules, quiet: bool = False, flag: str = "--not-in") -> None:
        self.rules = rules
        self.items: list[str] = []
        runs: list[np.ndarray] = []
        lengths: list[int] = []
        with Progress(f"read {flag}", unit="items", quiet=quiet) as progress:
            of_squad = lambda row: isinstance(row.value.get("paragraphs", row.value.get("data")), list)  # noqa: E731
            rows = (unfolded(row) if of_squad(row) else [row] for row in read_jsonl(rules.files))
            for row in chain.from_iterable(rows):
                progress.advance()
                question, answer = _item(row)
                letters = _letters(f"{question} {answer}")[0]
                if len(letters) >= (SHORTEST if answer else SHORT):
                    self.items.append(row.where)
                    lengths.append(len(letters))
                    runs.append(np.unique(_runs(letters)))
        read = int(progress.done)
        if short := read - len(self.items):
            least = f"shorter than {SHORTEST} letters with the answer, or {SHORT} without one"
            say(f"{flag}: ignored {counted(short, 'item')} of {read}: {least}", quiet)
        if not runs:
            raise UserError(f"{flag} {' '.join(rules.files)}: expected items of {SHORTEST} letters or more, found none")
        self._lengths = np.array(lengths)
        self._sizes, keys = np.array([len(some) for some in runs]), np.concatenate(runs)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._owners = np.repeat(np.arange(len(runs), dtype=np.int32), self._sizes)[order]
        seen = np.zeros((2, 1 << _BITS), bool)
        seen[0, self._keys >> _SHIFT] = seen[1, self._keys & _LOW] = True
        self._seen = np.packbits(seen, axis=1, bitorder="little")

    def share(self) -> None:
        """Move the arrays to temporary files, which other processes on this machine map instead of copying."""
        self._folder = tempfile.TemporaryDirectory(prefix="llmkit-")
        for name in ARRAYS:
            np.save(f"{self._folder.name}/{name}.npy", getattr(self, name))
        self._map(self._folder.name)

    def _map(self, folder: str) -> None:
        for name in ARRAYS:
            setattr(self, name, np.asarray(np.load(f"{folder}/{name}.npy", mmap_mode="r")))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle only the folder of shared arrays."""
        if not isinstance(self._folder, tempfile.TemporaryDirectory):
            return self.__dict__
        return {**{name: self.__dict__[name] for name in ("rules", "items")}, "_folder": self._folder.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._folder, str):
            self._map(self._folder)

    def find(self, text: str) -> list[Match]:
        """Return the items that a text contains with at least min_score, highest score first."""
        matches = [Match(self.items[item], score) for item, score, _ in self._found(_letters(text)[0])]
        return sorted(matches, key=lambda match: -match.score)

    def redact(self, text: str) -> str:
        """Return the text without the items that it contains with at least min_score."""
        letters, places = _letters(text)
        while items := self._found(letters):
            pieces, end = [], 0
            for start in np.unique(np.concatenate([starts for _, _, starts in items])).tolist():
                first, last = int(places[start]), int(places[start + RUN - 1]) + 1
                pieces.append(text[end:first])
                end = max(end, last)
            text = "".join([*pieces, text[end:]])
            letters, places = _letters(text)
        return text

    def _found(self, letters: np.ndarray) -> list[tuple[int, float, np.ndarray]]:
        """Return (item number, score, places where its runs begin) of each item found in the letters."""
        runs = _runs(letters)
        places = np.flatnonzero(self._may_have(0, runs >> _SHIFT))
        places = places[self._may_have(1, runs[places] & _LOW)]
        places = places[np.argsort(runs[places], kind="stable")]
        known, starts, repeats = np.unique(runs[places], return_index=True, return_counts=True)
        first = np.searchsorted(self._keys, known)
        counts = np.searchsorted(self._keys, known, "right") - first
        owners = self._owners[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
        items, counts_of = np.unique(owners, return_counts=True)
        shares = counts_of / self._sizes[items]
        order = np.argsort(-shares, kind="stable")[: np.count_nonzero(shares >= self.rules.min_score)]
        items = np.sort(items[order[:MOST_ITEMS]])
        if not len(items):
            return []
        by_owner = np.argsort(owners, kind="stable")
        owned = np.repeat(np.arange(len(known)), counts)[by_owner]  # run numbers, grouped by item
        ends = np.searchsorted(owners[by_owner], items, "right")
        occurring = []
        for item, begin, end in zip(items.tolist(), np.searchsorted(owners[by_owner], items), ends, strict=True):
            own = owned[begin:end]
            size, width = int(self._sizes[item]), 2 * int(self._lengths[item]) + APART
            enough = math.ceil(self.rules.min_score * size - 1e-9)
            # an occurrence has at least `enough` of these runs, so it has one of the len(own) - enough + 1 rarest
            rarest = own[np.argsort(repeats[own], kind="stable")[: len(own) - enough + 1]]
            some = [places[starts[run] : starts[run] + min(repeats[run], MOST)] for run in rarest]
            some = np.unique(np.concatenate(some))  # candidates; all places within `width` of them are examined
            apart = np.flatnonzero(np.diff(some) > 2 * width)
            lows, highs = some[np.r_[0, apart + 1]] - width, some[np.r_[apart, len(some) - 1]] + width + 1
            around = zip(lows.tolist(), highs.tolist(), strict=True)
            near = np.concatenate([np.arange(max(low, 0), min(high, len(runs))) for low, high in around])
            near = near[np.isin(runs[near], known[own])]
            most, dense = _densest(near.tolist(), runs[near].tolist(), width, enough)
            if dense:
                occurring.append((item, most / size, np.array(dense)))
        return occurring

    def _may_have(self, table: int, hashes: np.ndarray) -> np.ndarray:
        return (self._seen[table, hashes >> _BYTE] >> (hashes & _BIT).astype(np.uint8) & 1).astype(bool)


def _densest(places: list[int], runs: list[int], width: int, enough: int) -> tuple[int, list[int]]:
    """Return the most distinct runs that begin within `width` letters, and the places of all windows with enough."""
    most, start, within = 0, 0, Counter[int]()
    dense: list[int] = []
    listed = 0  # earlier places are in `dense`, or in no dense window
    for end, run in enumerate(runs):
        within[run] += 1
        while places[end] - places[start] > width:
            within[runs[start]] -= 1
            if not within[runs[start]]:
                del within[runs[start]]
            start += 1
        most = max(most, len(within))
        if len(within) >= enough:
            dense += places[max(start, listed) : end + 1]
            listed = end + 1
    return most, dense


def _item(row: Row) -> tuple[str, str]:
    """Return the question of an evaluation record, and its right answer if the question is short, or ""."""
    value = row.value
    chosen = _choice(value)
    if "context_options" in value:
        return chosen, str(value.get("continuation", ""))
    if OF_BLIMP in value:
        return "", str(value[OF_BLIMP])
    named = (*QUESTIONS, OF_PIQA[0])
    question = next((value[name] for name in named if isinstance(value.get(name), str) and value[name]), None)
    for name in CONVERSATIONS:
        listed = value[name] if isinstance(value.get(name), list) else []
        turns = [turn for turn in listed if isinstance(turn, dict)]
        contents = [
            turn.get("content", turn.get("value")) for turn in turns if turn.get("role", turn.get("from")) in ASKERS
        ]
        question = question or " ".join(text for text in contents if isinstance(text, str))
    if not question:
        question = max((text for text in value.values() if isinstance(text, str)), key=len, default="")
    if len(_letters(question)[0]) >= SHORT:
        return question, ""
    for name in (*ANSWERS, OF_PIQA[1]) if not chosen else ():
        if value.get(name) is not None and not isinstance(value[name], int):
            with suppress(UserError):
                chosen = answers_of(value[name], name)[0]
            break
    return question, chosen


def _choice(value: Mapping[str, Any]) -> str:
    """Return the right choice of a record, which gives it by index (from 0) or by letter; "" if there is none."""
    listed = next((value[name] for name in ("context_options", *CHOICES) if value.get(name)), None)
    labels: Any = "ABCDEFGHIJ"
    if isinstance(listed, dict):  # ARC's columns
        labels = listed["label"] if isinstance(listed.get("label"), list) else labels
        listed = listed.get("text")
    choices = listed if isinstance(listed, list) else [value[letter] for letter in labels[:5] if letter in value]
    for name in ("gold", "answer", "label", "answerKey", "correct"):
        key = value.get(name)
        if isinstance(key, str) and key in list(labels):
            key = list(labels).index(key)
        if type(key) is int and 0 <= key < len(choices):
            return str(choices[key].get("text", "") if isinstance(choices[key], dict) else choices[key])
    return ""


@cache
def _numbers() -> np.ndarray:
    """Return a random number for each letter: uint64 (2^16,)."""
    return np.random.default_rng(0).integers(0, 2**64, 1 << 16, np.uint64)


@cache
def _folded() -> np.ndarray:
    """Map the first 2^16 characters to letters and digits without case and accents; 0 for all others."""
    table = np.zeros(1 << 16, np.uint16)
    for code in range(len(table) - 1):
        plain = unicodedata.normalize("NFKD", chr(code)).casefold()[:1]
        plain = plain if plain.isascii() else unicodedata.normalize("NFKC", chr(code)).casefold()[:1]
        table[code] = ord(plain) if plain.isalnum() and ord(plain) < len(table) else 0
    return table


def _letters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the folded letters and digits of a text, and their positions: uint16 and int64 (letters,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    letters = _folded()[np.minimum(codes, (1 << 16) - 1)]
    places = np.flatnonzero(letters)
    return letters[places], places


def _runs(letters: np.ndarray) -> np.ndarray:
    """Hash each run of RUN letters: uint64 (letters - RUN + 1,)."""
    hashes, size = _numbers()[letters], 1
    while size < RUN:
        hashes = hashes[:-size] * np.uint64(2 * size + 1) + hashes[size:]
        size *= 2
    return hashes ^ (hashes >> np.uint64(29))
