"""The row-wise Triton kernels as operators of torch, and the list of those that the dispatch uses.

Everywhere else `torch.compile` fuses the plain formulas of kernels/rowwise.py with what stands around them, which an
operator prevents. N tokens, D the row's size, F intermediate size.
"""

import torch
from llmkit.kernels.dispatch import backend, triton_module
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_ROW = 8192  # numbers that a program of a norm holds at once; of 16,384 its backward spills
# Of "add_rms_norm", "rms_norm", "rotary", "swiglu": those that benchmarks/gpu/kernels.py has shown to be at least
# 1.1 times as fast as torch.compile's own. Nothing has been timed yet.
IN_USE: frozenset[str] = frozenset()


def is_used(name: str, x: Tensor) -> bool:
    """Whether the Triton kernel `name` is to compute a row-wise step of x."""
    if name not in IN_USE or x.dtype not in DTYPES or x.shape[-1] > LARGEST_ROW or x.numel() == 0:
        return False
    return backend(x.device.type) in ("triton", "interpret")


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("llmkit::rms_norm", mutates_args=())
def _norm(x: Tensor, residual: Tensor | None, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm(x + residual), x + residual (empty without one), and 1 / rms (N,), of x (N, D)."""
    residual = None if residual is None else _rows(residual)
    return triton_module("rowwise").norm(_rows(x), residual, gain, eps)


@_norm.register_fake
def _(x, residual, gain, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("llmkit::rms_norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, gain: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad_total = None if grad_total is None else _rows(grad_total)
    grad_x, grad_gain = triton_module("rowwise").norm_backward(_rows(grad), grad_total, _rows(x), gain, rstd)
    return grad_x, x.new_empty(0) if grad_gain is None else grad_gain


@_norm_backward.register_fake
def _(grad, grad_total, x, gain, rstd):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(0) if gain is None else torch.empty_like(gain)


def _save_norm(ctx, inputs, output):
    x, residual, gain, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, gain, rstd)


def _differentiate_norm(ctx, grad, grad_total, _):
    x, gain, rstd = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(x)
    grad_x, grad_gain = _norm_backward(grad, grad_total if ctx.has_residual else None, x, gain, rstd)
    return grad_x, grad_x.clone() if ctx.has_residual else None, None if gain is None else grad_gain, None


_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)


@torch.library.custom_op("llmkit::rotary", mutates_args=())
def _turn(x_BTHD: Tensor, cos_sin: Tensor, back: bool) -> Tensor:
    x_BTHD = x_BTHD if x_BTHD.stride(-1) == 1 else x_BTHD.contiguous()
    # the last three dimensions of a table lie one after the other, whatever the first does
    return triton_module("rowwise").turn(x_BTHD, cos_sin.contiguous(), back)


@_turn.register_fake
def _(x_BTHD, cos_sin, back):
    return torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)


def _save_turn(ctx, inputs, output):
    _, cos_sin, ctx.back = inputs
    ctx.save_for_backward(cos_sin)


def _differentiate_turn(ctx, grad):
    (cos_sin,) = ctx.saved_tensors
    return _turn(grad, cos_sin, not ctx.back), None, None


_turn.register_autograd(_differentiate_turn, setup_context=_save_turn)


@torch.library.custom_op("llmkit::swiglu", mutates_args=())
def _gate(gate_up: Tensor) -> Tensor:
    return triton_module("rowwise").gate(_rows(gate_up))


@_gate.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("llmkit::swiglu_backward", mutates_args=())
def _gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return triton_module("rowwise").gate_backward(_rows(grad), _rows(gate_up))


@_gate_backward.register_fake
def _(grad, gate_up):
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_gate(ctx, grad):
    return _gate_backward(grad, *ctx.saved_tensors)


_gate.register_autograd(_differentiate_gate, setup_context=_save_gate)


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`rowwise.rms_norm` by the Triton kernel."""
    return _norm(x.reshape(-1, x.shape[-1]), None, gain, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`rowwise.add_rms_norm` by the Triton kernel."""
    size = x.shape[-1]
    y, total, _ = _norm(x.reshape(-1, size), residual.reshape(-1, size), gain, eps)
    return y.view(x.shape), total.view(x.shape)


def rotary(x_BTHD: Tensor, cos_sin: Tensor) -> Tensor:
    """`rowwise.rotary` by the Triton kernel; the table gets no gradient."""
    return _turn(x_BTHD, cos_sin, False)


def swiglu(gate_up: Tensor) -> Tensor:
    """`rowwise.swiglu` by the Triton kernel."""
    return _gate(gate_up.reshape(-1, gate_up.shape[-1])).view(*gate_up.shape[:-1], -1)
