"""Row-wise kernels in eager torch: RMSNorm, alone and of a sum, and rotary embedding.

On CPU each is one autograd node with a hand-written backward: fewer passes over memory and fewer nodes than
torch's composition of the same steps. Everywhere else, and under `torch.compile`, the plain formula runs and the
compiler fuses it.

B batch, T tokens, H heads, D head size.
"""

import torch
from llmkit.kernels.dispatch import once_differentiable
from torch import Tensor


def by_hand(x: Tensor) -> bool:
    """Return True if the hand-written CPU path applies to this input."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) per row, in x's dtype. The norm reduction sums in float32 and reads x once."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.float() if norm.dtype != torch.float64 else norm
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = inverse_rms(x, eps)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, weight)
        return normed if weight is None else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_rms_norm_gradients(ctx, grad, ctx.needs_input_grad[1]), None


def _rms_norm_gradients(ctx, grad: Tensor, need_weight: bool) -> tuple[Tensor, Tensor | None]:
    normed, rstd, weight = ctx.saved_tensors
    grad_weight = None
    if weight is not None:
        if need_weight:
            grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
    mean = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(grad.shape[-1])
    return torch.addcmul(grad, normed, mean, value=-1).mul_(rstd), grad_weight


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        total = x + residual
        normed = _RMSNorm.forward(ctx, total, weight, eps)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total):
        grad, grad_weight = _rms_norm_gradients(ctx, grad, ctx.needs_input_grad[2])
        grad += grad_total
        return grad, grad, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Apply RMSNorm over the last dimension: x (..., hidden), weight (hidden,) or None for no gain.

    The mean square is summed in float32.
    """
    return _RMSNorm.apply(x, weight, eps) if by_hand(x) else rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return RMSNorm of a sum, and the sum: (rms_norm(x + residual), x + residual)."""
    if by_hand(x):
        return _AddRMSNorm.apply(x, residual, weight, eps)
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


# Rotary embedding: Su et al. 2021, arXiv:2104.09864. Pairs are adjacent, (2i, 2i + 1), so that a pair is one complex
# number and the rotation one product: 1.5 ms instead of 7 for half-split slices (8,192 tokens, 8 heads of 64, float32,
# one thread). Hugging Face's order (i, i + D/2) is a permutation of the projection's rows.


def rotary(x_BTHD: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of x (B, T, H, D) by `cos_sin` (T, D/2, 2), or (B, T, D/2, 2) if rows differ."""
    # 10 to 40x as fast, with the same bits if heads fill complete vectors: a remainder uses fused multiply-adds
    if by_hand(x_BTHD) and not torch.is_grad_enabled() and x_BTHD.dtype == cos_sin.dtype and x_BTHD.shape[-1] % 16 == 0:
        turn = torch.view_as_complex(cos_sin).unsqueeze(-2)
        return torch.view_as_real(torch.view_as_complex(x_BTHD.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    cos, sin = cos_sin.unsqueeze(-3).to(x_BTHD.dtype).unbind(-1)
    even, odd = x_BTHD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def rotate_(x_BTHD: Tensor, cos_sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate in place, in float32 or float64; `back` inverts the rotation. No autograd."""
    turn = torch.view_as_complex(cos_sin).unsqueeze(-2)
    torch.view_as_complex(x_BTHD.unflatten(-1, (-1, 2))).mul_(turn.conj() if back else turn)
    return x_BTHD
