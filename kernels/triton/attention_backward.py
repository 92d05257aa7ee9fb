"""Backward of attention: one kernel for the gradient of queries, one for those of keys and values. No atomics.

Terms are those of kernels/triton/attention.py; `delta` is sum(output * its gradient) of each query.
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.fused_attention import LOG2_E, empty_as_used
from llmkit.kernels.triton.attention import (
    batch_stride,
    describable,
    key_ranges,
    numbers_from,
    padded,
    rows_of,
    seen_keys,
    shared_constants,
    store_tile,
    three_strides,
)
from llmkit.kernels.triton.launch import cdiv, launch
from llmkit.kernels.triton.tiles import tiles
from torch import Tensor


@triton.jit
def _add_grad_query(grad_q, q, grad, lse, delta, query, lo, k_rows, v_rows, first, firsts, second, blocks, keys,
                    score_scale, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr,
                    PRECISION: tl.constexpr, MASKED: tl.constexpr, SPECIALIZE: tl.constexpr = False):  # fmt: skip
    column = tl.arange(0, BLOCK_N)
    for i in tl.range(0, blocks, warp_specialize=SPECIALIZE):
        n0 = tl.where(i < firsts, first + i * BLOCK_N, second + (i - firsts) * BLOCK_N)
        k, v = k_rows.load([n0, 0]), v_rows.load([n0, 0])
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(products * score_scale - lse[:, None])
        if MASKED:
            p = tl.where(seen_keys(query, n0 + column, lo, keys, CAUSAL, HAS_LO), p, 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_grad_query(
    q_ptr, k_ptr, v_ptr, o_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, lo_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt, stride_lo,
    stride_lse, heads, queries, keys, size, scale, score_scale, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes their gradient, and `delta` (B, H, T) for the other kernel.

    With p = exp(s - lse), dL/ds = p (dL/dp - delta), delta being the sum of output times its gradient. Keys outside
    [lo, q] are not read. With SPECIALIZE `delta` is read, because Triton 3.6 aborts on a sum before such a loop.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks
    b, h = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
    query = m0 + tl.arange(0, BLOCK_M)
    q = rows_of(q_ptr + b * stride_qb + h * stride_qh, queries, size, stride_qt, BLOCK_M, BLOCK_D).load([m0, 0])
    grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, queries, size, stride_gt, BLOCK_M, BLOCK_D).load([m0, 0])
    k_base = k_ptr + b * stride_kb + h // GROUP * stride_kh
    v_base = v_ptr + b * stride_vb + h // GROUP * stride_vh
    k_rows = rows_of(k_base, keys, size, stride_ks, BLOCK_N, BLOCK_D)
    v_rows = rows_of(v_base, keys, size, stride_vs, BLOCK_N, BLOCK_D)
    at = tl.cast(row, tl.int64) * stride_lse
    lse = numbers_from(lse_ptr + at, m0, queries, 0.0, BLOCK_M, SPECIALIZE)
    if SPECIALIZE:
        delta = numbers_from(delta_ptr + at, m0, queries, 0.0, BLOCK_M, SPECIALIZE)
    else:
        o = rows_of(o_ptr + b * stride_ob + h * stride_oh, queries, size, stride_ot, BLOCK_M, BLOCK_D).load([m0, 0])
        delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
        tl.store(delta_ptr + at + query, delta, mask=query < queries)
    lo = query
    if HAS_LO:
        lo_ptr += b * stride_lo
        lo = numbers_from(lo_ptr, m0, queries, 0, BLOCK_M, SPECIALIZE)
    begin, every, some, end = key_ranges(lo_ptr, m0, queries, keys, BLOCK_M, BLOCK_N, CAUSAL, HAS_LO)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SPECIALIZE:
        every, some = begin, begin
    firsts = (every - begin) // BLOCK_N
    grad_q = _add_grad_query(
        grad_q, q, grad, lse, delta, query, lo, k_rows, v_rows, begin, firsts, some,
        firsts + tl.cdiv(end - some, BLOCK_N), keys, score_scale, BLOCK_N, CAUSAL, HAS_LO, PRECISION, True, SPECIALIZE,
    )  # fmt: skip
    if not SPECIALIZE:
        grad_q = _add_grad_query(
            grad_q, q, grad, lse, delta, query, lo, k_rows, v_rows, every, 0, every, (some - every) // BLOCK_N, keys,
            score_scale, BLOCK_N, CAUSAL, HAS_LO, PRECISION, False,
        )  # fmt: skip
    grad_q_base = grad_q_ptr + b * stride_dqb + h * stride_dqh
    store_tile(grad_q_base, grad_q * scale, m0, queries, size, stride_dqt, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["queries", "heads"])
def attention_delta(
    o_ptr, grad_ptr, delta_ptr, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_lse, heads,
    queries, size, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: `delta` of BLOCK_M queries of one head, before `attention_grad_query` with SPECIALIZE."""
    blocks = tl.cdiv(queries, BLOCK_M)
    m0, row = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks
    b, h = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
    query = m0 + tl.arange(0, BLOCK_M)
    o = rows_of(o_ptr + b * stride_ob + h * stride_oh, queries, size, stride_ot, BLOCK_M, BLOCK_D).load([m0, 0])
    grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, queries, size, stride_gt, BLOCK_M, BLOCK_D).load([m0, 0])
    delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + tl.cast(row, tl.int64) * stride_lse + query, delta, mask=query < queries)


@triton.jit
def _query_ranges(hi_ptr, n0, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                  HAS_LO: tl.constexpr):  # fmt: skip
    """For the keys from n0, return the first query, start and end of those that see all, and the last query's end."""
    whole, end = queries // BLOCK_M * BLOCK_M, queries
    if CAUSAL:
        last = tl.minimum(n0 + BLOCK_N, keys) - 1
        if HAS_LO:
            whole = (tl.load(hi_ptr + n0) + 1) // BLOCK_M * BLOCK_M
            end = tl.load(hi_ptr + last) + 1
        every = tl.minimum((last + BLOCK_M - 1) // BLOCK_M * BLOCK_M, end)
        return n0 // BLOCK_M * BLOCK_M, every, tl.maximum(every, whole), end
    else:
        return 0, 0, whole, end


@triton.jit
def _add_grad_key_value(grad_k, grad_v, k, v, key, hi, q_rows, grad_rows, lse_rows, delta_rows, first, firsts,
                        second, blocks, score_scale, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
                        HAS_LO: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
                        SPECIALIZE: tl.constexpr = False):  # fmt: skip
    """Add `blocks` blocks of queries of each of HEADS heads, in one loop: Triton 3.6 specializes no nested ones.

    Everything is transposed, keys by queries: p and dL/ds are then left factors, which tensor cores read from
    registers.
    """
    for i in tl.range(0, blocks * HEADS, warp_specialize=SPECIALIZE):
        j, h = i // HEADS, i % HEADS
        m0 = tl.where(j < firsts, first + j * BLOCK_M, second + (j - firsts) * BLOCK_M)
        query = m0 + tl.arange(0, BLOCK_M)
        if SPECIALIZE:
            q = q_rows.load([h, m0, 0]).reshape(BLOCK_M, k.shape[1])
            grad = grad_rows.load([h, m0, 0]).reshape(BLOCK_M, k.shape[1])
            lse = lse_rows.load([h, m0]).reshape(BLOCK_M)
        else:  # of one head: with Ampere's masked 3D loads the compiler overlaps less
            q, grad, lse = q_rows.load([m0, 0]), grad_rows.load([m0, 0]), lse_rows.load([m0])
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(products * score_scale - lse[None, :])
        if MASKED and CAUSAL:
            seen = key[:, None] <= query[None, :]
            if HAS_LO:
                seen = seen & (query[None, :] <= hi[:, None])
            p = tl.where(seen, p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        # Loaded this late, or its registers would spill.
        delta = delta_rows.load([h, m0]).reshape(BLOCK_M) if SPECIALIZE else delta_rows.load([m0])
        grad_s = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_grad_key_value(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, hi_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_hi,
    stride_lse, heads, queries, keys, size, scale, score_scale, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_N keys of one key-value head, and the queries of all heads of its group. No atomics."""
    blocks = tl.cdiv(keys, BLOCK_N)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    row = tl.program_id(0) // blocks
    kv_heads = heads // GROUP
    b, h = tl.cast(row // kv_heads, tl.int64), tl.cast(row % kv_heads, tl.int64)
    key = n0 + tl.arange(0, BLOCK_N)
    k = rows_of(k_ptr + b * stride_kb + h * stride_kh, keys, size, stride_ks, BLOCK_N, BLOCK_D).load([n0, 0])
    v = rows_of(v_ptr + b * stride_vb + h * stride_vh, keys, size, stride_vs, BLOCK_N, BLOCK_D).load([n0, 0])
    hi = key
    if HAS_LO:
        hi_ptr += b * stride_hi
        hi = numbers_from(hi_ptr, n0, keys, -1, BLOCK_N, SPECIALIZE)
    begin, every, whole, end = _query_ranges(hi_ptr, n0, queries, keys, BLOCK_M, BLOCK_N, CAUSAL, HAS_LO)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if SPECIALIZE:
        every, whole = begin, begin
    firsts = tl.cdiv(every - begin, BLOCK_M)
    masked = firsts + tl.cdiv(end - whole, BLOCK_M)
    q_base = q_ptr + b * stride_qb + h * GROUP * stride_qh
    grad_base = grad_ptr + b * stride_gb + h * GROUP * stride_gh
    at = (b * heads + h * GROUP) * stride_lse
    if SPECIALIZE:
        shape = [GROUP, queries, size]
        q_rows = tl.make_tensor_descriptor(q_base, shape, [stride_qh, stride_qt, 1], [1, BLOCK_M, BLOCK_D])
        grad_rows = tl.make_tensor_descriptor(grad_base, shape, [stride_gh, stride_gt, 1], [1, BLOCK_M, BLOCK_D])
        lse_rows = rows_of(lse_ptr + at, GROUP, queries, stride_lse, 1, BLOCK_M)
        delta_rows = rows_of(delta_ptr + at, GROUP, queries, stride_lse, 1, BLOCK_M)
        grad_k, grad_v = _add_grad_key_value(
            grad_k, grad_v, k, v, key, hi, q_rows, grad_rows, lse_rows, delta_rows, begin, firsts, whole, masked,
            score_scale, GROUP, BLOCK_M, CAUSAL, HAS_LO, PRECISION, True, True,
        )  # fmt: skip
    else:
        for head in tl.range(0, GROUP):
            g = tl.cast(head, tl.int64)
            q_rows = rows_of(q_base + g * stride_qh, queries, size, stride_qt, BLOCK_M, BLOCK_D)
            grad_rows = rows_of(grad_base + g * stride_gh, queries, size, stride_gt, BLOCK_M, BLOCK_D)
            lse_rows = tl.make_tensor_descriptor(lse_ptr + at + g * stride_lse, [queries], [1], [BLOCK_M])
            delta_rows = tl.make_tensor_descriptor(delta_ptr + at + g * stride_lse, [queries], [1], [BLOCK_M])
            grad_k, grad_v = _add_grad_key_value(
                grad_k, grad_v, k, v, key, hi, q_rows, grad_rows, lse_rows, delta_rows, begin, firsts, whole, masked,
                score_scale, 1, BLOCK_M, CAUSAL, HAS_LO, PRECISION, True,
            )  # fmt: skip
            grad_k, grad_v = _add_grad_key_value(
                grad_k, grad_v, k, v, key, hi, q_rows, grad_rows, lse_rows, delta_rows, every, 0, every,
                tl.cdiv(whole - every, BLOCK_M), score_scale, 1, BLOCK_M, CAUSAL, HAS_LO, PRECISION, False,
            )  # fmt: skip
    grad_k_base = grad_k_ptr + b * stride_dkb + h * stride_dkh
    grad_v_base = grad_v_ptr + b * stride_dvb + h * stride_dvh
    store_tile(grad_k_base, grad_k * scale, n0, keys, size, stride_dks, BLOCK_N, BLOCK_D)
    store_tile(grad_v_base, grad_v, n0, keys, size, stride_dvs, BLOCK_N, BLOCK_D)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    lo: Tensor | None, hi: Tensor | None, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value."""
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1:3]
    grad, query, key, value, out = describable(grad, query, key, value, out)
    grad_query = empty_as_used(query.shape, query)
    grad_key, grad_value = (empty_as_used(key.shape, query) for _ in range(2))
    lse = padded(lse)
    delta = torch.empty_like(lse)
    constants = shared_constants(query, key, is_causal, lo is not None)
    chosen = tiles("attention_grad_query", size, query.dtype)
    if chosen.specialize:
        lo = padded(lo)
        launch(
            attention_delta, (cdiv(queries, 64) * heads * batch,), out, grad, delta, *three_strides(out, grad),
            lse.stride(1), heads, queries, size, BLOCK_M=64, BLOCK_D=constants["BLOCK_D"],
        )  # fmt: skip
    launch(
        attention_grad_query, (cdiv(queries, chosen.block_m) * heads * batch,), query, key, value, out, grad, lse,
        delta, grad_query, lo, *three_strides(query, key, value, out, grad, grad_query), batch_stride(lo),
        lse.stride(1), heads, queries, keys, size, scale, scale * LOG2_E, **constants, **chosen.options(),
    )  # fmt: skip
    chosen = tiles("attention_grad_key_value", size, query.dtype)
    hi = padded(hi) if chosen.specialize else hi
    launch(
        attention_grad_key_value, (cdiv(keys, chosen.block_n) * kv_heads * batch,), query, key, value, grad, lse,
        delta, grad_key, grad_value, hi, *three_strides(query, key, value, grad, grad_key, grad_value),
        batch_stride(hi), lse.stride(1), heads, queries, keys, size, scale, scale * LOG2_E, **constants,
        **chosen.options(),
    )  # fmt: skip
    return grad_query, grad_key, grad_value
