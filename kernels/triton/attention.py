"""Attention forward and backward: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with one mechanism for all masks.

Causal query q sees the keys lo[q] ... q, and key k is seen by the queries k ... hi[k]; both tables never decrease, so
their values at the ends of a block tell which blocks of the other side are seen by none of it (skipped), by all of it
(computed without a mask) or by some. Documents and windows are both such tables, and cost what they see.

Scores are kept in base 2: p = exp2(s - lse) with log2(e) in the scale, one instruction where exp is two.

B batch, H query heads, K key-value heads, G = H / K, T queries, S keys, D head size (padded to a power of two).
"""

import math

import torch
import triton
import triton.language as tl
from llmkit.kernels.triton.launch import launch
from llmkit.kernels.triton.tiles import tiles
from torch import Tensor

LOG2_E = math.log2(math.e)


@triton.jit
def _tanh(x):
    # Below 0.625 the quotient cancels; there a polynomial of Cephes' tanhf, to 1e-7.
    z = x * x
    near = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z) * z
    near = x + x * (near - 3.33332819422e-1 * z)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _load_tile(base, row, stride, limit, size, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `row` of a matrix with rows of `size` numbers: (rows, BLOCK_D), zero beyond `limit` rows and `size`."""
    column = tl.arange(0, BLOCK_D)
    pointer = base + row[:, None] * stride + column[None, :]
    if MASKED and EVEN_D:
        return tl.load(pointer, mask=row[:, None] < limit, other=0.0)
    elif MASKED:
        return tl.load(pointer, mask=(row[:, None] < limit) & (column[None, :] < size), other=0.0)
    elif EVEN_D:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=column[None, :] < size, other=0.0)


@triton.jit
def _store_tile(base, tile, row, stride, limit, size, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointer = base + row[:, None] * stride + column[None, :]
    tl.store(pointer, tile.to(base.dtype.element_ty), mask=(row[:, None] < limit) & (column[None, :] < size))


@triton.jit
def _base2_scores(products, score_scale, cap, SOFTCAP: tl.constexpr):
    """Products of queries and keys to scores in base 2, and tanh where they are capped."""
    if SOFTCAP:
        turned = _tanh(products * score_scale)
        return turned * cap, turned
    else:
        scores = products * score_scale
        return scores, scores


@triton.jit
def _key_ranges(lo_ptr, m0, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                HAS_LO: tl.constexpr):  # fmt: skip
    """For the queries from m0: where keys begin, where they are seen by all, where no more by all, where they end."""
    if CAUSAL:
        end = tl.minimum(m0 + BLOCK_M, queries)
        some = (m0 + 1) // BLOCK_N * BLOCK_N
        begin, every = 0, 0
        if HAS_LO:
            begin = tl.load(lo_ptr + m0) // BLOCK_N * BLOCK_N
            highest = tl.load(lo_ptr + end - 1)
            every = tl.minimum((highest + BLOCK_N - 1) // BLOCK_N * BLOCK_N, some)
            every = tl.maximum(every, begin)
        return begin, every, tl.maximum(some, every), end
    else:
        return 0, 0, keys // BLOCK_N * BLOCK_N, keys


@triton.jit
def _seen(query, key, lo, keys, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr):
    if CAUSAL:
        seen = key[None, :] <= query[:, None]
        if HAS_LO:
            seen = seen & (key[None, :] >= lo[:, None])
    else:
        seen = key[None, :] < keys
    return seen


@triton.jit
def _attend(total, weight, highest, q, query, lo, k_base, v_base, stride_k, stride_v, start, end, keys, size,
            score_scale, cap, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
            CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Add the keys start ... end to the running weighted sum of values."""
    column = tl.arange(0, BLOCK_N)
    k_base += tl.cast(start, tl.int64) * stride_k
    v_base += tl.cast(start, tl.int64) * stride_v
    for n0 in tl.range(start, end, BLOCK_N):
        k = _load_tile(k_base, column, stride_k, keys - n0, size, BLOCK_D, EVEN_D, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            scores, _ = _base2_scores(products, score_scale, cap, SOFTCAP)
            if MASKED:
                scores = tl.where(_seen(query, n0 + column, lo, keys, CAUSAL, HAS_LO), scores, float("-inf"))
            now = tl.maximum(highest, tl.max(scores, 1))
            anchor = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
            p = tl.exp2(scores - anchor[:, None])
        else:
            # The scale is positive: it goes into one multiply-add with the maximum.
            if MASKED:
                products = tl.where(_seen(query, n0 + column, lo, keys, CAUSAL, HAS_LO), products, float("-inf"))
            now = tl.maximum(highest, tl.max(products, 1) * score_scale)
            # a row that has seen no key yet: exp2(-inf - 0) = 0 where exp2(-inf + inf) is NaN
            anchor = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
            p = tl.exp2(products * score_scale - anchor[:, None])
        decay = tl.exp2(highest - anchor)
        weight = weight * decay + tl.sum(p, 1)
        v = _load_tile(v_base, column, stride_v, keys - n0, size, BLOCK_D, EVEN_D, MASKED)
        total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION)
        highest = now
        k_base += BLOCK_N * stride_k
        v_base += BLOCK_N * stride_v
    return total, weight, highest


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lo_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_ot, stride_lo, heads, queries, keys, size,
    score_scale, cap, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes outputs, and log2 of the sum of 2^scores (B, H, T)."""
    blocks = tl.cdiv(queries, BLOCK_M)
    # The last queries see most keys: begun first, they leave no straggler.
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks
    b, h = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
    local = tl.arange(0, BLOCK_M)
    query = m0 + local
    q_base = q_ptr + b * stride_qb + h * stride_qh + tl.cast(m0, tl.int64) * stride_qt
    k_base = k_ptr + b * stride_kb + h // GROUP * stride_kh
    v_base = v_ptr + b * stride_vb + h // GROUP * stride_vh
    q = _load_tile(q_base, local, stride_qt, queries - m0, size, BLOCK_D, EVEN_D, True)
    lo = query
    if HAS_LO:
        lo_ptr += b * stride_lo
        lo = tl.load(lo_ptr + query, mask=query < queries, other=0)
    begin, every, some, end = _key_ranges(lo_ptr, m0, queries, keys, BLOCK_M, BLOCK_N, CAUSAL, HAS_LO)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_LO:
        total, weight, highest = _attend(
            total, weight, highest, q, query, lo, k_base, v_base, stride_ks, stride_vs, begin, every, keys, size,
            score_scale, cap, BLOCK_N, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    total, weight, highest = _attend(
        total, weight, highest, q, query, lo, k_base, v_base, stride_ks, stride_vs, every, some, keys, size,
        score_scale, cap, BLOCK_N, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION, False,
    )  # fmt: skip
    total, weight, highest = _attend(
        total, weight, highest, q, query, lo, k_base, v_base, stride_ks, stride_vs, some, end, keys, size,
        score_scale, cap, BLOCK_N, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    o_base = o_ptr + b * stride_ob + h * stride_oh + tl.cast(m0, tl.int64) * stride_ot
    _store_tile(o_base, total / weight[:, None], local, stride_ot, queries - m0, size, BLOCK_D)
    lse_base = lse_ptr + tl.cast(row, tl.int64) * queries
    tl.store(lse_base + query, highest + tl.log2(weight), mask=query < queries)


@triton.jit
def _add_grad_query(grad_q, q, grad, lse, delta, query, lo, k_base, v_base, stride_k, stride_v, start, end, keys, size,
                    score_scale, cap, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
                    CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
                    MASKED: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK_N)
    k_base += tl.cast(start, tl.int64) * stride_k
    v_base += tl.cast(start, tl.int64) * stride_v
    for n0 in tl.range(start, end, BLOCK_N):
        k = _load_tile(k_base, column, stride_k, keys - n0, size, BLOCK_D, EVEN_D, MASKED)
        v = _load_tile(v_base, column, stride_v, keys - n0, size, BLOCK_D, EVEN_D, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, turned = _base2_scores(products, score_scale, cap, SOFTCAP)
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            p = tl.where(_seen(query, n0 + column, lo, keys, CAUSAL, HAS_LO), p, 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[:, None])
        if SOFTCAP:
            grad_s = grad_s * (1.0 - turned * turned)
        grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION)
        k_base += BLOCK_N * stride_k
        v_base += BLOCK_N * stride_v
    return grad_q


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_grad_query(
    q_ptr, k_ptr, v_ptr, o_ptr, grad_ptr, lse_ptr, grad_lse_ptr, delta_ptr, grad_q_ptr, lo_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt, stride_lo,
    heads, queries, keys, size, scale, score_scale, cap, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes their gradient, and `delta` (B, H, T) for the other kernel.

    With p = exp(s - lse), dL/ds = p (dL/dp - delta), delta being the sum of output times its gradient; a gradient of
    lse itself is taken off it. Keys outside [lo, q] are not read.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks
    b, h = tl.cast(row // heads, tl.int64), tl.cast(row % heads, tl.int64)
    first = tl.cast(m0, tl.int64)
    local = tl.arange(0, BLOCK_M)
    query, left = m0 + local, queries - m0
    k_base = k_ptr + b * stride_kb + h // GROUP * stride_kh
    v_base = v_ptr + b * stride_vb + h // GROUP * stride_vh
    q_base = q_ptr + b * stride_qb + h * stride_qh + first * stride_qt
    o_base = o_ptr + b * stride_ob + h * stride_oh + first * stride_ot
    grad_base = grad_ptr + b * stride_gb + h * stride_gh + first * stride_gt
    q = _load_tile(q_base, local, stride_qt, left, size, BLOCK_D, EVEN_D, True)
    o = _load_tile(o_base, local, stride_ot, left, size, BLOCK_D, EVEN_D, True)
    grad = _load_tile(grad_base, local, stride_gt, left, size, BLOCK_D, EVEN_D, True)
    at = tl.cast(row, tl.int64) * queries + query
    lse = tl.load(lse_ptr + at, mask=query < queries, other=0.0)
    delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=query < queries, other=0.0)
    tl.store(delta_ptr + at, delta, mask=query < queries)
    lo = query
    if HAS_LO:
        lo_ptr += b * stride_lo
        lo = tl.load(lo_ptr + query, mask=query < queries, other=0)
    begin, every, some, end = _key_ranges(lo_ptr, m0, queries, keys, BLOCK_M, BLOCK_N, CAUSAL, HAS_LO)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LO:
        grad_q = _add_grad_query(
            grad_q, q, grad, lse, delta, query, lo, k_base, v_base, stride_ks, stride_vs, begin, every, keys, size,
            score_scale, cap, BLOCK_N, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    grad_q = _add_grad_query(
        grad_q, q, grad, lse, delta, query, lo, k_base, v_base, stride_ks, stride_vs, every, some, keys, size,
        score_scale, cap, BLOCK_N, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION, False,
    )  # fmt: skip
    grad_q = _add_grad_query(
        grad_q, q, grad, lse, delta, query, lo, k_base, v_base, stride_ks, stride_vs, some, end, keys, size,
        score_scale, cap, BLOCK_N, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    grad_q_base = grad_q_ptr + b * stride_dqb + h * stride_dqh + first * stride_dqt
    _store_tile(grad_q_base, grad_q * scale, local, stride_dqt, left, size, BLOCK_D)


@triton.jit
def _query_ranges(hi_ptr, n0, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                  HAS_LO: tl.constexpr):  # fmt: skip
    """For the keys from n0: where queries begin, from where and up to where they see all of them, where they end."""
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
def _add_grad_key_value(grad_k, grad_v, k, v, key, hi, q_base, grad_base, lse_ptr, delta_ptr, stride_q, stride_g,
                        start, end, queries, size, score_scale, cap, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                        EVEN_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr, SOFTCAP: tl.constexpr,
                        PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """All is transposed, keys by queries: then p and dL/ds are left factors, which tensor cores read from registers."""
    local = tl.arange(0, BLOCK_M)
    q_base += tl.cast(start, tl.int64) * stride_q
    grad_base += tl.cast(start, tl.int64) * stride_g
    for m0 in tl.range(start, end, BLOCK_M):
        query = m0 + local
        q = _load_tile(q_base, local, stride_q, queries - m0, size, BLOCK_D, EVEN_D, MASKED)
        grad = _load_tile(grad_base, local, stride_g, queries - m0, size, BLOCK_D, EVEN_D, MASKED)
        # Beyond the last query p = 2^0 times a gradient of 0.
        if MASKED:
            lse = tl.load(lse_ptr + query, mask=query < queries, other=0.0)
            delta = tl.load(delta_ptr + query, mask=query < queries, other=0.0)
        else:
            lse = tl.load(lse_ptr + query)
            delta = tl.load(delta_ptr + query)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        scores, turned = _base2_scores(products, score_scale, cap, SOFTCAP)
        p = tl.exp2(scores - lse[None, :])
        if MASKED and CAUSAL:
            seen = key[:, None] <= query[None, :]
            if HAS_LO:
                seen = seen & (query[None, :] <= hi[:, None])
            p = tl.where(seen, p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[None, :])
        if SOFTCAP:
            grad_s = grad_s * (1.0 - turned * turned)
        grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
        q_base += BLOCK_M * stride_q
        grad_base += BLOCK_M * stride_g
    return grad_k, grad_v


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attention_grad_key_value(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, hi_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_hi,
    heads, queries, keys, size, scale, score_scale, cap, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LO: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key-value head, and the queries of all heads of its group. No atomics."""
    blocks = tl.cdiv(keys, BLOCK_N)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    row = tl.program_id(0) // blocks
    kv_heads = heads // GROUP
    b, h = tl.cast(row // kv_heads, tl.int64), tl.cast(row % kv_heads, tl.int64)
    first = tl.cast(n0, tl.int64)
    local = tl.arange(0, BLOCK_N)
    key, left = n0 + local, keys - n0
    k_base = k_ptr + b * stride_kb + h * stride_kh + first * stride_ks
    v_base = v_ptr + b * stride_vb + h * stride_vh + first * stride_vs
    k = _load_tile(k_base, local, stride_ks, left, size, BLOCK_D, EVEN_D, True)
    v = _load_tile(v_base, local, stride_vs, left, size, BLOCK_D, EVEN_D, True)
    hi = key
    if HAS_LO:
        hi_ptr += b * stride_hi
        hi = tl.load(hi_ptr + key, mask=key < keys, other=-1)
    begin, every, whole, end = _query_ranges(hi_ptr, n0, queries, keys, BLOCK_M, BLOCK_N, CAUSAL, HAS_LO)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(GROUP):
        head = h * GROUP + g
        q_base = q_ptr + b * stride_qb + head * stride_qh
        grad_base = grad_ptr + b * stride_gb + head * stride_gh
        lse_base = lse_ptr + (b * heads + head) * queries
        delta_base = delta_ptr + (b * heads + head) * queries
        if CAUSAL:
            grad_k, grad_v = _add_grad_key_value(
                grad_k, grad_v, k, v, key, hi, q_base, grad_base, lse_base, delta_base, stride_qt, stride_gt, begin,
                every, queries, size, score_scale, cap, BLOCK_M, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION,
                True,
            )  # fmt: skip
        grad_k, grad_v = _add_grad_key_value(
            grad_k, grad_v, k, v, key, hi, q_base, grad_base, lse_base, delta_base, stride_qt, stride_gt, every,
            whole, queries, size, score_scale, cap, BLOCK_M, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION,
            False,
        )  # fmt: skip
        grad_k, grad_v = _add_grad_key_value(
            grad_k, grad_v, k, v, key, hi, q_base, grad_base, lse_base, delta_base, stride_qt, stride_gt, whole,
            end, queries, size, score_scale, cap, BLOCK_M, BLOCK_D, EVEN_D, CAUSAL, HAS_LO, SOFTCAP, PRECISION,
            True,
        )  # fmt: skip
    grad_k_base = grad_k_ptr + b * stride_dkb + h * stride_dkh + first * stride_dks
    grad_v_base = grad_v_ptr + b * stride_dvb + h * stride_dvh + first * stride_dvs
    _store_tile(grad_k_base, grad_k * scale, local, stride_dks, left, size, BLOCK_D)
    _store_tile(grad_v_base, grad_v, local, stride_dvs, left, size, BLOCK_D)


def _three_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _shared_arguments(query: Tensor, key: Tensor, scale: float, is_causal: bool, softcap: float, has_lo: bool):
    """The scalars and constants that the three kernels have in common: score_scale, cap; then the constants."""
    size = query.shape[-1]
    padded = max(16, triton.next_power_of_2(size))
    scales = (scale / softcap, softcap * LOG2_E) if softcap > 0 else (scale * LOG2_E, 0.0)
    return scales, {
        "GROUP": query.shape[1] // key.shape[1],
        "BLOCK_D": padded,
        "EVEN_D": padded == size,
        "CAUSAL": is_causal,
        "HAS_LO": has_lo,
        "SOFTCAP": softcap > 0,
        # float32 in full on CUDA's ordinary cores; tensor cores would round it to 10 bits
        "PRECISION": "ieee",
    }


def empty_as_used(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    """(B, H, T, D) that lies in memory as (B, T, H, D), as the projection that follows reads it."""
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def forward(
    query: Tensor, key: Tensor, value: Tensor, lo: Tensor | None, scale: float, is_causal: bool, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log2 of the sum of 2^scores (B, H, T) in float32.

    The last dimension of every tensor is contiguous; lo (B or 1, T) int32; softcap 0 is none.
    """
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    out = empty_as_used(batch, heads, queries, size, query)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    scales, constants = _shared_arguments(query, key, scale, is_causal, softcap, lo is not None)
    chosen = tiles("attention_forward", constants["BLOCK_D"], query.dtype)
    grid = (triton.cdiv(queries, chosen.block_m) * heads * batch,)
    launch(
        attention_forward, grid, query, key, value, out, lse, lo, *_three_strides(query, key, value, out),
        _batch_stride(lo), heads, queries, keys, size, *scales, **constants, **chosen.options(),
    )  # fmt: skip
    return out, lse


def _batch_stride(bounds: Tensor | None) -> int:
    """0 where one row of bounds serves the whole batch."""
    return 0 if bounds is None or bounds.shape[0] == 1 else bounds.stride(0)


def backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    lo: Tensor | None, hi: Tensor | None, scale: float, is_causal: bool, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value; grad_lse (B, H, T) is that of `lse` in natural units, if any."""
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1:3]
    grad_query = empty_as_used(batch, heads, queries, size, query)
    grad_key, grad_value = (empty_as_used(batch, kv_heads, keys, size, query) for _ in range(2))
    delta = torch.empty_like(lse)
    scales, constants = _shared_arguments(query, key, scale, is_causal, softcap, lo is not None)
    chosen = tiles("attention_grad_query", constants["BLOCK_D"], query.dtype)
    grid = (triton.cdiv(queries, chosen.block_m) * heads * batch,)
    launch(
        attention_grad_query, grid, query, key, value, out, grad, lse, grad_lse, delta, grad_query, lo,
        *_three_strides(query, key, value, out, grad, grad_query), _batch_stride(lo), heads, queries, keys, size,
        scale, *scales, HAS_GRAD_LSE=grad_lse is not None, **constants, **chosen.options(),
    )  # fmt: skip
    chosen = tiles("attention_grad_key_value", constants["BLOCK_D"], query.dtype)
    grid = (triton.cdiv(keys, chosen.block_n) * kv_heads * batch,)
    launch(
        attention_grad_key_value, grid, query, key, value, grad, lse, delta, grad_key, grad_value, hi,
        *_three_strides(query, key, value, grad, grad_key, grad_value), _batch_stride(hi), heads, queries, keys, size,
        scale, *scales, **constants, **chosen.options(),
    )  # fmt: skip
    return grad_query, grad_key, grad_value
