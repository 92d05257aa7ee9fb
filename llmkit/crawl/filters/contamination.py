"""Evaluation items that stand in a text: what is trained on must not hold what is tested with.

    index = Contamination(ContaminationRules(("eval.jsonl",)))
    index.find("... What is the capital of France? It is Paris. ...")  # [Match('eval.jsonl:7', 1.0)]

An item is its question, with the right answer where the question is short. Of item and text only letters and digits
count, so that line ends, punctuation and case do not. The score is the share of the item's runs of RUN letters
(overlapping) that stand together in the text. Of 3,000 of 70,851 items of 26 public sets, planted into documents as
they are, in capitals, wrapped anew, with punctuation removed or replaced, .992 are found at a score of .8 (the others
are too short); of 5,167 documents 2 are taken for contaminated, 3 with 99,623 items of 45 sets. 13-grams of words, as
GPT-3 has it (arXiv:2005.14165, appendix C), do not find items of fewer words.
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
SHORT = 24  # letters of a question that says little without its answer
SHORTEST = 18  # letters of an item, with its answer
OF_PIQA = ("goal", "sol1")  # question and an answer, which may be the wrong one: no label stands beside them
OF_BLIMP = "sentence_good"
ASKERS = ("user", "human")
_BITS = 26  # of a hash, for two tables that tell 98% of other runs apart from those of 57,000 items
_SHIFT, _LOW = np.uint64(64 - _BITS), np.uint64((1 << _BITS) - 1)
_BYTE, _BIT = np.uint64(3), np.uint64(7)
# Of a text that is a list of items: those looked at together, and the places of a run; of 1 MB of BBH's 2,635 took 41 s
MOST_ITEMS, MOST = 500, 100
APART = 200  # letters that may stand between a short question and its answer
ARRAYS = ("_lengths", "_sizes", "_keys", "_owners", "_seen")  # of an index
LISTED = 100  # documents of an item, in a report
REPORT = "contamination.json"  # in a run folder, and
OF_FILE = f".{REPORT}"  # after the name of an output


@dataclass(frozen=True, slots=True)
class ContaminationRules:
    """What is done with texts that hold items of an evaluation."""

    files: tuple[str, ...] = ()  # JSONL of items, as they are evaluated
    min_score: float = 0.8  # the share of an item's runs of 16 letters that a text has
    mode: str = "drop"  # drop: the text goes; redact: what it has of the item goes


class Match(NamedTuple):
    """An item that a text has, as FILE:LINE, and the share of it that the text has."""

    item: str
    score: float


@dataclass
class Findings:
    """The items that were found in documents, for a report."""

    documents: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # documents, by item
    _listed: dict[str, list[tuple[Any, float]]] = field(default_factory=dict)
    _highest: dict[str, float] = field(default_factory=dict)

    def add(self, document: Any, matches: Iterable[tuple[str, float]]) -> None:
        """Note what was found in a document, which goes by its id or place."""
        self.documents += 1
        for item, score in matches:
            self.counts[item] += 1
            self._highest[item] = max(score, self._highest.get(item, 0.0))
            if self.counts[item] <= LISTED:
                self._listed.setdefault(item, []).append((document, score))

    def __str__(self) -> str:
        """The figures in words."""
        return f"{counted(len(self.counts), 'item')} in {counted(self.documents, 'document')}"

    def write(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Write a report, the items of most documents first, and return how many documents and items it has."""
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
    """The runs of all items of some files of JSONL."""

    _folder: tempfile.TemporaryDirectory[str] | str | None = None  # of the arrays, once they are shared

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
            least = f"under {SHORTEST} letters with the answer, or {SHORT} without one"
            say(f"{flag}: {counted(short, 'item')} of {read} left out: {least}", quiet)
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
        """Move the arrays into temporary files, which other processes of this machine map, without copies of theirs."""
        self._folder = tempfile.TemporaryDirectory(prefix="llmkit-")
        for name in ARRAYS:
            np.save(f"{self._folder.name}/{name}.npy", getattr(self, name))
        self._map(self._folder.name)

    def _map(self, folder: str) -> None:
        for name in ARRAYS:
            setattr(self, name, np.asarray(np.load(f"{folder}/{name}.npy", mmap_mode="r")))

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: of shared arrays their folder."""
        if not isinstance(self._folder, tempfile.TemporaryDirectory):
            return self.__dict__
        return {**{name: self.__dict__[name] for name in ("rules", "items")}, "_folder": self._folder.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._folder, str):
            self._map(self._folder)

    def find(self, text: str) -> list[Match]:
        """Return the items that a text has at min_score or above, that of the highest score first."""
        matches = [Match(self.items[item], score) for item, score, _ in self._found(_letters(text)[0])]
        return sorted(matches, key=lambda match: -match.score)

    def redact(self, text: str) -> str:
        """Return a text without what it has of items at min_score or above."""
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
        """The items that stand among some letters, by number, with scores, and where the runs of each begin."""
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
        owned = np.repeat(np.arange(len(known)), counts)[by_owner]  # numbers of runs, those of an item together
        ends = np.searchsorted(owners[by_owner], items, "right")
        occurring = []
        for item, begin, end in zip(items.tolist(), np.searchsorted(owners[by_owner], items), ends, strict=True):
            own = owned[begin:end]
            size, width = int(self._sizes[item]), 2 * int(self._lengths[item]) + APART
            enough = math.ceil(self.rules.min_score * size - 1e-9)
            # an occurrence lacks no more than size - enough runs: one of those that stand in fewest places is in it
            rarest = own[np.argsort(repeats[own], kind="stable")[: len(own) - enough + 1]]
            some = [places[starts[run] : starts[run] + min(repeats[run], MOST)] for run in rarest]
            some = np.unique(np.concatenate(some))  # and all places within `width` of these
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
    """The most different runs that begin within `width` letters, and the places in stretches that have enough."""
    most, start, within = 0, 0, Counter[int]()
    dense: list[int] = []
    listed = 0  # places before it are dense, or left behind
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
    """The question of a record of an evaluation, and its right answer where the question is short."""
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
    """The right one of the choices of a record, which tells it by its place, from 0, or by its letter."""
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
