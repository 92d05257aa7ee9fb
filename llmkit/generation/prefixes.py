"""Keys and values of prompts, computed in pieces and kept for prompts that begin alike, as turns of a conversation do.

A piece is so many tokens, counted from the beginning of the prompt. It is computed behind the pieces before it by the
same operations on the same shapes, whether those were kept or have just been computed, so a prompt that begins with
kept pieces has the same bits as one computed anew. What steps have written while decoding is not kept: their attention
sums in other blocks, which changes last bits. vLLM keeps blocks of prompts so ("automatic prefix caching").
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b

from llmkit.generation.decode import Decoder, Prefix

KEPT_BYTES = 256 * 2**20  # of keys and values


class PrefixCache:
    """The pieces used last, of at most `limit` bytes; each under a hash of the tokens from the beginning to its end."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._pieces: OrderedDict[bytes, Prefix] = OrderedDict()
        self._limit, self._bytes = limit, 0

    def prefill(self, decoder: Decoder, token_ids: list[int]) -> Iterator[Prefix]:
        """Yield the prefix of a prompt so far, after each piece that is computed; at last that of all of it."""
        hasher, names = blake2b(digest_size=16), []
        for start in range(0, len(token_ids), decoder.piece):
            hasher.update(array("q", token_ids[start : start + decoder.piece]).tobytes())
            names.append(hasher.digest())
        count = next((i for i, name in enumerate(names) if name not in self._pieces), len(names))
        pieces = [self._pieces[name] for name in names[:count]]
        start = sum(map(len, pieces))
        self._use(names[:count])
        for number, prefix in enumerate(decoder.prefill_behind(pieces, token_ids), count + 1):
            if number <= len(names):
                piece, old = prefix.piece(start), self._pieces.get(names[number - 1])  # of a request beside this one
                self._bytes += piece.nbytes - (0 if old is None else old.nbytes)
                self._pieces[names[number - 1]] = piece
                self._use(names[:number])
                start = len(prefix)
            yield prefix

    def _use(self, names: list[bytes]) -> None:
        """Let the first piece of a prompt be the last to go, and drop what is too much."""
        for name in filter(self._pieces.__contains__, names[::-1]):
            self._pieces.move_to_end(name)
        while self._bytes > self._limit:
            self._bytes -= self._pieces.popitem(last=False)[1].nbytes
