"""Training batches as a pure function of (seed, step), and the batches of a complete validation set.

The stream of training tokens concatenates all documents in the shuffled order of epoch 0, then all in that of epoch 1,
and so on. It is cut into rows of T tokens, which are dealt out in shuffled order within each epoch (`Stream.place`).
No token is dropped or repeated within an epoch: a document cut at the end of a row continues in the next one, and the
last row of an epoch extends into the next epoch.

    token_ids_BT   int64   the inputs
    targets_BT     int64   the token that follows each input in its document, also across the end of a row; `end`
                           (<|endoftext|>) after the last token of a document; -100 if nothing is predicted
    doc_ids_BT     int32   0, 1, 2 ... along each row: attention stays within a document

So in every epoch each token is an input once, and each token except the `start` of a document, and the `end` of each
document, is predicted once, from its own document. A document that continues in another row loses its context there.
Nothing depends on the number of processes or micro-batches, and a run resumes by requesting its next step.

With several sources, each has such a stream, and contributes its share of the tokens of every step, exact to one token.
Complete rows come first; the partial rows at both ends of each share are concatenated in the rows after them. A source
that runs out continues with its next epoch.

A `Mixture` packs complete examples. Each is drawn from the source that is furthest behind its share of tokens; every
source has its own order, reshuffled each epoch. Windows of about 64 rows are packed best-fit, longest first; examples
are not truncated and do not attend to each other, and the rest of a row is padding that predicts nothing. An example
longer than a row is alone in its row, which `pack` extends as necessary.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import ceil
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from llmkit.data.examples import Examples
from llmkit.data.shards import TokenShards
from llmkit.errors import UserError
from llmkit.io.progress import counted

_64_BITS = (1 << 64) - 1
IGNORED = -100  # target of positions that predict nothing, as in torch's cross_entropy

# The documents of an epoch in order, and the end of each
Order: TypeAlias = tuple[np.ndarray, np.ndarray]
WINDOW_ROWS = 64
SOURCE_SEEDS = 7919  # difference between the seeds of consecutive sources
COUNTED_ROWS = 2**18  # rows that are planned to count steps and epochs; more are extrapolated

Row = list[tuple[int, int]]  # (source, example) pairs of a row


class TokenRows(NamedTuple):
    """Rows of token ids, targets and document numbers, all [B, T]; see the module docstring."""

    token_ids_BT: np.ndarray
    targets_BT: np.ndarray
    doc_ids_BT: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, including padding."""
        return self.token_ids_BT.size

    def nothing(self) -> TokenRows:
        """Return a row that predicts nothing, for a rank that has no more rows while others do."""
        return TokenRows(self.token_ids_BT[:1], np.full_like(self.targets_BT[:1], IGNORED), self.doc_ids_BT[:1])


class Stream:
    """The endless stream of one source, whose rows are dealt out in shuffled order within an epoch.

    A row is found by binary search: row 1,000,000 costs as much as row 0. Memory: 16 bytes per document for each of
    the last two epochs used.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, seed: int) -> None:
        self.shards, self.sequence_length, self.seed = shards, sequence_length, seed

        @lru_cache(maxsize=2)
        def order(epoch: int) -> Order:
            documents = shuffled(shards.documents, seed, epoch)
            return documents, np.cumsum(shards.lengths[documents])

        self._order = order

    def place(self, index: int) -> int:
        """Return the position in the stream, in rows, of the row dealt out as number `index`."""
        tokens, length = self.shards.tokens, self.sequence_length
        epoch = index * length // tokens
        first = -(-epoch * tokens // length)  # the first row that begins in the epoch
        count = -(-(epoch + 1) * tokens // length) - first
        return first + permuted(index - first, count, self.seed, epoch)

    def fill(self, rows: TokenRows, position: int) -> None:
        """Write the tokens from `position` in the dealt rows into flat rows, which must end within the dealt row."""
        index, offset = divmod(position, self.sequence_length)
        position = self.place(index) * self.sequence_length + offset
        _fill(rows, self.shards, self._order, position, self.shards.info.end)


class Batches:
    """Training batches from several sources.

    sequence_length: tokens per row, T
    batch_size:      rows per step, B, over all processes
    seed:            determines the order of the documents
    shares:          first step -> the share of each source from that step on, summing to 1 [equal shares]

    Raise UserError if a step has fewer tokens than the square of the number of sources, because shares are rounded to
    tokens and the largest source gets the rest.
    """

    def __init__(
        self,
        sources: Sequence[TokenShards],
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        shares: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        self.sources, self.sequence_length, self.batch_size = list(sources), sequence_length, batch_size
        self.shares = dict(sorted((shares or {0: [1 / len(self.sources)] * len(self.sources)}).items()))
        self._streams = [
            Stream(shards, sequence_length, seed + SOURCE_SEEDS * number) for number, shards in enumerate(self.sources)
        ]
        if (fewest := len(self.sources) ** 2) > batch_size * sequence_length:
            raise UserError(
                f"--batch-tokens: expected at least {fewest} for the shares of "
                f"{counted(len(self.sources), 'input')}, found {batch_size * sequence_length}"
            )

    def batch(self, step: int) -> TokenRows:
        """Return the rows of a step."""
        shape = self.batch_size, self.sequence_length
        batch = TokenRows(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32))
        flat = [array.reshape(-1) for array in batch]
        filled = 0
        for position, size, stream in sorted(self._pieces(step), key=lambda piece: piece[1] < self.sequence_length):
            stream.fill(TokenRows._make(array[filled : filled + size] for array in flat), position)
            filled += size
        _number_documents(batch.doc_ids_BT)
        return batch

    def taken(self, step: int) -> list[int]:
        """Return each source's tokens before a step: in each phase its share, to one token; the largest, the rest."""
        taken = [0] * len(self.sources)
        for (first, shares), stop in zip(self.shares.items(), [*list(self.shares)[1:], step], strict=True):
            tokens = max(0, min(stop, step) - first) * self.batch_size * self.sequence_length
            counts = [int(share * tokens) for share in shares]
            counts[int(np.argmax(shares))] += tokens - sum(counts)
            taken = [before + more for before, more in zip(taken, counts, strict=True)]
        return taken

    def realised(self, first: int, stop: int) -> list[float]:
        """Return the actual share of each source in the tokens of steps `first` to `stop`."""
        counts = np.subtract(self.taken(stop), self.taken(first))
        return (counts / max(1, counts.sum())).round(6).tolist()

    def epochs(self, step: int) -> list[float]:
        """Return the epochs over each source before a step."""
        return [round(taken / shards.tokens, 3) for taken, shards in zip(self.taken(step), self.sources, strict=True)]

    def prefetch(self, first_step: int) -> Iterator[TokenRows]:
        """Yield the batches from a step on, endlessly, prepared ahead in a thread."""
        return prefetched(self.batch, first_step)

    def _pieces(self, step: int) -> Iterator[tuple[int, int, Stream]]:
        """Yield the pieces of dealt rows that make up a step: first token, number of tokens, stream."""
        for stream, position, stop in zip(self._streams, self.taken(step), self.taken(step + 1), strict=True):
            while position < stop:
                size = min(self.sequence_length - position % self.sequence_length, stop - position)
                yield position, size, stream
                position += size


class EvaluationBatches:
    """The batches of a validation set, in its own order; each token of text is predicted exactly once.

    The sum of the losses (in nats) over all batches / ln 2 / `bytes` is bits per byte of text: neither the `end` of a
    document nor the padding of the last row is predicted. The last batch has only as many rows as necessary.

    bytes: UTF-8 bytes of the text
    """

    def __init__(self, shards: TokenShards, sequence_length: int, batch_size: int) -> None:
        self.shards, self.sequence_length, self.batch_size = shards, sequence_length, batch_size
        self._documents = np.arange(shards.documents), np.cumsum(shards.lengths)
        self.bytes = int(shards.doc_bytes.sum())

    def __iter__(self) -> Iterator[TokenRows]:
        length = self.sequence_length
        order = lambda epoch: self._documents if epoch == 0 else None  # noqa: E731
        rows = -(-self.shards.tokens // length)
        for first in range(0, rows, self.batch_size):
            shape = min(self.batch_size, rows - first), length
            token_ids, targets = np.full(shape, self.shards.info.end, np.int64), np.full(shape, IGNORED, np.int64)
            batch = TokenRows(token_ids, targets, np.zeros(shape, np.int32))
            flat = TokenRows._make(array.reshape(-1) for array in batch)
            _fill(flat, self.shards, order, first * length, IGNORED)
            _number_documents(batch.doc_ids_BT)
            yield batch


def prefetched(make: Callable[[int], TokenRows], first_step: int) -> Iterator[TokenRows]:
    """Yield `make(step)` for all steps from the first on; a thread prepares the next two."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = deque(pool.submit(make, first_step + number) for number in range(3))
        try:
            for step in count(first_step + 3):
                yield ahead.popleft().result()
                ahead.append(pool.submit(make, step))
        finally:
            for future in ahead:
                future.cancel()


def _fill(
    rows: TokenRows, shards: TokenShards, order_of: Callable[[int], Order | None], position: int, end_target: int
) -> None:
    """Write the tokens from `position` in the stream of all epochs into flat rows; document numbers are 1 where a
    document begins and 0 elsewhere. After the last epoch tokens and targets are left unchanged."""
    token_ids, targets, doc_ids = rows
    doc_ids[:] = 0
    doc_ids[0] = 1
    epoch, position = divmod(position, shards.tokens)
    current = order_of(epoch)
    index = 0 if current is None else int(np.searchsorted(current[1], position, side="right"))
    filled = 0
    while filled < len(token_ids) and current is not None:
        order, ends = current
        document, end = int(order[index]), int(ends[index])
        length = int(shards.lengths[document])
        begin = position - (end - length)
        size = min(end - position, len(token_ids) - filled)
        # one more token than inputs, as the target of the last one, unless the document ends there
        piece = shards.span(document, begin, min(begin + size + 1, length))
        token_ids[filled : filled + size] = piece[:size]
        targets[filled : filled + len(piece) - 1] = piece[1:]
        if begin + size == length:
            targets[filled + size - 1] = end_target
        filled, position, index = filled + size, position + size, index + 1
        if filled < len(token_ids):
            doc_ids[filled] = 1
        if index == len(order):
            epoch, position, index = epoch + 1, 0, 0
            current = order_of(epoch)


def _number_documents(doc_ids_BT: np.ndarray) -> None:
    """Turn the 1 at the beginning of each document into document numbers, in place."""
    doc_ids_BT[:, 0] = 0
    np.cumsum(doc_ids_BT, axis=1, out=doc_ids_BT)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0 ... count - 1 determined by (seed, epoch), int64.

    It sorts hashes of the numbers. The hash is a bijection, so there are no ties; and unlike numpy's generators it
    gives the same order in every version, which resumed runs need.
    """
    drawn = splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) + np.uint64(epoch)
    keys = splitmix64(np.arange(count, dtype=np.uint64) + splitmix64(drawn))
    return np.argsort(keys)


def permuted(index: int, count: int, seed: int, epoch: int) -> int:
    """Return the image of `index` under a permutation of 0 ... count - 1 determined by (seed, epoch), in O(1) memory.

    A Feistel network of 6 rounds over the next power of 4, iterated until the result is in range (cycle walking): Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    drawn = _mixed(epoch + _mixed(seed))
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            key = _mixed(right + (turn << 40) + drawn)
            left, right = right, left ^ (key & mask)
        index = (left << half) | right
        if index < count:
            return index


def _mixed(number: int) -> int:
    """Compute `splitmix64` of one number with Python integers: 10 times faster than an array of one."""
    mixed = (number + 0x9E3779B97F4A7C15) & _64_BITS
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _64_BITS
    return mixed ^ (mixed >> 31)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers by a bijection: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Packable(Protocol):
    """Examples that can be packed: the items, the tokens that each takes of a row, and their sum, `inputs`."""

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
    """Examples and their share of the tokens, relative to the other sources."""

    examples: Packable
    weight: float


class Mixture:
    """Training batches of packed examples from several sources.

    sequence_length  tokens per row, T
    batch_size       rows per step, B
    pad              the padding token
    pack             makes a batch from rows of examples; by default `packed`
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
        self.pad, self._seed, self._pack = pad, seed, pack or packed
        self._draws = self._drawn()
        self._rows: list[Row] = []
        self._drawn_inputs: list[int] = []  # tokens drawn after each row of `_rows`, interpolated within a window
        self._windows, self._lock = 0, Lock()

    @property
    def inputs(self) -> int:
        """Number of tokens in one epoch over all sources."""
        return sum(source.examples.inputs for source in self.sources)

    def steps_for(self, inputs: float) -> int:
        """Return the number of steps that use `inputs` tokens, at least one."""
        with self._lock:
            while not self._drawn_inputs or (self._drawn_inputs[-1] < inputs and len(self._rows) < COUNTED_ROWS):
                self._plan_window()
            rows = bisect_left(self._drawn_inputs, inputs) + 1
            if inputs > self._drawn_inputs[-1]:
                rows = ceil(inputs / self._drawn_inputs[-1] * len(self._rows))
        return max(1, -(-rows // self.batch_size))

    def epochs(self, step: int) -> list[tuple[Source, float]]:
        """Return each source with the epochs over it before a step."""
        taken, rows = [0] * len(self.sources), step * self.batch_size
        counted = min(rows, max(COUNTED_ROWS, len(self._rows)))
        for row in self._planned(counted)[:counted]:
            for source, example in row:
                taken[source] += int(self._sizes[source][example])
        return [
            (source, count / source.examples.inputs * (rows / max(1, counted)))
            for count, source in zip(taken, self.sources, strict=True)
        ]

    def batch(self, step: int) -> TokenRows:
        """Return the rows of a step."""
        first = step * self.batch_size
        planned = self._planned(first + self.batch_size)[first : first + self.batch_size]
        rows = [[self.sources[source].examples[number] for source, number in row] for row in planned]
        return self._pack(rows, self.sequence_length, self.pad)

    def prefetch(self, first_step: int) -> Iterator[TokenRows]:
        """Yield the batches from a step on, endlessly, prepared ahead in a thread."""
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
        """Yield (source, example) endlessly, from the source that is furthest behind its share."""
        drawn = [0] * len(self.sources)
        orders = [self._in_epochs(number) for number in range(len(self.sources))]
        while True:
            behind = min(range(len(self.sources)), key=lambda s: drawn[s] / self.sources[s].weight)
            example = next(orders[behind])
            drawn[behind] += int(self._sizes[behind][example])
            yield behind, example

    def _in_epochs(self, number: int) -> Iterator[int]:
        for epoch in count():
            yield from shuffled(len(self._sizes[number]), self._seed + SOURCE_SEEDS * number, epoch).tolist()


class PackedEvaluation:
    """The batches of held-out examples; each target is predicted once. The last one has only the necessary rows."""

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
    """Pack items, by index, into bins of `capacity`: largest first, each into the fullest bin with room for it.

    Uses at most 11/9 of the fewest bins (Johnson et al. 1974). Raise ValueError for an item larger than a bin.
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
    """Concatenate the (token ids, trained) pairs of each row to inputs, next-token targets and document numbers."""
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
