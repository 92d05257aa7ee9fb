"""Arrays in memory, or in files where there is a folder: written once, then read as memory, gone with the process."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

BLOCK = 1 << 16  # rows that are in memory before they go to a file: 8 MiB of 128 bytes
TOUCHED = 1 << 10  # rows read between two calls of `release`; the system maps 64 KiB around each, at most 64 MiB


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
            _advise(self._array, "MADV_RANDOM")  # or a lookup reads 16 pages around the one that it needs
        return self._array


def read_through(arrays: Iterable[np.ndarray]) -> None:
    """Say that arrays are about to be read from front to back."""
    for array in arrays:
        _advise(array, "MADV_SEQUENTIAL")


def release(arrays: Iterable[np.ndarray]) -> None:
    """Take the pages of those arrays that lie in files out of this process's memory; they come back when read."""
    for array in arrays:
        _advise(array, "MADV_DONTNEED")


def _advise(array: np.ndarray, advice: str) -> None:
    if isinstance(pages := getattr(array.base, "obj", None), mmap.mmap) and hasattr(mmap, advice):  # not on Windows
        pages.madvise(getattr(mmap, advice))


class Rows:
    """Rows that are appended, and read by number: the last 65,536 at most in memory where there is a folder."""

    def __init__(self, dtype: np.dtype, folder: Path | None = None) -> None:
        self._folder, self._count, self._touched = folder, 0, 0
        self._blocks: list[np.ndarray] = []  # BLOCK rows each
        self._last = np.empty(BLOCK, dtype)

    def __len__(self) -> int:
        return self._count

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
        found = np.empty(len(numbers), self._last.dtype)
        blocks = numbers // BLOCK
        for block in np.unique(blocks):
            wanted = blocks == block
            rows = self._blocks[block] if block < len(self._blocks) else self._last
            found[wanted] = rows[numbers[wanted] % BLOCK]
            self._touched += np.count_nonzero(wanted)
            if self._touched >= TOUCHED:
                release(self._blocks)
                self._touched = 0
        return found
