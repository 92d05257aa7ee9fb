"""Log-probabilities directly from hidden states: a product whose tiles are reduced before they are written.

Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), but each program takes several tiles of the vocabulary for
its tokens and writes their sum, and these are added in a fixed order: no lock, and the bits of a row's result do not
depend on the other rows. N tokens, D hidden, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.logit_chunks import Objective
from llmkit.kernels.triton.attention import describable, rows_of
from llmkit.kernels.triton.cross_entropy import add_to_softmax
from llmkit.kernels.triton.launch import cdiv, launch
from llmkit.kernels.triton.tiles import product_tiles
from torch import Tensor

GROUP = 16  # blocks of tokens that traverse the vocabulary together, so that their hidden states stay in cache
MERGED = 64  # tokens per program of `merge_splits`


@triton.jit(do_not_specialize=["tokens"])
def linear_logsumexp(
    x_ptr, w_ptr, target_ptr, highest_ptr, total_ptr, moment_ptr, picked_ptr, stride_x, stride_w, tokens, vocab,
    hidden, inverse_temperature, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_N tokens and SPLIT blocks of the vocabulary.

    Writes maximum, sum and moment (splits, N) of `add_to_softmax` for its words, and the logits of targets among them.
    """
    blocks = tl.cdiv(tokens, BLOCK_N)
    splits = tl.cdiv(vocab, BLOCK_V * SPLIT)
    group = tl.program_id(0) // (GROUP * splits) * GROUP
    slot = tl.program_id(0) % (GROUP * splits)
    group_size = tl.minimum(blocks - group, GROUP)
    n0 = (group + slot % group_size) * BLOCK_N
    split = slot // group_size
    row = n0 + tl.arange(0, BLOCK_N)
    x_rows = rows_of(x_ptr, tokens, hidden, stride_x, BLOCK_N, BLOCK_D)
    w_rows = rows_of(w_ptr, vocab, hidden, stride_w, BLOCK_V, BLOCK_D)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    moment = tl.zeros([BLOCK_N], tl.float32)
    start = split * SPLIT * BLOCK_V
    for v0 in tl.range(start, tl.minimum(start + SPLIT * BLOCK_V, vocab), BLOCK_V):
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for d0 in tl.range(0, hidden, BLOCK_D, warp_specialize=SPECIALIZE):
            z = tl.dot(x_rows.load([n0, d0]), tl.trans(w_rows.load([v0, d0])), z, input_precision=PRECISION)
        z *= inverse_temperature
        column = v0 + tl.arange(0, BLOCK_V)
        target = tl.load(target_ptr + row, mask=row < tokens, other=-1)
        hit = column[None, :] == target[:, None]
        inside = (row < tokens) & (target >= v0) & (target < tl.minimum(v0 + BLOCK_V, vocab))
        tl.store(picked_ptr + row, tl.sum(tl.where(hit, z, 0.0), 1), mask=inside)
        z = tl.where(column[None, :] < vocab, z, float("-inf"))
        highest, total, moment = add_to_softmax(z, highest, total, moment, ENTROPY)
    part = split.to(tl.int64) * tokens + row
    tl.store(highest_ptr + part, highest, mask=row < tokens)
    tl.store(total_ptr + part, total, mask=row < tokens)
    if ENTROPY:
        tl.store(moment_ptr + part, moment, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "splits", "ignore_index"])
def merge_splits(
    highest_ptr, total_ptr, moment_ptr, picked_ptr, target_ptr, logprob_ptr, entropy_ptr, tokens, splits,
    ignore_index, BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens, whose splits are added in order."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < tokens
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    moment = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.range(0, splits):
        part = tl.cast(split, tl.int64) * tokens + row
        its_highest = tl.load(highest_ptr + part, mask=inside, other=float("-inf"))
        its_total = tl.load(total_ptr + part, mask=inside, other=0.0)
        now = tl.maximum(highest, its_highest)
        anchor = tl.where(now == float("-inf"), 0.0, now)
        decay, its_decay = tl.exp(highest - anchor), tl.exp(its_highest - anchor)
        if ENTROPY:
            its_moment = tl.load(moment_ptr + part, mask=inside, other=0.0)
            lowered = tl.where(total > 0, highest - anchor, 0.0)
            its_lowered = tl.where(its_total > 0, its_highest - anchor, 0.0)
            moment = decay * (moment + total * lowered) + its_decay * (its_moment + its_total * its_lowered)
        total = total * decay + its_total * its_decay
        highest = now
    counted = tl.load(target_ptr + row, mask=inside, other=0) != ignore_index
    picked = tl.load(picked_ptr + row, mask=inside, other=0.0)
    log_total = tl.log(total)
    tl.store(logprob_ptr + row, tl.where(counted, picked - highest - log_total, 0.0), mask=inside)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(counted, log_total - moment / total, 0.0), mask=inside)


def logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, objective: Objective
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities (N,) of the targets, and entropies (N,) with `objective.with_entropy`, in float32."""
    tokens, hidden = input.shape
    vocab = linear_weight.shape[0]
    input, linear_weight = describable(input, linear_weight)
    target = target.contiguous()
    chosen = product_tiles(input.dtype)
    splits = cdiv(vocab, chosen.block_v * chosen.split)
    highest, total = input.new_empty(2, splits, tokens, dtype=torch.float32)
    moment = torch.empty_like(highest) if objective.with_entropy else None
    picked = highest.new_full((tokens,), float("nan"))  # remains if no word is the target
    launch(
        linear_logsumexp, (cdiv(tokens, chosen.block_n) * splits,), input, linear_weight, target, highest,
        total, moment, picked, input.stride(0), linear_weight.stride(0), tokens, vocab, hidden,
        1.0 / objective.temperature, GROUP=GROUP, ENTROPY=objective.with_entropy, PRECISION="ieee",
        **chosen.options(),
    )  # fmt: skip
    logprob = torch.empty_like(picked)
    entropy = torch.empty_like(picked) if objective.with_entropy else None
    launch(
        merge_splits, (cdiv(tokens, MERGED),), highest, total, moment, picked, target, logprob, entropy,
        tokens, splits, objective.ignore_index, BLOCK_N=MERGED, ENTROPY=objective.with_entropy, num_warps=2,
    )  # fmt: skip
    return logprob, entropy
