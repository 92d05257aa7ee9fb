"""Index from each key to the first document that had it: sorted runs of (key, document), merged as they grow.

    index = BandIndex()
    index.find(keys)                 # the document of each key, or NOBODY
    index.insert(keys, documents)    # new keys only

A log-structured merge tree (O'Neil et al., 1996) of numpy arrays: 13 bytes per key, 26 while the largest runs are
merged in memory; a Python dict takes 100. Keys are hashes, so a table of where each 1/m of their range begins in a run
leaves few to compare: a binary search in 6 million keys took 5 times as long, mostly waiting for memory.

Everything is in memory, or in files of a folder if one is given: `ArrayWriter` writes an array from front to back, and
`Rows` stores rows that are appended and read by number.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 16  # rows buffered in memory before they go to a file: 8 MiB of 128-byte rows
TOUCHED_ROWS = 1 << 10  # rows read before their pages are released; the system maps 64 KiB for each, at most 64 MiB
NOBODY = np.uint32(0xFFFFFFFF)
RATIO = 4  # a run is merged into the one before it if that has fewer than 4 times as many keys
IN_FILE = 1 << 18  # fewest keys for which a run goes to a file
CHUNK = 1 << 18  # keys merged at once
BUCKET = 4  # mean keys per bucket of a run's table; the fullest of millions of buckets has 20
LOOKED_UP = 1 << 11  # keys per lookup
TOUCHED = 1 << 11  # keys looked up before their pages are released; the system maps 64 KiB for each


class ArrayWriter:
    """An array of `count` items, written from front to back.

    With a folder, the array is a read-only memory map of an unnamed temporary file there: not even a killed process
    leaves it behind, and the system can drop its pages when memory is short.
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
        """Return the array after everything was written."""
        if self._file:
            with self._file:
                self._file.flush()
                pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._array = np.frombuffer(pages, self._array.dtype)
            advise([self._array], "MADV_RANDOM")  # otherwise a lookup reads 16 pages instead of one
        return self._array


def advise(arrays: Iterable[np.ndarray], advice: str) -> None:
    """Call madvise for those arrays that are in files; MADV_DONTNEED frees their pages."""
    for array in arrays:
        pages = getattr(array.base, "obj", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, advice):  # not on Windows
            pages.madvise(getattr(mmap, advice))


class Rows:
    """Rows that are appended, and read by number. With a folder, at most the last 65,536 are in memory."""

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
        """Return the rows with these numbers (n,), in the order of the numbers."""
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
    """Distinct keys in ascending order (n,) uint64, and the first document with each (n,) uint32."""

    keys: np.ndarray
    documents: np.ndarray


class Run(NamedTuple):
    """Pairs, the start of each bucket (buckets,) uint32, and the size of the largest bucket."""

    pairs: Pairs
    starts: np.ndarray
    width: int

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the keys (n,) that are in the run, and their documents."""
        buckets = _buckets(keys, len(self.starts))
        at = self.starts[buckets][:, None] + np.arange(self.width)
        index, column = np.nonzero(self.pairs.keys.take(at, mode="clip") == keys[:, None])
        return index, self.pairs.documents.take(at[index, column], mode="clip")


class BandIndex:
    """Keys and the first document with each; with a folder, large runs are in files there."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._runs: list[Run] = []  # the largest first
        self._touched = 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the document of each key (n,) uint64, NOBODY for new keys: (n,) uint32. Fastest for sorted keys."""
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
        """Write a run from pieces in ascending order of keys, `count` keys in total."""
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
    """Return the bucket of each key, of `count` equal parts of the range of keys: int64."""
    return (((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def _merging(large: Pairs, small: Pairs) -> Iterator[Pairs]:
    """Merge two runs, in pieces to bound the memory."""
    advise([*large, *small], "MADV_SEQUENTIAL")
    at = 0
    for start in range(0, len(large.keys), CHUNK):
        stop, before = start + CHUNK, at
        at = int(np.searchsorted(small.keys, large.keys[stop])) if stop < len(large.keys) else len(small.keys)
        keys = np.concatenate([large.keys[start:stop], small.keys[before:at]])
        order = np.argsort(keys, kind="stable")  # merges sorted runs: 4 times as fast as numpy's default
        yield Pairs(keys[order], np.concatenate([large.documents[start:stop], small.documents[before:at]])[order])
        advise([*large, *small], "MADV_DONTNEED")
