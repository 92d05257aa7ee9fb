"""Index of the document that had each key first: sorted runs of (key, document), merged as they grow.

    index = BandIndex()
    index.find(keys)                 # the document of each key, or NOBODY
    index.insert(keys, documents)    # keys that find() did not know

A log-structured merge tree (O'Neil et al., 1996) of numpy arrays: 13 bytes a key, and while the largest runs are merged
in memory 26. A Python dict takes 100. Keys are hashes, so that a table of where each 1/m of their range begins in a run
leaves few to look at: a binary search in 6 million keys took 5 times as long, most of it waiting for memory.

All of it lies in memory, or in files of a folder where one is given: `ArrayWriter` writes an array from front to back,
and `Rows` holds rows that are appended and read by number.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 16  # rows that are in memory before they go to a file: 8 MiB of 128 bytes
TOUCHED_ROWS = 1 << 10  # rows read before their pages are released; the system maps 64 KiB around each, at most 64 MiB
NOBODY = np.uint32(0xFFFFFFFF)
RATIO = 4  # a run is merged into the one before it where that has fewer than 4 times its keys
IN_FILE = 1 << 18  # keys from which a run is worth a file
CHUNK = 1 << 18  # keys merged at once
BUCKET = 4  # keys between two entries of a run's table, on average; the fullest bucket of millions has 20
LOOKED_UP = 1 << 11  # keys at once
TOUCHED = 1 << 11  # keys looked up before their pages are released; the system maps 64 KiB around each that is read


class ArrayWriter:
    """An array of `count` items that is written from front to back.

    With a folder it lies in a file without a name there, which not even a killed process leaves behind; it can be read
    only, and its pages are the system's to drop when memory is short.
    """

    def __init__(self, dtype: np.dtype | type, count: int, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder) if folder else None  # noqa: SIM115 -- closed by array()
        self._array, self._written = np.empty(0 if folder else count, dtype), 0

    def write(self, part: np.ndarray) -> None:
        """Add items of the array's type at the end."""
        if self._file:
            self._file.write(np.ascontiguousarray(part, self._array.dtype).view(np.uint8).data)
        else:
            self._array[self._written : self._written + len(part)] = part
            self._written += len(part)

    def array(self) -> np.ndarray:
        """The array, when all was written."""
        if self._file:
            with self._file:
                self._file.flush()
                pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._array = np.frombuffer(pages, self._array.dtype)
            advise([self._array], "MADV_RANDOM")  # or a lookup reads 16 pages around the one that it needs
        return self._array


def advise(arrays: Iterable[np.ndarray], advice: str) -> None:
    """Say how those arrays that lie in files are about to be read; MADV_DONTNEED takes their pages out of memory."""
    for array in arrays:
        pages = getattr(array.base, "obj", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, advice):  # not on Windows
            pages.madvise(getattr(mmap, advice))


class Rows:
    """Rows that are appended, and read by number: the last 65,536 at most in memory where there is a folder."""

    def __init__(self, dtype: np.dtype, folder: Path | None = None) -> None:
        self._folder, self._count, self._touched = folder, 0, 0
        self._blocks: list[np.ndarray] = []  # BLOCK rows each
        self._last = np.empty(BLOCK, dtype)

    def append(self, rows: np.ndarray) -> None:
        """Add rows (n,) at the end."""
        while len(rows):
            start = self._count % BLOCK
            part, rows = rows[: BLOCK - start], rows[BLOCK - start :]
            self._last[start : start + len(part)] = part
            self._count += len(part)
            if self._count % BLOCK == 0:
                block = ArrayWriter(self._last.dtype, BLOCK, self._folder)
                block.write(self._last)
                self._blocks.append(block.array())

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (n,), in their order."""
        taken = np.empty(len(numbers), self._last.dtype)
        blocks = numbers // BLOCK
        for block in np.unique(blocks):
            wanted = blocks == block
            rows = self._blocks[block] if block < len(self._blocks) else self._last
            taken[wanted] = rows[numbers[wanted] % BLOCK]
            self._touched += np.count_nonzero(wanted)
            if self._touched >= TOUCHED_ROWS:
                advise(self._blocks, "MADV_DONTNEED")
                self._touched = 0
        return taken


class Pairs(NamedTuple):
    """Distinct keys in ascending order (n,) uint64, and the document that had each first (n,) uint32."""

    keys: np.ndarray
    documents: np.ndarray


class Run(NamedTuple):
    """Pairs, with the table of where each bucket begins (buckets,) uint32, and the size of the largest bucket."""

    pairs: Pairs
    starts: np.ndarray
    width: int

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of those keys (n,) that the run holds, and their documents."""
        buckets = _buckets(keys, len(self.starts))
        at = self.starts[buckets][:, None] + np.arange(self.width)
        index, column = np.nonzero(self.pairs.keys.take(at, mode="clip") == keys[:, None])
        return index, self.pairs.documents.take(at[index, column], mode="clip")


class BandIndex:
    """Keys and the documents that had them first; large runs in files of the folder where one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._runs: list[Run] = []  # the largest first
        self._touched = 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The document of each key (n,) uint64, NOBODY where it is new: (n,) uint32. Sorted keys are found faster."""
        firsts = np.full(len(keys), NOBODY)
        for start in range(0, len(keys), LOOKED_UP):
            some = keys[start : start + LOOKED_UP]
            for run in self._runs:
                index, documents = run.find(some)
                firsts[start + index] = documents
            self._touched += len(some)
            if self._touched >= TOUCHED:
                advise((array for run in self._runs for array in run.pairs), "MADV_DONTNEED")
                self._touched = 0
        return firsts

    def insert(self, keys: np.ndarray, documents: np.ndarray) -> None:
        """Add new keys (n,) uint64, sorted and distinct, with their documents (n,) uint32."""
        if not len(keys):
            return
        self._runs.append(self._written([Pairs(keys, documents)], len(keys)))
        while len(self._runs) > 1 and len(self._runs[-2].pairs.keys) < RATIO * len(self._runs[-1].pairs.keys):
            small, large = self._runs.pop().pairs, self._runs.pop().pairs
            self._runs.append(self._written(_merging(large, small), len(large.keys) + len(small.keys)))

    def _written(self, pieces: Iterable[Pairs], count: int) -> Run:
        """Pieces in the order of their keys, `count` keys in all, as a run."""
        folder = self._folder if count >= IN_FILE else None
        keys, documents = ArrayWriter(np.uint64, count, folder), ArrayWriter(np.uint32, count, folder)
        table = np.zeros(count // BUCKET + 2, np.uint32)
        for piece in pieces:
            keys.write(piece.keys)
            documents.write(piece.documents)
            buckets = _buckets(piece.keys, len(table) - 1)
            counted = np.bincount(buckets - buckets[0])
            table[1 + buckets[0] : 1 + buckets[0] + len(counted)] += counted.astype(np.uint32)
        width = int(table.max())
        np.cumsum(table, out=table)
        return Run(Pairs(keys.array(), documents.array()), table[:-1], width)


def _buckets(keys: np.ndarray, count: int) -> np.ndarray:
    """The number of each key's part of the range of keys, of `count` equal parts: int64."""
    return (((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def _merging(large: Pairs, small: Pairs) -> Iterator[Pairs]:
    """Two runs as one, in pieces, so that the memory for it is bounded."""
    advise([*large, *small], "MADV_SEQUENTIAL")
    at = 0
    for start in range(0, len(large.keys), CHUNK):
        stop, before = start + CHUNK, at
        at = int(np.searchsorted(small.keys, large.keys[stop])) if stop < len(large.keys) else len(small.keys)
        keys = np.concatenate([large.keys[start:stop], small.keys[before:at]])
        order = np.argsort(keys, kind="stable")  # merges what is sorted: 4 times as fast as numpy's default
        yield Pairs(keys[order], np.concatenate([large.documents[start:stop], small.documents[before:at]])[order])
        advise([*large, *small], "MADV_DONTNEED")
