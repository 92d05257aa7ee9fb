"""Keys and values of the tokens seen so far, for decoding: preallocated, grown in steps.

L layers, B rows, K key-value heads, S positions held, D head size.
"""

import torch
from torch import Tensor

from llmkit.model.config import ModelConfig

GROWTH = 256  # positions added at a time


class KVCache:
    """The cache of B sequences, at one position or each at its own.

    `lengths` (B,) counts the tokens of each row that later tokens may see. The model writes new tokens at
    `lengths` and moves it on; a caller who prefills right-padded prompts sets `lengths` to the true ones
    afterwards, and the padding is overwritten as the rows go on.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = GROWTH,
    ):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys_LBKSD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBKSD = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._even = 0  # the common length, or None where rows differ

    def __len__(self) -> int:
        """Positions in use: the longest row's."""
        return self._even if self._even is not None else int(self.lengths.max())

    @property
    def batch_size(self) -> int:
        return self.keys_LBKSD.shape[1]

    @property
    def common_length(self) -> int | None:
        return self._even

    def set_lengths(self, lengths: Tensor | list[int]) -> None:
        """Declare how many tokens of each row count; the rest will be overwritten."""
        self.lengths = torch.as_tensor(lengths, dtype=torch.long, device=self.keys_LBKSD.device)
        first, last = int(self.lengths.min()), int(self.lengths.max())
        self._even = first if first == last else None

    def reserve(self, positions: int) -> None:
        """Make room for `positions` in every row."""
        held = self.keys_LBKSD.shape[3]
        if positions <= held:
            return
        grown = GROWTH * -(-max(positions, held + held // 2) // GROWTH)
        for name in ("keys_LBKSD", "values_LBKSD"):
            old = getattr(self, name)
            new = old.new_zeros((*old.shape[:3], grown, old.shape[4]))
            new[:, :, :, :held] = old
            setattr(self, name, new)

    def write(self, layer: int, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of T new tokens; returns views (B, K, S, D) of all positions up to the last."""
        new = keys_BKTD.shape[2]
        keys, values = self.keys_LBKSD[layer], self.values_LBKSD[layer]
        end = len(self) + new
        if self._even is not None:
            keys[:, :, self._even : end] = keys_BKTD
            values[:, :, self._even : end] = values_BKTD
        else:
            row = torch.arange(self.batch_size, device=keys.device).unsqueeze(1)
            position = self.lengths.unsqueeze(1) + torch.arange(new, device=keys.device)
            keys[row, :, position] = keys_BKTD.transpose(1, 2)
            values[row, :, position] = values_BKTD.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, new: int) -> None:
        self.lengths = self.lengths + new
        if self._even is not None:
            self._even += new

    def select(self, rows: Tensor | list[int]) -> "KVCache":
        """A cache of the given rows in the given order; a row may appear more than once."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        out = object.__new__(KVCache)
        out.keys_LBKSD, out.values_LBKSD = self.keys_LBKSD[:, rows], self.values_LBKSD[:, rows]
        out.set_lengths(self.lengths[rows])
        return out
