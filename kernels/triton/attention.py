"""Attention forward, and what its backward shares: FlashAttention-2 with one mechanism for all masks.

Dao 2023, arXiv:2307.08691.

Causal query q sees the keys lo[q] ... q, and key k is seen by the queries k ... hi[k]. Both tables are non-decreasing,
so their values at the ends of a block tell which blocks of the other side are seen by none of its rows (skipped), by
all (computed without a mask) or by some. Documents and windows are such tables; the cost is that of visible keys.

Scores are kept in base 2: p = exp2(s - lse) with log2(e) in the scale, one instruction instead of two for exp.

B batch, H query heads, K key-value heads, G = H / K, T queries, S keys, D head size (padded to a power of two).
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.fused_attention import LOG2_E, empty_as_used
from llmkit.kernels.triton.launch import cdiv, launch, next_power_of_2
from llmkit.kernels.triton.tiles import tiles
from torch import Tensor


@triton.jit
def store_tile(base, tile, first, rows, size, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a tile to a matrix (rows, size) from row `first` on; its rows may begin anywhere in memory."""
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointer, tile.to(base.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < size))


@triton.jit
def key_ranges(lo_ptr, m0, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
               HAS_LO: tl.constexpr):  # fmt: skip
    """For the queries from m0, return the first key, start and end of the keys that all see, and the last key's end."""
    if CAUSAL:
        end = tl.minimum(m0 + BLOCK_M, queries)
        some = (m0 + 1) // BLOCK_N * BLOCK_N
        begin, every = 0, 0
        if HAS_LO:
            begin = tl.load(lo_ptr + m0) // BLOCK_N * BLOCK_N
            highest = tl.load(lo_ptr + end - 1)
            every = tl.minimum(tl.cdiv(highest, BLOCK_N) * BLOCK_N, some)
            every = tl.maximum(every, begin)
        return begin, every, tl.maximum(some, every), end
    else:
        return 0, 0, keys // BLOCK_N * BLOCK_N, keys


@triton.jit
def seen_keys(query, key, lo, keys, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr):
    if CAUSAL:
        seen = key[None, :] <= query[:, None]
        if HAS_LO:
            seen = seen & (key[None, :] >= lo[:, None])
    else:
        seen = key[None, :] < keys
    return seen


@triton.jit
def rows_of(base, rows, size, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Describe a matrix (rows, size) of which BLOCK rows are loaded at a time, zero beyond `rows` and `size`.

    On sm_90 the tensor memory accelerator loads them, without a thread's addresses, masks or registers; elsewhere the
    compiler generates masked loads.
    """
    return tl.make_tensor_descriptor(base, [rows, size], [stride, 1], [BLOCK, BLOCK_D])


@triton.jit
def numbers_from(base, first, count, other, BLOCK: tl.constexpr, SPECIALIZE: tl.constexpr):
    """Load BLOCK of `count` numbers, `other` beyond them; 0 with SPECIALIZE, which needs a descriptor."""
    if SPECIALIZE:
        return tl.make_tensor_descriptor(base, [count], [1], [BLOCK]).load([first])
    else:
        at = first + tl.arange(0, BLOCK)
        return tl.load(base + at, mask=at < count, other=other)


@triton.jit
def _attend(total, weight, highest, q, query, lo, k_rows, v_rows, first, firsts, second, blocks, keys, score_scale,
            BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, PRECISION: tl.constexpr,
            MASKED: tl.constexpr, SPECIALIZE: tl.constexpr = False):  # fmt: skip
    """Add `blocks` blocks of keys to the weighted sum: `firsts` from `first` on, the others from `second` on."""
    column = tl.arange(0, BLOCK_N)
    for i in tl.range(0, blocks, warp_specialize=SPECIALIZE):
        n0 = tl.where(i < firsts, first + i * BLOCK_N, second + (i - firsts) * BLOCK_N)
        k = k_rows.load([n0, 0])
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # The scale is positive, so it is applied in one multiply-add with the maximum.
        if MASKED:
            products = tl.where(seen_keys(query, n0 + column, lo, keys, CAUSAL, HAS_LO), products, float("-inf"))
        now = tl.maximum(highest, tl.max(products, 1) * score_scale)
        # for a row that has seen no key yet, exp2(-inf - 0) = 0, but exp2(-inf + inf) is NaN
        anchor = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
        p = tl.exp2(products * score_scale - anchor[:, None])
        decay = tl.exp2(highest - anchor)
        weight = weight * decay + tl.sum(p, 1)
        v = v_rows.load([n0, 0])
        total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION)
        highest = now
    return total, weight, highest


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lo_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_ot, stride_lo, heads, queries, keys, size,
    score_scale, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes outputs, and log2 of the sum of 2^scores (B, H, T).

    With SPECIALIZE, on sm_90 and 4 warps, one warp group loads keys and values and two compute 64 queries each. Triton
    3.6 needs a single loop for this, with masks in every block, and bounds loaded by a descriptor.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    # The last queries see most keys: started first, they leave no straggler.
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks
    b, h = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
    query = m0 + tl.arange(0, BLOCK_M)
    q = rows_of(q_ptr + b * stride_qb + h * stride_qh, queries, size, stride_qt, BLOCK_M, BLOCK_D).load([m0, 0])
    k_base = k_ptr + b * stride_kb + h // GROUP * stride_kh
    v_base = v_ptr + b * stride_vb + h // GROUP * stride_vh
    k_rows = rows_of(k_base, keys, size, stride_ks, BLOCK_N, BLOCK_D)
    v_rows = rows_of(v_base, keys, size, stride_vs, BLOCK_N, BLOCK_D)
    lo = query
    if HAS_LO:
        lo_ptr += b * stride_lo
        lo = numbers_from(lo_ptr, m0, queries, 0, BLOCK_M, SPECIALIZE)
    begin, every, some, end = key_ranges(lo_ptr, m0, queries, keys, BLOCK_M, BLOCK_N, CAUSAL, HAS_LO)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SPECIALIZE:
        every, some = begin, begin
    firsts = (every - begin) // BLOCK_N
    total, weight, highest = _attend(
        total, weight, highest, q, query, lo, k_rows, v_rows, begin, firsts, some,
        firsts + tl.cdiv(end - some, BLOCK_N), keys, score_scale, BLOCK_N, CAUSAL, HAS_LO, PRECISION, True, SPECIALIZE,
    )  # fmt: skip
    if not SPECIALIZE:
        total, weight, highest = _attend(
            total, weight, highest, q, query, lo, k_rows, v_rows, every, 0, every, (some - every) // BLOCK_N, keys,
            score_scale, BLOCK_N, CAUSAL, HAS_LO, PRECISION, False,
        )  # fmt: skip
    o_base = o_ptr + b * stride_ob + h * stride_oh
    store_tile(o_base, total / weight[:, None], m0, queries, size, stride_ot, BLOCK_M, BLOCK_D)
    lse_base = lse_ptr + tl.cast(row, tl.int64) * queries
    tl.store(lse_base + query, highest + tl.log2(weight), mask=query < queries)


def batch_stride(bounds: Tensor | None) -> int:
    """Return the batch stride of bounds; 0 if one row serves the complete batch."""
    return 0 if bounds is None or bounds.shape[0] == 1 else bounds.stride(0)


def three_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def describable(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors (..., T, D), or copies if a tensor descriptor cannot address their matrices (T, D).

    Bases and strides must be multiples of 16 bytes, rows contiguous, rows and heads not repeated (CUDA driver API,
    cuTensorMapEncodeTiled).
    """
    described = []
    for x in tensors:
        each = 16 // x.element_size()
        *strides, last = x.stride()
        if x.data_ptr() % 16 or last != 1 or 0 in strides[-2:] or any(stride % each for stride in strides):
            *shape, size = x.shape
            x = x.new_empty([*shape, cdiv(size, each) * each])[..., :size].copy_(x)
        described.append(x)
    return described


def padded(x: Tensor | None) -> Tensor | None:
    """Pad 4-byte numbers (..., T) so that rows begin at multiples of 16 bytes, as descriptors of single rows need."""
    return x if x is None or x.shape[-1] % 4 == 0 else torch.nn.functional.pad(x, (0, -x.shape[-1] % 4))


def shared_constants(query: Tensor, key: Tensor, is_causal: bool, has_lo: bool) -> dict:
    """Return the constants that the three kernels have in common."""
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "BLOCK_D": max(16, next_power_of_2(query.shape[-1])),
        "CAUSAL": is_causal,
        "HAS_LO": has_lo,
        # full float32 on CUDA cores; tensor cores would round it to 10 bits
        "PRECISION": "ieee",
    }


def forward(
    query: Tensor, key: Tensor, value: Tensor, lo: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return output (B, H, T, D) and log2 of the sum of 2^scores (B, H, T) in float32; lo (B or 1, T) is int32."""
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    query, key, value = describable(query, key, value)
    out = empty_as_used(query.shape, query)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    constants = shared_constants(query, key, is_causal, lo is not None)
    chosen = tiles("attention_forward", size, query.dtype)
    lo = padded(lo) if chosen.specialize else lo
    launch(
        attention_forward, (cdiv(queries, chosen.block_m) * heads * batch,), query, key, value, out, lse, lo,
        *three_strides(query, key, value, out), batch_stride(lo), heads, queries, keys, size, scale * LOG2_E,
        **constants, **chosen.options(),
    )  # fmt: skip
    return out, lse
