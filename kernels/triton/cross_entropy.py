"""From a chunk of logits to losses and the logits' gradient, in place: one read of the chunk, then one read and write.

The softmax is taken online (Milakov and Gimelshein 2018, arXiv:1805.02867), in float32. The second read finds the row
in cache: 100 KB for 50,304 words of 16 bits, where an H200 has 50 MB for some 400 rows at once.

N tokens of a chunk, V vocabulary; rows lie `width` numbers apart, a multiple of 16, so that every load is of 128 bits.
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.logit_chunks import Objective
from llmkit.kernels.triton.attention import _tanh
from llmkit.kernels.triton.launch import launch
from llmkit.kernels.triton.tiles import row_tiles
from torch import Tensor


@triton.jit
def adjust(z, cap, inverse_cap, inverse_temperature, SOFTCAP: tl.constexpr):
    """Logits as they came to logits as they count, in float32."""
    z = z.to(tl.float32)
    if SOFTCAP:
        z = _tanh(z * inverse_cap) * cap
    return z * inverse_temperature


@triton.jit
def _tanh_slope(x):
    """1 - tanh(x)^2 as s (2 - s), s = 1 - tanh|x|: of 1 - t * t a large x leaves few digits."""
    s = 2.0 / (1.0 + tl.exp2(2.8853900817779268 * tl.abs(x)))
    return s * (2.0 - s)


@triton.jit
def add_to_softmax(z, highest, total, moment, ENTROPY: tl.constexpr):
    """Add a block of logits z (R, V) to rows' running maximum, sum of e = exp(z - maximum), and sum of e * log e."""
    now = tl.maximum(highest, tl.max(z, 1))
    # a row all of whose logits are -inf so far: exp(-inf - 0) = 0 where exp(-inf + inf) is NaN
    anchor = tl.where(now == float("-inf"), 0.0, now)
    shifted = z - anchor[:, None]
    e = tl.exp(shifted)
    decay = tl.exp(highest - anchor)
    if ENTROPY:
        lowered = tl.where(total > 0, highest - anchor, 0.0)
        moment = decay * (moment + total * lowered) + tl.sum(tl.where(e > 0, e * shifted, 0.0), 1)
    return now, total * decay + tl.sum(e, 1), moment


@triton.jit(do_not_specialize=["tokens", "ignore_index"])
def cross_entropy(
    logits_ptr, target_ptr, class_weight_ptr, upstream_ptr, grad_entropy_ptr, loss_ptr, lse_ptr, entropy_ptr,
    width, stride_upstream, stride_grad_entropy, tokens, vocab, ignore_index, kept, spread, z_loss, cap, inverse_cap,
    inverse_temperature, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, SMOOTHED: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens. `kept` is 1 - e and `spread` e / V of the label smoothing e."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    local = tl.arange(0, BLOCK_V)
    base = logits_ptr + row.to(tl.int64) * width
    target = tl.load(target_ptr + row, mask=inside, other=0)
    counted = inside & (target != ignore_index)
    valid = counted & (target >= 0) & (target < vocab)
    picked = tl.load(base + target, mask=valid, other=float("nan"))
    picked = adjust(picked, cap, inverse_cap, inverse_temperature, SOFTCAP)
    # A smoothed row's logits are added up as differences from the first: no digits are lost to a common offset.
    first = tl.load(base, mask=inside, other=0.0)
    first = adjust(first, cap, inverse_cap, inverse_temperature, SOFTCAP)
    weight = tl.full([ROWS], 1.0, tl.float32)
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + target, mask=valid, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    differences = tl.zeros([ROWS], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    end = tl.where(tl.max(counted.to(tl.int32), 0) > 0, vocab, 0)
    for v0 in tl.range(0, end, BLOCK_V):
        column = v0 + local
        mask = inside[:, None] & (column[None, :] < width)
        z = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
        z = adjust(z, cap, inverse_cap, inverse_temperature, SOFTCAP)
        if SMOOTHED:
            share = tl.where(column < vocab, 1.0, 0.0)
            if class_weight_ptr is not None:
                share = tl.load(class_weight_ptr + column, mask=column < vocab, other=0.0)
            difference = tl.where(column[None, :] < vocab, z - first[:, None], 0.0)
            differences += tl.sum(share[None, :] * difference, 1)
            weights += tl.sum(share, 0)
        z = tl.where(column[None, :] < vocab, z, float("-inf"))
        highest, total, moment = add_to_softmax(z, highest, total, moment, ENTROPY)
    log_total = tl.log(total)
    lse = highest + log_total
    loss = kept * weight * (highest - picked + log_total) + z_loss * weight * lse * lse
    pull = 2.0 * z_loss * weight * lse
    if SMOOTHED:
        loss += spread * (weights * (highest - first + log_total) - differences)
        pull += spread * weights
    entropy = log_total - moment / total
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), mask=inside)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(counted, lse, 0.0), mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(counted, entropy, 0.0), mask=inside)
    if GRADIENT:
        # Every thread has read its targets' logits before any is overwritten.
        tl.debug_barrier()
        scale = tl.full([ROWS], inverse_temperature, tl.float32)
        entropy_scale = scale
        if upstream_ptr is not None:
            scale *= tl.load(upstream_ptr + row * stride_upstream, mask=inside, other=0.0)
        if grad_entropy_ptr is not None:
            entropy_scale *= tl.load(grad_entropy_ptr + row * stride_grad_entropy, mask=inside, other=0.0)
        inverse_total = 1.0 / total
        for v0 in tl.range(0, width, BLOCK_V):
            column = v0 + local
            mask = inside[:, None] & (column[None, :] < width)
            pointer = base[:, None] + column[None, :]
            logit = tl.load(pointer, mask=mask, other=0.0)
            z = adjust(logit, cap, inverse_cap, inverse_temperature, SOFTCAP)
            shifted = z - highest[:, None]
            p = tl.exp(shifted) * inverse_total[:, None]
            # p - 1 first: of a sure row nothing else is left, and p * (1 + pull) - 1 would round that away
            hit = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
            gradient = (p - hit) * (kept * weight)[:, None] + p * pull[:, None]
            if SMOOTHED:
                share = tl.full([BLOCK_V], 1.0, tl.float32)
                if class_weight_ptr is not None:
                    share = tl.load(class_weight_ptr + column, mask=column < vocab, other=0.0)
                gradient -= spread * share[None, :]
            gradient *= scale[:, None]
            if grad_entropy_ptr is not None:
                surprise = tl.where(p > 0, p * (shifted - log_total[:, None] + entropy[:, None]), 0.0)
                gradient -= entropy_scale[:, None] * surprise
            if SOFTCAP:
                gradient *= _tanh_slope(logit.to(tl.float32) * inverse_cap)
            gradient = tl.where(counted[:, None], gradient, 0.0)
            tl.store(pointer, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def turn(
    logits_NV: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    objective: Objective,
    upstream: Tensor | None,
    grad_entropy: Tensor | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, lse and entropy (N,) of each row; with `need_gradient` the logits become their gradient.

    Rows lie a multiple of 16 numbers apart, and what lies between V and the next row is overwritten too.
    """
    tokens, vocab = logits_NV.shape
    width = logits_NV.stride(0)
    assert logits_NV.stride(1) == 1 and width % 16 == 0 and width >= vocab
    rows = [
        logits_NV.new_empty(tokens, dtype=torch.float32) if asked else None
        for asked in (True, objective.with_lse, objective.with_entropy)
    ]
    chosen = row_tiles("cross_entropy", width)
    smoothing, cap = objective.label_smoothing, objective.softcap
    launch(
        cross_entropy, (triton.cdiv(tokens, chosen.rows),), logits_NV, target.contiguous(), class_weight, upstream,
        grad_entropy, *rows, width, 0 if upstream is None else upstream.stride(0),
        0 if grad_entropy is None else grad_entropy.stride(0), tokens, vocab, objective.ignore_index,
        1.0 - smoothing, smoothing / vocab, objective.z_loss, cap, 1.0 / cap if cap else 0.0,
        1.0 / objective.temperature, ROWS=chosen.rows, BLOCK_V=chosen.block,
        SMOOTHED=smoothing > 0, SOFTCAP=cap > 0, ENTROPY=objective.with_entropy, GRADIENT=need_gradient,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    return tuple(rows)  # type: ignore[return-value]
