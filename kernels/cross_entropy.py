"""Linear layer and cross-entropy fused: from hidden states to loss and gradients, chunk by chunk.

It is a torch operator on every machine, `llmkit::linear_cross_entropy`, so that a compiled graph sees neither the loop
over chunks nor their number. The gradients are computed with the loss, from the same logits. N tokens, D hidden, V
vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from llmkit.kernels.dispatch import eager_function, in_one_dtype, is_eager
from llmkit.kernels.logit_chunks import (
    Objective,
    accumulation_dtype,
    auto_chunk_tokens,
    rows_and_gradients,
    uses_triton,
)
from torch import Tensor


def linear_cross_entropy_reference(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, reduction: str = "mean", ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute the loss with torch's functions and all logits, as the reference for tests. input is (N, D)."""
    logits = F.linear(input, linear_weight)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    losses = F.cross_entropy(
        logits.to(accumulation_dtype(logits.dtype)), target, reduction="none", ignore_index=ignore_index
    )
    return losses.sum() / ((target != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)


def _compute(
    input: Tensor, linear_weight: Tensor, target: Tensor, reduction: str, ignore_index: int, chunk_tokens: int,
    softcap: float, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, the gradients of input (N, D) and weight (V, D), and the factor that these still need.

    Gradients that are not needed are empty.
    """
    dtype = accumulation_dtype(input.dtype)
    scale = upstream = later = None
    if reduction == "mean":
        scale = (target != ignore_index).sum().to(dtype).clamp_(min=1).reciprocal_()
        if uses_triton(input):
            # A kernel divides before it rounds, as torch does. But float16 underflows at 6e-8, an ordinary gradient of
            # a mean: the power of two is applied when the upstream gradient, perhaps a loss scale, is known.
            upstream, exponent = torch.frexp(scale)
            later = torch.ldexp(torch.ones_like(scale), exponent)
        else:
            later = scale  # in eager mode, dividing at once costs a pass over the logits
    rows, gradients = rows_and_gradients(
        input, linear_weight, target, Objective(ignore_index, softcap=softcap), chunk_tokens, upstream=upstream,
        need=(need_input, need_weight),
    )  # fmt: skip
    loss = rows.loss.sum() if scale is None else rows.loss.sum() * scale
    nothing = input.new_empty
    return (
        loss,
        nothing(0) if gradients.input is None else gradients.input,
        nothing(0, dtype=dtype) if gradients.weight is None else gradients.weight,
        loss.new_ones(()) if later is None else later.clone(),
    )


_loss_and_gradients = torch.library.custom_op("llmkit::linear_cross_entropy", _compute, mutates_args=())


@_loss_and_gradients.register_fake
def _(
    input, linear_weight, target, reduction, ignore_index, chunk_tokens, softcap, need_input, need_weight,
):  # fmt: skip
    dtype = accumulation_dtype(input.dtype)
    return (
        input.new_empty((), dtype=dtype),
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(linear_weight.shape if need_weight else (0,), dtype=dtype),
        input.new_empty((), dtype=dtype),
    )


def _scaled(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """Return x * factor in the wider of their dtypes, rounded once to the dtype of `like`, in one pass."""
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x, dtype=like.dtype))


def _scaled_in_a_graph(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    return (x * factor.reshape(1)).to(like.dtype)  # the compiler fuses this into one pass


def _save(ctx, inputs, output):
    _, linear_weight, *_, need_input, need_weight = inputs
    ctx.needs = need_input, need_weight
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(linear_weight, *output[1:])  # backward needs only the dtype of the weight


def _backward(ctx, grad, *_, scaled=_scaled_in_a_graph):
    if grad is None:
        return (None,) * 9
    linear_weight, grad_input, grad_weight, scale = ctx.saved_tensors
    known = (grad_input, grad_input), (grad_weight, linear_weight)
    factor = grad * scale
    grads = (scaled(x, factor, like) if need else None for (x, like), need in zip(known, ctx.needs, strict=True))
    return *grads, *(None,) * 7


_loss_and_gradients.register_autograd(_backward, setup_context=_save)


# without the dispatcher, whose 0.2 ms are a seventh of the loss of 256 tokens on CPU
_eagerly = eager_function("LinearCrossEntropy", _compute, _save, partial(_backward, scaled=_scaled))


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, reduction: str = "mean", ignore_index: int = -100,
    chunk_tokens: int | str = "auto", softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute the cross-entropy of `input @ linear_weight.T` against `target`, with one chunk of logits at a time.

    input (..., D), linear_weight (V, D), target (...) of integers. The loss is float32, or float64 for float64 inputs.
    The inputs have one dtype (else TypeError), or get autocast's. The loss is differentiable once, in reverse: second
    and forward-mode derivatives raise.

    If every token is ignored, loss and gradients are zero, not NaN as in torch. With a `softcap` c the logits are
    c * tanh(logit / c).

    `chunk_tokens` is the number of tokens per chunk; on a GPU at least 4,096, or accumulating the weight gradient
    dominates. A target outside [0, V) that is not ignored raises IndexError on CPU and makes the loss NaN on a GPU,
    which is never synchronized. Hidden states of ignored tokens must be finite on a GPU.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: expected reduction mean or sum, found {reduction!r}")
    input, linear_weight = in_one_dtype("linear_cross_entropy", input=input, linear_weight=linear_weight)
    grad = torch.is_grad_enabled()
    chunk = auto_chunk_tokens(linear_weight) if chunk_tokens == "auto" else int(chunk_tokens)
    compute = _eagerly if is_eager(input, linear_weight) else _loss_and_gradients
    loss, *_ = compute(
        input.reshape(-1, input.shape[-1]), linear_weight, target.reshape(-1), reduction, ignore_index, chunk,
        softcap or 0.0, grad and input.requires_grad, grad and linear_weight.requires_grad,
    )  # fmt: skip
    return loss
