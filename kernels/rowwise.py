"""Row-wise kernels in eager torch: RMSNorm, rotary embedding (with or without per-head norm), SwiGLU.

On CPU each is one autograd node with its backward written by hand: fewer passes over memory and fewer nodes than
torch's composition of the same steps. Everywhere else, and under `torch.compile`, the plain formula runs and the
compiler fuses it. The plain formulas at the head of each section are the references that the tests compare with.

B batch, T tokens, H heads, D head size, N rows, F intermediate size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) per row, in x's dtype. The norm reduction sums in float32 and reads x once."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.float().square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = _inverse_rms(x, eps)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, weight)
        return normed if weight is None else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        normed, rstd, weight = ctx.saved_tensors
        grad_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                dims = tuple(range(grad.ndim - 1))
                grad_weight = (grad * normed).sum(dims, dtype=torch.float32 if grad.dtype != torch.float64 else None)
                grad_weight = grad_weight.to(weight.dtype)
            grad = grad * weight
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        mean = _row_dot(grad, normed).div_(grad.shape[-1])
        return torch.addcmul(grad, normed, mean, value=-1).mul_(rstd), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None):
    """RMSNorm over the last dimension; with `residual`, of their sum: returns (normed, x + residual).

    x (..., hidden), weight (hidden,) or None for no gain. Statistics are taken in float32.
    """
    if residual is not None:
        x = x + residual
    y = _RMSNorm.apply(x, weight, eps) if _by_hand(x) else rms_norm_reference(x, weight, eps)
    return y if residual is None else (y, x)


# Rotary embedding in the half-split layout of Hugging Face: Su et al. 2021, arXiv:2104.09864


def rotary_reference(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x (B, T, H, D); cos and sin (T, D/2), or (B, T, D/2) where rows differ."""
    cos, sin = cos_TD.unsqueeze(-2), sin_TD.unsqueeze(-2)
    first, second = x_BTHD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


rotary = rotary_reference


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    x1, x2 = x.chunk(2, -1)
    out1, out2 = out.chunk(2, -1)
    torch.mul(x1, cos, out=out1)
    out1.addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2)
    out2.addcmul_(x1, sin, value=sign)


class _NormRotary(torch.autograd.Function):
    """Per-head RMSNorm (optional), its gain (optional), rotation, and the move to (B, H, T, D), in one node."""

    @staticmethod
    def forward(ctx, x_BTHD, weight, cos, sin, eps):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        rstd = normed = None
        y = x_BTHD
        if eps is not None:
            rstd = _inverse_rms(x_BTHD, eps)
            y = normed = x_BTHD * rstd
            if weight is not None:
                y = normed * weight
        out_BHTD = torch.empty_like(y.transpose(1, 2), memory_format=torch.contiguous_format)
        _rotate_into(out_BHTD.transpose(1, 2), y, cos, sin, 1)
        ctx.save_for_backward(normed, rstd, weight, cos, sin)
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHTD):
        normed, rstd, weight, cos, sin = ctx.saved_tensors
        grad = torch.empty_like(grad_BHTD.transpose(1, 2), memory_format=torch.contiguous_format)
        _rotate_into(grad, grad_BHTD.transpose(1, 2), cos, sin, -1)
        if normed is None:
            return grad, None, None, None, None
        grad_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                grad_weight = (grad * normed).sum((0, 1, 2), dtype=torch.float32).to(weight.dtype)
            grad.mul_(weight)
        mean = _row_dot(grad, normed).div_(grad.shape[-1])
        return grad.addcmul_(normed, mean, value=-1).mul_(rstd), grad_weight, None, None, None


def norm_rotary(
    x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Queries or keys from their projection to attention: per-head RMSNorm when `eps` is given, then rotation.

    (B, T, H, D) -> (B, H, T, D), contiguous; weight (D,) is the norm's gain.
    """
    if _by_hand(x_BTHD):
        return _NormRotary.apply(x_BTHD, weight, cos_TD, sin_TD, eps)
    if eps is not None:
        x_BTHD = rms_norm_reference(x_BTHD, weight, eps)
    return rotary_reference(x_BTHD, cos_TD, sin_TD).transpose(1, 2)


# SwiGLU: Shazeer 2020, arXiv:2002.05202


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of one fused projection: (..., 2F), gate first, to (..., F)."""
    return _SwiGLU.apply(gate_up) if _by_hand(gate_up) else swiglu_reference(gate_up)
