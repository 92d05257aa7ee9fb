"""The Triton kernels of losses and log-probabilities in the interpreter, against float64: values and gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmkit.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from llmkit.kernels.dispatch import triton_module
from llmkit.kernels.logprobs import linear_logprobs, linear_logprobs_reference

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # numpy's warnings about the padding of a buffer, and about exp(-inf)
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def example(tokens, vocab, hidden=32, dtype=torch.float32, ignored=0.3, seed=0):
    """Return input and weight, rounded first so that only the kernels' error is measured, and the target."""
    generator = torch.Generator().manual_seed(seed + tokens + vocab)
    pairs = ((tokens, hidden), 1.0), ((vocab, hidden), 2 * hidden**-0.5)  # logits of about 2
    made = [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape, scale in pairs]
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    return made, target


def values_and_gradients(function, inputs, upstream=None):
    """Return outputs, then gradients of the inputs, for upstream gradients of all differentiable outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in outputs if x.requires_grad]
    if upstream is None:
        upstream = [torch.ones_like(x) for x in leaves]
    torch.autograd.backward(leaves, [u.to(x.dtype) for u, x in zip(upstream, leaves, strict=True)])
    return [*(x.detach() for x in outputs), *(x.grad for x in inputs)]


def errors(found, expected, values=0):
    """Return errors relative to the norm; those of the first `values`, in nats, relative to at least one nat.

    Below one nat the error is that of float32's sum of e^z, which is 1.
    """
    least = [x.numel() ** 0.5 if i < values else 1e-30 for i, x in enumerate(expected)]
    return [((x.double() - y.double()).norm() / max(y.double().norm(), floor)).item()
            for x, y, floor in zip(found, expected, least, strict=True)]  # fmt: skip


def assert_as_good_as_torch(ours, torchs, exact, values):
    """Compare our errors with torch's and return the ratios.

    Both round to 16 bits at the same points, but after different sums. A tie rounded the other way changes the error of
    an example by up to a tenth, but not the mean over examples, which a test below checks.
    """
    for mine, wanted in zip(ours, exact, strict=True):
        assert mine.shape == wanted.shape and mine.isfinite().all()
        assert wanted.any() or not mine.any()
    pairs = list(zip(errors(ours, exact, values), errors(torchs, exact, values), strict=True))
    factor = 1.02 if ours[-1].dtype == torch.float32 else 1.15
    assert all(error <= factor * its_error + 1e-6 for error, its_error in pairs), pairs
    return [error / max(its_error, 1e-30) for error, its_error in pairs]


def check_loss(tokens, vocab, dtype=torch.float32, *, hidden=32, ignored=0.3, reduction="mean", chunk_tokens=64,
               seed=0):  # fmt: skip
    inputs, target = example(tokens, vocab, hidden, dtype, ignored, seed)

    def ours(x, w):
        return linear_cross_entropy(x, w, target, reduction=reduction, chunk_tokens=chunk_tokens)

    def reference(x, w):
        return linear_cross_entropy_reference(x, w, target, reduction=reduction)

    found = values_and_gradients(ours, inputs)
    assert found[0].dtype == torch.float32 and all(x.dtype == dtype for x in found[1:])
    expected = values_and_gradients(reference, [x.double() for x in inputs])
    return assert_as_good_as_torch(found, values_and_gradients(reference, inputs), expected, 1)


def check_logprobs(tokens, vocab, dtype=torch.float32, *, hidden=32, ignored=0.3, entropy=True, **options):
    inputs, target = example(tokens, vocab, hidden, dtype, ignored)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(tokens, generator=generator) for _ in range(1 + entropy)]

    def reference(*x):
        return linear_logprobs_reference(*x, target, **options)[: 1 + entropy]

    found = values_and_gradients(
        lambda *x: linear_logprobs(*x, target, return_entropy=entropy, **options), inputs, upstream
    )
    assert found[0].dtype == torch.float32 and all(x.dtype == dtype for x in found[1 + entropy :])
    expected = values_and_gradients(reference, [x.double() for x in inputs], upstream)
    assert_as_good_as_torch(found, values_and_gradients(reference, inputs, upstream), expected, 1 + entropy)


COUNTS = [(tokens, 123, torch.float32, {"ignored": part}) for tokens in (1, 63, 64, 128) for part in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype", "options"),
    [
        *((65, vocab, dtype, {}) for vocab in (123, 507, 2048) for dtype in DTYPES),
        *((100, 123, dtype, {"reduction": reduction}) for dtype in DTYPES for reduction in ("mean", "sum")),
        *COUNTS,
    ],
)
def test_loss_and_gradients(tokens, vocab, dtype, options):
    check_loss(tokens, vocab, dtype, **options)


@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype", "options"),
    [
        *((65, vocab, dtype, {}) for vocab in (123, 507, 2048) for dtype in DTYPES),
        *((*count, {**options, "entropy": False}) for *count, options in COUNTS),
        *(
            (40, 300, dtype, {"hidden": hidden, "temperature": temperature})
            for dtype in DTYPES for hidden in (48, 72, 160) for temperature in (0.6, 1.7)
        ),
    ],
)  # fmt: skip
def test_logprobs_and_gradients(tokens, vocab, dtype, options):
    check_logprobs(tokens, vocab, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_over_many_examples_16_bits_cost_no_more_than_they_cost_torch(dtype):
    ratios = [check_loss(24, 60, dtype, seed=1000 * n)[1:] for n in range(16)]
    assert torch.tensor(ratios).log().mean(0).exp().max() < 1.005


def test_every_number_of_the_results_is_written():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
        check_loss(70, 123)
        check_loss(70, 123, ignored=1.0)
        check_logprobs(70, 523)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def test_inputs_may_lie_in_memory_as_they_like():
    (x, w), target = example(50, 123)
    strange = [x.t().contiguous().t(), torch.stack((w, w), 1)[:, 0], torch.stack((target, target), 1)[:, 1]]
    assert not any(t.is_contiguous() for t in strange)

    def both(x, w, target):
        loss = linear_cross_entropy(x, w, target)
        logprobs, entropy = linear_logprobs(x, w, target, return_entropy=True)
        # upstream gradients are expanded scalars
        return values_and_gradients(lambda *_: loss + 2 * logprobs.sum() - entropy.sum(), [])

    plain, odd = [[t.clone().requires_grad_() for t in (x, w)], target], [strange[:2], strange[2]]
    odd[0] = [t.detach().requires_grad_() for t in odd[0]]
    for inputs, labels in (plain, odd):
        both(*inputs, labels)
    for mine, theirs in zip(odd[0], plain[0], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_common_offset_of_thousands_changes_no_loss(dtype):
    (x, w), target = example(40, 123, dtype=dtype)
    for offset in (-3e4, 3e4):
        x[:, -1], w[:, -1] = 1, offset
        found = values_and_gradients(lambda x, w: linear_logprobs(x, w, target), (x, w))
        reference = lambda x, w: linear_logprobs_reference(x, w, target)[0]  # noqa: E731
        theirs = values_and_gradients(reference, (x, w))
        exact = values_and_gradients(reference, (x.double(), w.double()))
        for mine, limit in zip(errors(found, exact), errors(theirs, exact), strict=True):
            assert mine <= 1.5 * limit + 1e-6  # the products are rounded differently


def test_a_sure_prediction_has_an_exact_small_loss():
    weight = torch.eye(16)
    x = torch.eye(16)[:5] * 15
    expected = linear_cross_entropy_reference(x.double(), weight.double(), torch.arange(5))
    assert expected < 1e-5
    for found in (
        linear_cross_entropy(x, weight, torch.arange(5)),
        -linear_logprobs(x, weight, torch.arange(5)).mean(),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0)  # 1 + 5e-6 has 6 bits of the 5e-6


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_gradient_of_a_sure_token_is_as_good_as_torchs(dtype):
    """p - 1 is exact only if p and the sum of all p come from the same rounded logits."""
    (x, w), target = example(40, 300, dtype=dtype, ignored=0.0)
    x = (x.float() / 2 + 8 * w[target].float()).to(dtype)
    found, theirs, exact = (
        values_and_gradients(lambda x, w, function=function: function(x, w, target), [x.to(d), w.to(d)])
        for function, d in (
            (linear_logprobs, dtype),
            (lambda *i: linear_logprobs_reference(*i)[0], dtype),
            (lambda *i: linear_logprobs_reference(*i)[0], torch.float64),
        )
    )
    assert exact[0].exp().median() > 0.999
    assert_as_good_as_torch(found[1:], theirs[1:], exact[1:], 0)


@pytest.mark.parametrize("wrong", [-1, 123, 10**9])
def test_a_target_outside_of_the_vocabulary_gives_nan(wrong):
    (x, w), target = example(20, 123, ignored=0.0)
    target[3] = wrong
    assert linear_cross_entropy(x, w, target).isnan()
    assert linear_logprobs(x, w, target).isnan().nonzero().tolist() == [[3]]


def test_a_row_has_the_same_bits_in_any_batch():
    (x, w), target = example(100, 600, hidden=80, ignored=0.0)
    together, entropy = linear_logprobs(x, w, target, return_entropy=True)
    for rows in (slice(0, 1), slice(0, 40), slice(64, 100)):  # numpy's product depends on the position in a tile
        alone = linear_logprobs(x[rows], w, target[rows], return_entropy=True)
        assert torch.equal(alone[0], together[rows]) and torch.equal(alone[1], entropy[rows])


def test_float16_gradients_of_a_mean_survive_a_loss_scale():
    (x, w), target = example(256, 50, hidden=16, dtype=torch.float16, ignored=0.0)
    w *= 1e-3

    def gradient(x, function, scale):
        x = x.detach().requires_grad_()
        (function(x) * scale).backward()
        return x.grad.double() / scale

    function = lambda x: linear_cross_entropy(x, w.to(x.dtype), target)  # noqa: E731
    exact = gradient(x.double(), lambda x: linear_cross_entropy_reference(x, w.double(), target), 1.0)
    assert errors([gradient(x, function, 65536.0)], [exact])[0] < 2e-3
    assert errors([gradient(x, function, 1.0)], [exact])[0] > 2e-3  # the reason for loss scaling


def test_the_kernels_are_what_ran(monkeypatch):
    started = []
    for name in ("cross_entropy", "logprobs"):
        module = triton_module(name)
        original = module.launch
        monkeypatch.setattr(
            module, "launch", lambda k, *a, original=original, **d: started.append(k.__name__) or original(k, *a, **d)
        )
    (x, w), target = example(20, 50)
    linear_cross_entropy(x, w, target)
    linear_logprobs(x, w, target)
    assert started == ["cross_entropy", "linear_logsumexp", "merge_splits"]
    linear_cross_entropy(x.double(), w.double(), target)
    assert len(started) == 3


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    (x, w), target = example(100, 123)
    held = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **d: held.append(d["out"].shape) or original(a, b, **d))
    values_and_gradients(lambda *i: linear_cross_entropy(*i, target, chunk_tokens=32), (x, w))
    assert [tuple(s) for s in held] == [(rows, width) for rows in (32, 32, 32, 4) for width in (123, 32)]
    held.clear()
    with torch.no_grad():
        linear_logprobs(x, w, target)
    assert not held


problems = {
    "tokens": st.integers(1, 70),
    "vocab": st.integers(1, 300),
    "dtype": st.sampled_from(DTYPES),
    "ignored": st.sampled_from([0.0, 0.3, 1.0]),
}
losses = {
    "reduction": st.sampled_from(["mean", "sum"]),
    "chunk_tokens": st.integers(1, 80),
}
logprobs = {"temperature": st.floats(0.2, 3.0), "entropy": st.booleans()}
quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=15, **quiet)
@given(**problems, **losses)
def test_any_loss(chunk_tokens, **problem):
    check_loss(chunk_tokens=max(chunk_tokens, 10), hidden=16, **problem)


@settings(max_examples=15, **quiet)
@given(**problems, **logprobs)
def test_any_logprobs(**problem):
    check_logprobs(hidden=16, **problem)


@pytest.mark.slow
@settings(max_examples=300, **quiet)
@given(**problems, **losses)
def test_any_loss_at_length(**problem):
    check_loss(hidden=16, **problem)


@pytest.mark.slow
@settings(max_examples=300, **quiet)
@given(**problems, **logprobs)
def test_any_logprobs_at_length(**problem):
    check_logprobs(hidden=16, **problem)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [123, 507, 2048])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 257])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_every_shape(dtype, vocab, tokens, ignored):
    check_loss(tokens, vocab, dtype, ignored=ignored)
    check_logprobs(tokens, vocab, dtype, ignored=ignored, temperature=0.8)
