"""Norms, projections with rotary embeddings, feed-forward and linear layers against plain formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from llmkit.kernels.linear import linear
from llmkit.kernels.projections import ACTIVATIONS, activate_rows, feed_forward, qkv_rotary, qkv_rotary_reference
from llmkit.kernels.rowwise import add_rms_norm, rms_norm, rms_norm_reference, rotary

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)


def values_and_gradients(function, inputs, dtype, seed=5):
    inputs = [None if x is None else x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(dtype) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    return [*outputs, *(x.grad for x in inputs if x is not None)]


def check(ours, reference, inputs, dtype):
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    for found, expected in zip(
        values_and_gradients(ours, inputs, dtype), values_and_gradients(reference, inputs, torch.float64), strict=True
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [True, False])
def test_rms_norm(dtype, gain):
    inputs = [normal(3, 7, 40), normal(40) if gain else None]
    check(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [True, False])
def test_add_rms_norm(dtype, gain):
    inputs = [normal(3, 7, 40), normal(3, 7, 40).flip(0), normal(40) if gain else None]

    def reference(x, residual, weight):
        return rms_norm_reference(x + residual, weight, 1e-6), x + residual

    check(lambda x, r, w: add_rms_norm(x, r, w, 1e-6), reference, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["none", "plain", "gains"])
@pytest.mark.parametrize("rows_differ", [True, False])
def test_qkv_rotary(dtype, bias, norm, rows_differ):
    batch, length, hidden, heads, kv_heads, size = 2, 7, 32, 4, 2, 8
    angles = normal(batch, length, size // 2) if rows_differ else normal(length, size // 2)
    table = torch.stack((angles.double().cos(), angles.double().sin()), -1)
    table = table if dtype == torch.float64 else table.float()
    rows = (heads + 2 * kv_heads) * size
    gains = [normal(size) if norm == "gains" else None] * 2
    inputs = [normal(batch, length, hidden), normal(rows, hidden), normal(rows) if bias else None, *gains]
    eps = None if norm == "none" else 1e-5

    def ours(x, w, b, q_gain, k_gain):
        return qkv_rotary(x, w, table, heads=heads, kv_heads=kv_heads, bias=b, q_gain=q_gain, k_gain=k_gain, eps=eps)

    def reference(x, w, b, q_gain, k_gain):
        return qkv_rotary_reference(x, w, table.double(), heads, kv_heads, b, q_gain, k_gain, eps)

    check(ours, reference, inputs, dtype)


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("rows_differ", [True, False])
def test_a_rotation_without_gradients_is_the_same(size, rows_differ):
    angles = normal(3, 7, size // 2) if rows_differ else normal(7, size // 2)
    table = torch.stack((angles.float().cos(), angles.float().sin()), -1)
    heads = normal(3, 7, 6, size).float()[:, :, 1:5]  # a slice of a larger projection
    with torch.no_grad():
        quick = rotary(heads, table)
    assert torch.equal(quick, rotary(heads, table))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    inputs = [normal(3, 5, 32), normal(48, 32), normal(32, 24)]

    def reference(x, gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    check(feed_forward, reference, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 32, 8), (3, 5, 8, 32), (1, 1, 16, 16)])
def test_linear(dtype, shape):
    batch, length, wide, narrow = shape
    check(linear, F.linear, [normal(batch, length, wide), normal(narrow, wide)], dtype)
    check(linear, F.linear, [normal(batch, length, wide), normal(narrow, wide), normal(narrow)], dtype)


def test_frozen_weights_zeros_and_empty_batches():
    assert linear(torch.empty(0, 8), normal(4, 8)).shape == (0, 4)
    zeros = torch.zeros(2, 8, requires_grad=True)
    rms_norm(zeros, None, 1e-6).sum().backward()
    assert zeros.grad.isfinite().all()
    x = normal(2, 3, 16).requires_grad_()
    gate_up, down = normal(24, 16), normal(16, 12)
    feed_forward(linear(x, normal(16, 16)), gate_up, down).sum().backward()
    assert x.grad is not None and gate_up.grad is None and down.grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [108, 1376])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_activation_has_the_bits_of_its_row_alone(activation, width, threads):
    torch.set_num_threads(threads)
    gate_NF = torch.randn(160, 2 * width, generator=torch.Generator().manual_seed(0)).mul(3).chunk(2, -1)[0]
    for x_NF in (gate_NF, gate_NF.contiguous()):  # interleaved with the gated values, and contiguous
        alone = torch.cat([activate_rows(ACTIVATIONS[activation], row) for row in x_NF.split(1)])
        for rows in range(2, 160, 5):
            assert torch.equal(activate_rows(ACTIVATIONS[activation], x_NF[:rows]), alone[:rows]), rows
        torch.testing.assert_close(alone, ACTIVATIONS[activation](x_NF))
