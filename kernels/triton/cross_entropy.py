"""Losses and the logits' gradient from a chunk of logits, in place: two reads, one of them from cache, and one write.

The softmax is computed online (Milakov and Gimelshein 2018, arXiv:1805.02867), in float32: over a thread's eight
neighbours at a time, so that threads synchronize once per row and not once per block. The second read finds the row in
the L2 cache: a program of 1,024 threads at 43 registers each has a multiprocessor to itself, so that 132 rows are in
flight on an H200, 34 MB of its 50 for 128,256 words of 16 bits. With 8 warps per program there were 660.

N tokens of a chunk, V vocabulary; rows are `width` numbers apart, a multiple of 16, so that every load has 128 bits.
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.logit_chunks import Objective
from llmkit.kernels.triton.launch import cdiv, launch
from llmkit.kernels.triton.tiles import row_tiles
from torch import Tensor


@triton.jit
def add_to_softmax(z, highest, total, moment, ENTROPY: tl.constexpr):
    """Add a block of logits z (R, V) to rows' running maximum, sum of e = exp(z - maximum), and sum of e * log e."""
    now = tl.maximum(highest, tl.max(z, 1))
    # for a row whose logits are all -inf so far, exp(-inf - 0) = 0, but exp(-inf + inf) is NaN
    anchor = tl.where(now == float("-inf"), 0.0, now)
    shifted = z - anchor[:, None]
    e = tl.exp(shifted)
    decay = tl.exp(highest - anchor)
    if ENTROPY:
        lowered = tl.where(total > 0, highest - anchor, 0.0)
        moment = decay * (moment + total * lowered) + tl.sum(tl.where(e > 0, e * shifted, 0.0), 1)
    return now, total * decay + tl.sum(e, 1), moment


@triton.jit
def merge_softmax(highest, total, moment, ENTROPY: tl.constexpr):
    """Merge the L softmaxes of each row, (R, L) to (R,), in the form of `add_to_softmax`."""
    now = tl.max(highest, 1)
    lowered = tl.where(total > 0, highest - now[:, None], float("-inf"))
    decay = tl.exp(lowered)
    moment = tl.sum(tl.where(total > 0, decay * (moment + total * lowered), 0.0), 1) if ENTROPY else tl.max(moment, 1)
    return now, tl.sum(total * decay, 1), moment


@triton.jit(do_not_specialize=["tokens", "vocab", "ignore_index"])
def cross_entropy(
    logits_ptr, target_ptr, upstream_ptr, grad_entropy_ptr, loss_ptr, entropy_ptr, width, stride_upstream,
    stride_grad_entropy, tokens, vocab, ignore_index, inverse_temperature, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    local = tl.arange(0, BLOCK_V)
    base = logits_ptr + row.to(tl.int64) * width
    target = tl.load(target_ptr + row, mask=inside, other=0)
    counted = inside & (target != ignore_index)
    valid = counted & (target >= 0) & (target < vocab)
    picked = tl.load(base + target, mask=valid, other=float("nan"))
    picked = picked.to(tl.float32) * inverse_temperature
    highest = tl.full([ROWS * BLOCK_V // 8], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * BLOCK_V // 8], tl.float32)
    moment = tl.zeros([ROWS * BLOCK_V // 8], tl.float32)
    end = tl.where(tl.max(counted.to(tl.int32), 0) > 0, vocab, 0)
    for v0 in tl.range(0, end, BLOCK_V):
        column = v0 + local
        mask = inside[:, None] & (column[None, :] < width)
        z = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
        z = tl.where(column[None, :] < vocab, z.to(tl.float32) * inverse_temperature, float("-inf"))
        z = tl.reshape(z, [ROWS * BLOCK_V // 8, 8])
        highest, total, moment = add_to_softmax(z, highest, total, moment, ENTROPY)
    highest, total, moment = merge_softmax(
        tl.reshape(highest, [ROWS, BLOCK_V // 8]), tl.reshape(total, [ROWS, BLOCK_V // 8]),
        tl.reshape(moment, [ROWS, BLOCK_V // 8]), ENTROPY,
    )  # fmt: skip
    log_total = tl.log(total)
    entropy = log_total - moment / total
    tl.store(loss_ptr + row, tl.where(counted, highest - picked + log_total, 0.0), mask=inside)
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
            shifted = logit.to(tl.float32) * inverse_temperature - highest[:, None]
            p = tl.exp(shifted) * inverse_total[:, None]
            gradient = (p - tl.where(column[None, :] == target[:, None], 1.0, 0.0)) * scale[:, None]
            if grad_entropy_ptr is not None:
                surprise = tl.where(p > 0, p * (shifted - log_total[:, None] + entropy[:, None]), 0.0)
                gradient -= entropy_scale[:, None] * surprise
            gradient = tl.where(counted[:, None], gradient, 0.0)
            tl.store(pointer, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def loss_and_gradient(
    logits_NV: Tensor, target: Tensor, objective: Objective, upstream: Tensor | None, grad_entropy: Tensor | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return loss and entropy (N,) of each row; with `need_gradient` the logits become their gradient.

    Rows are a multiple of 16 numbers apart; the numbers between V and the next row are overwritten, too.
    """
    tokens, vocab = logits_NV.shape
    width = logits_NV.stride(0)
    assert logits_NV.stride(1) == 1 and width % 16 == 0 and width >= vocab
    rows = [
        logits_NV.new_empty(tokens, dtype=torch.float32) if each else None for each in (True, objective.with_entropy)
    ]
    chosen = row_tiles("cross_entropy", width)
    launch(
        cross_entropy, (cdiv(tokens, chosen.rows),), logits_NV, target.contiguous(), upstream,
        grad_entropy, *rows, width, 0 if upstream is None else upstream.stride(0),
        0 if grad_entropy is None else grad_entropy.stride(0), tokens, vocab, objective.ignore_index,
        1.0 / objective.temperature, ROWS=chosen.rows, BLOCK_V=chosen.block, ENTROPY=objective.with_entropy,
        GRADIENT=need_gradient, num_warps=chosen.num_warps,
    )  # fmt: skip
    return tuple(rows)  # type: ignore[return-value]
