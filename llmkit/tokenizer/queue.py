"""The queue of candidate pairs of a BPE training run, as flat arrays: which pairs are merged next?

A pair ranks by its count, highest first, then by its two ids, lowest first: the order of Hugging Face's trainer. Counts
only fall once a pair is filed. So it is enough to look at a *front*, the pairs that counted at least `threshold` when
they were filed or when the threshold was lowered; the others cannot rank above it. A step costs the size of the front
(thousands), not of the queue (millions).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.signedinteger]

# Pairs in the front after the threshold was lowered. At a vocabulary of 32k and 100 MB, 1,024 and 16,384 are slower.
FRONT = 4096


def rank_order(counts: Ints, keys: Ints) -> Ints:
    """Indices that sort pairs by rank."""
    return np.lexsort((keys, -counts))


class PairQueue:
    """Pairs of token ids with their counts and the positions where they may stand. A pair's id is its index."""

    def __init__(self, position_type: type) -> None:
        self.size = 0
        self.key = np.empty(1024, np.int64)  # left id << 32 | right id, which orders pairs as (left, right)
        self.count = np.empty(1024, np.int64)  # 0 once merged
        self.start = np.empty(1024, np.int64)  # it may stand at positions[start:stop]
        self.stop = np.empty(1024, np.int64)
        self.positions = np.empty(1024, position_type)
        self.noted = 0
        self.threshold = np.iinfo(np.int64).max
        self.front = np.empty(0, np.int64)

    def file(self, keys: Ints, counts: Ints, lengths: Ints, positions: Ints) -> Ints:
        """Add pairs, each with the next `length` of the positions; return their ids."""
        first, end = self.size, self.size + len(keys)
        self.key, self.count = _grown(self.key, end), _grown(self.count, end)
        self.start, self.stop = _grown(self.start, end), _grown(self.stop, end)
        self.positions = _grown(self.positions, self.noted + len(positions))
        self.key[first:end] = keys
        self.count[first:end] = counts
        stops = self.noted + np.cumsum(lengths)
        self.start[first:end] = stops - lengths
        self.stop[first:end] = stops
        self.positions[self.noted : self.noted + len(positions)] = positions
        self.noted += len(positions)
        self.size = end
        self.front = np.concatenate([self.front, first + np.flatnonzero(counts >= self.threshold)])
        return np.arange(first, end)

    def top(self, size: int, at_least: int) -> Ints:
        """The first `size` pairs by rank that count `at_least` (> 0): fewer, but not none while there are any."""
        while True:
            counts = self.count[self.front]
            if not (counts >= self.threshold).all():
                self.front = self.front[counts >= self.threshold]
                counts = counts[counts >= self.threshold]
            if len(self.front) or self.threshold <= at_least:
                break
            self._lower_threshold(at_least)
        least = at_least
        if size < len(counts):  # sort no more than needed
            least = max(least, np.partition(counts, len(counts) - size)[len(counts) - size])
        pairs = self.front[counts >= least]
        return pairs[rank_order(self.count[pairs], self.key[pairs])][:size]

    def _lower_threshold(self, at_least: int) -> None:
        counts = self.count[: self.size]
        waiting = np.flatnonzero((counts >= at_least) & (counts < self.threshold))
        cut = len(waiting) - FRONT
        self.threshold = int(np.partition(counts[waiting], cut)[cut]) if cut > 0 else at_least
        self.front = waiting[counts[waiting] >= self.threshold]

    def places(self, pairs: Ints) -> list[NDArray]:
        """The positions noted for each pair; it may have gone from some of them since."""
        bounds = zip(self.start[pairs].tolist(), self.stop[pairs].tolist(), strict=True)
        return [self.positions[start:stop] for start, stop in bounds]


def _grown(array: NDArray, size: int) -> NDArray:
    """The array, or a copy with room for `size` elements: at least half as many again, so that appending is O(1)."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, len(array) * 3 // 2), array.dtype)
    larger[: len(array)] = array
    return larger
