"""Matrix products on CPU: oneDNN for float32, where torch's own choice, MKL, has half the rate or less on AMD.

MKL uses AVX2 code on AMD processors. oneDNN's AVX-512 code has 2.1-2.5x its rate there in all three products of a
linear layer (docs/experiments.md, "CPU hot path"), with the same float32 accumulation. In bfloat16 torch already calls
oneDNN.

Constant weights are packed once, in oneDNN's layout.

Decoding multiplies few rows by the same weights thousands of times. Compared with oneDNN on plain weights, one thread,
float32, 768 x 256 to 2304 x 768: 2.0x as fast at 2 rows, 1.5x at 16. In float32 the bits of a row's result do not
depend on the number of rows: oneDNN sums a single row of more than 1,024 inputs in pieces, so such a row gets an idle
neighbour, which costs 5%.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from llmkit.kernels.dispatch import once_differentiable
from torch import Tensor

PACKED_FOR = 16  # rows that the layout is chosen for; it works for any number
MOST_ALONE = 1024  # inputs up to which oneDNN sums a single row like one of many, on 1 to 16 threads


@cache
def can_pack(dtype: torch.dtype, device_type: str) -> bool:
    """Return True if `packed_linear` packs here; otherwise it falls back to plain weights."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        x, weight = torch.randn(3, 64).to(dtype), torch.randn(32, 64).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return torch.allclose(y.float(), (x @ weight.t()).float(), rtol=0.02, atol=0.2)
    except (AttributeError, RuntimeError):
        return False


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return `x_BK -> x_BK @ weight_NK.T + bias`, without autograd and with its own copy of the weight."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if not can_pack(weight.dtype, weight.device.type):
        return lambda x_BK: F.linear(x_BK, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)
    product = torch.ops.mkldnn._linear_pointwise.default
    if weight.dtype != torch.float32 or weight.shape[1] <= MOST_ALONE:
        return lambda x_BK: product(x_BK, packed, bias, "none", [], "")
    return lambda x_BK: product(x_BK if len(x_BK) > 1 else x_BK.expand(2, -1), packed, bias, "none", [], "")[
        : len(x_BK)
    ]


def _find_onednn():
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        a, b = torch.randn(3, 4), torch.randn(5, 4)
        return op if torch.allclose(op(a, b, None, "none", [], ""), a @ b.t(), atol=1e-5) else None
    except (AttributeError, RuntimeError):
        return None


_onednn = _find_onednn()


def _onednn_linear(a: Tensor, b: Tensor) -> Tensor:
    return _onednn(a, b, None, "none", [], "")  # type: ignore[misc]


def _by_onednn(a: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and _onednn is not None
        and not torch.compiler.is_compiling()
        and a.numel() > 0
    )


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """Return `a_MK @ b_NK.T`, without autograd."""
    return _onednn_linear(a, b) if _by_onednn(a) else a @ b.t()


def matmul_nn(a: Tensor, b: Tensor) -> Tensor:
    """Return `a_MK @ b_KN`, without autograd."""
    return _onednn_linear(a, b.t()) if _by_onednn(a) else a @ b


def matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    """Return `a_KM.T @ b_KN`, without autograd: the weight gradient's product.

    A transposed first operand is copied; over many rows it should be the narrower one (1.05-1.2x as fast).
    """
    if a.shape[1] > b.shape[1] and a.device.type == "cpu" and (a.dtype == torch.float32 or a.shape[0] >= 2048):
        return _matmul_tn(b, a).t().contiguous()
    return _matmul_tn(a, b)


def _matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    return _onednn_linear(a.t(), b.t()) if _by_onednn(a) else a.t() @ b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        x_NK = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_NK, weight)
        return matmul_nt(x_NK, weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_NK, weight = ctx.saved_tensors
        grad_NM = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight = ctx.needs_input_grad
        grad_x = matmul_nn(grad_NM, weight).view(*grad.shape[:-1], weight.shape[1]) if need_x else None
        return grad_x, matmul_tn(grad_NM, x_NK) if need_weight else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, as `torch.nn.functional.linear`: x (..., in), weight (out, in) -> (..., out)."""
    if not _by_onednn(x):
        return F.linear(x, weight, bias)
    y = _Linear.apply(x, weight)
    return y if bias is None else y + bias
