"""Find documents that repeat an earlier one: exactly, or with a similar MinHash signature.

    duplicates = Duplicates()
    for texts in batches:
        for repeat in duplicates.add(signatures(texts)):
            ...                                     # None: keep the document; Repeat: it repeats document `index`

The rule looks only backwards, so that documents can be written as they come, and does not depend on the batches:

- a document repeats an earlier one exactly when their 128-bit hashes are equal;
- else nearly when in one of the bands no document had the same key before that one, and the estimate of their
  similarity is at least the threshold; of several the most similar counts, of equals the earliest;
- the earlier one may be a repeat itself; named is the document at the end of that chain, which was kept.

Found are, of pairs with 2% of the words replaced, inserted or deleted in documents of 100 to 1,000 words, .996
[measured by benchmarks/duplicates.py]. A pair whose similarity is .5 is joined with a probability of 7e-6, one of .4
with 5e-11 (the sum over the binomial distributions of the matches in the bands). A chain can join two documents that
are less alike than any of its links.

On many machines the same comes from files: `keys` of all documents, `band_firsts` of each column of them, `join`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmkit.crawl.dedup.band_index import NOBODY, BandIndex, Rows
from llmkit.crawl.dedup.minhash import numbered, signatures, similarity
from llmkit.errors import UserError

__all__ = ["Duplicates", "Repeat", "band_firsts", "join", "keys", "signatures"]

THRESHOLD = 0.7  # of the estimated Jaccard similarity; what 2% of edits leave is .82
JOINED = 1 << 16  # documents joined at once


class Repeat(NamedTuple):
    """Earlier document that a dropped one repeats.

    `index`: the document that was kept; `kind`: "exact" or "near"; `similarity`: the estimate for the document that
    it was found by, which was dropped itself if it is not `index`; 1.0 for an exact repeat.
    """

    index: int
    kind: str
    similarity: float


class Duplicates:
    """Finds the repeats among documents that come in batches.

    A document takes 17 keys of 12 bytes, 128 bytes of signature and 4 more; with a folder all but the 4 are in files.
    """

    def __init__(
        self, spill: Path | None = None, threshold: float = THRESHOLD, exact: bool = True, near: bool = True
    ) -> None:
        """`exact`, `near`: the kinds to look for. Without exact ones, an equal text is a near repeat."""
        self._asked = _Asked(threshold, exact, near)
        self._spill = spill
        self._index = BandIndex(spill)
        self._rows: Rows | None = None  # their type is that of the first signatures
        self._roots = np.empty(1 << 12, np.uint32)
        self._count = 0

    def add(self, signatures: np.ndarray) -> list[Repeat | None]:
        """Return the repeat of each of the next documents (n,), or None. Batches of thousands are fastest."""
        start, stop = self._count, self._count + len(signatures)
        if stop > int(NOBODY):
            raise UserError(f"expected at most {int(NOBODY):,} documents, found more; filter them in several runs")
        band_keys = keys(signatures)
        firsts = self._firsts(band_keys.ravel(), band_keys.shape[1]).reshape(band_keys.shape)
        if self._rows is None:
            fields = ("exact", "minima")
            self._rows = Rows(np.dtype([(name, signatures.dtype[name]) for name in fields]), self._spill)
        self._rows.append(signatures[["exact", "minima"]])
        self._count = stop
        matches = _matches(firsts, signatures, start, self._rows.take, self._asked)
        if stop > len(self._roots):
            self._roots = np.concatenate([self._roots, np.empty(max(stop, len(self._roots)), np.uint32)])
        self._roots[start:stop] = matches.parents
        _follow(self._roots[:stop], start)
        return _told(self._roots[start:stop], matches, start)

    def _firsts(self, keys: np.ndarray, columns: int) -> np.ndarray:
        """The first document with each of the batch's keys (n * columns,): int64."""
        distinct, at, inverse = np.unique(keys, return_index=True, return_inverse=True)
        documents = self._index.find(distinct)
        new = documents == NOBODY
        documents[new] = self._count + at[new] // columns
        self._index.insert(distinct[new], documents[new])
        return documents[inverse].astype(np.int64)


# ---- the same from all signatures at once


def keys(signatures: np.ndarray) -> np.ndarray:
    """Return the keys by which documents are compared: (n, bands + 1) uint64, the last column for exact repeats."""
    bands = signatures["bands"]
    exact = numbered(signatures["exact"][:, :1], np.uint64(bands.shape[1]))
    return np.concatenate([bands, exact], 1)


def band_firsts(keys: np.ndarray) -> np.ndarray:
    """For one column of `keys` (n,) the first document with the same key: (n,) int64, its own number where it is new.

    A part of the documents will do where it holds all of those with the keys in it: a range of keys, say, with the
    documents in order; the numbers are then those in the part.

    >>> band_firsts(np.array([7, 5, 7, 5, 9])).tolist()
    [0, 1, 0, 1, 4]
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def join(
    firsts: np.ndarray, signatures: np.ndarray, threshold: float = THRESHOLD, exact: bool = True, near: bool = True
) -> list[Repeat | None]:
    """Find repeats as `Duplicates` does, from the columns of `band_firsts` (n, bands + 1) and signatures (n,).

    Both can be memory-mapped files.
    """
    rules = _Asked(threshold, exact, near)
    chunks = [
        _matches(firsts[start : start + JOINED], signatures[start : start + JOINED], start, signatures.take, rules)
        for start in range(0, len(signatures), JOINED)
    ]
    if not chunks:
        return []
    matches = _Matches(*map(np.concatenate, zip(*chunks, strict=True)))
    roots = matches.parents.copy()
    _follow(roots, 0)
    return _told(roots, matches, 0)


# ---- the rule


class _Asked(NamedTuple):
    threshold: float
    exact: bool
    near: bool


class _Matches(NamedTuple):
    """For each document (n,) the earlier one that it repeats, or itself; whether exactly; how similar they are."""

    parents: np.ndarray  # int64
    exact: np.ndarray  # bool
    similarity: np.ndarray  # float64


def _matches(
    firsts: np.ndarray, signatures: np.ndarray, start: int, take: Callable[[np.ndarray], np.ndarray], rules: _Asked
) -> _Matches:
    """The matches of the documents from number `start` on; take: the signatures of any earlier or equal numbers."""
    own = np.arange(start, start + len(signatures))
    matches = _Matches(own.copy(), np.zeros(len(own), bool), np.zeros(len(own)))
    row, column = np.nonzero(firsts < own[:, None])
    # each pair once, however many bands it shares; 2^32 rows of 2^32 documents fit
    row, other = np.divmod(np.unique((row << 32) | firsts[row, column]), 1 << 32)
    mine, theirs = signatures[row], take(other)
    alike = similarity(mine, theirs)
    exact = (mine["exact"] == theirs["exact"]).all(1)
    alike[exact] = 1.0
    exact &= rules.exact
    hits = np.flatnonzero(exact | (rules.near & (alike >= rules.threshold)))
    order = hits[np.lexsort((other[hits], -alike[hits], ~exact[hits], row[hits]))]
    rows, best = np.unique(row[order], return_index=True)
    for values, of_pairs in zip(matches, (other, exact, alike), strict=True):
        values[rows] = of_pairs[order[best]]
    return matches


def _follow(parents: np.ndarray, start: int) -> None:
    """Replace each parent from `start` on, in place, by the end of its chain; those before are ends already.

    Union-find without the union: a document has one parent for ever, and each round halves the chains.
    """
    while True:
        further = parents[parents[start:]]
        if np.array_equal(further, parents[start:]):
            return
        parents[start:] = further


def _told(roots: np.ndarray, matches: _Matches, start: int) -> list[Repeat | None]:
    """The answers for the documents from number `start` on."""
    repeats: list[Repeat | None] = [None] * len(roots)
    for row in np.flatnonzero(matches.parents != np.arange(start, start + len(roots))).tolist():
        kind = "exact" if matches.exact[row] else "near"
        repeats[row] = Repeat(int(roots[row]), kind, float(matches.similarity[row]))
    return repeats
