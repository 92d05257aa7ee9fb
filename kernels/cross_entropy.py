"""Linear layer and cross-entropy as one step: from hidden states to loss and gradients, chunk by chunk.

The logits of a whole batch are the largest tensor of training (4,096 tokens x 32,768 words: 512 MB in float32,
three times over in the usual formulation). Here the forward pass computes one chunk of them in one reused buffer,
turns it into the chunk's loss and gradients, and goes on. N tokens, D hidden, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from llmkit.kernels.linear import matmul_nn, matmul_nt, matmul_tn
from llmkit.kernels.rowwise import by_hand
from torch import Tensor
from torch.autograd.function import once_differentiable

# On CPU a chunk's logits should stay in cache, and its tokens be enough that adding up the weight gradient is cheap:
# at 8,192 tokens x 256 hidden, 2,048 or 4,096 tokens a chunk are 1.2x as fast as 256.
CPU_CHUNK_BYTES = 32 * 2**20
CPU_LEAST_TOKENS = 1024
CHUNK_BYTES = 512 * 2**20
LEAST_TOKENS = 4096
# Below this probability -log(p) is taken again from the logits, for p itself is near the end of its range.
LEAST_PROBABILITY = 1e-30


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


def _chunk_tokens(chunk_tokens: int | str, weight: Tensor) -> int:
    if chunk_tokens != "auto":
        return int(chunk_tokens)
    row = weight.shape[0] * weight.element_size()
    if by_hand(weight):
        return max(CPU_LEAST_TOKENS, CPU_CHUNK_BYTES // row)
    return max(LEAST_TOKENS, CHUNK_BYTES // row)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _losses(input: Tensor, weight: Tensor, target: Tensor, chunk_tokens: int) -> Tensor:
    """Loss of each token from float32 log-softmax, no gradients."""
    dtype = _accumulation_dtype(input.dtype)
    losses = torch.empty(input.shape[0], dtype=dtype, device=input.device)
    for start in range(0, input.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        log_probabilities = torch.log_softmax(matmul_nt(input[rows], weight).to(dtype), -1)
        losses[rows] = log_probabilities.gather(1, target[rows].unsqueeze(1)).squeeze(1).neg_()
    return losses


def _losses_and_gradients(input, weight, target, row_scale, chunk_tokens, need_input, need_weight):
    """Losses (N,), their gradient to input (N, D) in its dtype and to weight (V, D) in the accumulation dtype."""
    dtype = _accumulation_dtype(input.dtype)
    tokens = input.shape[0]
    losses = torch.empty(tokens, dtype=dtype, device=input.device)
    grad_input = torch.empty_like(input) if need_input else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
    every_row = torch.arange(min(chunk_tokens, tokens), device=input.device)
    on_cpu = by_hand(input)
    probabilities = input.new_empty((min(chunk_tokens, tokens), weight.shape[0])) if on_cpu else None
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        target_N, row = target[rows], every_row[: rows.stop - rows.start]
        logits_NV = matmul_nt(input[rows], weight)
        if probabilities is not None:
            # torch's softmax has an exponential several times faster than `exp` by itself on CPU. It computes in
            # float32 and rounds once to the dtype of the products; the loss is -log of the target's probability.
            out = probabilities[: logits_NV.shape[0]]
            grad_NV = torch.ops.aten._softmax.out(logits_NV, 1, False, out=out)
            probability = grad_NV[row, target_N]
            losses[rows] = -probability.to(dtype).log()
            grad_NV[row, target_N] = probability - 1
        else:
            log_probabilities = torch.log_softmax(logits_NV.to(dtype), -1)
            losses[rows] = -log_probabilities[row, target_N]
            grad_NV = log_probabilities.exp()
            grad_NV[row, target_N] -= 1
            grad_NV = grad_NV.to(input.dtype)
        if row_scale is not None:
            grad_NV.mul_(row_scale[rows].unsqueeze(1).to(grad_NV.dtype))
        if grad_input is not None:
            grad_input[rows] = matmul_nn(grad_NV, weight)
        if grad_weight is not None:
            grad_weight += matmul_tn(grad_NV, input[rows])
    if on_cpu:
        unlikely = losses > -math.log(LEAST_PROBABILITY)
        if unlikely.any():
            losses[unlikely] = _losses(input[unlikely], weight, target[unlikely], chunk_tokens)
    return losses, grad_input, grad_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, target, reduction, counted, chunk_tokens):
        """`counted` (N,) is 1 for tokens that count and 0 for others, or None where all do."""
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.reduction, ctx.chunk_tokens = reduction, chunk_tokens
        grad_input = grad_weight = None
        if reduction == "none" or not (need_input or need_weight):
            # The upstream gradients of reduction "none" come only with backward, which computes the rest then.
            losses = _losses(input, weight, target, chunk_tokens)
        else:
            losses, grad_input, grad_weight = _losses_and_gradients(
                input, weight, target, counted, chunk_tokens, need_input, need_weight
            )
        if counted is not None:
            losses *= counted
        if reduction == "none":
            ctx.save_for_backward(input, weight, target, counted)
            return losses
        tokens = losses.shape[0] if counted is None else counted.sum()
        scale = 1.0 / torch.as_tensor(tokens, dtype=losses.dtype, device=losses.device).clamp(min=1)
        scale = scale if reduction == "mean" else torch.ones_like(scale)
        ctx.save_for_backward(grad_input, grad_weight, scale)
        ctx.weight_dtype = weight.dtype
        return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.reduction != "none":
            grad_input, grad_weight, scale = ctx.saved_tensors
            scale = scale * grad
            if grad_input is not None:
                grad_input = grad_input * scale.to(grad_input.dtype)
            if grad_weight is not None:
                grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
            return grad_input, grad_weight, None, None, None, None
        input, weight, target, counted = ctx.saved_tensors
        grad = grad if counted is None else grad * counted
        _, grad_input, grad_weight = _losses_and_gradients(
            input, weight, target, grad, ctx.chunk_tokens, *ctx.needs_input_grad[:2]
        )
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_input, grad_weight, None, None, None, None


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

    input (..., D), linear_weight (V, D), target (...) int64. The loss is float32 whatever the inputs are (float64
    for float64): a scalar for "mean" (over tokens that are not ignored) and "sum", the shape of `target` for
    "none". Where every token is ignored the loss is 0 and the gradients are zero. `chunk_tokens` is the number of
    tokens a chunk. The options that raise NotImplementedError are torch-like names reserved for later.
    """
    for name, value, off in (
        ("linear_bias", linear_bias, None),
        ("weight", weight, None),
        ("label_smoothing", label_smoothing, 0.0),
        ("z_loss", z_loss, 0.0),
        ("softcap", softcap, None),
        ("return_lse", return_lse, False),
    ):
        if value is not None and (isinstance(value, Tensor) or value != off):
            raise NotImplementedError(f"linear_cross_entropy: {name} is not implemented")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: expected reduction mean, sum or none, found {reduction!r}")
    rows, flat_target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    chunk = _chunk_tokens(chunk_tokens, linear_weight)
    counted = flat_target != ignore_index
    on_host = by_hand(input)
    if on_host and bool(counted.all()):
        loss = _LinearCrossEntropy.apply(rows, linear_weight, flat_target, reduction, None, chunk)
    elif on_host and reduction != "none":  # ignored tokens cost nothing: leave them out
        kept = counted.nonzero().squeeze(1)
        rows, flat_target = rows.index_select(0, kept), flat_target[kept]
        loss = _LinearCrossEntropy.apply(rows, linear_weight, flat_target, reduction, None, chunk)
    else:
        safe_target = flat_target.masked_fill(~counted, 0)
        counted = counted.to(_accumulation_dtype(input.dtype))
        loss = _LinearCrossEntropy.apply(rows, linear_weight, safe_target, reduction, counted, chunk)
    return loss.view(target.shape) if reduction == "none" else loss
