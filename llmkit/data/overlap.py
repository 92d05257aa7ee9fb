"""Find held-out records that also occur in the training data, exactly or nearly.

    overlap = Overlap.of_texts(["What is the sea?"])
    overlap.compare_texts(["what is the sea", "What is salt?"])
    overlap.exact, overlap.near  # 1, 0

Records are sequences of integers: hashed words, or tokens. A held-out record nearly occurs in a training record that
has most of its n-grams. N-grams shared by many held-out records are not counted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from llmkit.crawl.filters.contamination import Contamination, ContaminationRules, Findings
from llmkit.data.batches import Source, splitmix64
from llmkit.data.examples import DataFile
from llmkit.data.shards import TokenShards
from llmkit.formats.conversations import Conversation
from llmkit.io.jsonl import input_files, name_of
from llmkit.io.progress import counted, say

_ALONE = r"\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff"  # letters of scripts without spaces between words
WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
NEAR = 0.75  # share of a held-out record's n-grams in one training record for a near match
AT_ONCE = 4 << 20  # training tokens compared at a time
FEWEST, COMMON = 3, 10  # fewest n-grams for a near match; most held-out records that may share an n-gram


def words(text: str) -> np.ndarray:
    """Hash the words of a text, int64, valid in this process; case and punctuation are ignored."""
    return np.array([hash(word) for word in WORD.findall(text.casefold())], np.int64)


class Overlap:
    """Finds held-out sequences in training data.

    run    length of an n-gram, a power of 2
    every  about one in `every` n-grams is compared, which is enough for long sequences
    """

    def __init__(self, held_out: Iterable[np.ndarray], run: int = 2, every: int = 1) -> None:
        self._run, self._every = run, np.uint64(every)
        records = [np.asarray(tokens, np.int64) for tokens in held_out]
        self.records = len(records)
        self._places: dict[bytes, list[int]] = defaultdict(list)
        for number, record in enumerate(records):
            if len(record):
                self._places[record.tobytes()].append(number)
        runs, owners = self._runs_of(records)
        order = np.lexsort((owners, runs))
        runs, owners = runs[order], owners[order]
        new = np.ones(len(runs), bool)  # count an n-gram once per record
        new[1:] = (runs[1:] != runs[:-1]) | (owners[1:] != owners[:-1])
        self._owners = owners[new]
        self._runs, self._first, self._counts = np.unique(runs[new], return_index=True, return_counts=True)
        rare = self._counts <= COMMON
        self._runs, self._first, self._counts = self._runs[rare], self._first[rare], self._counts[rare]
        _, of_rare = self._held_with(np.arange(len(self._runs)), np.zeros(len(self._runs), np.int64))
        self._sizes = np.bincount(of_rare, minlength=len(records))
        self._exact, self._near = np.zeros(len(records), bool), np.zeros(len(records), bool)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Overlap:
        """Index held-out texts by their words."""
        return cls(map(words, texts))

    @property
    def exact(self) -> int:
        """Number of held-out sequences that equal a training sequence."""
        return int(self._exact.sum())

    @property
    def near(self) -> int:
        """Number of other held-out sequences that nearly occur in training."""
        return int((self._near & ~self._exact).sum())

    def compare(self, training: Sequence[np.ndarray]) -> None:
        """Search training sequences for the held-out ones."""
        lengths = {len(whole) // 8 for whole in self._places}
        for sequence in training:
            if len(sequence) not in lengths:
                continue
            self._exact[self._places.get(np.asarray(sequence, np.int64).tobytes(), [])] = True
        if not len(self._runs):
            return
        runs, seen_in = self._runs_of(training)
        places = np.searchsorted(self._runs, runs)
        places[places == len(self._runs)] = 0
        hit = self._runs[places] == runs
        pairs = np.unique(seen_in[hit] * len(self._runs) + places[hit])
        seen_in, records = self._held_with(pairs % len(self._runs), pairs // len(self._runs))
        both, counts = np.unique(seen_in * self.records + records, return_counts=True)
        records = both % self.records
        same = (counts >= NEAR * self._sizes[records]) & (self._sizes[records] >= FEWEST)
        self._near[records[same]] = True

    def compare_texts(self, training: Iterable[str]) -> None:
        """Search training texts for the held-out ones."""
        self.compare([words(text) for text in training])

    def compare_shards(self, training: TokenShards) -> None:
        """Search the training shards for the held-out documents."""
        documents: list[np.ndarray] = []
        size = 0
        for document in range(len(training)):
            documents.append(training[document])
            size += len(documents[-1])
            if size >= AT_ONCE or document + 1 == len(training):
                self.compare(documents)
                documents, size = [], 0

    def report(self, quiet: bool) -> None:
        """Print the number of held-out records in training, if any."""
        if self.exact + self.near:
            count = self.exact + self.near
            both = f"{self.exact} exactly, {self.near} nearly"
            say(
                f"--val: {count} of {counted(self.records, 'record')} {'is' if count == 1 else 'are'} also in the "
                f"training data ({both}), so the validation is too optimistic; remove them from one of the two",
                quiet,
            )

    def _held_with(self, places: np.ndarray, seen_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs of training and held-out records that share an n-gram, from (n-gram, training record) pairs."""
        pairs = [
            (seen_in[some], self._owners[self._first[places[some]] + turn])
            for turn in range(int(self._counts.max(initial=0)))
            if (some := self._counts[places] > turn).any()
        ]
        seen, held_out = zip(*pairs, strict=True) if pairs else ([seen_in[:0]], [seen_in[:0]])
        return np.concatenate(seen), np.concatenate(held_out)

    def _runs_of(self, sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of the n-grams of sequences, and the sequence of each."""
        owners = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
        if len(owners) < self._run:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        hashes = splitmix64(np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences]).view(np.uint64))
        size = 1
        while size < self._run:
            hashes = hashes[:-size] * np.uint64(2 * size + 1) + hashes[size:]
            size *= 2
        chosen = (owners[: len(hashes)] == owners[self._run - 1 :]) & ((hashes >> np.uint64(32)) % self._every == 0)
        return hashes[chosen], owners[: len(hashes)][chosen]


def read_sources(
    read: Callable[..., tuple[Any, str]],
    files: Sequence[DataFile],
    val: Sequence[str],
    quiet: bool,
    read_held_out: Callable[..., tuple[Any, str]] | None = None,
) -> tuple[list[Source], list[Any], list[str]]:
    """Read training sources, with a digest of each, and held-out ones; report held-out records in the training data.

    read: returns examples and their digest, for a name and paths; passes the texts to its argument `observe`, if any
    """
    texts: list[str] = []
    held_out = [(read_held_out or read)(name_of(path), input_files([path]), observe=texts.extend)[0] for path in val]
    overlap = Overlap.of_texts(texts)
    sources, digests = [], []
    for number, file in enumerate(files):
        examples, digest = read(name_of(file.path), file.files, observe=overlap.compare_texts if val else None)
        if before := [other.path for other in files[:number]].count(file.path):
            examples.name += f" ({before + 1})"  # separate figures for a file that is given again
        sources.append(Source(examples, file.weight or float(examples.inputs)))
        digests.append(digest)
    overlap.report(quiet)
    return sources, held_out, digests


def item_finder(not_in: tuple[str, ...], findings: Findings, shown: int, quiet: bool) -> Callable[[Conversation], bool]:
    """Return a function that tests if a conversation contains an item of `--not-in`; it adds to `findings`, and prints
    the first `shown`."""
    index = Contamination(ContaminationRules(not_in), quiet)

    def holds_item(conversation: Conversation) -> bool:
        text = "\n".join(part.text for message in conversation.messages for part in message.parts)
        matches = index.find(conversation.document or text)
        if not matches:
            return False
        findings.add(conversation.where, matches)
        if findings.documents <= shown:
            item, score = matches[0]
            say(f"dropped: {conversation.where}: contains {item}, score {score:.2f}", quiet)
        return True

    return holds_item
