"""Values and gradients of attention against plain float64 softmax: documents, windows, grouped heads, odd lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmkit.kernels.attention import Branching, Packing, attention_mask, scaled_dot_product_attention

from llmkit.kernels import attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def naive(query, key, value, mask, scale):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def check(dtype, length, heads, kv_heads, size, doc_ids, window, batch=2, scale=None):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, heads, length, size)] + [(batch, kv_heads, length, size)] * 2
    # inputs are rounded to the dtype first, so that only the kernel's error is measured
    given_ = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    exact = [x.double().clone().requires_grad_() for x in given_]
    mask = attention_mask(length, length, doc_ids, window)
    expected = naive(*exact, mask, scale or size**-0.5)
    expected.backward(upstream.double())
    ours = [x.clone().requires_grad_() for x in given_]
    found = scaled_dot_product_attention(
        *ours, is_causal=True, enable_gqa=True, doc_ids=doc_ids, window=window, scale=scale
    )
    found.backward(upstream)
    assert found.shape == expected.shape and found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad.shape == theirs.grad.shape
        # the exact gradient of a query with a single visible key is zero, so its error is relative to the inputs
        scale_of_it = max(theirs.grad.norm().item(), 0.2 * theirs.grad.numel() ** 0.5)
        assert (mine.grad.double() - theirs.grad).norm() < TOLERANCE[dtype] * scale_of_it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 63, 128, 129, 300, 700])
@pytest.mark.parametrize("window", [None, 1, 48, 1000])
def test_packed_documents_match_naive_attention(dtype, length, window):
    generator = torch.Generator().manual_seed(0)
    doc_ids = (torch.rand(2, length, generator=generator) < 0.05).cumsum(1)
    check(dtype, length, 4, 2, 16, doc_ids, window)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("sizes", [(200,), (9, 61, 1, 129)])  # one document per row, and several
def test_branches_of_documents_match_naive_attention(sizes, window):
    generator = torch.Generator().manual_seed(0)
    ids = [[], [], []]
    for document, size in enumerate(sizes):
        prompt, first = size // 3, size // 2  # one answer up to `first`, then another
        ids[0] += [document] * size
        ids[1] += [0] * prompt + [1] * (first - prompt) + [2] * (size - first)
        ids[2] += [*range(first), *range(prompt, prompt + size - first)]
    branching = Branching(*torch.tensor(ids).unsqueeze(1).expand(3, 2, -1))
    tensors = [torch.randn(2, heads, len(ids[0]), 16, generator=generator) for heads in (4, 2, 2)]
    exact, ours = ([x.clone().to(dtype).requires_grad_() for x in tensors] for dtype in (torch.float64, torch.float32))
    expected = naive(*exact, branching.mask(window), 0.25)
    found = scaled_dot_product_attention(*ours, is_causal=True, enable_gqa=True, doc_ids=branching, window=window)
    for output in (expected, found):
        output.square().sum().backward()
    assert relative_error(found, expected) < TOLERANCE[torch.float32]
    for mine, theirs in zip(ours, exact, strict=True):
        assert relative_error(mine.grad, theirs.grad) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (4, 2)])
def test_grouped_heads_match_naive_attention(dtype, heads):
    check(dtype, 130, *heads, 32, None, None, scale=0.3)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 200),
    starts=st.sets(st.integers(1, 199), max_size=8),
    window=st.one_of(st.none(), st.integers(1, 220)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_split_into_documents_matches_naive_attention(length, starts, window, dtype):
    begins = torch.zeros(1, length, dtype=torch.long)
    for start in starts:
        if start < length:
            begins[0, start] = 1
    check(dtype, length, 2, 1, 8, begins.cumsum(1), window, batch=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_packed_rows_match_naive_attention_and_build_no_square_mask(monkeypatch, dtype):
    monkeypatch.setattr(attention, "LONGEST_DENSE_MASK", 64)
    asked = []
    original = attention.attention_mask
    monkeypatch.setattr(attention, "attention_mask", lambda *a, **k: asked.append(a) or original(*a, **k))
    doc_ids = (torch.arange(300) // 70).expand(2, 300)
    check(dtype, 300, 2, 2, 8, doc_ids, None)
    assert not asked


def test_probabilities_computed_again_in_backward_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr(attention, "LONGEST_KEPT", 16)
    check(torch.bfloat16, 200, 4, 2, 16, (torch.arange(200) // 90).expand(2, 200), None)


def test_the_same_id_again_after_another_is_a_new_document_for_packing():
    packing = Packing(torch.tensor([[7, 7, 2, 2, 7]]))
    assert packing.starts.tolist() == [[0, 0, 2, 2, 4]]
    assert packing.segments == [[0, 2, 4]]
    assert not packing.is_single and Packing(torch.zeros(3, 4)).is_single


def test_unsupported_options_are_refused_by_name():
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True, window=2)
    with pytest.raises(NotImplementedError, match="attn_mask with window"):
        scaled_dot_product_attention(x, x, x, torch.ones(4, 4, dtype=torch.bool), window=2)
    with pytest.raises(ValueError, match="is_causal"):
        scaled_dot_product_attention(x, x, x, doc_ids=torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_dropout_of_torch_still_work(dtype):
    x = torch.randn(1, 2, 4, 8, dtype=dtype)
    mask = torch.tensor([[True, False, True, False]] * 4)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)
    assert torch.equal(scaled_dot_product_attention(x, x, x, mask), expected)
    assert scaled_dot_product_attention(x, x, x, dropout_p=0.5, is_causal=True).shape == x.shape
