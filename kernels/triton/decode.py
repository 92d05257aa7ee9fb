"""Attention of new tokens to a cache of keys and values: FlashDecoding, split over the keys.

A program takes all queries that share one key-value head, so that a key is read once, and a fixed range of keys; a
second kernel merges the ranges. Ranges are counted from position 0 whatever the batch, so that the bits of a sequence's
result do not depend on the others.

B batch, H query heads, K key-value heads, G = H / K, T new tokens per row, R = T G rows of queries, S capacity.
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.fused_attention import LOG2_E, empty_as_used
from llmkit.kernels.triton.launch import cdiv, launch, next_power_of_2
from llmkit.kernels.triton.tiles import decode_tiles
from torch import Tensor

MERGED = 16  # splits at a time, whatever the capacity: the order of a sum is part of its bits


@triton.jit
def _load_tile(base, row, stride, limit, size, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Load (rows, BLOCK_D), zero beyond `limit` and `size`, by pointers: descriptors take as long as few tiles."""
    column = tl.arange(0, BLOCK_D)
    pointer = base + row[:, None] * stride + column[None, :]
    if EVEN_D:
        return tl.load(pointer, mask=row[:, None] < limit, other=0.0)
    else:
        return tl.load(pointer, mask=(row[:, None] < limit) & (column[None, :] < size), other=0.0)


@triton.jit
def _store_rows(base, tile, offset, valid, size, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (column[None, :] < size)
    tl.store(base + offset[:, None] + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["kv_heads", "new", "capacity", "splits", "window"])
def attention_decode(
    q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, part_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh,
    stride_ks, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_ot, kv_heads, new, capacity, splits, size,
    window, score_scale, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_R queries of one key-value head, and SPLIT_KEYS keys.

    Row r is token r // G of the row's T new ones, of head r % G of the group. Writes the output if there is only
    one split; else the split's output (B, K, R, splits, D) and the log2 of its weight.
    """
    split, row = tl.program_id(0) % splits, tl.program_id(0) // splits
    b, h = tl.cast(row // kv_heads, tl.int64), tl.cast(row % kv_heads, tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = r < new * GROUP
    t = r // GROUP
    length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), capacity)
    last = length - new + t  # position of the query: the last key that it sees
    block_last = length - new + tl.minimum((tl.program_id(1) * BLOCK_R + BLOCK_R - 1) // GROUP, new - 1)
    begin = split * SPLIT_KEYS
    end = tl.minimum(begin + SPLIT_KEYS, block_last + 1)
    if WINDOWED:
        first = length - new + tl.program_id(1) * BLOCK_R // GROUP - window + 1
        begin = tl.maximum(begin, tl.maximum(first, 0) // BLOCK_N * BLOCK_N)
    if (begin < end) | ONE_SPLIT:
        column = tl.arange(0, BLOCK_D)
        q_at = (h * GROUP + r % GROUP) * stride_qh + t * stride_qt
        q_mask = valid[:, None] & (column[None, :] < size)
        q = tl.load(q_ptr + b * stride_qb + q_at[:, None] + column[None, :], mask=q_mask, other=0.0)
        local = tl.arange(0, BLOCK_N)
        k_base = k_ptr + b * stride_kb + h * stride_kh + tl.cast(begin, tl.int64) * stride_ks
        v_base = v_ptr + b * stride_vb + h * stride_vh + tl.cast(begin, tl.int64) * stride_vs
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        weight = tl.zeros([BLOCK_R], tl.float32)
        highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for n0 in tl.range(begin, end, BLOCK_N):
            k = _load_tile(k_base, local, stride_ks, end - n0, size, BLOCK_D, EVEN_D)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            key = n0 + local
            seen = key[None, :] <= last[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] > last[:, None] - window)
            scores = tl.where(seen, products * score_scale, float("-inf"))
            now = tl.maximum(highest, tl.max(scores, 1))
            anchor = tl.where(now == float("-inf"), 0.0, now)
            p = tl.exp2(scores - anchor[:, None])
            decay = tl.exp2(highest - anchor)
            weight = weight * decay + tl.sum(p, 1)
            v = _load_tile(v_base, local, stride_vs, end - n0, size, BLOCK_D, EVEN_D)
            total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION)
            highest = now
            k_base += BLOCK_N * stride_ks
            v_base += BLOCK_N * stride_vs
        # A row that sees no key gives zeros, with the weight 2^-inf.
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        if ONE_SPLIT:
            o_at = (h * GROUP + r % GROUP) * stride_oh + t * stride_ot
            _store_rows(o_ptr + b * stride_ob, total, o_at, valid, size, BLOCK_D)
        else:
            part = (tl.cast(row, tl.int64) * new * GROUP + r) * splits + split
            _store_rows(part_ptr, total, part * size, valid, size, BLOCK_D)
            tl.store(lse_ptr + part, highest + tl.log2(weight), mask=valid)


@triton.jit(do_not_specialize=["kv_heads", "new", "capacity", "splits", "window"])
def attention_merge(
    part_ptr, lse_ptr, lengths_ptr, o_ptr, stride_ob, stride_oh, stride_ot, kv_heads, new, capacity, splits, size,
    window, GROUP: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: one query. Writes the mean of its splits' outputs by their weights."""
    r, row = tl.program_id(0) % (new * GROUP), tl.program_id(0) // (new * GROUP)
    b, h = tl.cast(row // kv_heads, tl.int64), tl.cast(row % kv_heads, tl.int64)
    t = r // GROUP
    last = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), capacity) - new + t
    begin, end = 0, (last + SPLIT_KEYS) // SPLIT_KEYS
    if WINDOWED:
        begin = tl.maximum(last - window + 1, 0) // SPLIT_KEYS
    column = tl.arange(0, BLOCK_D)
    base = (tl.cast(row, tl.int64) * new * GROUP + r) * splits
    total = tl.zeros([BLOCK_D], tl.float32)
    weight = 0.0
    highest = float("-inf")
    for s0 in range(begin, end, BLOCK_S):
        split = s0 + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + base + split, mask=split < end, other=float("-inf"))
        mask = (split[:, None] < end) & (column[None, :] < size)
        part = tl.load(part_ptr + (base + split)[:, None] * size + column[None, :], mask=mask, other=0.0)
        now = tl.maximum(highest, tl.max(lse, 0))
        anchor = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(lse - anchor)
        decay = tl.exp2(highest - anchor)
        weight = weight * decay + tl.sum(p, 0)
        total = total * decay + tl.sum(p[:, None] * part, 0)
        highest = now
    total = total / tl.where(weight == 0.0, 1.0, weight)
    o_base = o_ptr + b * stride_ob + (h * GROUP + r % GROUP) * stride_oh + t * stride_ot
    tl.store(o_base + column, total.to(o_ptr.dtype.element_ty), mask=column < size)


def decode(query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int) -> Tensor:
    """Return the output (B, H, T, D) of T new tokens, the last of `lengths` (B,) positions; window 0 is none."""
    batch, heads, new, size = query.shape
    lengths = lengths.contiguous()
    kv_heads, capacity = key_cache.shape[1:3]
    group = heads // kv_heads
    padded = max(16, next_power_of_2(size))
    out = empty_as_used(query.shape, query)
    chosen = decode_tiles(size, query.dtype)
    splits = max(1, cdiv(capacity, chosen.split_keys))
    block_r = min(64, max(16, next_power_of_2(new * group)))
    pieces = lse = None
    if splits > 1:
        pieces = query.new_empty((batch, kv_heads, new * group, splits, size), dtype=torch.float32)
        lse = query.new_empty(pieces.shape[:-1], dtype=torch.float32)
    counts = kv_heads, new, capacity, splits, size, window
    constants = {"GROUP": group, "SPLIT_KEYS": chosen.split_keys, "BLOCK_D": padded, "WINDOWED": window > 0}
    launch(
        attention_decode, (splits * batch * kv_heads, cdiv(new * group, block_r)), query, key_cache, value_cache,
        lengths, out, pieces, lse, *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
        *out.stride()[:3], *counts, scale * LOG2_E, BLOCK_R=block_r, BLOCK_N=chosen.block_n, EVEN_D=padded == size,
        PRECISION="ieee", ONE_SPLIT=splits == 1, **constants, num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            attention_merge, (new * group * batch * kv_heads,), pieces, lse, lengths, out, *out.stride()[:3], *counts,
            BLOCK_S=MERGED, **constants, num_warps=2,
        )  # fmt: skip
    return out
