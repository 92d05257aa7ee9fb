"""The two halves of a decoder layer around attention, each as one autograd node on CPU.

`qkv_rotary`: hidden states to the queries, keys and values of attention. `feed_forward`: the feed-forward layer.
Merging the products with the row-wise steps between them keeps every elementwise operand contiguous (reading half of
a fused row costs 2.2x a contiguous read), saves tensors for backward only once, and avoids nodes, on which a tiny
model spends as much time as on products.

B batch, T tokens, C hidden, H query heads, K key-value heads, D head size, F intermediate size, N = B * T.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from llmkit.kernels.dispatch import once_differentiable
from llmkit.kernels.linear import linear, matmul_nn, matmul_nt, matmul_tn
from llmkit.kernels.rowwise import by_hand, inverse_rms, rms_norm, rms_norm_reference, rotary, rotate_
from torch import Tensor


class _QKVRotary(torch.autograd.Function):
    """Backward uses that a rotation preserves inner products: the norm's row means are those of rotated vectors."""

    @staticmethod
    def forward(ctx, x_BTC, weight, bias, cos_sin, heads, kv_heads, q_gain, k_gain, eps):
        batch, length, _ = x_BTC.shape
        size = weight.shape[0] // (heads + 2 * kv_heads)
        rotated = (heads + kv_heads) * size
        x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
        qk_NR, v_NR = matmul_nt(x_NC, weight[:rotated]), matmul_nt(x_NC, weight[rotated:])
        if bias is not None:
            qk_NR += bias[:rotated]
            v_NR += bias[rotated:]
        qk = qk_NR.view(batch, length, heads + kv_heads, size).to(cos_sin.dtype)
        rstd = gained = normed = None
        if eps is not None:
            rstd = inverse_rms(qk, eps)
            if q_gain is not None:
                normed = qk.mul_(rstd)
                gained = torch.cat([q_gain.expand(heads, -1), k_gain.expand(kv_heads, -1)]).to(qk.dtype)
                qk = normed * gained
            else:
                qk.mul_(rstd)
        rotate_(qk, cos_sin)
        query = x_BTC.new_empty(batch, heads, length, size)
        key, value = x_BTC.new_empty(2, batch, kv_heads, length, size).unbind(0)
        query.copy_(qk[:, :, :heads].transpose(1, 2))
        key.copy_(qk[:, :, heads:].transpose(1, 2))
        value.copy_(v_NR.view(batch, length, kv_heads, size).transpose(1, 2))
        plain_norm = eps is not None and gained is None
        ctx.save_for_backward(
            x_NC, weight, cos_sin, rstd, gained, normed, *((query, key) if plain_norm else (None, None))
        )
        ctx.has_bias, ctx.x_shape = bias is not None, x_BTC.shape
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        x_NC, weight, cos_sin, rstd, gained, normed, query, key = ctx.saved_tensors
        batch, heads, length, size = grad_query.shape
        kv_heads = grad_key.shape[1]
        both = heads + kv_heads
        grad_qkv = x_NC.new_empty(batch, length, both + kv_heads, size)
        grad = torch.empty(batch, length, both, size, dtype=cos_sin.dtype)
        if query is not None:
            # Without a gain: d(x * rstd) = rstd * (g - y * mean(g * y)), with g and y still rotated.
            for out, g, y in ((grad[:, :, :heads], grad_query, query), (grad[:, :, heads:], grad_key, key)):
                mean = torch.linalg.vecdot(g, y).unsqueeze(-1).div_(size)
                out.copy_(torch.addcmul(g, y, mean, value=-1).transpose(1, 2))
        else:
            grad[:, :, :heads] = grad_query.transpose(1, 2)
            grad[:, :, heads:] = grad_key.transpose(1, 2)
        rotate_(grad, cos_sin, back=True)
        grad_q_gain = grad_k_gain = None
        if gained is not None:
            if any(ctx.needs_input_grad[6:8]):
                per_head = (grad * normed).sum((0, 1))
                grad_q_gain = per_head[:heads].sum(0).to(weight.dtype)
                grad_k_gain = per_head[heads:].sum(0).to(weight.dtype)
            grad.mul_(gained)
            mean = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(size)
            grad.addcmul_(normed, mean, value=-1)
        if rstd is not None:
            grad.mul_(rstd)
        grad_qkv[:, :, :both] = grad
        grad_qkv[:, :, both:] = grad_value.transpose(1, 2)
        grad_qkv = grad_qkv.view(x_NC.shape[0], -1)
        grad_x = matmul_nn(grad_qkv, weight).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        grad_weight = matmul_tn(grad_qkv, x_NC) if ctx.needs_input_grad[1] else None
        grad_bias = grad_qkv.sum(0) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, grad_q_gain, grad_k_gain, None


def qkv_rotary(
    x_BTC: Tensor, weight: Tensor, cos_sin: Tensor, *, heads: int, kv_heads: int, bias: Tensor | None = None,
    q_gain: Tensor | None = None, k_gain: Tensor | None = None, eps: float | None = None, whole: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Project hidden states to rotated queries and keys, and values: (B, H, T, D), (B, K, T, D), (B, K, T, D).

    weight ((H + 2K) D, C) stacks the three projections; within a head the rotated pairs are adjacent. `cos_sin`
    (T, D/2, 2) or (B, T, D/2, 2) is float32. With `eps` queries and keys are RMS-normalized before the rotation, times
    `q_gain` and `k_gain` if given: each head, with gains (D,), or with `whole` all heads at once, (H D,) and (K D,).
    """
    if by_hand(x_BTC) and torch.is_grad_enabled() and not whole:
        return _QKVRotary.apply(x_BTC, weight, bias, cos_sin, heads, kv_heads, q_gain, k_gain, eps)
    return qkv_rotary_reference(x_BTC, weight, cos_sin, heads, kv_heads, bias, q_gain, k_gain, eps, whole)


def qkv_rotary_reference(x_BTC, weight, cos_sin, heads, kv_heads, bias, q_gain, k_gain, eps, whole=False):
    """Compute `qkv_rotary` step by step."""
    qkv = linear(x_BTC, weight, bias).unflatten(-1, (heads + 2 * kv_heads, -1))
    query, key, value = qkv.split((heads, kv_heads, kv_heads), 2)
    if eps is not None and whole:
        query, key = (rms_norm(x.flatten(2), gain, eps).view_as(x) for x, gain in ((query, q_gain), (key, k_gain)))
    elif eps is not None:
        query, key = rms_norm_reference(query, q_gain, eps), rms_norm_reference(key, k_gain, eps)
    query, key = rotary(query, cos_sin), rotary(key, cos_sin)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _SwiGLUMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down):
        x_NC = x.reshape(-1, x.shape[-1])
        half = gate_up.shape[0] // 2
        gate, up = matmul_nt(x_NC, gate_up[:half]), matmul_nt(x_NC, gate_up[half:])
        activated = F.silu(gate)
        hidden = activated * up
        ctx.save_for_backward(x_NC, gate_up, down, gate, up, activated, hidden)
        return matmul_nt(hidden, down).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_NC, gate_up, down, gate, up, activated, hidden = ctx.saved_tensors
        need_x, need_gate_up, need_down = ctx.needs_input_grad
        grad_NC = grad.reshape(-1, grad.shape[-1])
        grad_down = matmul_tn(grad_NC, hidden) if need_down else None
        grad_hidden = matmul_nn(grad_NC, down)
        # One buffer for both, so that each of the two products below is a single one.
        grad_both = torch.empty((x_NC.shape[0], gate_up.shape[0]), dtype=grad.dtype)
        grad_gate, grad_up = grad_both.chunk(2, -1)
        torch.mul(grad_hidden, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
        grad_x = matmul_nn(grad_both, gate_up).view(*grad.shape[:-1], -1) if need_x else None
        return grad_x, matmul_tn(grad_both, x_NC) if need_gate_up else None, grad_down


VECTORS = 32  # numbers that torch activates at once: two vectors of AVX-512
ONE_THREAD = 16384  # numbers up to which torch computes GELU on one thread (SiLU: 32,768)
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def activate_rows(activate: Callable[[Tensor], Tensor], x_NF: Tensor) -> Tensor:
    """Apply `activate`, one of ACTIVATIONS, with the bits that each row has alone: float32 on CPU, (N, F) to (N, F).

    torch computes complete vectors, and the remaining elements by functions with other last bits: at the end of the
    contiguous rows, and at the end of each thread's share, wherever that is.
    """
    rows, width = x_NF.shape
    if width % VECTORS:
        x_NF = F.pad(x_NF, (0, -width % VECTORS))
    elif rows * width <= ONE_THREAD:
        return activate(x_NF)
    shares = x_NF.split(max(1, ONE_THREAD // x_NF.shape[1]))
    return torch.cat([activate(share) for share in shares])[:, :width].contiguous()


def feed_forward(
    x: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, *,
    activation: str = "silu", gated: bool = True,
) -> Tensor:  # fmt: skip
    """Compute down @ (activation(gate @ x) * (up @ x)): x (..., C), gate_up (2F, C) with the gate first, down (C, F).

    With "silu" it is SwiGLU (Shazeer 2020, arXiv:2002.05202). Without a gate it is down @ activation(up @ x), with
    gate_up (F, C). `activation` is "silu" or "gelu_tanh", the approximation of GELU by tanh (Hendrycks and Gimpel 2016,
    arXiv:1606.08415).
    """
    is_swiglu = activation == "silu" and gated and gate_up_bias is None and down_bias is None
    if is_swiglu and by_hand(x) and torch.is_grad_enabled():
        return _SwiGLUMLP.apply(x, gate_up, down)
    hidden = linear(x, gate_up, gate_up_bias)
    if gated:
        gate, up = hidden.chunk(2, -1)
        hidden = ACTIVATIONS[activation](gate) * up
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return linear(hidden, down, down_bias)
