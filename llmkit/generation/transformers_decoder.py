"""The interface of `Decoder` (generation/decode.py) for models that transformers computes, with its cache.

Each slot has a cache of one row. For decoding, the caches of the slots in use are joined to a batch: keys and values
are left-padded to the longest, states of recurrent layers are joined unchanged. Filling, leaving or moving a slot
splits the batch again, which copies as much as a step does, because transformers copies its cache at every step.

The last bits of a row's logits depend on its neighbours.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import UserError
from llmkit.model.transformers_backend import TransformersModel


@dataclass(frozen=True)
class CachedPrefix:
    """Cache of one sequence of `length` tokens, and the logits of the next token, (1, V), or (0, V) if not computed."""

    cache: Any
    length: int
    logits_1V: Tensor

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in _tensors(layer))

    def piece(self, start: int) -> CachedPrefix:
        """Return the complete prefix: a prompt is one piece."""
        return self


class TransformersDecoder:
    """The decoding slots of one model. Only matrices with adapters are copied, to merge them."""

    def __init__(self, model: TransformersModel) -> None:
        self.model, self.config = model.merged(), model.config
        self.device, self.dtype = model.embed_tokens.device, model.embed_tokens.dtype
        self.piece = sys.maxsize  # recurrent layers continue a prompt token by token
        self._slots: list[CachedPrefix] = []
        self._batch: Any = None  # the joint cache of all slots, newer than their own
        self._lengths: list[int] = []  # of the rows of the batch

    def prefill(self, token_ids: list[int]) -> CachedPrefix:
        """Run a prompt through the model alone. Raises UserError for a family without transformers' shared cache."""
        cache = self._new_cache()
        try:
            prefix = self._extend(cache, 0, token_ids)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._other_cache()} ({error})") from error
        if not all(_tensors(layer) or type(layer).__name__ == "DummyLayer" for layer in prefix.cache.layers):
            raise UserError(self._other_cache())
        return prefix

    def prefill_after(self, pieces: Sequence[CachedPrefix], token_ids: list[int]) -> Iterator[CachedPrefix]:
        """See `Decoder.prefill_after`; a prompt is one piece."""
        yield pieces[0] if pieces else self.prefill(token_ids)

    def extend(self, prefix: CachedPrefix, token_ids: list[int]) -> CachedPrefix:
        """Return `prefix`, which is not changed, extended by more tokens."""
        extended = replace(prefix, cache=_join([prefix]))
        # recurrent layers continue from a state one token at a time: with several, mamba ignores the state
        is_recurrent = any(map(_states, extended.cache.layers))
        for ids in [[token] for token in token_ids] if is_recurrent else [token_ids]:
            extended = self._extend(extended.cache, len(extended), ids)
        return extended

    def needs_new_prefill(self, before: int, after: int) -> bool:
        """Return False: transformers never computes a cache again with other rotations."""
        return False

    def logits_in_pieces(self, token_ids: list[int], size: int) -> Iterator[tuple[int, Tensor]]:
        """See `Decoder.logits_in_pieces`."""
        hidden_1TC = self._hidden([token_ids], [0], self._new_cache())
        for start in range(0, len(token_ids), size):
            yield start, self.model.logits(hidden_1TC[0, start : start + size])

    def hold(self, slot: int, length: int) -> CachedPrefix:
        """Return the cache of a slot, of `length` positions, to continue from later."""
        self._split_batch()
        assert len(self._slots[slot]) == length
        return self._slots[slot]

    def load(self, slot: int, prefix: CachedPrefix) -> None:
        """Put a prefix into a slot."""
        self._split_batch()
        self._slots[slot:] = [prefix]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot into another."""
        self._split_batch()
        self._slots[target] = self._slots[source]

    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Feed slot i the token `tokens[i]` at position `positions[i]`; return the logits (B, V) of the next tokens."""
        if self._batch is None or len(tokens) != len(self._lengths):
            self._split_batch()
            self._slots = self._slots[: len(tokens)]
            self._batch, self._lengths = _join(self._slots), [len(prefix) for prefix in self._slots]
        assert self._lengths == positions
        logits_BV = self._last_logits([[token] for token in tokens], positions, self._batch)
        self._lengths = [position + 1 for position in positions]
        return logits_BV

    def _new_cache(self) -> Any:
        from transformers import cache_utils

        if self.model.cache_name is None:
            raise UserError(self._other_cache())
        cache = cache_utils.DynamicCache(config=self.config.stock)
        full = {
            "DynamicSlidingWindowLayer": "DynamicLayer",
            "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
        }
        # windowed layers keep all positions, so that rows of several lengths can be padded; the mask has the window
        cache.layers = [
            getattr(cache_utils, full[name])() if (name := type(layer).__name__) in full else layer
            for layer in cache.layers
        ]
        return cache

    def _other_cache(self) -> str:
        return (
            f"model_type {self.config.model_type!r}: expected transformers' shared cache, found the family's own; "
            "it can be trained but not sampled"
        )

    def _extend(self, cache: Any, length: int, token_ids: list[int]) -> CachedPrefix:
        return CachedPrefix(cache, length + len(token_ids), self._last_logits([token_ids], [length], cache))

    @torch.no_grad()
    def _hidden(self, tokens: list[list[int]], lengths: list[int], cache: Any) -> Tensor:
        """Return the hidden states (B, T, hidden) of tokens (B, T) that follow caches of `lengths` (B,)."""
        ids_BT = torch.tensor(tokens, device=self.device)
        length_B1 = torch.tensor(lengths, device=self.device).unsqueeze(1)
        options = {"position_ids": length_B1 + torch.arange(ids_BT.shape[1], device=self.device)}
        longest = max(lengths)
        if min(lengths) < longest and any(_by_position(layer) for layer in cache.layers):
            key_S = torch.arange(longest + ids_BT.shape[1], device=self.device)
            options["attention_mask"] = (key_S >= longest - length_B1).long()
        if self.model.module.training:
            self.model.module.eval()
        return self.model.run(ids_BT, cache, **options)

    @torch.no_grad()
    def _last_logits(self, tokens: list[list[int]], lengths: list[int], cache: Any) -> Tensor:
        """Return the logits (B, V) after the last of tokens (B, T) that follow caches of `lengths` (B,)."""
        return self.model.logits(self._hidden(tokens, lengths, cache)[:, -1:])[:, -1]

    def _split_batch(self) -> None:
        """Give each slot its row of the batch, as a view."""
        if self._batch is None:
            return
        no_logits = torch.empty((0, self.config.vocab_size))
        self._slots = []
        for i, length in enumerate(self._lengths):
            cache = copy.copy(self._batch)
            cache.layers = [copy.copy(layer) for layer in self._batch.layers]
            for layer in cache.layers:
                for name in _by_position(layer):
                    value = getattr(layer, name)[i : i + 1]
                    setattr(layer, name, value.narrow(-2, value.shape[-2] - length, length))
                for name, states in _states(layer):
                    tensors = {n: state[i : i + 1] for n, state in states.items() if isinstance(state, Tensor)}
                    setattr(layer, name, {**states, **tensors})
            self._slots.append(CachedPrefix(cache, length, no_logits))
        self._batch = None


def _by_position(layer: Any) -> list[str]:
    """Return the names of a layer's tensors with positions, (rows, ..., positions, D); states are in dictionaries."""
    return [name for name, value in vars(layer).items() if isinstance(value, Tensor)]


def _states(layer: Any) -> list[tuple[str, dict[Any, Tensor]]]:
    """Return the names and values of a layer's dictionaries of states (rows, ...), which have no positions."""
    return [(name, value) for name, value in vars(layer).items() if isinstance(value, dict)]


def _tensors(layer: Any) -> list[Tensor]:
    """Return all tensors of a layer of a cache."""
    states = [state for _, states in _states(layer) for state in states.values()]
    return [value for value in (*vars(layer).values(), *states) if isinstance(value, Tensor)]


def _join(prefixes: Sequence[CachedPrefix]) -> Any:
    """Join prefixes into one cache of all rows, which shares no memory with theirs."""
    longest, batch = max(map(len, prefixes)), copy.copy(prefixes[0].cache)
    batch.layers = []
    for layers in zip(*(prefix.cache.layers for prefix in prefixes), strict=True):
        joined = copy.copy(layers[0])
        for name in _by_position(joined):
            rows = zip((getattr(layer, name) for layer in layers), prefixes, strict=True)
            setattr(joined, name, torch.cat([F.pad(row, (0, 0, longest - len(prefix), 0)) for row, prefix in rows]))
        for name, states in _states(joined):
            tensors = {
                number: torch.cat([getattr(layer, name)[number] for layer in layers])
                for number, state in states.items()
                if isinstance(state, Tensor)
            }
            setattr(joined, name, {**states, **tensors})
        batch.layers.append(joined)
    return batch
