"""Batched decoding: the next token of many sequences at once, over a pool of KV-cache slots.

A slot contains the keys and values of one sequence, and each sequence is at its own position. The first `n` slots are
in use, so that a step computes no idle row. `prefill` runs a prompt through the model once, and `load` copies the
result into one slot per sample.

The computation equals the model's (a test compares the two), with fewer, larger operations and weights packed by
`model/quantized.py` and `kernels/linear.py`, for prompts and for steps: the model itself can be freed. In float32 on a
CPU, and with int8 weights, the bits of a row's logits do not depend on the other rows of the batch:

- packed products give a row the same bits for any number of rows (kernels/linear.py); if weights cannot be packed,
  rows are padded to a multiple of 8, among which MKL's bits do not change;
- attention is a batched product over (row, head), not torch's flash kernel, which has a scratch buffer per thread
  whose alignment changes MKL's last bit, so that a row depends on the thread that computes it (2 threads, 4 heads
  of 64: equal rows 0 and 16 differ by an ulp);
- SiLU and GELU, whose last bit depends on an element's place in memory, always get complete vectors
  (`activate_rows`);
- the number of attended positions is rounded up and the rest masked: adding exact zeros at the end changes nothing
  as long as the order of summation stays the same. Values are therefore summed in blocks of 256 positions.

On a GPU a step is captured as a CUDA graph when it is first needed, and then replayed as one launch: with few rows it
is bound by kernel launches, a dozen per layer, not by memory. A graph cannot see new values on the host, so a step is a
function of tensors at fixed addresses: the tokens and positions fed, and the decoder's own tensors. There is one graph
for each number of rows and of attended positions, both rounded up.

L layers, R slots, B rows in use, H query heads, K key-value heads, G = H / K, P = 2K, S positions, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.io.progress import say
from llmkit.kernels.attention import attention_decode, attention_mask, scaled_dot_product_attention
from llmkit.kernels.dispatch import backend
from llmkit.kernels.linear import can_pack, packed_linear
from llmkit.kernels.projections import ACTIVATIONS, activate_rows
from llmkit.model.devices import Weights
from llmkit.model.quantized import narrow_linear
from llmkit.model.transformer import Layer, Transformer, normalize, rotary_tables

FEW_ROWS = 8  # rows are rounded up to powers of two up to this, then to its multiples, which cost no more
LEAST_SEEN = 256
MOST_GRAPHS = 48  # kept at once; a graph of a 48-layer model has some 700 nodes of about 1 KB
_Attend = Callable[[int, Tensor, Tensor], Tensor]  # (layer, queries of the new tokens, their keys followed by values)
KEPT_BYTES = 256 * 2**20  # of cached prompt prefixes
BLOCK = 256  # positions whose values are summed at once
# prompt tokens prefilled at once: on a CPU the complete prompt at once is 1.5% faster, pieces of 128 are 15% slower
PIECE, GPU_PIECE = 256, 1024
MKL_ROWS = 8  # a row's bits are the same for all multiples of this number of rows


class Recording(Protocol):
    """A captured function without arguments: `out` is its result, which `replay` recomputes in place."""

    out: Tensor

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Tensor], Any], Recording]  # (function to capture, recording to share memory with)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all captures: each stream has its own cuBLAS workspace, 32 MiB on sm_90."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """A recording as a CUDA (or HIP) graph."""

    def __init__(self, compute: Callable[[], Tensor], shared: CudaGraph | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        device = torch.device("cuda", torch.cuda.current_device())
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        pool = None if shared is None else shared._graph.pool()
        # A failed capture leaves its stream current; this block restores the previous one.
        with torch.cuda.stream(stream):
            # Run once before the capture, which forbids compiling and loading kernels and allocating handles and
            # workspaces.
            compute()
            # Only calls of this thread can break the capture: other threads may copy or synchronize meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.out = compute()

    def replay(self) -> None:
        self._graph.replay()


class StepGraphs:
    """CUDA graphs of the steps of one decoder with `slots` slots.

    The graphs share one memory pool: a replay overwrites the memory of the others, so the caller gets a copy of the
    logits. Beyond MOST_GRAPHS the least recently used graph is dropped.
    """

    def __init__(self, record: Record, slots: int, device: torch.device) -> None:
        self._record: Record | None = record
        self._fed_2R = torch.zeros((2, slots), dtype=torch.long, device=device)
        self._graphs: OrderedDict[tuple[int, int], Recording] = OrderedDict()

    def forget(self) -> None:
        """Drop all graphs, after the tensors that they read have moved."""
        self._graphs.clear()

    def run(self, rows: int, seen: int, fed: list[list[int]], compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return a copy of the logits `compute(token_B, position_B)` of `fed`, (2, rows), over `seen` positions.

        If a capture fails, because memory is short or an operation forbids it, no further steps are captured.
        """
        on_gpu = self._fed_2R.device.type == "cuda"
        token_B, position_B = self._fed_2R[:, :rows]
        # from pinned memory the copy is asynchronous; torch keeps the memory until it is done
        self._fed_2R[:, :rows].copy_(torch.tensor(fed, pin_memory=on_gpu), non_blocking=True)
        graph = self._graphs.pop((rows, seen), None)
        if graph is None and self._record is not None:
            try:
                graph = self._record(lambda: compute(token_B, position_B), next(iter(self._graphs.values()), None))
            except RuntimeError as error:  # CUDA errors and out of memory
                self._record = None
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"decoding without CUDA graphs, which is slower: {first}")
        if graph is None:
            return compute(token_B, position_B)
        self._graphs[rows, seen] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        graph.replay()
        return graph.out.clone()


def rounded_rows(used: int) -> int:
    """Round up a number of rows to 1, 2, 4, 8, 16, 24, 32 ..."""
    return 1 << (used - 1).bit_length() if used <= FEW_ROWS else -(-used // FEW_ROWS) * FEW_ROWS


def rounded_seen(positions: int, context: int) -> int:
    """Round up to 256, 512, 1,024 ... `context`: a block of keys beyond every row costs a program that exits at
    once."""
    rounded = max(LEAST_SEEN, 1 << (positions - 1).bit_length())
    return rounded if positions > context else min(rounded, context)


@dataclass(frozen=True)
class Prefix:
    """KV cache of T tokens: keys and values (L, K, T, D), and the next token's logits (1, V), or (0, V) if unknown."""

    keys_LKTD: Tensor
    values_LKTD: Tensor
    logits_1V: Tensor

    def __len__(self) -> int:
        return self.keys_LKTD.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys_LKTD.nbytes + self.values_LKTD.nbytes + self.logits_1V.nbytes

    def piece(self, start: int) -> Prefix:
        """Return the part from position `start` on, in its own memory."""
        if start == 0 and self.keys_LKTD.is_contiguous():  # not a view of a longer prefix
            return self
        return Prefix(self.keys_LKTD[:, :, start:].clone(), self.values_LKTD[:, :, start:].clone(), self.logits_1V)


class _Layer:
    def __init__(self, layer: Layer, table: int, weights: Weights) -> None:
        config = layer.config
        self.table = table
        out, down = layer.out.detach(), layer.down.detach()
        if layer.residual_scale is not None:
            out, down = out * layer.residual_scale[0], down * layer.residual_scale[1]
        self.input_norm, self.mlp_norm, self.window = layer.input_norm, layer.mlp_norm, layer.window
        self.input_norm_bias, self.mlp_norm_bias = layer.input_norm_bias, layer.mlp_norm_bias
        self.attention_post_norm, self.mlp_post_norm = layer.attention_post_norm, layer.mlp_post_norm
        self.qkv = _product(layer.qkv, layer.qkv_bias, weights)
        self.out = _product(out, layer.out_bias, weights)
        self.gate_up = _product(layer.gate_up, layer.gate_up_bias, weights)
        self.down = _product(down, layer.down_bias, weights)
        self.head_gains: Tensor | None = None  # (H + K, D)
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        if layer.q_norm is not None and layer.k_norm is not None and not config.qk_norm_whole:
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            self.head_gains = torch.cat([layer.q_norm.expand(heads, -1), layer.k_norm.expand(kv_heads, -1)])


def _product(weight: Tensor, bias: Tensor | None, weights: Weights) -> Callable[[Tensor], Tensor]:
    narrow = None if weights == "dense" else narrow_linear(weight, bias, weights)
    return narrow or packed_linear(weight, bias)


class Decoder:
    """The decoding slots of one model.

    slots    maximum number of sequences
    weights  format of the matrices; all but "dense" need a float32 model on a CPU. Packed weights are copies: build a
             new decoder after further training
    record   captures steps; None never does, "auto" uses CUDA graphs if attention is fused
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        slots: int,
        weights: Weights = "dense",
        record: Record | Literal["auto"] | None = "auto",
    ) -> None:
        self.config, self._embedding, self._final_norm = model.config, model.embed_tokens.detach(), model.norm
        self.device, self.dtype, self._weights = self._embedding.device, self._embedding.dtype, weights
        self._tables, table_of = rotary_tables(model.config)
        self._layers = [_Layer(layer, i, weights) for layer, i in zip(model.layers, table_of, strict=True)]
        scaling = model.config.rope_scaling
        self._first_context = scaling.original_max_position_embeddings if scaling and scaling.long_factor else None
        # longrope rotates by the complete length, so a prompt is one piece
        self.piece = sys.maxsize if self._first_context else PIECE if self.device.type == "cpu" else GPU_PIECE
        self._positions, self._final_bias = model.embed_positions, model.norm_bias
        self._embedding_scale = model.embedding_scales[self.dtype]
        self._product = _product(model.head_weight, None, weights)
        self._activate = self._activate_rows = ACTIVATIONS[self.config.activation]
        if self.dtype == torch.float32 and self.device.type == "cpu":
            self._activate_rows = partial(activate_rows, self._activate)
        self._scale = self.config.attention_scale
        self._eps = torch.tensor(self.config.rms_norm_eps, device=self.device)
        self._fused = backend(self.device.type) != "torch"
        self._slots = self._rows(slots)
        if record == "auto":
            record = CudaGraph if self._fused and self.device.type == "cuda" else None
        self._graphs = None if record is None else StepGraphs(record, self._slots, self.device)
        shape = self.config.num_hidden_layers, 2, self._slots, self.config.num_key_value_heads, 0, self.config.head_dim
        # (L, 2, R, K, S, D): one tensor, so that a layer's new keys and values are written by one operation
        self._cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._keys, self._values = self._cache.unbind(1)
        self._viewed: tuple[int, int] | None = None

    def _rows(self, used: int) -> int:
        """Return the rows to compute for `used` slots: padded in float32 on a CPU, so that no row's bits depend on
        it."""
        if self.dtype != torch.float32 or self.device.type != "cpu" or self._weights != "dense":
            return used
        return used if can_pack(self.dtype, self.device.type) else -(-used // MKL_ROWS) * MKL_ROWS

    def prefill(self, token_ids: list[int]) -> Prefix:
        """Run a prompt through the model alone, `piece` tokens at a time; the result depends on the prompt only."""
        *_, prefix = self.prefill_after([], token_ids)
        return prefix

    def prefill_after(self, pieces: Sequence[Prefix], token_ids: list[int]) -> Iterator[Prefix]:
        """Run a prompt whose first `pieces` are cached; yield the prefix so far after each new piece.

        If no piece is left to compute, yield the complete prefix.
        """
        past, total = sum(map(len, pieces)), len(token_ids)
        if len(pieces) == 1 and past == total:
            yield pieces[0]
            return
        keys, values = self._empty(total)
        if pieces:
            torch.cat([piece.keys_LKTD for piece in pieces], 2, out=keys[:, :, :past])
            torch.cat([piece.values_LKTD for piece in pieces], 2, out=values[:, :, :past])
        if past == total:
            yield Prefix(keys, values, pieces[-1].logits_1V)
        for start in range(past, total, self.piece):
            end = min(start + self.piece, total)
            hidden_TC = self._run(token_ids[start:end], keys[:, :, :end], values[:, :, :end])
            yield Prefix(keys[:, :, :end], values[:, :, :end], self._head(hidden_TC[-1:]))

    @torch.no_grad()
    def extend(self, prefix: Prefix, token_ids: list[int]) -> Prefix:
        """Return `prefix` extended by more tokens, which run through the model alone."""
        past = len(prefix)
        keys, values = self._empty(past + len(token_ids))
        keys[:, :, :past], values[:, :, :past] = prefix.keys_LKTD, prefix.values_LKTD
        return Prefix(keys, values, self._head(self._run(token_ids, keys, values)[-1:]))

    def _head(self, hidden_NC: Tensor) -> Tensor:
        cap = self.config.logits_softcap
        return self._product(hidden_NC) if cap is None else torch.tanh(self._product(hidden_NC) / cap) * cap

    def needs_new_prefill(self, before: int, after: int) -> bool:
        """Return True if a sequence that grows from `before` to `after` tokens must be prefilled again.

        Longrope rotates all positions differently once a sequence is longer than the original context.
        """
        return self._first_context is not None and before <= self._first_context < after

    def logits_in_pieces(self, token_ids: list[int], size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the start of each piece of T tokens, and the logits (`size`, V) after each of its tokens."""
        keys, values = self._empty(len(token_ids))
        hidden_TC = self._run(token_ids, keys, values)
        for start in range(0, len(token_ids), size):
            yield start, self._head(hidden_TC[start : start + size])

    def _empty(self, positions: int) -> Tensor:
        """Allocate the keys and values (2, L, K, S, D) of one sequence."""
        shape = 2, self.config.num_hidden_layers, self.config.num_key_value_heads, positions, self.config.head_dim
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def _run(self, token_ids: list[int], keys: Tensor, values: Tensor) -> Tensor:
        """Return the hidden states (T, hidden) of a sequence's last tokens; write their keys and values in place."""
        new, config = len(token_ids), self.config
        past = keys.shape[2] - new
        length_1 = torch.tensor([past + new], device=self.device)
        gqa = config.num_attention_heads != config.num_key_value_heads
        masks: dict[int | None, Tensor] = {}  # by window
        if past and not self._fused:
            windows = {layer.window for layer in self._layers}
            masks = {window: attention_mask(new, past + new, None, window, self.device) for window in windows}

        def attend(i: int, query_THD: Tensor, both_TPD: Tensor) -> Tensor:
            keys[i, :, past:], values[i, :, past:] = both_TPD.transpose(0, 1).chunk(2)
            query_1HTD = query_THD.transpose(0, 1).unsqueeze(0)
            seen = keys[i : i + 1], values[i : i + 1]
            window, details = self._layers[i].window, {"scale": self._scale, "softcap": config.attention_softcap}
            if past and self._fused:
                out_1HTD = attention_decode(query_1HTD, *seen, length_1, window=window, **details)
            else:  # after a prefix, torch's kernel takes 0.7 of the reference's time for a prompt of 1,500 tokens
                if past:
                    details["attn_mask"] = masks[window]
                else:
                    details |= {"is_causal": True, "window": window}
                out_1HTD = scaled_dot_product_attention(query_1HTD, *seen, enable_gqa=gqa, **details)
            return out_1HTD[0].transpose(0, 1)

        turns = [torch.view_as_complex(table(past + new, self.device)) for table in self._tables]
        tokens_T, position_T = torch.tensor(token_ids, device=self.device), torch.arange(past, past + new)
        turn_N1D = [turn[past:].unsqueeze(1) for turn in turns]
        return self._forward(tokens_T, position_T.to(self.device), turn_N1D, attend, self._activate)

    def hold(self, slot: int, length: int) -> Prefix:
        """Copy the first `length` positions of a slot, to continue from later."""
        keys, values = (tensor[:, slot, :, :length].clone() for tensor in (self._keys, self._values))
        return Prefix(keys, values, keys.new_empty((0, self.config.vocab_size)))

    @torch.no_grad()
    def load(self, slot: int, prefix: Prefix) -> None:
        """Copy a prefix into a slot."""
        self._reserve(len(prefix))
        self._keys[:, slot, :, : len(prefix)] = prefix.keys_LKTD
        self._values[:, slot, :, : len(prefix)] = prefix.values_LKTD

    @torch.no_grad()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot into another."""
        for tensor in (self._keys, self._values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def _reserve(self, positions: int) -> None:
        capacity = self._keys.shape[3]
        if positions <= capacity:
            return
        grown = self._reach(max(positions, capacity + capacity // 2))
        shape = self._cache.shape
        # zeros, because unwritten positions get weight zero, and zero times NaN is NaN
        cache = self._cache.new_zeros((*shape[:4], grown, shape[5]))
        cache[..., :capacity, :] = self._cache
        self._cache, (self._keys, self._values) = cache, cache.unbind(1)
        first_2RK = torch.arange(math.prod(shape[1:4]), device=self.device).view(shape[1:4]) * grown
        self._all_first_RP = first_2RK.transpose(0, 1).reshape(self._slots, -1).contiguous()
        self._turns = [torch.view_as_complex(table(grown, self.device, decoding=True)) for table in self._tables]
        self._viewed = None
        if self._graphs is not None:
            self._graphs.forget()

    def _reach(self, positions: int) -> int:
        """Return the number of positions that a step reads to attend to `positions` of them."""
        if self._graphs is None:
            return _rounded(positions)
        return rounded_seen(positions, _rounded(self.config.max_position_embeddings))

    @torch.no_grad()
    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Feed slot i the token `tokens[i]` at position `positions[i]`; return the logits (B, V) of the next tokens."""
        used, seen = len(tokens), self._reach(max(positions) + 1)
        self._reserve(seen)
        rows = self._rows(used if self._graphs is None else min(rounded_rows(used), self._slots))
        fed = [numbers + [0] * (rows - used) for numbers in (tokens, positions)]
        if self._graphs is None:
            # 0.95 of the time of no_grad for one row; tensors that outlive the step are created outside
            with torch.inference_mode():
                logits_BV = self._advance(rows, seen, *torch.tensor(fed, device=self.device).unbind())
        else:
            logits_BV = self._graphs.run(rows, seen, fed, partial(self._advance, rows, seen))
        return logits_BV[:used]

    def _advance(self, rows: int, seen: int, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Compute a step. It can be captured: `rows` and `seen` are its only numbers from the host."""
        self._view(rows, seen)
        kv_heads, size, cap = self.config.num_key_value_heads, self.config.head_dim, self.config.attention_softcap
        write_at = (position_B.unsqueeze(1) + self._first_RP).view(-1)
        masks: dict[int | None, Tensor] = {}  # by window (B * K, 1, S): minus infinity for hidden keys
        for window in set() if self._fused else {layer.window for layer in self._layers}:
            key_S, last_B1 = torch.arange(seen, device=self.device), position_B.unsqueeze(1)
            hidden_BS = key_S > last_B1
            if window is not None:
                hidden_BS |= key_S <= last_B1 - window
            mask_BS = torch.zeros(hidden_BS.shape, dtype=self.dtype, device=self.device)
            mask_BS.masked_fill_(hidden_BS, float("-inf"))
            masks[window] = mask_BS.unsqueeze(1).expand(-1, kv_heads, -1).reshape(-1, 1, seen)
        length_B = position_B + 1 if self._fused else position_B

        def attend(i: int, query_BHD: Tensor, both_BPD: Tensor) -> Tensor:
            cache, seen_keys, seen_values = self._views[i]
            cache.index_copy_(0, write_at, both_BPD.reshape(-1, size))
            window = self._layers[i].window
            if self._fused:
                seen_cache = seen_keys, seen_values, length_B
                details = {"scale": self._scale, "window": window, "softcap": cap}
                return attention_decode(query_BHD.unsqueeze(2), *seen_cache, **details)
            query_XGD = query_BHD.reshape(rows * kv_heads, -1, size)
            if cap is None:
                scores_XGS = torch.baddbmm(masks[window], query_XGD, seen_keys, alpha=self._scale)
            else:
                scores_XGS = torch.bmm(query_XGD, seen_keys).mul_(self._scale / cap).tanh_().mul_(cap)
                scores_XGS += masks[window]
            return _weighted_sum(torch.softmax(scores_XGS, -1), seen_values)

        turns = [turn.index_select(0, position_B).unsqueeze(1) for turn in self._turns]
        return self._head(self._forward(token_B, position_B, turns, attend, self._activate_rows))

    def _forward(self, token_N: Tensor, position_N: Tensor, turns_N1D: list[Tensor], attend: _Attend,
                 activate: Callable[[Tensor], Tensor]) -> Tensor:  # fmt: skip
        """Return the hidden states (N, hidden) of N tokens, rotated by their layers' tables; `attend` is attention."""
        config, heads = self.config, self.config.num_attention_heads
        rotated, rows, size = heads + config.num_key_value_heads, len(token_N), config.head_dim
        is_plain = not config.post_norms and config.residual_multiplier == 1.0
        x_NC = F.embedding(token_N, self._embedding)
        if config.normalize_embedding:
            x_NC = self._norm(x_NC, None)
        if config.embedding_scale != 1.0:
            x_NC = x_NC * self._embedding_scale
        if self._positions is not None:
            x_NC = x_NC + F.embedding(position_N, self._positions)
        for i, layer in enumerate(self._layers):
            normed_NC = self._normed(x_NC, layer.input_norm, layer.input_norm_bias) if config.pre_norms else x_NC
            qkv_NJD = layer.qkv(normed_NC).view(rows, -1, size)
            qk_NJD = qkv_NJD[:, :rotated]
            if config.qk_norm_whole:
                both = (qk_NJD[:, :heads], layer.q_norm), (qk_NJD[:, heads:], layer.k_norm)
                for x_NJD, gain in both:
                    x_NJD.copy_(self._norm(x_NJD.flatten(1), gain).view(x_NJD.shape))
            elif config.qk_norm:
                self._norm(qk_NJD, None, out=qk_NJD)
                if layer.head_gains is not None:
                    qk_NJD.mul_(layer.head_gains)
            turned_NJD = qk_NJD.float()  # no copy in float32
            turned_NJD.view(torch.complex64).mul_(turns_N1D[layer.table])
            if turned_NJD is not qk_NJD:
                qk_NJD.copy_(turned_NJD)
            attended = attend(i, qkv_NJD[:, :heads], qkv_NJD[:, heads:])
            branch_NC = layer.out(attended.reshape(rows, -1))
            x_NC = x_NC.add_(branch_NC if is_plain else self._finish(branch_NC, layer.attention_post_norm))
            normed_NC = self._normed(x_NC, layer.mlp_norm, layer.mlp_norm_bias) if config.pre_norms else x_NC
            gate_NF = layer.gate_up(normed_NC)
            if config.gated_mlp:
                gate_NF, up_NF = gate_NF.chunk(2, -1)
                hidden_NF = activate(gate_NF).mul_(up_NF)
            else:
                hidden_NF = activate(gate_NF)
            branch_NC = layer.down(hidden_NF)
            x_NC = x_NC.add_(branch_NC if is_plain else self._finish(branch_NC, layer.mlp_post_norm))
        x_NC = self._normed(x_NC, self._final_norm, self._final_bias)
        return x_NC if config.logits_scaling == 1.0 else x_NC / config.logits_scaling

    def _finish(self, branch_NC: Tensor, post_norm: Tensor | None) -> Tensor:
        """Normalize and scale the output of a branch for the residual stream."""
        if self.config.post_norms:
            branch_NC = self._norm(branch_NC, post_norm)
        multiplier = self.config.residual_multiplier
        return branch_NC if multiplier == 1.0 else branch_NC * multiplier

    def _normed(self, x_NC: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        return normalize(x_NC, gain, bias, self.config) if self.config.layer_norm else self._norm(x_NC, gain)

    def _norm(self, x_NC: Tensor, gain: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Apply RMSNorm. On a CPU torch's own is 8 operations, 13 us for a row of 384; these are 5, and 9 us."""
        if self.device.type != "cpu":
            y_NC = F.rms_norm(x_NC, x_NC.shape[-1:], gain, self.config.rms_norm_eps)
            return y_NC if out is None else out.copy_(y_NC)
        length_N1 = torch.linalg.vector_norm(x_NC.float(), 2, -1, True)
        inverse_N1 = torch.addcmul(self._eps, length_N1, length_N1, value=1 / x_NC.shape[-1]).rsqrt_()
        y_NC = torch.mul(x_NC, inverse_N1, out=out).to(self.dtype)
        return y_NC if gain is None else y_NC.mul_(gain)

    def _view(self, rows: int, seen: int) -> None:
        """Create views of the slots in use, for several steps: creating them costs as much as computing with them."""
        if self._viewed == (rows, seen):
            return
        kv_heads, capacity, size = self._keys.shape[2:]
        step = BLOCK if self.dtype == torch.float32 else seen
        self._views = []  # by layer: all slots, flat, and the keys and values that a step reads
        for cache_2RKSD in self._cache:
            flat, (keys_RKSD, values_RKSD) = cache_2RKSD.view(-1, size), cache_2RKSD
            if self._fused:  # its number of splits depends on `seen`, not on the capacity
                self._views.append((flat, keys_RKSD[:rows, :, :seen], values_RKSD[:rows, :, :seen]))
                continue
            used = [x[:rows].view(rows * kv_heads, capacity, size) for x in (keys_RKSD, values_RKSD)]
            blocks = [used[1][:, at : min(at + step, seen)] for at in range(0, seen, step)]
            self._views.append((flat, used[0][:, :seen].mT, blocks))
        self._first_RP = self._all_first_RP[:rows]
        self._viewed = (rows, seen)


def _weighted_sum(weights_XGS: Tensor, value_blocks: list[Tensor]) -> Tensor:
    """Return the sum of the values by their weights, (X, G, D), block after block."""
    if len(value_blocks) == 1:
        return torch.bmm(weights_XGS, value_blocks[0])
    weight_blocks = weights_XGS.split(value_blocks[0].shape[1], -1)
    total = torch.bmm(weight_blocks[0], value_blocks[0])
    for weights, block in zip(weight_blocks[1:], value_blocks[1:], strict=True):
        total.baddbmm_(weights, block)
    return total


def _rounded(positions: int) -> int:
    """Round up a number of positions to 64, 128, 256, and then to multiples of BLOCK."""
    if positions <= BLOCK:
        return max(64, 1 << (positions - 1).bit_length())
    return -(-positions // BLOCK) * BLOCK


class PrefixCache:
    """LRU cache of keys and values of prompts, in pieces, for common prefixes such as the turns of a conversation.

    It contains at most `limit` bytes. The key of a piece is a hash of all tokens up to its end. A piece is computed by
    the same operations on the same shapes whether the pieces before it were cached or not, so a cache hit changes no
    bit. Keys and values written by decode steps are not cached: steps sum attention in other blocks, which changes last
    bits. vLLM caches blocks of prompts in the same way ("automatic prefix caching").
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._pieces: OrderedDict[bytes, Prefix] = OrderedDict()
        self._limit, self._bytes = limit, 0

    def prefill(self, decoder: Decoder, token_ids: list[int]) -> Iterator[Prefix]:
        """Yield the prefix of a prompt so far after each computed piece; the last one is complete."""
        hasher, names = blake2b(digest_size=16), []
        for start in range(0, len(token_ids), decoder.piece):
            hasher.update(array("q", token_ids[start : start + decoder.piece]).tobytes())
            names.append(hasher.digest())
        count = next((i for i, name in enumerate(names) if name not in self._pieces), len(names))
        pieces = [self._pieces[name] for name in names[:count]]
        start = sum(map(len, pieces))
        self._use(names[:count])
        for number, prefix in enumerate(decoder.prefill_after(pieces, token_ids), count + 1):
            if number <= len(names):
                piece, old = prefix.piece(start), self._pieces.get(names[number - 1])  # of a concurrent request
                self._bytes += piece.nbytes - (0 if old is None else old.nbytes)
                self._pieces[names[number - 1]] = piece
                self._use(names[:number])
                start = len(prefix)
            yield prefix

    def _use(self, names: list[bytes]) -> None:
        """Mark the pieces of a prompt as used, so that its first piece is evicted last, and evict down to the limit."""
        for name in filter(self._pieces.__contains__, names[::-1]):
            self._pieces.move_to_end(name)
        while self._bytes > self._limit:
            self._bytes -= self._pieces.popitem(last=False)[1].nbytes
