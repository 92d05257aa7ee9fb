"""Row-wise Triton kernels, in the interpreter, against float64 and beside torch's own steps."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmkit.kernels.projections import qkv_rotary_reference
from llmkit.kernels.rowwise import rms_norm_reference, rotary_reference, swiglu_reference

from llmkit.kernels import add_rms_norm, fused_rowwise, qkv_rotary, rms_norm, swiglu

pytestmark = pytest.mark.usefixtures("interpreted")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 10_000 * seed))


def table(*shape):
    angles = normal(*shape)
    return torch.stack((angles.cos(), angles.sin()), -1)


def add_rms_norm_reference(x, residual, weight):
    return rms_norm_reference(x + residual, weight, EPS), x + residual


def values_and_gradients(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(
        outputs, [normal(*o.shape, seed=i + 1).bfloat16().to(o.dtype) for i, o in enumerate(outputs)]
    )
    return [*(x.detach() for x in outputs), *(x.grad for x in inputs)]


def check(function, reference, inputs, dtype, *, few=False):
    """Errors at most 1e-6 in float32 and at most torch's own in 16 bits.

    Of `few` numbers torch's own is luck, and gradients may cancel: their errors are held to the dtype's rounding.
    """
    inputs = [x.to(dtype) for x in inputs]
    ours, torchs = values_and_gradients(function, inputs), values_and_gradients(reference, inputs)
    exact = values_and_gradients(reference, [x.double() for x in inputs])
    for mine, theirs, wanted in zip(ours, torchs, exact, strict=True):
        assert mine.shape == wanted.shape and mine.dtype == dtype
        error, limit = ((x.double() - wanted).norm().item() for x in (mine, theirs))
        if few:
            limit = 2 * torch.finfo(dtype).eps * (wanted.norm().item() + 10 * wanted.numel() ** 0.5)
        elif dtype == torch.float32:
            limit = 1e-6 * wanted.norm().item()
        assert error <= 1.001 * limit  # the same roundings, not the same sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 64), (3, 21, 72), (130, 768)])
def test_rms_norm(dtype, shape):
    x, gain = normal(*shape), normal(shape[-1])
    check(lambda x, w: fused_rowwise.rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), [x, gain], dtype)
    check(lambda x: fused_rowwise.rms_norm(x, None, EPS), lambda x: rms_norm_reference(x, None, EPS), [x], dtype)
    both = [x, normal(*shape, seed=3), gain]
    check(lambda *i: fused_rowwise.add_rms_norm(*i, EPS), add_rms_norm_reference, both, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, 64, 128])
def test_rotary(dtype, size):
    x = normal(2, 9, 5, size)
    for cos_sin in (table(9, size // 2), table(2, 9, size // 2)):
        check(lambda x, t=cos_sin: fused_rowwise.rotary(x, t), lambda x, t=cos_sin: rotary_reference(x, t), [x], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 172, 1500])
def test_swiglu(dtype, size):
    check(fused_rowwise.swiglu, swiglu_reference, [normal(2, 17, 2 * size) * 3], dtype)


def test_inputs_may_lie_in_memory_as_they_like_and_every_number_is_written():
    x, gain = normal(40, 72), normal(72)
    odd = torch.stack((x, x), 1)[:, 1]
    columns = x.t().contiguous().t()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for function in (lambda x: rms(x, gain), fused_rowwise.swiglu):
            plain = values_and_gradients(function, [x])
            for strange in (odd, columns):
                assert all(map(torch.equal, values_and_gradients(function, [strange]), plain))
        heads, cos_sin = x.view(1, 10, 4, 72), table(10, 36)
        moved = heads.transpose(1, 2).contiguous().transpose(1, 2)
        plain = values_and_gradients(lambda x: fused_rowwise.rotary(x, cos_sin), [heads])
        assert all(map(torch.equal, values_and_gradients(lambda x: fused_rowwise.rotary(x, cos_sin), [moved]), plain))
        assert all(x.isfinite().all() for x in plain)
        expanded = x.clone().requires_grad_()
        rms(expanded, gain).sum().backward()  # a gradient of strides zero
        wanted = x.double().requires_grad_()
        rms_norm_reference(wanted, gain.double(), EPS).sum().backward()
        assert (expanded.grad - wanted.grad).norm() < 1e-6 * wanted.grad.norm()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def rms(x, gain):
    return fused_rowwise.rms_norm(x, gain, EPS)


def test_a_sum_whose_norm_alone_is_used_has_its_gradient():
    inputs = [normal(5, 32), normal(5, 32, seed=3), normal(32)]
    check(
        lambda *i: fused_rowwise.add_rms_norm(*i, EPS)[0], lambda *i: add_rms_norm_reference(*i)[0], inputs, DTYPES[0]
    )
    check(lambda *i: fused_rowwise.add_rms_norm(*i, EPS)[1], lambda *i: i[0] + i[1] + 0 * i[2].sum(), inputs, DTYPES[0])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(1, 80), size=st.integers(1, 150), dtype=st.sampled_from(DTYPES))
def test_any_shape(tokens, size, dtype):
    x, gain = normal(tokens, size) + 0.1, normal(size)
    both = [x, normal(tokens, size, seed=3) * 0.5, gain]
    check(lambda *i: fused_rowwise.add_rms_norm(*i, 1e-2), lambda x, r, w: (rms_norm_reference(x + r, w, 1e-2), x + r),
          both, dtype, few=True)  # fmt: skip
    check(fused_rowwise.swiglu, swiglu_reference, [normal(tokens, 2 * size)], dtype, few=True)


def test_the_dispatch_takes_those_on_its_list(monkeypatch):
    x, gain = normal(3, 4, 32), normal(32)
    weight, cos_sin = normal(4 * 16, 32), table(4, 8)

    def steps():
        return [rms_norm(x, gain, EPS), *add_rms_norm(x, x, gain, EPS), swiglu(x),
                *qkv_rotary_reference(x, weight, cos_sin, 2, 1, None, None, None, EPS)]  # fmt: skip

    from llmkit.kernels.dispatch import triton_module

    started = []
    module = triton_module("rowwise")
    original = module.launch
    monkeypatch.setattr(module, "launch", lambda k, *a, **d: started.append(k.__name__) or original(k, *a, **d))
    expected = steps()
    assert not started and not fused_rowwise.IN_USE
    monkeypatch.setattr(fused_rowwise, "IN_USE", frozenset({"add_rms_norm", "rms_norm", "rotary", "swiglu"}))
    for found, wanted in zip(steps(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert started == ["rms_norm_forward", "rms_norm_forward", "swiglu_forward", "rotary_turn", "rotary_turn"]
    with torch.no_grad():
        assert qkv_rotary(x, weight, cos_sin, heads=2, kv_heads=1)[0].shape == (3, 2, 4, 16)
    assert len(started) == 7


def test_torch_accepts_the_operators():
    x, gain = normal(6, 32).requires_grad_(), normal(32).requires_grad_()
    heads = normal(1, 3, 2, 16).requires_grad_()
    torch.library.opcheck(fused_rowwise._norm, (x, None, None, EPS))
    torch.library.opcheck(fused_rowwise._norm, (x, x.detach() * 2, gain, EPS))
    torch.library.opcheck(fused_rowwise._turn, (heads, table(3, 8), False))
    torch.library.opcheck(fused_rowwise._gate, (x,))


def test_compiled_they_are_the_same_and_another_length_is_no_other_graph():
    torch._dynamo.reset()
    cos_sin = table(70, 8)

    def step(x, gain):
        normed, total = fused_rowwise.add_rms_norm(x, x * 2, gain, EPS)
        turned = fused_rowwise.rotary(normed.view(1, -1, 2, 16), cos_sin[: x.shape[0]])
        return fused_rowwise.swiglu(turned.flatten(2)).sum() + total.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (20, 33, 70):
        inputs = normal(tokens, 32), normal(32)
        eager = values_and_gradients(step, inputs)
        with torch.compiler.set_stance("default" if tokens == 20 else "fail_on_recompile"):
            ours = values_and_gradients(compiled, inputs)
        assert all(map(torch.equal, ours, eager))
