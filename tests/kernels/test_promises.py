"""Guarantees of the kernels for any input: unsupported strides, shapes, dtypes and derivatives."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from llmkit.kernels.attention import Packing, attention_decode, scaled_dot_product_attention
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.dispatch import triton_module
from llmkit.kernels.linear import linear
from llmkit.kernels.logprobs import linear_logprobs
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.kernels import logit_chunks

HEADS = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
HIDDEN, WEIGHT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([1, 2, 0, 4, 3])
CAUSAL = partial(scaled_dot_product_attention, is_causal=True)
OPERATIONS = {
    "attention": (CAUSAL, HEADS, HEADS, HEADS),
    "block attention": (CAUSAL, *[HEADS.bfloat16()] * 3),
    "loss": (partial(linear_cross_entropy, target=TARGET), HIDDEN, WEIGHT),
    "log-probabilities": (partial(linear_logprobs, target=TARGET), HIDDEN, WEIGHT),
    "linear": (linear, HIDDEN, WEIGHT),
}


@pytest.fixture(params=["torch", "interpret"])
def kernels(request, monkeypatch):
    if request.param == "interpret":
        request.getfixturevalue("interpreted")
    monkeypatch.setenv("LLMKIT_KERNELS", request.param)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_second_derivative_is_refused(kernels, name):
    function, x, *others = OPERATIONS[name]
    x = x.clone().requires_grad_()
    with pytest.raises((NotImplementedError, RuntimeError), match="derivative"):
        (gradient,) = torch.autograd.grad(function(x, *others).sum(), x, create_graph=True)
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_is_refused(kernels, name, gradients):
    function, x, *others = OPERATIONS[name]
    refused = pytest.raises(NotImplementedError, match="forward")
    with refused, forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        function(forward_ad.make_dual(x, torch.ones_like(x)), *others)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CAUSAL(HEADS, HEADS.half(), HEADS), "query float32, key float16, value float32"),
        (lambda: attention_decode(HEADS.half(), HEADS, HEADS, torch.tensor([6])), "query float16, key_cache float32"),
        (lambda: linear_cross_entropy(HIDDEN.bfloat16(), WEIGHT, TARGET), "input bfloat16, linear_weight float32"),
        (lambda: linear_logprobs(HIDDEN.bfloat16(), WEIGHT, TARGET), "input bfloat16, linear_weight float32"),
    ],
)
def test_several_dtypes_are_refused_by_name(kernels, call, message):
    with pytest.raises(TypeError, match=f"expected tensors of one dtype, found {message}"):
        call()


@pytest.mark.parametrize("name", ["attention", "loss", "log-probabilities"])
def test_autocast_gives_what_its_dtype_gives(kernels, name):
    function, x, *others = OPERATIONS[name]
    half, x = x.bfloat16().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = function(x, *others)
    wanted = function(half, *(other.bfloat16() for other in others))
    assert torch.equal(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, half.grad.float())


@pytest.mark.parametrize("shape", [(1, 5), (1, 7), (2, 6), (6,)])
@pytest.mark.parametrize("packed", [Packing, torch.Tensor.clone])
def test_documents_of_another_shape_are_refused(kernels, shape, packed):
    if len(shape) == 1 and packed is Packing:
        pytest.skip("refused when it is made")
    with pytest.raises(ValueError, match=r"doc_ids: expected shape \(1, 6\)"):
        CAUSAL(HEADS, HEADS, HEADS, doc_ids=packed(torch.zeros(shape, dtype=torch.long)))


@torch.no_grad()
def test_lengths_may_lie_in_memory_as_they_like(interpreted):
    heads = HEADS.expand(3, 2, 6, 16)
    query, column = heads[:, :, :1], torch.tensor([[2, 9], [5, 9], [6, 9]])[:, 0]
    for lengths in (column, torch.tensor(4).expand(3)):
        found = attention_decode(query, heads, heads, lengths)
        assert torch.equal(found, attention_decode(query, heads, heads, lengths.clone()))


def test_a_grid_of_decoding_ends_at_two_billions_of_rows(interpreted, monkeypatch):
    """CUDA limits the second and third dimension of a grid to 65,535."""
    grids = []
    monkeypatch.setattr(triton_module("decode"), "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    query, cache = torch.empty(40_000, 2, 1, 16), torch.empty(1, 2, 300, 16).expand(40_000, 2, 300, 16)
    attention_decode(query, cache, cache, torch.ones(40_000, dtype=torch.long))
    assert len(grids) == 2 and all(side <= 65_535 for grid in grids for side in grid[1:])
    assert [torch.tensor(grid).prod().item() for grid in grids] == [80_000 * 3, 80_000]


def test_the_order_of_a_sum_over_splits_does_not_depend_on_the_capacity(interpreted, monkeypatch):
    kernel_options = []
    monkeypatch.setattr(triton_module("decode"), "launch", lambda *_, **options: kernel_options.append(options))
    for capacity in (300, 3000):
        cache = torch.empty(1, 2, capacity, 16)
        attention_decode(HEADS[:, :, :1], cache, cache, torch.tensor([300]))
    assert kernel_options[1]["BLOCK_S"] == kernel_options[3]["BLOCK_S"]


@pytest.mark.parametrize("wrong", [-1, 5, 10**9])
def test_on_a_gpu_torchs_path_gives_nan_for_a_target_outside_of_the_vocabulary(wrong):
    """An index beyond the logits would make the GPU unusable for the process. Here the path runs on a CPU."""
    target = TARGET.clone()
    target[1] = wrong
    rows, gradient = logit_chunks.loss_and_gradient_reference(
        HIDDEN @ WEIGHT.T, target, logit_chunks.Objective(), None, None, True
    )
    assert rows.loss.isnan().nonzero().tolist() == [[1]] and gradient.isfinite().all()


def test_the_gradient_of_a_transposed_weight_is_as_the_operator_promises(monkeypatch):
    """Row-major, like its fake. Only cuBLAS accumulates into float32, so the tensors have no memory here."""
    monkeypatch.setattr(logit_chunks, "_adds_in_float32", lambda *_: True)
    weight = torch.empty(16, 5, dtype=torch.bfloat16, device="meta").t()
    logits, hidden = weight.new_empty(4, 5), weight.new_empty(4, 16)
    chunks = logit_chunks._Chunks(hidden, weight, logit_chunks.Objective(), 4)
    assert chunks._sum_of_products(None, logits, hidden).is_contiguous()


def test_layers_compiled_one_by_one_are_given_the_bounds_of_documents(interpreted, monkeypatch):
    torch._dynamo.reset()
    graphs = []
    noting = partial(torch.compile, backend=lambda graph, _: graphs.append(graph.code) or graph)
    model = make_model(layer_windows=(None, 5))
    ids = torch.arange(20).view(2, 10)
    documents = ids // 4
    expected = model(ids, doc_ids=documents)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", noting)
        model.compile_layers()
    torch.testing.assert_close(model(ids, doc_ids=documents), expected)
    assert len(graphs) == 2 and not any("searchsorted" in code for code in graphs)


def test_eager_calls_pass_the_dispatcher_by_and_traces_see_the_operators(interpreted):
    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(str(operator))
            return operator(*arguments, **(options or {}))

    query, hidden = HEADS.clone().requires_grad_(), HIDDEN.clone().requires_grad_()

    def run():
        CAUSAL(query, HEADS, HEADS).sum().backward()
        linear_cross_entropy(hidden, WEIGHT, TARGET).backward()
        linear_logprobs(hidden, WEIGHT, TARGET).sum().backward()
        with torch.no_grad():
            attention_decode(HEADS[:, :, :1], HEADS, HEADS, torch.tensor([6]))

    seen = []
    with Noting():
        run()
    assert {name for name in seen if "llmkit" in name} == {
        f"llmkit.{name}.default"
        for name in ("attention", "attention_backward", "attention_decode", "linear_cross_entropy", "linear_logprobs",
                     "linear_logprobs_backward")
    }  # fmt: skip
    with torch.profiler.profile() as profile:
        run()
    assert not [event.name for event in profile.events() if "llmkit" in event.name]


def test_tiles_are_looked_up_once(interpreted, monkeypatch):
    tiles = triton_module("tiles")
    first = tiles.tiles("attention_forward", 64, torch.float32)
    monkeypatch.setattr(tiles, "Tiles", None)
    assert tiles.tiles("attention_forward", 64, torch.float32) is first
