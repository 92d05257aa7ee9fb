"""RMSNorm with a residual, rotary embedding and SwiGLU, forward and backward: one pass over memory each.

Everything between a load and a store is float32, rounded once. A program takes ROWS whole rows.

N tokens, D the row's size, H heads, F intermediate size.
"""

import torch
import triton
import triton.language as tl
from llmkit.kernels.triton.launch import launch
from llmkit.kernels.triton.tiles import row_tiles
from torch import Tensor

PARTS = 512  # programs that add up a gain's gradient, several for each multiprocessor of any GPU


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_forward(
    x_ptr, residual_ptr, gain_ptr, y_ptr, total_ptr, rstd_ptr, stride_x, stride_residual, tokens, size, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    wide = row.to(tl.int64)[:, None]
    mask = (row[:, None] < tokens) & (column[None, :] < size)
    x = tl.load(x_ptr + wide * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + wide * stride_residual + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + wide * size + column[None, :], rounded, mask=mask)
        x = rounded.to(tl.float32)  # what is normed is what is handed on
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / size + eps)
    y = x * rstd[:, None]
    if gain_ptr is not None:
        y *= tl.load(gain_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + wide * size + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_backward(
    grad_ptr, grad_total_ptr, x_ptr, gain_ptr, rstd_ptr, grad_x_ptr, grad_gain_ptr, stride_grad, stride_grad_total,
    stride_x, tokens, size, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d(x * rstd) = rstd * (g - y * mean(g * y)), y = x * rstd. Writes the program's part of the gain's gradient."""
    column = tl.arange(0, BLOCK)
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    grad_gain = tl.zeros([BLOCK], tl.float32)
    for n0 in tl.range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = n0 + tl.arange(0, ROWS)
        wide = row.to(tl.int64)[:, None]
        mask = (row[:, None] < tokens) & (column[None, :] < size)
        rstd = tl.load(rstd_ptr + row, mask=row < tokens, other=0.0)
        x = tl.load(x_ptr + wide * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y = x * rstd[:, None]
        grad = tl.load(grad_ptr + wide * stride_grad + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if grad_gain_ptr is not None:
            grad_gain += tl.sum(grad * y, 0)
        grad *= gain[None, :]
        grad_x = (grad - y * (tl.sum(grad * y, 1) / size)[:, None]) * rstd[:, None]
        if grad_total_ptr is not None:
            pointer = grad_total_ptr + wide * stride_grad_total + column[None, :]
            grad_x += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + wide * size + column[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_gain_ptr is not None:
        tl.store(grad_gain_ptr + tl.program_id(0) * size + column, grad_gain, mask=column < size)


@triton.jit(do_not_specialize=["length", "heads"])
def rotary_turn(
    x_ptr, table_ptr, y_ptr, stride_b, stride_t, stride_h, stride_table, length, heads, size, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS heads of one token. Pairs (2i, 2i + 1) turn by the table's (cos, sin)."""
    token = tl.program_id(0)
    b, t = tl.cast(token // length, tl.int64), tl.cast(token % length, tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (head[:, None] < heads) & (column[None, :] < size)
    base = x_ptr + b * stride_b + t * stride_t
    x = tl.load(base + head[:, None] * stride_h + column[None, :], mask=mask, other=0.0).to(tl.float32)
    table = tl.load(table_ptr + b * stride_table + t * size + column, mask=column < size, other=0.0)
    cos, sin = tl.split(tl.reshape(table.to(tl.float32), [1, BLOCK // 2, 2]))
    if BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    y = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, BLOCK])
    out = y_ptr + (tl.cast(token, tl.int64) * heads + head[:, None]) * size + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def swiglu_forward(gate_up_ptr, out_ptr, stride, tokens, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row[:, None] < tokens) & (column[None, :] < size)
    pointer = gate_up_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    gate = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointer + size, mask=mask, other=0.0).to(tl.float32)
    out = gate * up / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * size + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def swiglu_backward(
    grad_ptr, gate_up_ptr, grad_gate_up_ptr, stride_grad, stride, tokens, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = row.to(tl.int64)[:, None]
    mask = (row[:, None] < tokens) & (column[None, :] < size)
    pointer = gate_up_ptr + wide * stride + column[None, :]
    gate = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointer + size, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + wide * stride_grad + column[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    out = grad_gate_up_ptr + wide * 2 * size + column[None, :]
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(out, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(out + size, (grad * silu).to(grad_gate_up_ptr.dtype.element_ty), mask=mask)


def norm(x: Tensor, residual: Tensor | None, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm(x + residual), the sum (empty without a residual), both (N, D), and 1 / rms (N,)."""
    tokens, size = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd = x.new_empty(tokens, dtype=torch.float32)
    chosen = row_tiles("rms_norm_forward", size)
    launch(
        rms_norm_forward, (triton.cdiv(tokens, chosen.rows),), x, residual, gain, y,
        total if residual is not None else None, rstd, x.stride(0), 0 if residual is None else residual.stride(0),
        tokens, size, eps, ROWS=chosen.rows, BLOCK=chosen.block, num_warps=chosen.num_warps,
    )  # fmt: skip
    return y, total, rstd


def norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, gain: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradient of what was normed (N, D), and that of the gain (D,)."""
    tokens, size = x.shape
    chosen = row_tiles("rms_norm_backward", size)
    parts = min(PARTS, triton.cdiv(tokens, chosen.rows))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_gain = None if gain is None else x.new_empty((parts, size), dtype=torch.float32)
    launch(
        rms_norm_backward, (parts,), grad, grad_total, x, gain, rstd, grad_x, grad_gain, grad.stride(0),
        0 if grad_total is None else grad_total.stride(0), x.stride(0), tokens, size, ROWS=chosen.rows,
        BLOCK=chosen.block, num_warps=chosen.num_warps,
    )  # fmt: skip
    return grad_x, None if grad_gain is None or gain is None else grad_gain.sum(0).to(gain.dtype)


def turn(x_BTHD: Tensor, cos_sin: Tensor, back: bool) -> Tensor:
    """x (B, T, H, D) turned by `cos_sin` (T, D/2, 2) or (B, T, D/2, 2), or turned back."""
    batch, length, heads, size = x_BTHD.shape
    chosen = row_tiles("rotary_turn", size)
    rows = min(chosen.rows, triton.next_power_of_2(heads))
    y = torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    launch(
        rotary_turn, (batch * length, triton.cdiv(heads, rows)), x_BTHD, cos_sin, y, *x_BTHD.stride()[:3],
        cos_sin.stride(0) if cos_sin.dim() == 4 else 0, length, heads, size, ROWS=rows, BLOCK=chosen.block, BACK=back,
        num_warps=max(1, min(8, rows * chosen.block // 512)),
    )  # fmt: skip
    return y


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (N, 2F) -> (N, F)."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    chosen = row_tiles("swiglu_forward", size)
    out = gate_up.new_empty(tokens, size)
    launch(
        swiglu_forward, (triton.cdiv(tokens, chosen.rows), triton.cdiv(size, chosen.block)), gate_up, out,
        gate_up.stride(0), tokens, size, ROWS=chosen.rows, BLOCK=chosen.block, num_warps=chosen.num_warps,
    )  # fmt: skip
    return out


def gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    tokens, size = grad.shape
    chosen = row_tiles("swiglu_backward", size)
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    launch(
        swiglu_backward, (triton.cdiv(tokens, chosen.rows), triton.cdiv(size, chosen.block)), grad, gate_up,
        grad_gate_up, grad.stride(0), gate_up.stride(0), tokens, size, ROWS=chosen.rows, BLOCK=chosen.block,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    return grad_gate_up
