"""Fused attention as torch operators: how `torch.compile`, autograd and the dispatcher see the Triton kernels.

`llmkit::attention` with its backward `llmkit::attention_backward`, and `llmkit::attention_decode`. In eager mode they
are called as functions, because the dispatcher takes longer than a small kernel. Triton is imported when one runs.

B batch, H query heads, K key-value heads, T queries, S keys, D head size.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from llmkit.kernels.dispatch import backend, eager_function, is_eager, triton_module
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256
LOG2_E = math.log2(math.e)


def can_run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Return True if the Triton kernels compute this attention on this machine."""
    return (
        backend(query.device.type) in ("triton", "interpret")
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[-1] == key.shape[-1] <= LARGEST_HEAD
        and query.shape[1] % key.shape[1] == 0
        and 0 not in query.shape
        and 0 not in key.shape
        and scale > 0
    )


def document_starts(doc_ids: Tensor) -> Tensor:
    """Return the first position of each position's document: (B, T) -> (B, T). Equal neighbours are one document."""
    position = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    changes = doc_ids[:, 1:] != doc_ids[:, :-1]
    begins = torch.nn.functional.pad(changes, (1, 0), value=True)
    return torch.where(begins, position, 0).cummax(1).values


def bounds(starts: Tensor | None, window: int | None, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first key of each query, and the last query of each key: int32 (B or 1, T), both non-decreasing."""
    position = torch.arange(length, device=device)
    lo = torch.zeros_like(position).unsqueeze(0) if starts is None else starts
    if window is not None:
        lo = torch.maximum(lo, position - (window - 1))
    hi = torch.searchsorted(lo.contiguous(), position.expand(lo.shape).contiguous(), right=True) - 1
    return lo.int(), hi.int()


@lru_cache(maxsize=64)
def window_bounds(window: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `bounds` of one document: the same for every layer and step."""
    return bounds(None, window, length, device)


def empty_as_used(shape: Sequence[int], like: Tensor) -> Tensor:
    """Allocate (B, H, T, D) in memory order (B, T, H, D), as the next projection reads it."""
    batch, heads, length, size = shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D), in memory (B, T, H, D), and log2 of the sum of 2^scores (B, H, T) in float32,
    without gradient. `lo` and `hi` are those of `bounds`, with `is_causal`.
    """
    return triton_module("attention").forward(query, key, value, lo, scale, is_causal)


attention_operator = torch.library.custom_op("llmkit::attention", _attention, mutates_args=())


@attention_operator.register_fake
def _(query, key, value, lo, hi, scale, is_causal):
    return empty_as_used(query.shape, query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lo: Tensor | None,
    hi: Tensor | None, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value."""
    backward = triton_module("attention_backward").backward
    return backward(grad, query, key, value, out, lse.contiguous(), lo, hi, scale, is_causal)


backward_operator = torch.library.custom_op("llmkit::attention_backward", _attention_backward, mutates_args=())


@backward_operator.register_fake
def _(grad, query, key, value, out, lse, lo, hi, scale, is_causal):
    return empty_as_used(query.shape, query), empty_as_used(key.shape, query), empty_as_used(key.shape, query)


def _save(ctx, inputs, output):
    query, key, value, lo, hi, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, lo, hi)


def _backward(ctx, grad, _, backward: Callable = backward_operator):
    if grad is None:
        return (None,) * 7
    return *backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


attention_operator.register_autograd(_backward, setup_context=_save)

_attention_eagerly = eager_function("Attention", _attention, _save, partial(_backward, backward=_attention_backward))


def attention(
    query: Tensor, key: Tensor, value: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """Return the output of `llmkit::attention`, differentiable once, in reverse."""
    compute = _attention_eagerly if is_eager(query, key, value) else attention_operator
    return compute(query, key, value, lo, hi, scale, is_causal)[0]


def _attention_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    """Return the output (B, H, T, D), in memory (B, T, H, D); window 0 is none. No backward."""
    query, key_cache, value_cache = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key_cache, value_cache)
    )
    return triton_module("decode").decode(query, key_cache, value_cache, lengths, scale, window)


decode_operator = torch.library.custom_op("llmkit::attention_decode", _attention_decode, mutates_args=())


@decode_operator.register_fake
def _(query, key_cache, value_cache, lengths, scale, window):
    return empty_as_used(query.shape, query)


def attention_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    """Return the output of `llmkit::attention_decode`; if gradients are on, by the operator, whose backward raises."""
    plain = is_eager(query, key_cache, value_cache) and not torch.is_grad_enabled()
    return (_attention_decode if plain else decode_operator)(query, key_cache, value_cache, lengths, scale, window)
