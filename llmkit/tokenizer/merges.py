"""Byte pair merges of weighted pieces of text: those of Hugging Face's BpeTrainer, in batches of numpy operations.

Input: the unique pieces of a corpus with their counts. Output: the merges in order, the same as those of
`tokenizers.trainers.BpeTrainer` with the 256 bytes as its alphabet, except that counts are int64 (there they are int32
and overflow silently above 2 billion).

One merge at a time would take 50 numpy calls for a handful of positions. But consecutive merges rarely interact. So a
*batch* of the queue's first pairs is merged at once, and then cut back to the longest prefix that gives the same
result as merging one by one. `round` is a pair's index in the batch. The prefix ends

1. before a pair whose occurrences overlap those of an earlier one ("a b c" for (a, b) and (b, c)): its count fell;
2. before a pair that ranks below a pair created in an earlier round;
3. before and after a pair of one id with itself: in "a a a" its own occurrences overlap.

With 100 MB of English and a vocabulary of 32,768 a batch has 36 merges on average, and 90 or more in the second half.

Two merged occurrences may be adjacent. Then their rounds decide which tokens were there at the time, and which pairs
were created and removed within the batch: see `_replace`.

Each token is made by one pair. All occurrences of a string are merged in the same way as long as no merge crosses its
borders, and if one does, that occurrence cannot become the token: so when (l, r) is merged, every place that can still
become this token reads l r. Hence a merged pair never returns, a pair with a new token is itself new, and every pair is
filed once, with all its occurrences. The trainer's heap handles these cases, which never occur from single bytes.

Candidate pairs are in a queue of flat arrays, `PairQueue`. A pair ranks by its count, highest first, then by its two
ids, lowest first: the order of Hugging Face's trainer. Counts only fall after a pair is filed. So it is enough to look
at a *front*, the pairs with a count of at least `threshold` when they were filed or when the threshold was lowered;
the others cannot outrank it. A step costs the size of the front (thousands), not of the queue (millions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmkit.tokenizer.patterns import byte_alphabet

Ints = NDArray[np.signedinteger]

# Size of the front after the threshold is lowered. At a vocabulary of 32k and 100 MB, 1,024 and 16,384 are slower.
FRONT = 4096
GAP = -1  # the symbol between two pieces
NO_PAIR = -1
NEVER = np.int64(2**62)  # a round after all others; int64, so that int32 rounds are widened
SMALLEST_BATCH, LARGEST_BATCH = 8, 1024
LARGEST_WORK = 1 << 18  # occurrences in a batch, unless its first pair has more


def rank_order(counts: Ints, keys: Ints) -> Ints:
    """Return indices that sort pairs by rank."""
    return np.lexsort((keys, -counts))


class PairQueue:
    """Pairs of token ids with their counts and possible positions. A pair's id is its index."""

    def __init__(self, position_type: type) -> None:
        self.size = 0
        self.key = np.empty(1024, np.int64)  # left id << 32 | right id, which orders pairs as (left, right)
        self.count = np.empty(1024, np.int64)  # 0 once merged
        self.start = np.zeros(1024, np.int64)  # pair i may occur at positions[start[i] : start[i + 1]]
        self.positions = np.empty(1024, position_type)
        self.threshold = np.iinfo(np.int64).max
        self.front = np.empty(0, np.int64)

    def file(self, keys: Ints, counts: Ints, lengths: Ints, positions: Ints) -> Ints:
        """Add pairs, pair i with the next `lengths[i]` positions; return their ids."""
        first, end = self.size, self.size + len(keys)
        noted = int(self.start[first])
        self.key, self.count, self.start = _grown(self.key, end), _grown(self.count, end), _grown(self.start, end + 1)
        self.positions = _grown(self.positions, noted + len(positions))
        self.key[first:end] = keys
        self.count[first:end] = counts
        self.start[first + 1 : end + 1] = noted + np.cumsum(lengths)
        self.positions[noted : noted + len(positions)] = positions
        self.size = end
        self.front = np.concatenate([self.front, first + np.flatnonzero(counts >= self.threshold)])
        return np.arange(first, end)

    def top(self, size: int, at_least: int) -> Ints:
        """Return up to `size` pairs by rank with counts of `at_least` (> 0); none only if no such pairs are left."""
        while True:
            counts = self.count[self.front]
            if not (counts >= self.threshold).all():
                self.front = self.front[counts >= self.threshold]
                counts = counts[counts >= self.threshold]
            if len(self.front) or self.threshold <= at_least:
                break
            every = self.count[: self.size]
            waiting = np.flatnonzero((every >= at_least) & (every < self.threshold))
            cut = len(waiting) - FRONT
            self.threshold = int(np.partition(every[waiting], cut)[cut]) if cut > 0 else at_least
            self.front = waiting[every[waiting] >= self.threshold]
        least = at_least
        if size < len(counts):  # sort no more than needed
            least = max(least, np.partition(counts, len(counts) - size)[len(counts) - size])
        pairs = self.front[counts >= least]
        return pairs[rank_order(self.count[pairs], self.key[pairs])][:size]


def _grown(array: NDArray, size: int) -> NDArray:
    """Grow an array to `size` elements, by at least half, so that appending is amortized O(1)."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, len(array) * 3 // 2), array.dtype)
    larger[: len(array)] = array
    return larger


@dataclass(frozen=True)
class Merges:
    """`tokens[i]` are the bytes of id i, the 256 single bytes first; merge j makes token 256 + j.

    counts[i] is the frequency of token i in the encoded corpus.
    """

    tokens: list[bytes]
    pairs: list[tuple[int, int]]
    counts: Ints


def train_merges(
    pieces: list[bytes],
    counts: Ints,
    vocab_size: int,
    min_frequency: int = 0,
    on_progress: Callable[[int], object] | None = None,
) -> Merges:
    """Repeatedly merge the most frequent pair until there are `vocab_size` tokens, including the 256 bytes.

    pieces: unique and not empty; counts: how often each occurs. Stop early if no pair occurs `min_frequency` times (at
    least once). on_progress is called with the number of merges since the last call.

    >>> train_merges([b"low", b"lower"], np.array([5, 2]), vocab_size=258).tokens[256:]
    [b'lo', b'low']
    """
    trainer = _Trainer(pieces, counts, vocab_size, min_frequency)
    while done := trainer.step():
        if on_progress:
            on_progress(done)
    return Merges(trainer.tokens, trainer.pairs, trainer.token_count[: len(trainer.tokens)])


class _Occurrences(NamedTuple):
    """Occurrences of the pairs of a batch."""

    position: Ints
    second: Ints  # start of the pair's right token
    after: Ints  # end of the pair
    round: Ints


class _Falls(NamedTuple):
    """Older pairs that lose an occurrence of this weight in this round."""

    pair: Ints
    weight: Ints
    round: Ints


class _Changes(NamedTuple):
    """Pairs with a new token that gain (weight > 0) or lose (< 0) an occurrence in this round, sorted by key."""

    key: Ints
    weight: Ints
    round: Ints
    position: Ints
    until: Ints  # the round that removes a gained occurrence again


Table = TypeVar("Table", _Occurrences, _Falls, _Changes)


def _where(table: Table, mask: NDArray[np.bool_]) -> Table:
    return type(table)(*(column[mask] for column in table))


class _Trainer:
    """The text, as one array with a gap before and after each piece, and the queue of its pairs.

    `symbol` has each token's id at its first and last position, so that the neighbours of an occurrence take one
    lookup. `pair_at` has the pair that begins at a token's first position, so that reducing a count takes no search.
    """

    def __init__(self, pieces: list[bytes], counts: Ints, vocab_size: int, min_frequency: int) -> None:
        alphabet = [byte for _, byte in byte_alphabet()]
        self.tokens = [bytes([byte]) for byte in alphabet]
        self.pairs: list[tuple[int, int]] = []
        self.vocab_size, self.least_count = vocab_size, max(1, min_frequency)
        self.batch = SMALLEST_BATCH
        self.token_length = np.ones(max(vocab_size, 256) + 1, np.int64)
        self.token_length[GAP] = 0

        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        gaps = np.concatenate([[0], np.cumsum(lengths + 1)])
        inside = np.ones(gaps[-1] + 1, bool)
        inside[gaps] = False
        id_of_byte = np.empty(256, np.int32)
        id_of_byte[alphabet] = np.arange(256, dtype=np.int32)
        self.symbol = np.full(len(inside), GAP, np.int32)
        self.symbol[inside] = id_of_byte[np.frombuffer(b"".join(pieces), np.uint8)]
        narrow = counts.max(initial=0) < 2**31
        self.weight = np.zeros(len(inside), np.int32 if narrow else np.int64)
        self.weight[1:] = np.repeat(counts, lengths + 1)

        self.token_count = np.zeros(len(self.token_length), np.int64)  # bincount's floats are exact below 2**53
        self.token_count[:256] = np.bincount(self.symbol + 1, self.weight, minlength=257)[1:]

        self.queue = PairQueue(np.int32 if len(inside) < 2**31 else np.int64)
        self.pair_at = np.full(len(inside), NO_PAIR, np.int32)
        left, right = self.symbol[:-1], self.symbol[1:]
        position = np.flatnonzero((left != GAP) & (right != GAP)).astype(self.queue.positions.dtype)
        both = (left[position] * 256 + right[position]).astype(np.uint16)
        order = np.argsort(both, kind="stable")  # a radix sort at 16 bits
        position, both = position[order], both[order]
        del order
        start = _group_starts(both)
        lengths = np.diff(start, append=len(both))
        first = both[start].astype(np.int64)
        ids = self.queue.file(first // 256 << 32 | first % 256, _sums(self.weight[position], start), lengths, position)
        self.pair_at[position] = np.repeat(ids.astype(np.int32), lengths)
        self.round_of_pair = np.full(self.queue.size + 1, NO_PAIR, np.int32)  # scratch; NO_PAIR indexes the last

    def step(self) -> int:
        """Merge the next batch; return its number of merges, 0 at the end."""
        room = self.vocab_size - len(self.tokens)
        top = self.queue.top(min(self.batch, room), self.least_count) if room > 0 else ()
        if len(top) == 0:
            return 0
        work = np.cumsum(self.queue.start[top + 1] - self.queue.start[top])
        top = top[: max(1, int(np.searchsorted(work, LARGEST_WORK)))]
        keys = self.queue.key[top]
        pairs = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
        same = np.flatnonzero(pairs[:, 0] == pairs[:, 1])
        if len(same):
            top, pairs = top[: max(1, same[0])], pairs[: max(1, same[0])]
        done = self._merge(top, pairs)
        # twice the merges of this batch: it grows while pairs rarely interact, and little work is undone
        self.batch = min(LARGEST_BATCH, max(SMALLEST_BATCH, 2 * done))
        return done

    def _merge(self, top: Ints, pairs: Ints) -> int:
        """Merge the longest valid prefix of the top pairs (ids: pairs[:, 0], pairs[:, 1]), at least one."""
        base = len(self.tokens)
        start, stop = self.queue.start[top], self.queue.start[top + 1]
        noted = [self.queue.positions[i:j] for i, j in zip(start.tolist(), stop.tolist(), strict=True)]
        position, round_ = np.concatenate(noted).astype(np.int64), np.repeat(np.arange(len(top)), stop - start)
        there = self.pair_at[position] == top[round_]  # a later merge may have removed this occurrence
        position, round_ = position[there], round_[there]
        second = position + self.token_length[pairs[round_, 0]]
        occurrences = _Occurrences(position, second, second + self.token_length[pairs[round_, 1]], round_)
        if pairs[0, 0] == pairs[0, 1]:
            occurrences = _where(occurrences, _every_other(occurrences, int(self.token_length[pairs[0, 0]])))
        else:
            occurrences, top = self._without_overlaps(occurrences, top)
        self.token_length[base : base + len(top)] = self.token_length[pairs[: len(top)]].sum(axis=1)
        falls, changes = self._replace(occurrences, pairs, base)
        start = _group_starts(changes.key)
        created_in = np.maximum(changes.key >> 32, changes.key & 0xFFFFFFFF) - base
        created = _sums(np.where(changes.round == created_in, changes.weight, 0), start)
        rounds = self._before_outranked(top, created, changes.key[start], created_in[start])
        if rounds < len(top):
            undone = _where(occurrences, occurrences.round >= rounds)
            self.symbol[undone.position] = pairs[undone.round, 0]
            self.symbol[undone.after - 1] = pairs[undone.round, 1]
            occurrences = _where(occurrences, occurrences.round < rounds)
            falls = _where(falls, falls.round < rounds)
            changes = _where(changes, changes.round < rounds)
            start = _group_starts(changes.key)

        merged = pairs[:rounds].tolist()
        self.tokens += [self.tokens[left] + self.tokens[right] for left, right in merged]
        self.pairs += map(tuple, merged)
        times = np.bincount(occurrences.round, self.weight[occurrences.position], minlength=rounds).astype(np.int64)
        self.token_count[base : base + rounds] = times
        np.subtract.at(self.token_count, pairs[:rounds], times[:, None])
        np.subtract.at(self.queue.count, falls.pair, falls.weight)
        self.queue.count[top[:rounds]] = 0
        self.pair_at[occurrences.position] = NO_PAIR
        self.pair_at[occurrences.second] = NO_PAIR
        gain = changes.weight > 0
        sums, gains = _sums(changes.weight, start), _sums(gain, start)
        ids = self.queue.file(changes.key[start], sums, gains, changes.position[gain])
        stays = gain & (changes.until >= rounds)
        pair = np.repeat(ids, np.diff(start, append=len(changes.key)))
        self.pair_at[changes.position[stays]] = pair[stays]
        return rounds

    def _without_overlaps(self, occurrences: _Occurrences, top: Ints) -> tuple[_Occurrences, Ints]:
        """Cut the batch to its longest prefix in which no occurrence overlaps another."""
        if self.queue.size >= len(self.round_of_pair):
            self.round_of_pair = np.full(self.queue.size * 3 // 2, NO_PAIR, np.int32)
        self.round_of_pair[top] = np.arange(len(top))
        other = self.round_of_pair[self.pair_at[occurrences.second]]
        self.round_of_pair[top] = NO_PAIR
        hit = np.flatnonzero(other != NO_PAIR)
        if len(hit) == 0:
            return occurrences, top
        size = int(np.maximum(other[hit], occurrences.round[hit]).min())
        return _where(occurrences, occurrences.round < size), top[:size]

    def _replace(self, occurrences: _Occurrences, pairs: Ints, base: int) -> tuple[_Falls, _Changes]:
        """Write the batch's tokens (ids from `base`) into the text; return the changes of the counts.

        Merging (a, b) to x in "l a b r" removes (l, a) and (b, r) and creates (l, x) and (x, r). Next to another
        occurrence, l is the token that was there in this round: the batch's token if that was made in an earlier round
        (or in the same one, as a round goes from left to right), else the part of it, and then (l, x) is removed again
        in the later round. (l, a) existed before the batch only if l did.
        """
        position, second, after, round_ = occurrences
        new = base + round_
        weight = self.weight[position].astype(np.int64)
        left_before, right_before = self.symbol[position - 1], self.symbol[after]
        left_pair, right_pair = self.pair_at[position - self.token_length[left_before]], self.pair_at[second]
        self.symbol[position] = new
        self.symbol[after - 1] = new
        left_after, right_after = self.symbol[position - 1], self.symbol[after]
        left_made = np.where(left_after >= base, left_after - base, NEVER)
        right_made = np.where(right_after >= base, right_after - base, NEVER)
        left_is_new, right_is_new = left_made <= round_, right_made < round_
        left = np.where(left_is_new, left_after, left_before).astype(np.int64)
        right = np.where(right_is_new, right_after, right_before).astype(np.int64)

        i = np.flatnonzero((left_before != GAP) & ~left_is_new)
        j = np.flatnonzero((right_before != GAP) & ~right_is_new)
        falls = _Falls(*map(np.concatenate, zip(
            (left_pair[i], weight[i], round_[i]),
            (right_pair[j], weight[j], round_[j]),
            strict=True,
        )))  # fmt: skip

        i, j = np.flatnonzero(left_before != GAP), np.flatnonzero(right_before != GAP)
        left_until = np.where(left_is_new, NEVER, left_made)
        right_until = np.where(right_is_new, NEVER, right_made)
        begins = position[i] - self.token_length[left[i]]
        p, q = np.flatnonzero(left_is_new), np.flatnonzero(right_is_new)
        a, b = pairs[round_[p], 0], pairs[round_[q], 1]
        changes = _Changes(*map(np.concatenate, zip(
            (left[i] << 32 | new[i], weight[i], round_[i], begins, left_until[i]),
            (new[j] << 32 | right[j], weight[j], round_[j], position[j], right_until[j]),
            (left[p] << 32 | a, -weight[p], round_[p], position[p], round_[p]),
            (b << 32 | right[q], -weight[q], round_[q], position[q], round_[q]),
            strict=True,
        )))  # fmt: skip
        order = np.argsort(changes.key)
        return falls, _Changes(*(column[order] for column in changes))

    def _before_outranked(self, top: Ints, created: Ints, keys: Ints, created_in: Ints) -> int:
        """Return the number of rounds before a new pair, with count `created` from round `created_in` on, is due."""
        counts = self.queue.count[top]
        rival = np.flatnonzero(created >= counts[-1])
        if len(rival) == 0:
            return len(top)
        order = rank_order(np.concatenate([counts, created[rival]]), np.concatenate([self.queue.key[top], keys[rival]]))
        before = np.empty(len(order), np.int64)
        before[order] = np.cumsum(order < len(top))
        turn = np.maximum(before[len(top) :], created_in[rival] + 1)
        return min(len(top), int(turn.min()))


def _every_other(occurrences: _Occurrences, step: int) -> NDArray[np.bool_]:
    """Keep the first, third etc. occurrence of a pair (a, a) in "a a a a", as merging from left to right does."""
    order = np.argsort(occurrences.position)
    position = occurrences.position[order]
    run = np.flatnonzero(np.diff(position, prepend=-1 - step) != step)
    rank = np.arange(len(position)) - np.repeat(run, np.diff(run, append=len(position)))
    mask = np.empty(len(position), bool)
    mask[order] = rank % 2 == 0
    return mask


def _group_starts(ordered: NDArray) -> Ints:
    """Find where each run of equal values begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]]))


def _sums(values: NDArray, start: Ints) -> Ints:
    """Return the sums of the groups that begin at `start`."""
    return np.add.reduceat(values, start, dtype=np.int64) if len(start) else np.empty(0, np.int64)
