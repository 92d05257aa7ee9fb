"""Log-probabilities of given tokens from hidden states, and the entropy of their distributions.

For reinforcement learning and evaluation. On a GPU the forward pass stores no logits: tiles of them stay in registers
(Cut Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009). Backward, and both passes on CPU, go chunk by chunk. N
tokens, D hidden, V vocabulary.

Backward recomputes the log-sum-exp of its logits, which are rounded to 16 bits. With that of the forward pass, of
unrounded logits, the gradient of tokens of probability 0.9998, which is 1 - p, would be off by 60 times its length
(bfloat16, 8,192 words; by 0.02 as it is); the chunk is read from memory once either way.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from llmkit.kernels.dispatch import eager_function, in_one_dtype, is_eager, triton_module
from llmkit.kernels.logit_chunks import (
    Objective,
    accumulation_dtype,
    auto_chunk_tokens,
    rows_and_gradients,
    uses_triton,
)
from torch import Tensor


def linear_logprobs_reference(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, temperature: float = 1.0, ignore_index: int = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute log-probabilities and entropies with all logits, differentiably, as the reference for tests."""
    logits = F.linear(input, linear_weight)
    logits = logits.to(accumulation_dtype(logits.dtype))
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    log_p = torch.log_softmax(logits / temperature, -1)
    counted = target != ignore_index
    picked = log_p.gather(-1, (target * counted).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return picked.masked_fill(~counted, 0.0), entropy.masked_fill(~counted, 0.0)


def _compute(
    input: Tensor, linear_weight: Tensor, target: Tensor, temperature: float, ignore_index: int, chunk_tokens: int,
    softcap: float, return_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return log-probabilities (N,) and entropies (N,), the latter empty unless requested."""
    objective = Objective(ignore_index, temperature, return_entropy, softcap)
    if uses_triton(input) and input.shape[1] % 16 == 0 and not softcap:  # rows at 16-byte boundaries
        picked, entropy = triton_module("logprobs").logprobs(input, linear_weight, target, objective)
    else:
        rows, _ = rows_and_gradients(input, linear_weight, target, objective, chunk_tokens)
        picked, entropy = rows.loss.neg_(), rows.entropy
    return picked, picked.new_empty(0) if entropy is None else entropy


_logprobs = torch.library.custom_op("llmkit::linear_logprobs", _compute, mutates_args=())


@_logprobs.register_fake
def _(input, linear_weight, target, temperature, ignore_index, chunk_tokens, softcap, return_entropy):
    picked = input.new_empty(target.shape, dtype=accumulation_dtype(input.dtype))
    return picked, torch.empty_like(picked) if return_entropy else picked.new_empty(0)


def _gradients(
    grad: Tensor | None, grad_entropy: Tensor | None, input: Tensor, linear_weight: Tensor, target: Tensor,
    temperature: float, ignore_index: int, chunk_tokens: int, softcap: float, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of input and weight in their dtypes, empty if not needed."""
    objective = Objective(ignore_index, temperature, grad_entropy is not None, softcap)
    dtype = accumulation_dtype(input.dtype)
    upstream = input.new_zeros(target.shape, dtype=dtype) if grad is None else -grad.to(dtype)
    _, gradients = rows_and_gradients(
        input, linear_weight, target, objective, chunk_tokens,
        upstream=upstream, grad_entropy=grad_entropy, need=(need_input, need_weight),
    )  # fmt: skip
    pair = gradients.input, gradients.weight
    return tuple(input.new_empty(0) if x is None else x.to(input.dtype) for x in pair)  # type: ignore[return-value]


_gradients_in_a_graph = torch.library.custom_op("llmkit::linear_logprobs_backward", _gradients, mutates_args=())


@_gradients_in_a_graph.register_fake
def _(
    grad, grad_entropy, input, linear_weight, target, temperature, ignore_index, chunk_tokens, softcap, need_input,
    need_weight,
):  # fmt: skip
    pairs = (input.shape, need_input), (linear_weight.shape, need_weight)
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in pairs)


def _save(ctx, inputs, output):
    input, linear_weight, target, *options, ctx.return_entropy = inputs
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, linear_weight, target)


def _backward(ctx, grad, grad_entropy, gradients: Callable = _gradients_in_a_graph):
    need = ctx.needs_input_grad[:2]
    if not ctx.return_entropy:
        grad_entropy = None
    if grad is None and grad_entropy is None:
        return (None,) * 8
    grads = gradients(grad, grad_entropy, *ctx.saved_tensors, *ctx.options, *need)
    return *(x if each else None for x, each in zip(grads, need, strict=True)), *(None,) * 6


_logprobs.register_autograd(_backward, setup_context=_save)


_eagerly = eager_function("LinearLogprobs", _compute, _save, partial(_backward, gradients=_gradients))


def linear_logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, temperature: float = 1.0, ignore_index: int = -100,
    return_entropy: bool = False, softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Return the log-probability of each target under softmax(`input @ linear_weight.T` / temperature).

    input (..., D), linear_weight (V, D), target (...) of integers -> float32, or float64, of the shape of `target`.
    With `return_entropy` the entropies of the distributions, in nats, come second. Both are differentiable once, in
    reverse (else they raise), with respect to input and linear_weight, which have one dtype (else TypeError) or get
    autocast's. With a `softcap` c the logits are c * tanh(logit / c), before the temperature.
    Ignored positions give 0.0 and no gradient. A target outside [0, V) that is not ignored raises IndexError on CPU and
    gives NaN on a GPU.
    """
    if temperature <= 0:
        raise ValueError(f"linear_logprobs: expected a positive temperature, found {temperature}")
    input, linear_weight = in_one_dtype("linear_logprobs", input=input, linear_weight=linear_weight)
    compute = _eagerly if is_eager(input, linear_weight) else _logprobs
    picked, entropy = compute(
        input.reshape(-1, input.shape[-1]), linear_weight, target.reshape(-1), float(temperature), ignore_index,
        auto_chunk_tokens(linear_weight), softcap or 0.0, return_entropy,
    )  # fmt: skip
    picked = picked.view(target.shape)
    return (picked, entropy.view(target.shape)) if return_entropy else picked
