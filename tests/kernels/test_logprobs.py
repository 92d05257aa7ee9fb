"""Log-probabilities and entropies on CPU against torch's in float64."""

import pytest
import torch
from llmkit.kernels.logprobs import linear_logprobs, linear_logprobs_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def example(dtype, tokens=90, hidden=24, vocab=123):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[::4] = -100
    return x, weight, target


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.4, "softcap": 2.0}])
def test_values_and_gradients_match_torch(dtype, entropy, options):
    x, weight, target = example(dtype)
    exact, ours = [[t.to(d).requires_grad_() for t in (x, weight)] for d in (torch.float64, dtype)]
    expected = linear_logprobs_reference(*exact, target, **options)[: 1 + entropy]
    found = linear_logprobs(*ours, target, return_entropy=entropy, **options)
    found = found if entropy else (found,)
    upstream = [torch.randn(90) for _ in expected]
    for outputs in (expected, found):
        torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    pairs = [*zip(found, expected, strict=True), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for mine, wanted in pairs:
        assert (mine.double() - wanted).norm() < TOLERANCE[dtype] * wanted.norm()
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(not x[::4].any() for x in (*found, ours[0].grad))


def test_each_output_may_be_differentiated_alone():
    x, weight, target = example(torch.float64)
    x.requires_grad_()
    logprobs, entropy = linear_logprobs(x, weight, target, return_entropy=True)
    wanted = linear_logprobs_reference(x, weight, target)
    for mine, theirs in ((logprobs, wanted[0]), (entropy, wanted[1])):
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (mine, theirs)))


def test_it_is_the_loss_with_the_sign_turned_and_any_shape():
    x, weight, target = example(torch.float32)
    flat = linear_logprobs(x, weight, target)
    assert torch.equal(linear_logprobs(x.view(3, 30, -1), weight, target.view(3, 30)).flatten(), flat)
    assert linear_logprobs(x[:0], weight, target[:0]).shape == (0,)


def test_user_errors_are_named():
    x, weight, target = example(torch.float32)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(x, weight, target, temperature=0.0)
    with pytest.raises(IndexError, match="target 123 is out of bounds with 123 classes"):
        linear_logprobs(x, weight, target.masked_fill(target == target[1], 123))
