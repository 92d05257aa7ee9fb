"""The Triton kernels of attention in the interpreter, against float64: values, gradients and every kind of mask."""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmkit.kernels.attention import Packing, attention_mask, attention_reference, scaled_dot_product_attention

from llmkit.kernels import fused_attention

pytestmark = pytest.mark.usefixtures("interpreted")
HALF = [torch.float16, torch.bfloat16]


def example(length, heads=(2, 1), size=32, *, keys=None, batch=1, dtype=torch.float32, seed=0):
    """Return query, key, value and the output gradient, rounded first so that only the kernels' error is measured."""
    generator = torch.Generator().manual_seed(seed + length)
    shapes = [(batch, heads[0], length, size)] + [(batch, heads[1], keys or length, size)] * 2
    made = [torch.randn(s, generator=generator).to(dtype) for s in (*shapes, shapes[0])]
    return made[:3], made[3]


def values_and_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def exact(inputs, grad, *, is_causal=True, doc_ids=None, window=None, scale=None):
    length, keys, size = inputs[0].shape[2], inputs[1].shape[2], inputs[0].shape[-1]
    doc_ids = doc_ids.doc_ids if isinstance(doc_ids, Packing) else doc_ids
    mask = attention_mask(length, keys, doc_ids, window) if is_causal else None
    reference = partial(attention_reference, scale=scale or size**-0.5, mask=mask)
    return values_and_gradients(reference, [x.double() for x in inputs], grad)


def errors(found, expected):
    """Return the errors of outputs and gradients, relative to their norms.

    If every query sees a single key, queries and keys have zero gradients: their errors are then relative to the
    gradient of the values, the last one.
    """
    least = expected[-1].norm().item()
    return [(x.double() - y).norm().item() / max(y.norm().item(), least) for x, y in zip(found, expected, strict=True)]


def on_device(options):
    """Move options to the device; test parameters are created before the device is known."""
    device = torch.get_default_device()
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def check(length, heads=(2, 1), size=32, *, keys=None, batch=1, dtype=torch.float32, seed=0, **options):
    inputs, grad = example(length, heads, size, keys=keys, batch=batch, dtype=dtype, seed=seed)
    options = {"is_causal": True, **on_device(options)}
    expected = exact(inputs, grad, **options)
    found = values_and_gradients(
        lambda *x: scaled_dot_product_attention(*x, enable_gqa=True, **options), inputs, grad
    )  # fmt: skip
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(x.dtype == dtype for x in found)
    bound = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    assert max(errors(found, expected)) < bound
    return inputs, grad, found, expected


def documents(length, size, batch=1):
    return (torch.arange(length) // size).expand(batch, length)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        *((length, {}) for length in (1, 63, 64, 65, 100, 127, 129, 256)),
        *((70, {"heads": (1, 1), "size": size}) for size in (8, 24, 32, 64, 96, 128, 256)),
        *((65, {"heads": heads, "batch": 2}) for heads in ((1, 1), (4, 2), (4, 1), (8, 1))),
        *((129, {"window": window}) for window in (1, 48, 1000)),
        *((129, {"window": window, "doc_ids": documents(129, 50)}) for window in (1, 48, 1000)),
        *((130, {"doc_ids": documents(130, size)}) for size in (1, 2, 64, 100)),
        *((70, {"keys": keys, "is_causal": False}) for keys in (1, 64, 130)),
    ],
)
def test_any_length_head_and_mask(length, options):
    check(length, **options)


def test_rows_with_documents_of_their_own():
    ids = torch.zeros(3, 100, dtype=torch.long)
    ids[0, 10:], ids[1, 99:], ids[2, 64:] = 1, 1, 1
    check(100, batch=3, doc_ids=ids)
    check(100, batch=3, doc_ids=Packing(ids), window=30)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("length", "heads", "size", "options"),
    [
        (129, (2, 1), 64, {}),
        (100, (2, 2), 32, {"doc_ids": documents(100, 30, 2)}),
        (127, (2, 1), 128, {"window": 48}),
    ],
)
def test_half_precision_is_as_exact_as_torch(dtype, length, heads, size, options):
    inputs, grad, found, expected = check(length, heads, size, batch=2, dtype=dtype, **options)
    mask = attention_mask(length, length, on_device(options).get("doc_ids"), options.get("window"))
    torchs = values_and_gradients(
        lambda *x: F.scaled_dot_product_attention(*x, mask, enable_gqa=True), inputs, grad
    )  # fmt: skip
    ours, theirs = errors(found, expected), errors(torchs, expected)
    # rounding may push a single error above, but not their sum
    assert sum(ours) <= sum(theirs)
    assert all(mine <= 1.05 * other for mine, other in zip(ours, theirs, strict=True))


def test_tensors_lie_in_memory_as_they_like():
    (query, key, value), grad = example(70, (2, 2))
    expected = exact((query, key, value), grad)
    strided = torch.stack([query, key, value], 2)  # interleaved, as in the output of a projection
    as_rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in strided.unbind(2)]
    columns = [x.mT.contiguous().mT for x in (query, key, value)]
    unaligned = [F.pad(x, (1, 2))[..., 1:-2] for x in (query, key, value)]
    for inputs in (strided.unbind(2), as_rows, columns, unaligned):
        found = values_and_gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True), inputs, grad)
        assert max(errors(found, expected)) < 1e-6
    rows = [x[:, :, :1].expand(x.shape) for x in (query, key, value)]  # all equal
    repeated = grad[:, :, :1].expand(grad.shape)
    found = values_and_gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True), rows, repeated)
    assert max(errors(found, exact(rows, repeated))) < 1e-6
    leaf = query.clone().requires_grad_()
    scaled_dot_product_attention(leaf, key, value, is_causal=True).sum().backward()  # gradient with zero strides
    of_ones = exact((query, key, value), torch.ones_like(grad))[1]
    assert (leaf.grad - of_ones).norm() < 1e-6 * of_ones.norm()


def test_every_element_of_the_outputs_is_written():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
        check(70, (2, 1), 24, doc_ids=documents(70, 20))
        check(65, keys=33, is_causal=False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def test_blocks_of_other_documents_are_not_read():
    """They contain NaN, which would survive a weight of zero."""
    inputs, grad = example(200, (1, 1))
    for x in (*inputs, grad):
        x[:, :, :64] = torch.nan
    ids = (torch.arange(200) >= 64).long().unsqueeze(0)
    for options, clean in (({"doc_ids": ids}, 64), ({"window": 33}, 128)):
        results = values_and_gradients(
            lambda *x, options=options: scaled_dot_product_attention(*x, is_causal=True, **options), inputs, grad
        )
        assert all(x[:, :, clean:].isfinite().all() for x in results)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_rows_of_very_negative_and_very_large_scores(shift):
    (query, key, value), grad = example(70, (1, 1))
    query[..., -1], key[..., -1] = 1.0, shift  # equal for all keys of a row, so the weights do not change
    query[:, :, 5, :] = 0.0
    query[:, :, 5, -1] = 1e3
    expected = exact((query, key, value), grad, scale=1.0)
    found = values_and_gradients(
        lambda *x: scaled_dot_product_attention(*x, is_causal=True, scale=1.0), (query, key, value), grad
    )  # fmt: skip
    # the precision of such scores in float32 is 3e4 * 2^-24
    assert (found[0] - expected[0]).norm() < 5e-3 * expected[0].norm()
    assert all(x.isfinite().all() for x in found)


def test_unsupported_inputs_go_to_torch():
    (query, key, value), _ = example(20, (2, 2))
    mask = torch.rand(20, 20) < 0.7
    mask[:, 0] = True
    assert torch.equal(
        scaled_dot_product_attention(query, key, value, mask), F.scaled_dot_product_attention(query, key, value, mask)
    )
    wide = [x.double() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(*wide, is_causal=True), expected)
    short = scaled_dot_product_attention(query[:, :, :5], key, value, is_causal=True)
    assert torch.equal(short, F.scaled_dot_product_attention(query[:, :, :5], key, value, is_causal=True))


MASKS = st.fixed_dictionaries(
    {
        "starts": st.sets(st.integers(1, 139), max_size=6),
        "window": st.one_of(st.none(), st.integers(1, 150)),
        "scale": st.sampled_from([None, 0.3]),
    }
)


def check_any(length, masks, **shape):
    begins = torch.tensor([[int(i in masks["starts"]) for i in range(length)]])
    options = {name: value for name, value in masks.items() if name != "starts"}
    check(length, doc_ids=begins.cumsum(1), **shape, **options)


shapes = {
    "length": st.integers(1, 140),
    "heads": st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    "size": st.sampled_from([5, 16, 32]),
    "dtype": st.sampled_from([torch.float32, *HALF]),
    "masks": MASKS,
}
quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=12, **quiet)
@given(**shapes)
def test_any_shape_and_mask(**drawn):
    check_any(**drawn)


@pytest.mark.slow
@settings(max_examples=150, **quiet)
@given(**shapes)
def test_many_shapes_and_masks(**drawn):
    check_any(**drawn)


def shipped_blocks():
    from llmkit.kernels.triton import tiles

    tables = [*tiles._ATTENTION.values(), {"float32": tiles._FLOAT32.values()}]
    return sorted({row[:2] for table in tables for rows in table.values() for row in rows})


@pytest.mark.slow
def test_every_shipped_size_of_block(monkeypatch):
    from llmkit.kernels.triton import attention, attention_backward, tiles

    for block_m, block_n in shipped_blocks():
        for module in (attention, attention_backward):
            monkeypatch.setattr(module, "tiles", lambda *_, m=block_m, n=block_n: tiles.Tiles(m, n, 4, 1))
        check(150, (1, 1))
        check(150, (1, 1), doc_ids=documents(150, 40), window=33)
        check(70, (1, 1), keys=150, is_causal=False)


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_grad_query", "attention_grad_key_value"])
@pytest.mark.parametrize(
    "options", [{}, {"doc_ids": documents(130, 50), "window": 70, "heads": (6, 2)}, {"keys": 70, "is_causal": False}]
)
def test_specialized_groups_of_warps_compute_the_same(kernel, options):
    """On a GPU with the tiles that lint.py checks: run in a separate process with a time limit."""
    from llmkit.kernels.triton.tiles import Tiles, sized_name, trying

    shape = {"size": 32, "dtype": torch.float32}
    block = (32, 64, 4, 1) if kernel == "attention_grad_key_value" else (64, 32, 4, 1)
    if "LLMKIT_TEST_DEVICE" in os.environ:
        shape = {"size": 128, "dtype": torch.bfloat16}
        block = (64, 128, 4, 2) if kernel == "attention_grad_key_value" else (128, 128, 4, 2)
    with trying(sized_name(kernel, **shape), Tiles(*block, specialize=1)):
        check(130, **{"heads": (1, 1)} | options | shape)


class TestAsOperators:
    def inputs(self):
        (query, key, value), _ = example(20, size=16)
        return [x.requires_grad_() for x in (query, key, value)]

    def test_torch_accepts_them(self):
        bounds = fused_attention.bounds(torch.zeros(1, 20, dtype=torch.long), 5, 20, torch.device("cpu"))
        inputs = self.inputs()
        torch.library.opcheck(fused_attention.attention_operator, (*inputs, *bounds, 0.25, True))
        torch.library.opcheck(fused_attention.attention_operator, (*inputs, None, None, 0.25, False))
        held = [x.detach() for x in inputs]
        out, lse = fused_attention.attention_operator(*held, None, None, 0.25, True)
        backward = (out, *held, out, lse, None, None, 0.25, True)
        torch.library.opcheck(fused_attention.backward_operator, backward)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compilation_gives_the_same_result_without_recompiling_for_another_length(self, backend):
        targets = []
        torch._dynamo.reset()
        inner = torch._dynamo.lookup_backend(backend)

        def noting(graph, inputs):
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return inner(graph, inputs)

        def function(query, key, value, ids):
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True, doc_ids=ids, window=9
            )

        compiled = torch.compile(function, backend=noting, fullgraph=True, dynamic=True)
        for length in (20, 33, 70):
            inputs, grad = example(length, size=16)
            ids = documents(length, 7)
            eager = values_and_gradients(lambda *x, ids=ids: function(*x, ids), inputs, grad)
            with torch.compiler.set_stance("default" if length == 20 else "fail_on_recompile"):
                ours = values_and_gradients(lambda *x, ids=ids: compiled(*x, ids), inputs, grad)
            assert all(map(torch.equal, ours, eager))
        assert any("llmkit" in name for name in targets), targets


@pytest.mark.parametrize("options", [{"window": 3}, {}])
def test_the_reference_has_the_gradients_of_its_values(monkeypatch, options):
    monkeypatch.setenv("LLMKIT_KERNELS", "torch")
    inputs = [x.double().requires_grad_() for x in example(7, size=4)[0]]
    assert torch.autograd.gradcheck(
        lambda *x: scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True, **options), inputs
    )
