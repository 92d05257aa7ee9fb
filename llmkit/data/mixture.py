"""Training rows of several sources of examples, by weight: packed whole, in an order that is a function of the seed.

Examples are drawn one after another from the source that is furthest behind its share of tokens, each source in an
order of its own, drawn anew for each epoch. Windows of about 64 rows of them are packed best-fit, longest first; no
example is cut, none sees another, and what stays empty is padding that predicts nothing. An example that is longer
than a row stands alone in one, for `pack` to make as long as it needs. Batches are those of
llmkit.data.batches, and like those do not depend on the number of processes or micro-batches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from threading import Lock
from typing import Any, Protocol

import numpy as np

from llmkit.data.batches import IGNORED, TokenRows, prefetched, shuffled
from llmkit.data.examples import Examples

WINDOW_ROWS = 64
COUNTED_ROWS = 2**18  # whose contents say how many are needed; the need of more is in proportion

Row = list[tuple[int, int]]  # of a row: (source, example) pairs, side by side


class Packable(Protocol):
    """Examples that are packed whole: each one, and its tokens of a row, `inputs` in all."""

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def inputs(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Source:
    """Examples and their share of the tokens, relative to the other sources'."""

    examples: Packable
    weight: float


class Mixture:
    """The training batches of some sources.

    sequence_length  tokens in a row, T
    batch_size       rows in a step, B
    pad              the token that fills rows
    pack             makes a batch of rows of examples: `packed`, or what the examples want
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sequence_length: int,
        batch_size: int,
        pad: int,
        seed: int = 0,
        pack: Callable[[list[list[Any]], int, int], Any] | None = None,
    ):
        self.sources, self.sequence_length, self.batch_size = list(sources), sequence_length, batch_size
        self._sizes = [source.examples.sizes for source in self.sources]
        self._pad, self._seed, self._pack = pad, seed, pack or packed
        self._draws = self._drawn()
        self._rows: list[Row] = []
        self._drawn_inputs: list[int] = []  # after each row of `_rows`, rounded up to its window
        self._windows, self._lock = 0, Lock()

    @property
    def inputs(self) -> int:
        """Tokens of all sources, each once."""
        return sum(source.examples.inputs for source in self.sources)

    def steps_for(self, inputs: float) -> int:
        """The steps in which so many tokens are gone through, at least one."""
        with self._lock:
            while not self._drawn_inputs or (self._drawn_inputs[-1] < inputs and len(self._rows) < COUNTED_ROWS):
                self._plan_window()
            rows = bisect_left(self._drawn_inputs, inputs) + 1
            if inputs > self._drawn_inputs[-1]:
                rows = ceil(inputs / self._drawn_inputs[-1] * len(self._rows))
        return max(1, -(-rows // self.batch_size))

    def epochs(self, step: int) -> list[float]:
        """Epochs over each source before a step."""
        taken, rows = [0] * len(self.sources), step * self.batch_size
        counted = min(rows, max(COUNTED_ROWS, len(self._rows)))
        for row in self._planned(counted)[:counted]:
            for source, example in row:
                taken[source] += int(self._sizes[source][example])
        return [
            count / source.examples.inputs * (rows / max(1, counted))
            for count, source in zip(taken, self.sources, strict=True)
        ]

    def batch(self, step: int) -> TokenRows:
        """All rows of a step."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> TokenRows:
        """Rows start:stop of a step: the share of one process or one micro-batch."""
        first = step * self.batch_size
        planned = self._planned(first + stop)[first + start : first + stop]
        rows = [[self.sources[s].examples[i] for s, i in row] for row in planned]
        return self._pack(rows, self.sequence_length, self._pad)

    def prefetch(self, first_step: int) -> Iterator[TokenRows]:
        """The batches from a step on, without an end, made ahead of time."""
        return prefetched(self.batch, first_step)

    def _planned(self, rows: int) -> list[Row]:
        with self._lock:
            while len(self._rows) < rows:
                self._plan_window()
            return self._rows

    def _plan_window(self) -> None:
        room, chosen = WINDOW_ROWS * self.sequence_length, []
        while room > 0:
            source, example = next(self._draws)
            chosen.append((source, example))
            room -= int(self._sizes[source][example])
        sizes = [int(self._sizes[s][i]) for s, i in chosen]
        fitting = [min(size, self.sequence_length) for size in sizes]
        rows = [[chosen[i] for i in row] for row in best_fit(fitting, self.sequence_length)]
        self._rows += [rows[i] for i in shuffled(len(rows), self._seed, self._windows)]
        before = self._drawn_inputs[-1] if self._drawn_inputs else 0
        self._drawn_inputs += [before + sum(sizes) * (k + 1) // len(rows) for k in range(len(rows))]
        self._windows += 1

    def _drawn(self) -> Iterator[tuple[int, int]]:
        """(source, example) without end; the source is the one furthest behind its share."""
        drawn = [0] * len(self.sources)
        orders = [self._in_epochs(number) for number in range(len(self.sources))]
        while True:
            behind = min(range(len(self.sources)), key=lambda s: drawn[s] / self.sources[s].weight)
            example = next(orders[behind])
            drawn[behind] += int(self._sizes[behind][example])
            yield behind, example

    def _in_epochs(self, number: int) -> Iterator[int]:
        count, epoch = len(self.sources[number].examples), 0
        while True:
            yield from shuffled(count, self._seed + 7919 * number, epoch).tolist()
            epoch += 1


class PackedEvaluation:
    """The batches of held-out examples, each target predicted once; the last has only the rows that it needs."""

    def __init__(self, examples: Examples, sequence_length: int, batch_size: int, pad: int) -> None:
        self._examples, self._length, self._size, self._pad = examples, sequence_length, batch_size, pad
        self._rows = best_fit(examples.sizes.tolist(), sequence_length)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[TokenRows]:
        for start in range(0, len(self._rows), self._size):
            rows = [[self._examples[i] for i in row] for row in self._rows[start : start + self._size]]
            yield packed(rows, self._length, self._pad)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items by number in bins of `capacity`: longest first, each into the fullest bin that has room for it.

    Within 11/9 of the fewest bins (Johnson et al. 1974). Raises ValueError for an item that fits no bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), ascending
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > capacity:
            raise ValueError(f"an item of {sizes[item]} in bins of {capacity}")
        at = bisect_left(room, (sizes[item], -1))
        if at == len(room):
            bins.append([])
            left, chosen = capacity, len(bins) - 1
        else:
            left, chosen = room.pop(at)
        bins[chosen].append(item)
        insort(room, (left - sizes[item], chosen))
    return bins


def packed(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], sequence_length: int, pad: int) -> TokenRows:
    """(token ids, trained) pairs side by side in each row: inputs, the next tokens as targets, document numbers."""
    shape = len(rows), sequence_length
    token_ids, targets = np.full(shape, pad, np.int64), np.full(shape, IGNORED, np.int64)
    doc_ids = np.zeros(shape, np.int32)
    for row, examples in enumerate(rows):
        at = 0
        for number, (ids, trained) in enumerate(examples):
            end = at + len(ids) - 1
            token_ids[row, at:end] = ids[:-1]
            targets[row, at:end] = np.where(trained[1:], ids[1:], IGNORED)
            doc_ids[row, at:end] = number
            at = end
        doc_ids[row, at:] = len(examples) if at else 0
    return TokenRows(token_ids, targets, doc_ids)
