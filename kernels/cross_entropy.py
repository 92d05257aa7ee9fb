"""Linear layer and cross-entropy as one step: from hidden states to loss and gradients, chunk by chunk.

The logits of a whole batch are the largest tensor of training (4,096 tokens x 32,768 words: 512 MB in float32,
three times over in the usual formulation). Here the forward pass computes one chunk of them, turns it into the
chunk's loss and gradients, and drops it. N tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.kernels.linear import matmul_nn, matmul_nt, matmul_tn

CHUNK_BYTES = 64 * 2**20  # float32 logits held at once
LEAST_CHUNK_TOKENS = 1024


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """The same by torch's own functions, with all logits held: the truth for the tests."""
    logits = F.linear(input, linear_weight)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    loss = F.cross_entropy(
        logits, target, reduction="sum" if reduction == "mean" else reduction, ignore_index=ignore_index
    )
    return loss / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


def _chunk_tokens(chunk_tokens: int | str, vocab_size: int) -> int:
    if chunk_tokens == "auto":
        return max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (4 * vocab_size))
    return int(chunk_tokens)


def _losses_and_probabilities(logits: Tensor, target: Tensor, ignored: Tensor, in_place: bool):
    """Per-token losses (float32) and softmax of logits; an ignored token's loss is zero."""
    log_probabilities = torch.log_softmax(logits, -1)
    losses = log_probabilities.gather(1, target.unsqueeze(1)).squeeze(1).neg_().masked_fill_(ignored, 0.0)
    return losses, log_probabilities.exp_() if in_place else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, target, reduction, ignore_index, chunk_tokens):
        need_input, need_weight = ctx.needs_input_grad[:2]
        need = need_input or need_weight
        accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
        ignored = target == ignore_index
        safe_target = target.masked_fill(ignored, 0)
        scale = None
        if reduction == "mean":
            scale = (~ignored).sum().clamp_(min=1).to(accumulate).reciprocal_()
        losses = torch.empty(input.shape[0], dtype=accumulate, device=input.device)
        # reduction "none" meets its upstream gradient only in backward, so it computes its gradients there.
        now = need and reduction != "none"
        grad_input = torch.empty_like(input) if now and need_input else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if now and need_weight else None
        for start in range(0, input.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            _chunk(input, weight, safe_target, ignored, rows, losses, scale, grad_input, grad_weight)
        if reduction == "none":
            ctx.save_for_backward(input, weight, safe_target, ignored)
            ctx.chunk_tokens = chunk_tokens
            return losses
        ctx.save_for_backward(grad_input, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.chunk_tokens = None
        total = losses.sum()
        return total if scale is None else total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.chunk_tokens is None:
            grad_input, grad_weight = ctx.saved_tensors
            return (
                None if grad_input is None else grad_input * grad.to(grad_input.dtype),
                None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
                *[None] * 4,
            )
        input, weight, target, ignored = ctx.saved_tensors
        need_input, need_weight = ctx.needs_input_grad[:2]
        grad_input = torch.empty_like(input) if need_input else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if need_weight else None
        losses = torch.empty_like(grad)
        for start in range(0, input.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            scale = grad[rows].unsqueeze(1)
            _chunk(input, weight, target, ignored, rows, losses, scale, grad_input, grad_weight)
        return grad_input, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 4


def _chunk(input, weight, target, ignored, rows, losses, scale, grad_input, grad_weight) -> None:
    """Losses of one chunk of tokens into `losses`, and its gradients into or onto the two others."""
    input_ND, target_N = input[rows], target[rows]
    need = grad_input is not None or grad_weight is not None
    logits_NV = matmul_nt(input_ND, weight).to(losses.dtype)
    losses[rows], grad_NV = _losses_and_probabilities(logits_NV, target_N, ignored[rows], need)
    if not need:
        return
    grad_NV.scatter_add_(1, target_N.unsqueeze(1), torch.full_like(losses[rows], -1.0).unsqueeze(1))
    row_scale = (~ignored[rows]).to(grad_NV.dtype).unsqueeze(1)
    grad_NV.mul_(row_scale if scale is None else row_scale * scale)
    grad_NV = grad_NV.to(input.dtype)
    if grad_input is not None:
        grad_input[rows] = matmul_nn(grad_NV, weight)
    if grad_weight is not None:
        grad_weight += matmul_tn(grad_NV, input_ND)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | str = "auto",
    return_lse: bool = False,
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T` against `target`, never holding more than a chunk of logits.

    input (..., D), linear_weight (V, D), target (...) int64. The loss is float32 whatever the inputs are: a scalar
    for "mean" (over tokens that are not ignored) and "sum", the shape of `target` for "none". Where every token is
    ignored the loss is 0 and the gradients are zero. `chunk_tokens` is the number of tokens a chunk.
    """
    for name, value, off in (
        ("linear_bias", linear_bias, None),
        ("weight", weight, None),
        ("label_smoothing", label_smoothing, 0.0),
        ("z_loss", z_loss, 0.0),
        ("softcap", softcap, None),
        ("return_lse", return_lse, False),
    ):
        if value is not off and value != off:
            raise NotImplementedError(f"linear_cross_entropy: {name} is not implemented")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: expected reduction mean, sum or none, found {reduction!r}")
    rows = input.reshape(-1, input.shape[-1])
    chunk = _chunk_tokens(chunk_tokens, linear_weight.shape[0])
    loss = _LinearCrossEntropy.apply(rows, linear_weight, target.reshape(-1), reduction, ignore_index, chunk)
    return loss.view(target.shape) if reduction == "none" else loss
