"""Find documents that repeat an earlier one: exactly, or with a similar MinHash signature.

    duplicates = Duplicates()
    for texts in batches:
        for repeat in duplicates.seen(signatures(texts)):
            ...                                     # None: keep the document; Repeat: it repeats document `index`

The rule only looks back, so that documents can be written as they arrive, and does not depend on the batches:

- a document is an exact repeat of an earlier one if their 128-bit hashes are equal;
- otherwise it is a near repeat of a document that was the first with the same key in some band, if their estimated
  similarity is at least the threshold; the most similar one counts, of equally similar ones the earliest;
- the earlier document may be a repeat itself; the one reported is at the end of that chain and was kept.

Recall: .996 of pairs of documents of 100 to 1,000 words with 2% of the words replaced, inserted or deleted
[measured by benchmarks/duplicates.py]. False positives: a pair of similarity .5 is joined with a probability of 7e-6,
one of .4 with 5e-11 (the sum over the binomial distributions of the matches in the bands). A chain can join two
documents that are less similar than any of its links.

A signature, computed by the worker, is a hash for exact repeats and a MinHash for near ones. A shingle is 5 consecutive
words; the similarity of two documents is the Jaccard similarity of their sets of shingles. Two documents have the same
minimum under a permutation of the hashes with a probability equal to that similarity (Broder, "On the resemblance and
containment of documents", 1997); there are 112 permutations. 16 bands of 7 minima find the pairs: at similarity s, two
documents share a band with probability 1 - (1 - s^7)^16, which is .99 at .82, the similarity after 2% of the words are
replaced. 8 bits of each minimum are kept to estimate the similarity (Li and König, "b-Bit Minwise Hashing", 2010);
32 would take 4 times the disk.
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

THRESHOLD = 0.7  # estimated Jaccard similarity; 2% of edits leave .82
BANDS, ROWS = 16, 7
SHINGLE = 5  # words
CHUNK = 1024  # shingles per chunk: 448 KiB with 112 permutations, fits the L2 cache
KNOWN_WORDS = 200_000  # cached word hashes, about 25 MB
CHANCE = 1 / 256  # probability that the 8 bits of two different minima are equal

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_ANY_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


class Repeat(NamedTuple):
    """The earlier document that a dropped one repeats.

    `index`: the document that was kept; `kind`: "exact" or "near"; `similarity`: estimated with the document that
    matched, which is `index` or a repeat that was dropped itself; 1.0 for an exact repeat.
    """

    index: int
    kind: str
    similarity: float


class Duplicates:
    """Finds repeats among documents that arrive in batches.

    A document takes 17 keys of 12 bytes, 128 bytes of signature and 4 more; with `spill`, all but the 4 are in files.
    """

    def __init__(
        self, spill: Path | None = None, threshold: float = THRESHOLD, exact: bool = True, near: bool = True
    ) -> None:
        """`exact`, `near`: the kinds to look for. Without `exact`, an equal text is a near repeat."""
        self._threshold, self._exact, self._near = threshold, exact, near
        self._spill = spill
        self._index = BandIndex(spill)
        self._rows: Rows | None = None  # dtype taken from the first signatures
        self._roots = np.empty(1 << 12, np.uint32)  # the document at the end of each chain
        self._count = 0

    def seen(self, signatures: np.ndarray) -> list[Repeat | None]:
        """Return what each of the next documents (n,) repeats, or None. Fastest with batches of thousands."""
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
        # each pair once, even if it shares several bands; fits 2^32 rows of 2^32 documents
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
        # union-find without unions: parents never change, and each round halves the chains
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
    """Return the index keys: (n, bands + 1) uint64, the last column for exact repeats."""
    bands = signatures["bands"]
    exact = numbered(signatures["exact"][:, :1], np.uint64(bands.shape[1]))
    return np.concatenate([bands, exact], 1)


# ---- signatures


def signature_type(bands: int = BANDS, rows: int = ROWS) -> np.dtype:
    """Return the dtype of a signature, 256 bytes with 16 bands of 7.

    `exact`: 128 bits of the text; `bands`: a key for each band, its lowest byte the number of the band;
    `minima`: 8 bits of each minimum.
    """
    return np.dtype([("exact", "<u8", (2,)), ("bands", "<u8", (bands,)), ("minima", "u1", (bands * rows,))])


def signatures(texts: Sequence[str], bands: int = BANDS, rows: int = ROWS) -> np.ndarray:
    """Compute the signatures of texts: (n,) of `signature_type`; each depends on its own text only.

    Exact repeats are equal after NFC normalization and with runs of white space as one space. Words are lower-cased
    runs of `\\w`, or single letters in scripts written without spaces. The shingles of a text of fewer than 5 words are
    its words; a text without words is its own only shingle.
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
    """Return 8 bits of the minimum of hashes (n,) uint32 under each permutation: (112,) uint8, for `shared`."""
    return _short(_minima(hashes, BANDS * ROWS))


def shared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimate the Jaccard similarity of sets from their `minhash`: (n, 112) and (n, 112) or (112,) -> (n,) float64.

    Unbiased, with standard deviation sqrt(s (1 - s) / 112), .047 at .5. May be negative for disjoint sets.
    """
    equal = (first == second).sum(1, dtype=np.uint16) / first.shape[-1]
    return (equal - CHANCE) / (1 - CHANCE)


class _WordHashes(dict[str, int]):
    """Cached CRC-32 of words: 40 ns per word instead of 120 for a hash function."""

    def __missing__(self, word: str) -> int:
        if len(self) >= KNOWN_WORDS:
            self.clear()
        self[word] = checksum = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return checksum


_hashes = _WordHashes()


def _shingles(text: str, digest: bytes) -> np.ndarray:
    """Hash each shingle, including repeated ones: (shingles,) uint32.

    The upper half of the 64-bit multilinear family: two different shingles collide with a probability of 2^-32
    (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
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
    """Reduce minima to 8 bits each: uint8."""
    return ((minima * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)


def _minima(shingles: np.ndarray, permutations: int) -> np.ndarray:
    """Return the minimum shingle under each permutation x -> a x + b mod 2^32, a odd: (permutations,) uint32."""
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
    """Put the column number into the lowest byte of keys, so that keys of different columns never match."""
    return (keys & np.uint64(0xFFFFFFFFFFFFFF00)) | column


@cache
def _numbers(purpose: str, count: int) -> np.ndarray:
    """Return random 64-bit numbers, the same in every process and version: (count,) uint64.

    A smaller count gives a prefix of a larger one.
    """
    return np.frombuffer(hashlib.shake_128(f"llmkit {purpose}".encode()).digest(8 * count), "<u8").astype(np.uint64)
