"""Linear layer and cross-entropy as one step: from hidden states to loss and gradients, chunk by chunk.

An operator of torch on every machine, `llmkit::linear_cross_entropy`, so that a compiled graph sees neither the loop
over chunks nor its number. The gradients of a mean or a sum are computed beside the loss, from the same logits; those
of reduction "none" come with backward, which computes the logits again. N tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from llmkit.kernels.logit_chunks import (
    Objective,
    accumulation_dtype,
    auto_chunk_tokens,
    rows_and_gradients,
    uses_triton,
)
from llmkit.kernels.rowwise import by_hand
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy_reference(
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
) -> tuple[Tensor, Tensor]:
    """Loss and lse by torch's own functions, with all logits held: the truth for the tests. input is (N, D)."""
    logits = F.linear(input, linear_weight, linear_bias)
    logits = logits.to(accumulation_dtype(logits.dtype))
    weight = None if weight is None else weight.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits, target, weight, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    counted = target != ignore_index
    lse = torch.logsumexp(logits, -1) * counted
    shares = counted.to(logits.dtype) if weight is None else weight[target * counted] * counted
    losses = losses + z_loss * shares * lse.square()
    if reduction == "none":
        return losses, lse
    total = shares.sum()
    return losses.sum() / (torch.where(total > 0, total, 1) if reduction == "mean" else 1), lse


def _compute(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_tokens: int,
    return_lse: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, gradients of input (N, D), weight (V, D) and bias (V,), and what those remain to be multiplied by.

    What was not asked for is empty. softcap 0 is none.
    """
    objective = Objective(ignore_index, label_smoothing, z_loss, softcap, with_lse=return_lse)
    dtype = accumulation_dtype(input.dtype)
    scale = upstream = later = None
    if reduction == "mean":
        scale = _mean_scale(target, weight, ignore_index, dtype)
        if uses_triton(input):
            # A kernel divides before it rounds, as torch does. But float16 ends at 6e-8, an ordinary gradient of a
            # mean: the power of two waits until the upstream gradient, a loss scale perhaps, is known.
            upstream, exponent = torch.frexp(scale)
            later = torch.ldexp(torch.ones_like(scale), exponent)
        else:
            later = scale  # in eager to divide at once costs a pass over the logits
    rows, gradients = rows_and_gradients(
        input, linear_weight, linear_bias, target, weight, objective, chunk_tokens, upstream=upstream,
        need=(False, False, False) if reduction == "none" else (need_input, need_weight, need_bias),
    )  # fmt: skip
    loss = rows.loss
    if reduction != "none":
        loss = loss.sum() if scale is None else loss.sum() * scale
    nothing = input.new_empty
    return (
        loss,
        nothing(0, dtype=dtype) if rows.lse is None else rows.lse,
        nothing(0) if gradients.input is None else gradients.input,
        nothing(0, dtype=dtype) if gradients.weight is None else gradients.weight,
        nothing(0, dtype=dtype) if gradients.bias is None else gradients.bias,
        loss.new_ones(()) if later is None else later.clone(),
    )


_loss_and_gradients = torch.library.custom_op("llmkit::linear_cross_entropy", _compute, mutates_args=())


def _mean_scale(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """1 over the number of targets that count, at least one, or over the sum of their class weights."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum().to(dtype).clamp_(min=1).reciprocal_()
    total = (weight.to(dtype)[target.masked_fill(~counted, 0).long()] * counted).sum()
    return torch.where(total > 0, 1 / total, 0.0)


@_loss_and_gradients.register_fake
def _(
    input, linear_weight, linear_bias, weight, target, reduction, ignore_index, label_smoothing, z_loss, softcap,
    chunk_tokens, return_lse, need_input, need_weight, need_bias,
):  # fmt: skip
    dtype = accumulation_dtype(input.dtype)
    now, vocab = reduction != "none", linear_weight.shape[0]
    return (
        input.new_empty((() if now else target.shape), dtype=dtype),
        input.new_empty(target.shape if return_lse else (0,), dtype=dtype),
        input.new_empty(input.shape if now and need_input else (0,)),
        input.new_empty(linear_weight.shape if now and need_weight else (0,), dtype=dtype),
        input.new_empty((vocab,) if now and need_bias else (0,), dtype=dtype),
        input.new_empty((), dtype=dtype),
    )


@torch.library.custom_op("llmkit::linear_cross_entropy_backward", mutates_args=())
def _gradients_of_each(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_tokens: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of reduction "none", given that of each loss (N,), in the dtypes of input, weight and bias."""
    _, gradients = rows_and_gradients(
        input, linear_weight, linear_bias, target, weight,
        Objective(ignore_index, label_smoothing, z_loss, softcap), chunk_tokens,
        upstream=grad, need=(need_input, need_weight, need_bias),
    )  # fmt: skip
    found = gradients.input, gradients.weight, gradients.bias
    return tuple(input.new_empty(0) if x is None else x.to(input.dtype) for x in found)  # type: ignore[return-value]


@_gradients_of_each.register_fake
def _(
    grad, input, linear_weight, linear_bias, weight, target, ignore_index, label_smoothing, z_loss, softcap,
    chunk_tokens, need_input, need_weight, need_bias,
):  # fmt: skip
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    needs = need_input, need_weight, need_bias
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _scaled(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """x * factor in the wider of their dtypes, rounded once to the dtype of `like`; on a GPU in one pass."""
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x, dtype=like.dtype))


_scaled_in_a_graph = torch.library.custom_op("llmkit::scaled", _scaled, mutates_args=())


@_scaled_in_a_graph.register_fake
def _(x, factor, like):
    return torch.empty_like(x, dtype=like.dtype)


def _save(ctx, inputs, output):
    input, linear_weight, linear_bias, weight, target, ctx.reduction, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.reduction == "none":
        ctx.save_for_backward(input, linear_weight, linear_bias, weight, target)
    else:
        # of these two backward wants the dtype alone, and they live as long anyway
        ctx.save_for_backward(linear_weight, linear_bias, *output[2:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 15
    *options, _, need_input, need_weight, need_bias = ctx.options
    needs = need_input, need_weight, need_bias
    if ctx.reduction == "none":
        found = _gradients_of_each(grad, *ctx.saved_tensors, *options, *needs)
    else:
        linear_weight, linear_bias, grad_input, grad_weight, grad_bias, scale = ctx.saved_tensors
        known = (grad_input, grad_input), (grad_weight, linear_weight), (grad_bias, linear_bias)
        factor, scaled = grad * scale, _scaled if by_hand(grad) else _scaled_in_a_graph
        found = tuple(scaled(x, factor, like) if need else None for (x, like), need in zip(known, needs, strict=True))
    return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 12


_loss_and_gradients.register_autograd(_backward, setup_context=_save)


class _Eagerly(torch.autograd.Function):
    """The operator without torch's dispatcher, whose 0.2 ms are a seventh of 256 tokens' loss on CPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _compute(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of `input @ linear_weight.T + linear_bias` against `target`, holding one chunk of logits at most.

    input (..., D), linear_weight (V, D), linear_bias (V,), target (...) of integers. The loss is float32 whatever the
    inputs are (float64 for float64): a scalar for "mean" and "sum", the shape of `target` for "none".

    Meanings are those of torch's `cross_entropy`: `weight` (V,) are class weights, of the target for the likelihood
    and of each class for `label_smoothing`; a mean divides by the sum of the targets' weights, which is the number of
    tokens not ignored where there are none. With `softcap` a logit z becomes softcap * tanh(z / softcap). `z_loss`
    adds z_loss * weight[target] * lse^2 to each token's loss, lse being the logsumexp of its logits (PaLM,
    arXiv:2204.02311). Where every token is ignored the loss is 0, and the gradients are zeros, not NaN as in torch.

    With `return_lse` the result is (loss, lse), lse of the shape of `target`, 0 where ignored, without a gradient.
    `chunk_tokens` is the number of tokens a chunk; at least 4,096 on a GPU, or adding up the gradient of the weight
    dominates. `weight` gets no gradient. A target outside [0, V) that is not ignored raises IndexError on CPU and
    makes the loss NaN on a GPU, which is never waited for. Hidden states of ignored tokens must be finite there.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: expected reduction mean, sum or none, found {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: expected label_smoothing from 0 to 1, found {label_smoothing}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"linear_cross_entropy: expected a positive softcap, found {softcap}")
    grad = torch.is_grad_enabled()
    need_bias = grad and linear_bias is not None and linear_bias.requires_grad
    chunk = auto_chunk_tokens(linear_weight) if chunk_tokens == "auto" else int(chunk_tokens)
    compute = _Eagerly.apply if by_hand(input) else _loss_and_gradients
    loss, lse, *_ = compute(
        input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, weight, target.reshape(-1), reduction,
        ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0), chunk, return_lse,
        grad and input.requires_grad, grad and linear_weight.requires_grad, need_bias,
    )  # fmt: skip
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, lse.view(target.shape)) if return_lse else loss
