"""The fused loss against torch's in float64: values, gradients, ignored tokens, memory."""

import pytest
import torch
from llmkit.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

from llmkit.kernels import logit_chunks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def example(dtype, tokens=300, hidden=24, vocab=123, ignored=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) * 0.5).to(dtype)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    return x, weight, target


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize(("chunk_tokens", "softcap"), [("auto", None), (64, None), (64, 2.0)])
def test_loss_and_gradients_match_torch(dtype, reduction, ignored, chunk_tokens, softcap):
    x, weight, target = example(dtype, ignored=ignored)
    exact = [x.double().clone().requires_grad_(), weight.double().clone().requires_grad_()]
    expected = linear_cross_entropy_reference(*exact, target, reduction=reduction, softcap=softcap)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(upstream)
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = linear_cross_entropy(*ours, target, reduction=reduction, chunk_tokens=chunk_tokens, softcap=softcap)
    found.backward(upstream.to(found.dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(found, expected) < TOLERANCE[dtype]
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, theirs.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_ignored_tokens_has_no_loss_and_no_gradient(reduction):
    x, weight, _ = example(torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.full((300,), -100), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and x.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_ignored_tokens_get_no_gradient_even_when_their_hidden_state_is_not_a_number():
    x, weight, target = example(torch.float32, ignored=0.5)
    x[target == -100] = torch.nan
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, target)
    loss.backward()
    assert loss.isfinite() and x.grad[target == -100].abs().max() == 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_of_vanishing_probability_has_a_finite_exact_loss(dtype):
    x, weight, target = example(dtype)
    x[7] *= 200
    target[7] = (x[7].double() @ weight.double().t()).argmin()
    expected = linear_cross_entropy_reference(x.double(), weight.double(), target, reduction="sum")
    found = linear_cross_entropy(x.requires_grad_(), weight, target, reduction="sum")
    found.backward()
    assert expected > 500 and relative_error(found, expected) < TOLERANCE[dtype]
    assert x.grad.isfinite().all()


def test_values_do_not_depend_on_which_inputs_need_gradients():
    x, weight, target = example(torch.float32, ignored=0.2)
    alone = linear_cross_entropy(x, weight, target)
    weight.requires_grad_()
    linear_cross_entropy(x, weight, target).backward()
    of_weight, weight.grad = weight.grad, None
    loss = linear_cross_entropy(x.requires_grad_(), weight, target)
    loss.backward()
    assert torch.allclose(alone, loss, rtol=1e-6) and torch.equal(weight.grad, of_weight) and x.grad is not None


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    x, weight, target = example(torch.float32, tokens=1000)
    rows = []
    original = logit_chunks.matmul_nt
    monkeypatch.setattr(logit_chunks, "matmul_nt", lambda a, b: rows.append(a.shape[0]) or original(a, b))
    linear_cross_entropy(x.requires_grad_(), weight, target, chunk_tokens=128)
    assert max(rows) == 128 and sum(rows) == 1000


def test_the_shape_of_the_batch_does_not_matter():
    x, weight, target = example(torch.float32)
    flat = linear_cross_entropy(x, weight, target)
    assert torch.equal(linear_cross_entropy(x.view(3, 100, -1), weight, target.view(3, 100)), flat)


def test_probabilities_too_small_for_float16_have_an_exact_loss():
    x, weight, target = example(torch.float16)
    x *= 3
    expected = linear_cross_entropy_reference(x.double(), weight.double(), target, reduction="sum")
    found = linear_cross_entropy(x.requires_grad_(), weight, target, reduction="sum")
    assert expected > 15 * len(target) and relative_error(found, expected) < 1e-4


def test_an_error_in_the_options_is_named():
    x, weight, target = example(torch.float32)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, weight, target, reduction="none")
    for wrong in (-1, 123):
        target[5] = wrong
        with pytest.raises(IndexError, match=f"target {wrong} is out of bounds with 123 classes"):
            linear_cross_entropy(x, weight, target)
