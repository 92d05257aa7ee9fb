"""Training batches as a pure function of (seed, step), and the batches of a whole validation set.

The stream of training tokens is: all documents in an order drawn for epoch 0, then all documents in an order
drawn for epoch 1, and so on, end to end. Row r of step s is the T tokens from (s * batch_size + r) * T on: no
token is dropped or repeated within an epoch, a document cut by the end of a row goes on in the next one, and
the row at the end of an epoch runs into the next epoch.

    token_ids_BT   int64   the inputs
    targets_BT     int64   the token that follows each input in its document, also across the end of a row;
                           after the last token of a document `end` (<|endoftext|>); -100 for nothing
    doc_ids_BT     int32   0, 1, 2 ... along each row: attention stays within one number

So in every epoch each token is an input once; each token but the `start` of a document is predicted once,
from its own document; and so is the `end` of each document. A document that continues in another row loses its
context there. Nothing depends on the number of processes or micro-batches: a process takes
`rows(step, start, stop)`, and a run resumes by asking for its next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import NamedTuple, TypeAlias

import numpy as np

from llmkit.data.shards import TokenShards

_64_BITS = (1 << 64) - 1
IGNORED = -100  # the target where nothing is predicted, as in torch's cross_entropy

# Documents in the order of an epoch, and where each ends in it
Order: TypeAlias = tuple[np.ndarray, np.ndarray]


class TokenRows(NamedTuple):
    """Rows of token ids, targets and document numbers, all [B, T]; see the docstring of the module."""

    token_ids_BT: np.ndarray
    targets_BT: np.ndarray
    doc_ids_BT: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of all rows, with padding."""
        return self.token_ids_BT.size

    def nothing(self) -> TokenRows:
        """One row that predicts nothing, for a process that has no more rows where others have."""
        return TokenRows(self.token_ids_BT[:1], np.full_like(self.targets_BT[:1], IGNORED), self.doc_ids_BT[:1])


class Batches:
    """The training batches of a corpus.

    sequence_length: tokens in a row, T
    batch_size:      rows in a step, B, over all processes
    seed:            draws the order of the documents

    A row is found by binary search: step 1,000,000 costs what step 0 costs. Memory: 16 bytes a document for
    each of the last two epochs asked for. The corpus has a row at least.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, batch_size: int, seed: int = 0) -> None:
        self.shards, self.seed = shards, seed
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def batch(self, step: int) -> TokenRows:
        """All rows of a step."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> TokenRows:
        """Rows start:stop of a step: the share of one process or one micro-batch."""
        shape = stop - start, self.sequence_length
        batch = TokenRows(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32))
        for row in range(stop - start):
            row_batch = self._row(self.place(step * self.batch_size + start + row))
            for whole, part in zip(batch, row_batch, strict=True):
                whole[row] = part[0]
        return batch

    def place(self, index: int) -> int:
        """Where the row that is dealt out as number `index` stands in the stream, in rows."""
        tokens, length = self.shards.tokens, self.sequence_length
        epoch = index * length // tokens
        first = -(-epoch * tokens // length)  # the first row that begins in the epoch
        count = -(-(epoch + 1) * tokens // length) - first
        return first + permuted(index - first, count, self.seed, epoch)

    def _row(self, index: int) -> TokenRows:
        end = self.shards.info.end
        return _pack(self.shards, self.shards.tokens, self._order, index, 1, self.sequence_length, end)

    def epoch(self, step: int) -> float:
        """Return the number of passes through the corpus before this step."""
        return step * self.batch_size * self.sequence_length / self.shards.tokens

    def prefetch(self, first_step: int) -> Iterator[TokenRows]:
        """The batches from a step on, without an end, made ahead of time."""
        return prefetched(self.batch, first_step)

    def _draw_order(self, epoch: int) -> Order:
        order = shuffled(self.shards.documents, self.seed, epoch)
        return order, np.cumsum(self.shards.lengths[order])


class EvaluationBatches:
    """The batches of a validation set, in its own order, each token of text predicted exactly once.

    The sum of the losses (in nats) over all batches / ln 2 / `bytes` is bits per byte of text: the `end` of a
    document is no text and is not predicted here, nor is the padding that fills the last row. The last batch
    has only the rows that it needs.

    max_tokens: evaluate the first whole documents that hold so many tokens (at least one document)
    bytes:      UTF-8 bytes of the text of those documents
    targets:    number of tokens predicted

    `len(batches)`, `batches[k]` and iteration are over TokenRows; process r of w takes the k with k % w == r.
    """

    def __init__(
        self, shards: TokenShards, sequence_length: int, batch_size: int, max_tokens: int | None = None
    ) -> None:
        ends = np.cumsum(shards.lengths)
        documents = shards.documents
        if max_tokens is not None:
            documents = min(documents, int(np.searchsorted(ends, max_tokens)) + 1)
        self.shards, self.sequence_length, self.batch_size = shards, sequence_length, batch_size
        self._documents = np.arange(documents), ends[:documents]
        self.tokens = int(ends[documents - 1])
        self.targets = self.tokens - documents
        self.bytes = int(shards.doc_bytes[:documents].sum())

    def __len__(self) -> int:
        return -(-self.tokens // (self.sequence_length * self.batch_size))

    def __getitem__(self, index: int) -> TokenRows:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first_row = index * self.batch_size
        rows = min(self.batch_size, -(-self.tokens // self.sequence_length) - first_row)
        return _pack(self.shards, self.tokens, self._order, first_row, rows, self.sequence_length, IGNORED)

    def __iter__(self) -> Iterator[TokenRows]:
        return (self[index] for index in range(len(self)))

    def _order(self, epoch: int) -> Order | None:
        return self._documents if epoch == 0 else None


def prefetched(make: Callable[[int], TokenRows], first_step: int) -> Iterator[TokenRows]:
    """`make(step)` of all steps from the first on, in order; a thread makes two of them ahead of time."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = deque(pool.submit(make, first_step + number) for number in range(3))
        try:
            for step in count(first_step + 3):
                yield ahead.popleft().result()
                ahead.append(pool.submit(make, step))
        finally:
            for future in ahead:
                future.cancel()


def _pack(
    shards: TokenShards,
    epoch_tokens: int,
    order_of: Callable[[int], Order | None],
    first_row: int,
    rows: int,
    sequence_length: int,
    end_target: int,
) -> TokenRows:
    """Rows first_row ... of the stream of all epochs; after the last epoch, padding that predicts nothing."""
    token_ids = np.full(rows * sequence_length, shards.info.end, np.int64)
    targets = np.full_like(token_ids, IGNORED)
    doc_ids = np.zeros_like(token_ids, np.int32)
    epoch, position = divmod(first_row * sequence_length, epoch_tokens)
    current = order_of(epoch)
    index = 0 if current is None else int(np.searchsorted(current[1], position, side="right"))
    filled = 0
    while filled < len(token_ids) and current is not None:
        order, ends = current
        document, end = int(order[index]), int(ends[index])
        length = int(shards.lengths[document])
        begin = position - (end - length)
        size = min(end - position, len(token_ids) - filled)
        # One token more than the inputs, the target of the last of them, unless the document ends there
        piece = shards.span(document, begin, min(begin + size + 1, length))
        token_ids[filled : filled + size] = piece[:size]
        targets[filled : filled + len(piece) - 1] = piece[1:]
        if begin + size == length:
            targets[filled + size - 1] = end_target
        filled, position, index = filled + size, position + size, index + 1
        if filled < len(token_ids):
            doc_ids[filled] = 1  # another document begins: summed up along each row below
        if index == len(order):
            epoch, position, index = epoch + 1, 0, 0
            current = order_of(epoch)
    doc_ids_BT = doc_ids.reshape(rows, sequence_length)
    doc_ids_BT[:, 0] = 0
    np.cumsum(doc_ids_BT, axis=1, out=doc_ids_BT)
    return TokenRows(token_ids.reshape(doc_ids_BT.shape), targets.reshape(doc_ids_BT.shape), doc_ids_BT)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 ... count - 1 drawn by (seed, epoch), int64.

    It sorts hashes of the numbers. The hash is a bijection, so that no two are equal; and unlike numpy's
    generators it gives the same order in every version, which a resumed run needs.
    """
    drawn = splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) + np.uint64(epoch)
    keys = splitmix64(np.arange(count, dtype=np.uint64) + splitmix64(drawn))
    return np.argsort(keys)


def permuted(index: int, count: int, seed: int, epoch: int) -> int:
    """Where `index` of 0 ... count - 1 goes in a permutation drawn by (seed, epoch), without holding it.

    A Feistel network of 6 rounds over the next power of 4, walked until it falls into the range: Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains".
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
    """`splitmix64` of one number, in Python's integers: 10 times faster than an array of one."""
    mixed = (number + 0x9E3779B97F4A7C15) & _64_BITS
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _64_BITS
    return mixed ^ (mixed >> 31)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """A hash of uint64 numbers, a bijection: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
