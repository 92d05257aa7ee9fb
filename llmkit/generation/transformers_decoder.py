"""The interface of `Decoder` (generation/decode.py) over a model that transformers computes, by its own cache.

Each slot has a cache of one row. While they decode, the caches of the slots in use are joined to a batch: keys and
values padded on the left to the longest, states of recurrent layers as they are. Filling, leaving or moving a slot
splits the batch again, which copies as much as a step does, since transformers copies its cache at every step.

A row's logits depend on its neighbours in their last bits.
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
    """Cache of one sequence of `length` tokens, and the logits of the token that follows, (1, V) or (0, V)."""

    cache: Any
    length: int
    logits_1V: Tensor

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in _tensors(layer))

    def piece(self, start: int) -> CachedPrefix:
        """Return the whole, for a prompt is one piece."""
        return self


class TransformersDecoder:
    """The slots of one model. Adapters are merged into a copy of their matrices; other weights are not copied."""

    def __init__(self, model: TransformersModel) -> None:
        self.model, self.config = model.merged(), model.config
        self.device, self.dtype = model.embed_tokens.device, model.embed_tokens.dtype
        self.piece = sys.maxsize  # recurrent layers continue a prompt token by token
        self._slots: list[CachedPrefix] = []
        self._batch: Any = None  # the cache of all slots, newer than theirs
        self._lengths: list[int] = []  # of the rows of the batch

    def prefill(self, token_ids: list[int]) -> CachedPrefix:
        """Run a prompt through the model by itself. Raises UserError for a family without the shared cache."""
        cache = self._new_cache()
        try:
            prefix = self._extend(cache, 0, token_ids)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._other_cache()} ({error})") from error
        if not all(_tensors(layer) or type(layer).__name__ == "DummyLayer" for layer in prefix.cache.layers):
            raise UserError(self._other_cache())
        return prefix

    def prefill_behind(self, pieces: Sequence[CachedPrefix], token_ids: list[int]) -> Iterator[CachedPrefix]:
        """See `Decoder.prefill_behind`; a prompt is one piece."""
        yield pieces[0] if pieces else self.prefill(token_ids)

    def extend(self, prefix: CachedPrefix, token_ids: list[int]) -> CachedPrefix:
        """Run more tokens through the model behind a prefix, which stays as it is."""
        extended = replace(prefix, cache=_join([prefix]))
        # recurrent layers continue from a state by single tokens: of several, mamba ignores the state
        is_recurrent = any(map(_states, extended.cache.layers))
        for ids in [[token] for token in token_ids] if is_recurrent else [token_ids]:
            extended = self._extend(extended.cache, len(extended), ids)
        return extended

    def turns_anew(self, before: int, after: int) -> bool:
        """False: transformers never computes a cache again with other rotations."""
        return False

    def logits_in_pieces(self, token_ids: list[int], size: int) -> Iterator[tuple[int, Tensor]]:
        """See `Decoder.logits_in_pieces`."""
        hidden_1TC = self._hidden([token_ids], [0], self._new_cache())
        for start in range(0, len(token_ids), size):
            yield start, self.model.logits(hidden_1TC[0, start : start + size])

    def hold(self, slot: int, length: int) -> CachedPrefix:
        """The cache of a slot, of `length` positions, to continue from later."""
        self._take_apart()
        assert len(self._slots[slot]) == length
        return self._slots[slot]

    def load(self, slot: int, prefix: CachedPrefix) -> None:
        """Let a slot begin where a prompt ended."""
        self._take_apart()
        self._slots[slot:] = [prefix]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot into another."""
        self._take_apart()
        self._slots[target] = self._slots[source]

    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Feed slot i the token `tokens[i]`, which stands at `positions[i]`; the logits (B, V) of what follows."""
        if self._batch is None or len(tokens) != len(self._lengths):
            self._take_apart()
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
        # windowed layers hold all positions, so that rows of several lengths can be padded; the mask has the window
        cache.layers = [
            getattr(cache_utils, full[name])() if (name := type(layer).__name__) in full else layer
            for layer in cache.layers
        ]
        return cache

    def _other_cache(self) -> str:
        return (
            f"model_type {self.config.model_type!r}: expected the cache that models of transformers share, found "
            "one of its own; it can be trained, not sampled"
        )

    def _extend(self, cache: Any, length: int, token_ids: list[int]) -> CachedPrefix:
        return CachedPrefix(cache, length + len(token_ids), self._last_logits([token_ids], [length], cache))

    @torch.no_grad()
    def _hidden(self, tokens: list[list[int]], lengths: list[int], cache: Any) -> Tensor:
        """The hidden states (B, T, hidden) of tokens (B, T) that follow caches of some lengths."""
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
        """The logits (B, V) behind the last of tokens (B, T) that follow caches of some lengths."""
        return self.model.logits(self._hidden(tokens, lengths, cache)[:, -1:])[:, -1]

    def _take_apart(self) -> None:
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
    """Names of a layer's tensors with positions, (rows, ..., positions, D); states are in dictionaries."""
    return [name for name, value in vars(layer).items() if isinstance(value, Tensor)]


def _states(layer: Any) -> list[tuple[str, dict[Any, Tensor]]]:
    """Names of a layer's dictionaries of states (rows, ...), which have no positions."""
    return [(name, value) for name, value in vars(layer).items() if isinstance(value, dict)]


def _tensors(layer: Any) -> list[Tensor]:
    """All tensors that a layer of a cache holds."""
    states = [state for _, states in _states(layer) for state in states.values()]
    return [value for value in (*vars(layer).values(), *states) if isinstance(value, Tensor)]


def _join(prefixes: Sequence[CachedPrefix]) -> Any:
    """A cache of all rows, which shares no memory with theirs."""
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
