"""One new token for many sequences at a time: the model's decode step over a pool of slots.

A slot holds the keys and values of one sequence. Sequences are at positions of their own; the first `n` slots are in
use, so that a step computes no idle row. `prefill` runs a prompt through the model once, and `load` copies what it
left into as many slots as there are samples.

The step is the model's own mathematics (a test compares the two) with fewer, larger operations and packed weights.
In float32 on a CPU a row's logits are the same bits whatever rows stand beside it:

- packed products give a row the same bits among any number of rows but one (kernels/packed.py), so a single row gets
  an idle neighbour; where weights cannot be packed, rows are filled up to a multiple of 8, as MKL wants it;
- attention is a batched product over (row, head), not torch's flash kernel: that one has a scratch buffer per
  thread, whose alignment changes MKL's last bit, so that a row depends on the thread it falls to (2 threads,
  4 heads of 64: rows 0 and 16 of equal content differ by an ulp);
- the positions that are looked at are rounded up and masked: sums over exact zeros at the end change nothing, as
  long as the steps of summation stay the same. Values are therefore summed in blocks of 256 positions.

L layers, R slots, B rows in use, H query heads, K key-value heads, G = H / K, S positions, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.kernels import attention_decode, backend
from llmkit.kernels.packed import can_pack, packed_linear
from llmkit.model.cache import KVCache
from llmkit.model.rope import RotaryTable
from llmkit.model.transformer import Transformer

BLOCK = 256  # positions whose values are summed at once
PACKED_ROWS, MKL_ROWS = 2, 8  # the fewest rows, or their multiple, at which a row's bits do not depend on the number


@dataclass(frozen=True)
class Prefix:
    """What T tokens left behind: keys and values (L, K, T, D) and the logits of the token that follows.

    The logits are (1, V), or (0, V) where nobody has computed them.
    """

    keys_LKTD: Tensor
    values_LKTD: Tensor
    logits_1V: Tensor

    def __len__(self) -> int:
        return self.keys_LKTD.shape[2]


class _Layer:
    """One layer's weights, as the step wants them."""

    def __init__(self, layer) -> None:
        config = layer.config
        out, down = layer.out.detach(), layer.down.detach()
        if layer.residual_scale is not None:
            out, down = out * layer.residual_scale[0], down * layer.residual_scale[1]
        self.input_norm, self.mlp_norm, self.window = layer.input_norm, layer.mlp_norm, layer.window
        self.qkv = packed_linear(layer.qkv, layer.qkv_bias)
        self.out = packed_linear(out, layer.out_bias)
        self.gate_up, self.down = packed_linear(layer.gate_up), packed_linear(down)
        self.head_gains: Tensor | None = None  # (H + K, D)
        if layer.q_norm is not None:
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            self.head_gains = torch.cat([layer.q_norm.expand(heads, -1), layer.k_norm.expand(kv_heads, -1)])


class Decoder:
    """The slots of one model.

    `slots` sequences at most. The weights are copied where they are packed: build a new decoder when the model
    has been trained on.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, slots: int) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = model.embed_tokens.device, model.embed_tokens.dtype
        self._layers = [_Layer(layer) for layer in model.layers]
        self._head = packed_linear(model.head_weight)
        self._rotary = RotaryTable(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        self._scale = self.config.qk_gain * self.config.head_dim**-0.5
        self._fused = backend(self.device.type) != "torch"
        self._slots = self._rows(slots)
        shape = self.config.num_hidden_layers, self._slots, self.config.num_key_value_heads, 0, self.config.head_dim
        self._keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._values = torch.empty_like(self._keys)
        self._viewed: tuple[int, int] | None = None

    def _rows(self, used: int) -> int:
        """The rows to compute for `used` slots: some more in float32 on a CPU, so that no row sees the number."""
        if self.dtype != torch.float32 or self.device.type != "cpu":
            return used
        if can_pack(self.dtype, self.device.type):
            return max(used, PACKED_ROWS)
        return -(-used // MKL_ROWS) * MKL_ROWS

    def prefill(self, token_ids: list[int]) -> Prefix:
        """Run a prompt through the model by itself: what it leaves depends on nothing else."""
        return self._run(
            KVCache(self.config, 1, dtype=self.dtype, device=self.device, capacity=len(token_ids)), token_ids
        )

    @torch.no_grad()
    def extend(self, prefix: Prefix, token_ids: list[int]) -> Prefix:
        """Run more tokens through the model, by themselves again."""
        held = len(prefix)
        cache = KVCache(self.config, 1, dtype=self.dtype, device=self.device, capacity=held + len(token_ids))
        cache.keys_LBKSD[:, 0, :, :held] = prefix.keys_LKTD
        cache.values_LBKSD[:, 0, :, :held] = prefix.values_LKTD
        cache.set_lengths([held])
        return self._run(cache, token_ids)

    @torch.no_grad()
    def _run(self, cache: KVCache, token_ids: list[int]) -> Prefix:
        hidden = self.model(torch.tensor([token_ids], device=self.device), cache=cache)
        return Prefix(cache.keys_LBKSD[:, 0], cache.values_LBKSD[:, 0], self._head(hidden[:, -1]))

    def hold(self, slot: int, length: int) -> Prefix:
        """A copy of the first `length` positions of a slot, to go on from later."""
        keys, values = (held[:, slot, :, :length].clone() for held in (self._keys, self._values))
        return Prefix(keys, values, keys.new_empty((0, self.config.vocab_size)))

    @torch.no_grad()
    def load(self, slot: int, prefix: Prefix) -> None:
        """Let a slot begin where a prompt ended."""
        self._reserve(len(prefix))
        self._keys[:, slot, :, : len(prefix)] = prefix.keys_LKTD
        self._values[:, slot, :, : len(prefix)] = prefix.values_LKTD

    @torch.no_grad()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot into another."""
        for held in (self._keys, self._values):
            held[:, target, :, :length] = held[:, source, :, :length]

    def _reserve(self, positions: int) -> None:
        held = self._keys.shape[3]
        if positions <= held:
            return
        grown = _rounded(max(positions, held + held // 2))
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            # zeros: an unwritten position is masked, but zero times NaN would be NaN
            new = old.new_zeros((*old.shape[:3], grown, old.shape[4]))
            new[:, :, :, :held] = old
            setattr(self, name, new)
        self._viewed = None

    @torch.no_grad()
    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Feed slot i the token `tokens[i]`, which stands at `positions[i]`; the logits (B, V) of what follows."""
        used, rows = len(tokens), self._rows(len(tokens))
        filler = [0] * (rows - used)
        seen = _rounded(max(positions) + 1)
        self._reserve(seen)
        self._view(rows, seen)
        token_B, position_B = torch.tensor([tokens + filler, positions + filler], device=self.device)
        config, heads, kv_heads = self.config, self.config.num_attention_heads, self.config.num_key_value_heads
        size, rotated = config.head_dim, heads + kv_heads
        turn_B1D = self._turns[position_B].unsqueeze(1)
        write_at = (position_B.unsqueeze(1) + self._first_RK).view(-1)
        windows = set() if self._fused else {layer.window for layer in self._layers}
        masks = {window: self._mask(position_B, seen, window) for window in windows}
        length_B = position_B + 1 if self._fused else position_B
        x_BC = F.embedding(token_B, self.model.embed_tokens)
        if config.normalize_embedding:
            x_BC = self._norm(x_BC, None)
        for i, (layer, (keys, values, key_XDS, value_blocks)) in enumerate(zip(self._layers, self._views, strict=True)):
            qkv_BJD = layer.qkv(self._norm(x_BC, layer.input_norm)).view(rows, -1, size)
            qk_BJD = qkv_BJD[:, :rotated]
            if config.qk_norm:
                qk_BJD = F.rms_norm(qk_BJD, (size,), None, config.rms_norm_eps)
                if layer.head_gains is not None:
                    qk_BJD = qk_BJD * layer.head_gains
            qk_BJD = qk_BJD.float().contiguous()
            torch.view_as_complex(qk_BJD.view(rows, rotated, -1, 2)).mul_(turn_B1D)
            qk_BJD = qk_BJD.to(self.dtype)
            keys.index_copy_(0, write_at, qk_BJD[:, heads:].reshape(-1, size))
            values.index_copy_(0, write_at, qkv_BJD[:, rotated:].reshape(-1, size))
            if self._fused:
                held = self._keys[i, :rows], self._values[i, :rows]
                query_BH1D = qk_BJD[:, :heads].unsqueeze(2)
                attended = attention_decode(query_BH1D, *held, length_B, scale=self._scale, window=layer.window)
            else:
                query_XGD = qk_BJD[:, :heads].reshape(rows * kv_heads, -1, size)
                scores_XGS = torch.baddbmm(masks[layer.window], query_XGD, key_XDS, alpha=self._scale)
                attended = _weighted_sum(torch.softmax(scores_XGS, -1), value_blocks)
            x_BC = x_BC.add_(layer.out(attended.reshape(rows, -1)))
            gate, up = layer.gate_up(self._norm(x_BC, layer.mlp_norm)).chunk(2, -1)
            x_BC = x_BC.add_(layer.down(F.silu(gate).mul_(up)))
        return self._head(self._norm(x_BC, self.model.norm))[:used]

    def _norm(self, x_BC: Tensor, gain: Tensor | None) -> Tensor:
        return F.rms_norm(x_BC, x_BC.shape[-1:], gain, self.config.rms_norm_eps)

    def _mask(self, position_B: Tensor, seen: int, window: int | None) -> Tensor:
        """What is added to the scores: (B * K, 1, S), minus infinity where a key is not to be seen."""
        key_S, last_B1 = torch.arange(seen, device=self.device), position_B.unsqueeze(1)
        hidden_BS = key_S > last_B1
        if window is not None:
            hidden_BS |= key_S <= last_B1 - window
        mask_BS = torch.zeros(hidden_BS.shape, dtype=self.dtype, device=self.device)
        mask_BS.masked_fill_(hidden_BS, float("-inf"))
        return mask_BS.repeat_interleave(self.config.num_key_value_heads, 0).unsqueeze(1)

    def _view(self, rows: int, seen: int) -> None:
        """Views of the slots in use, kept from step to step: making them costs as much as computing with them."""
        if self._viewed == (rows, seen):
            return
        kv_heads, held, size = self._keys.shape[2:]
        step = BLOCK if self.dtype == torch.float32 else seen
        self._views = []
        for keys_RKSD, values_RKSD in zip(self._keys, self._values, strict=True):
            used = [x[:rows].view(rows * kv_heads, held, size) for x in (keys_RKSD, values_RKSD)]
            blocks = [used[1][:, at : min(at + step, seen)] for at in range(0, seen, step)]
            flat = (keys_RKSD.view(-1, size), values_RKSD.view(-1, size))
            self._views.append((*flat, used[0][:, :seen].mT, blocks))
        self._first_RK = torch.arange(rows * kv_heads, device=self.device).view(rows, kv_heads) * held
        self._turns = torch.view_as_complex(self._rotary(seen, self.device))
        self._viewed = (rows, seen)


def _weighted_sum(weights_XGS: Tensor, value_blocks: list[Tensor]) -> Tensor:
    """The values by their weights, block after block: (X, G, D)."""
    if len(value_blocks) == 1:
        return torch.bmm(weights_XGS, value_blocks[0])
    parts = weights_XGS.split(value_blocks[0].shape[1], -1)
    total = torch.bmm(parts[0], value_blocks[0])
    for part, block in zip(parts[1:], value_blocks[1:], strict=True):
        total.baddbmm_(part, block)
    return total


def _rounded(positions: int) -> int:
    """The positions that a step looks at: 64, 128, 256, and then whole blocks."""
    if positions <= BLOCK:
        return max(64, 1 << (positions - 1).bit_length())
    return -(-positions // BLOCK) * BLOCK
