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

import torch

from llmkit.generation.decode import Decoder, Prefix

KEPT_BYTES = 256 * 2**20  # of keys and values


class PrefixCache:
    """The pieces used last, of at most `limit` bytes; each under the tokens from the beginning to its end."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._pieces: OrderedDict[bytes, Prefix] = OrderedDict()
        self._limit, self._bytes = limit, 0

    def prefill(self, decoder: Decoder, token_ids: list[int]) -> Iterator[Prefix]:
        """Yield the prefix of a prompt so far, after each piece that is computed; at last that of all of it."""
        ends = [*range(decoder.piece, len(token_ids), decoder.piece), len(token_ids)]
        names = [array("q", token_ids[:end]).tobytes() for end in ends]
        count = next((i for i, name in enumerate(names) if name not in self._pieces), len(names))
        prefix = _join([self._pieces[name] for name in names[:count]]) if count else None
        try:
            for name, end in zip(names[count:], ends[count:], strict=True):
                start = 0 if prefix is None else len(prefix)
                new = token_ids[start:end]
                prefix = decoder.prefill(new) if prefix is None else decoder.extend(prefix, new)
                piece, old = _tail(prefix, start), self._pieces.get(name)  # that of a request beside this one
                self._bytes += piece.nbytes - (0 if old is None else old.nbytes)
                self._pieces[name] = piece
                yield prefix
        finally:
            for name in filter(self._pieces.__contains__, names[::-1]):  # the first is the last to go
                self._pieces.move_to_end(name)
            while self._bytes > self._limit:
                self._bytes -= self._pieces.popitem(last=False)[1].nbytes
        if count == len(names) and prefix is not None:
            yield prefix


def _join(pieces: list[Prefix]) -> Prefix:
    """The prefix that is made of pieces, with the logits behind the last."""
    if len(pieces) == 1:
        return pieces[0]
    keys, values = (torch.cat([getattr(piece, name) for piece in pieces], 2) for name in ("keys_LKTD", "values_LKTD"))
    return Prefix(keys, values, pieces[-1].logits_1V)


def _tail(prefix: Prefix, start: int) -> Prefix:
    """The piece of a prefix from position `start` on, with the logits behind it."""
    if start == 0:
        return prefix
    return Prefix(prefix.keys_LKTD[:, :, start:].clone(), prefix.values_LKTD[:, :, start:].clone(), prefix.logits_1V)
