"""Losses and log-probabilities as torch operators: contracts with autograd, tracing and the compiler."""

import pytest
import torch
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.logprobs import linear_logprobs

from llmkit.kernels import cross_entropy
from llmkit.kernels import logprobs as logprobs_module

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["torch", "interpret"])
def kernels(request, monkeypatch):
    if request.param == "interpret":
        request.getfixturevalue("interpreted")
    monkeypatch.setenv("LLMKIT_KERNELS", request.param)


def example(tokens=20, vocab=37, hidden=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, hidden), (vocab, hidden)
    made = [torch.randn(s, generator=generator, dtype=dtype) * 0.5 for s in shapes]
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[1::4] = -100
    return [x.requires_grad_() for x in made], target


def test_torch_accepts_the_loss(kernels):
    (x, w), target = example()
    for weight, needs in ((w, (True, True)), (w.detach(), (True, False))):
        torch.library.opcheck(cross_entropy._loss_and_gradients, (x, weight, target, "mean", -100, 8, 2.0, *needs))


@pytest.mark.parametrize("entropy", [True, False])
def test_torch_accepts_the_logprobs(kernels, entropy):
    (x, w), target = example()
    options = 0.8, -100, 8, 2.0
    torch.library.opcheck(logprobs_module._logprobs, (x, w, target, *options, entropy))
    grads = torch.randn(20), torch.randn(20) if entropy else None
    torch.library.opcheck(
        logprobs_module._gradients_in_a_graph, (*grads, x.detach(), w.detach(), target, *options, True, True)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradients_of_the_loss_are_those_of_its_values(reduction):
    inputs, target = example(5, 7, 3, torch.float64)
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction, chunk_tokens=3), tuple(inputs)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradients_of_the_logprobs_are_those_of_their_values(temperature):
    (x, w), target = example(5, 7, 3, torch.float64)
    torch.autograd.gradcheck(
        lambda x, w: linear_logprobs(x, w, target, temperature=temperature, return_entropy=True), (x, w)
    )


def loss(x, w, target):
    return linear_cross_entropy(x, w, target, chunk_tokens=8)


def logprobs(x, w, target):
    values, entropy = linear_logprobs(x, w, target, temperature=0.9, return_entropy=True)
    return values.sum() + 0.1 * entropy.sum()


@pytest.mark.parametrize("function", [loss, logprobs])
def test_compilation_gives_the_same_result_without_recompiling_for_another_length(kernels, function):
    torch._dynamo.reset()
    operators = []
    inner = torch._dynamo.lookup_backend("aot_eager")

    def noting(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return inner(graph, inputs)

    compiled = torch.compile(function, backend=noting, fullgraph=True, dynamic=True)
    for tokens in (20, 33, 70):
        results = []
        for step in (function, compiled):
            inputs, target = example(tokens)
            with torch.compiler.set_stance("default" if tokens == 20 else "fail_on_recompile"):
                value = step(*inputs, target)
                value.backward()
            results.append([value.detach(), *(x.grad for x in inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any("llmkit" in name for name in operators), operators
