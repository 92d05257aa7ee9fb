"""Find documents that repeat an earlier one: exactly, or with a similar MinHash signature.

    duplicates = Duplicates()
    for texts in batches:
        for repeat in duplicates.seen(signatures(texts)):
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

A signature is a hash for exact repeats and MinHash for near ones, computed where the document is. A shingle is 5 words
in a row; the similarity of two documents is the Jaccard similarity of their sets of shingles. Each of 112 permutations
of the hashes keeps its minimum, which two documents share with a probability of just that similarity (Broder, "On the
resemblance and containment of documents", 1997). 16 bands of 7 minima find the pairs: similarity s shares a band with
probability 1 - (1 - s^7)^16, which is .99 at .82, what is left with 2% of the words replaced. Of each minimum 8 bits
are kept to estimate the similarity (Li and König, "b-Bit Minwise Hashing", 2010), where 32 would take 4 times the disk.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmkit.crawl.dedup.band_index import NOBODY, BandIndex, Rows
from llmkit.errors import UserError
from llmkit.text.words import UNSPACED

THRESHOLD = 0.7  # of the estimated Jaccard similarity; what 2% of edits leave is .82
BANDS, ROWS = 16, 7
SHINGLE = 5  # words
CHUNK = 1024  # shingles at once: with 112 permutations 448 KiB, which the second-level cache holds
KNOWN_WORDS = 200_000  # whose hashes are remembered: some 25 MB
CHANCE = 1 / 256  # that the 8 bits of two different minima are equal

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_ANY_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


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
        self._threshold, self._exact, self._near = threshold, exact, near
        self._spill = spill
        self._index = BandIndex(spill)
        self._rows: Rows | None = None  # their type is that of the first signatures
        self._roots = np.empty(1 << 12, np.uint32)  # the document at the end of each one's chain
        self._count = 0

    def seen(self, signatures: np.ndarray) -> list[Repeat | None]:
        """Return the repeat of each of the next documents (n,), or None. Batches of thousands are fastest."""
        start, stop = self._count, self._count + len(signatures)
        if stop > int(NOBODY):
            raise UserError(f"expected at most {int(NOBODY):,} documents, found more; filter them in several runs")
        signature_keys = keys(signatures)
        distinct, at, inverse = np.unique(signature_keys.ravel(), return_index=True, return_inverse=True)
        holders = self._index.find(distinct)
        new = holders == NOBODY
        holders[new] = start + at[new] // signature_keys.shape[1]
        self._index.insert(distinct[new], holders[new])
        firsts = holders[inverse].astype(np.int64).reshape(signature_keys.shape)  # the first document with each key
        if self._rows is None:
            fields = ("exact", "minima")
            self._rows = Rows(np.dtype([(name, signatures.dtype[name]) for name in fields]), self._spill)
        self._rows.append(signatures[["exact", "minima"]])
        self._count = stop
        own = np.arange(start, stop)
        row, column = np.nonzero(firsts < own[:, None])
        # each pair once, however many bands it shares; 2^32 rows of 2^32 documents fit
        row, other = np.divmod(np.unique((row << 32) | firsts[row, column]), 1 << 32)
        mine, theirs = signatures[row], self._rows.take(other)
        alike = shared(mine["minima"], theirs["minima"])
        exact = (mine["exact"] == theirs["exact"]).all(1)
        alike[exact] = 1.0
        exact &= self._exact
        hits = np.flatnonzero(exact | (self._near & (alike >= self._threshold)))
        order = hits[np.lexsort((other[hits], -alike[hits], ~exact[hits], row[hits]))]
        row, best = np.unique(row[order], return_index=True)
        pairs = order[best]
        if stop > len(self._roots):
            self._roots = np.concatenate([self._roots, np.empty(max(stop, len(self._roots)), np.uint32)])
        own[row] = other[pairs]
        # union-find without the union: a document has one parent for ever, and each round halves the chains
        self._roots[start:stop] = own
        roots = self._roots[:stop]
        while not np.array_equal(further := roots[roots[start:]], roots[start:]):
            roots[start:] = further
        repeats: list[Repeat | None] = [None] * len(signatures)
        for number, pair in zip(row.tolist(), pairs.tolist(), strict=True):
            kind = "exact" if exact[pair] else "near"
            repeats[number] = Repeat(int(roots[start + number]), kind, float(alike[pair]))
        return repeats


def keys(signatures: np.ndarray) -> np.ndarray:
    """Return the keys by which documents are compared: (n, bands + 1) uint64, the last column for exact repeats."""
    bands = signatures["bands"]
    exact = numbered(signatures["exact"][:, :1], np.uint64(bands.shape[1]))
    return np.concatenate([bands, exact], 1)


# ---- signatures


def signature_type(bands: int = BANDS, rows: int = ROWS) -> np.dtype:
    """A signature: 256 bytes with 16 bands of 7.

    `exact`: 128 bits of the text; `bands`: a key for each band, its lowest byte the number of the band;
    `minima`: 8 bits of each minimum.
    """
    return np.dtype([("exact", "<u8", (2,)), ("bands", "<u8", (bands,)), ("minima", "u1", (bands * rows,))])


def signatures(texts: Sequence[str], bands: int = BANDS, rows: int = ROWS) -> np.ndarray:
    """The signatures of texts: (n,) of `signature_type`; each depends on its text alone.

    Exact repeats are equal after Unicode's NFC and with runs of white space as one space. Words are lower-cased
    runs of `\\w`, in scripts that are written without spaces single letters. A text of fewer than 5 words has its
    words for shingles, one without words itself.
    """
    assert bands < 255, "the lowest byte of a key numbers its band"
    records = np.zeros(len(texts), signature_type(bands, rows))
    minima = np.empty((len(texts), bands * rows), np.uint32)
    for row, text in enumerate(texts):
        normal = unicodedata.normalize("NFC", text)
        digest = hashlib.blake2b(" ".join(normal.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        records["exact"][row] = np.frombuffer(digest, "<u8")
        minima[row] = _minima(_shingles(normal, digest), bands * rows)
    records["minima"] = _short(minima)
    totals = (minima.reshape(-1, bands, rows) * (_numbers("bands", rows) | np.uint64(1))).sum(2, dtype=np.uint64)
    totals = (totals ^ (totals >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    records["bands"] = numbered(totals ^ (totals >> np.uint64(32)), np.arange(bands, dtype=np.uint64))
    return records


def minhash(hashes: np.ndarray) -> np.ndarray:
    """8 bits of the minimum of a set of hashes (n,) uint32 in each permutation, for `shared`: (112,) uint8."""
    return _short(_minima(hashes, BANDS * ROWS))


def shared(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimate the Jaccard similarity of sets by their `minhash`: (n, 112) and (n, 112), or (112,) -> (n,) float64.

    Unbiased; its standard deviation is sqrt(s (1 - s) / 112), .047 at .5. Of disjoint sets it may be negative.
    """
    equal = (some == others).sum(1, dtype=np.uint16) / some.shape[-1]
    return (equal - CHANCE) / (1 - CHANCE)


class _WordHashes(dict[str, int]):
    """CRC-32 of words, remembered: 40 ns each where a hash function takes 120."""

    def __missing__(self, word: str) -> int:
        if len(self) >= KNOWN_WORDS:
            self.clear()
        self[word] = checksum = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return checksum


_hashes = _WordHashes()


def _shingles(text: str, digest: bytes) -> np.ndarray:
    """A hash of each shingle, repeats among them: (shingles,) uint32.

    The multilinear family on 64 bits, of which the upper half is kept: two different shingles are equal with a
    probability of 2^-32 (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    text = text.lower()
    words = (_ANY_WORD if not text.isascii() and _UNSPACED.search(text) else _WORD).findall(text)
    if not words:
        return np.frombuffer(digest, "<u4")[:1]
    hashes = np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))
    length = SHINGLE if len(words) >= SHINGLE else 1
    count = len(words) - length + 1
    factors = _numbers("shingles", SHINGLE + 1)
    total = hashes[:count] * factors[0] + factors[SHINGLE]
    for offset in range(1, length):
        total += hashes[offset : offset + count] * factors[offset]
    return (total >> np.uint64(32)).astype(np.uint32)


def _short(minima: np.ndarray) -> np.ndarray:
    """The low bits of minima, mixed: uint8."""
    return ((minima * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)


def _minima(shingles: np.ndarray, permutations: int) -> np.ndarray:
    """The minimum of the shingles in each permutation x -> a x + b mod 2^32, a odd: (permutations,) uint32."""
    factors = _numbers("permutations", permutations)
    odd = (factors >> np.uint64(32)).astype(np.uint32)[:, None] | np.uint32(1)
    shift = factors.astype(np.uint32)[:, None]
    minima = np.full(permutations, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(shingles), CHUNK):
        permuted = odd * shingles[start : start + CHUNK]
        permuted += shift
        np.minimum(minima, permuted.min(1), out=minima)
    return minima


def numbered(keys: np.ndarray, column: np.ndarray | np.uint64) -> np.ndarray:
    """Keys with the number of their column in the lowest byte, so that those of two columns never meet."""
    return (keys & np.uint64(0xFFFFFFFFFFFFFF00)) | column


@cache
def _numbers(purpose: str, count: int) -> np.ndarray:
    """Random 64-bit numbers, the same in every process and with every version: (count,) uint64.

    The first ones do not depend on the count.
    """
    return np.frombuffer(hashlib.shake_128(f"llmkit {purpose}".encode()).digest(8 * count), "<u8").astype(np.uint64)
