"""Attention to a cache: every row length against float64, and the same bits in any batch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmkit.kernels.attention import attention_decode, attention_decode_reference, scaled_dot_product_attention

from llmkit.kernels import fused_attention

SPLIT = 128  # keys per program in the interpreter


def example(new, lengths, *, heads=(4, 2), size=16, capacity=300, dtype=torch.float32):
    """Make query, keys and values; positions beyond a row's length are NaN."""
    generator = torch.Generator().manual_seed(new)
    batch = len(lengths)
    query = torch.randn(batch, heads[0], new, size, generator=generator).to(dtype)
    key, value = torch.randn(2, batch, heads[1], capacity, size, generator=generator).to(dtype)
    for row, length in enumerate(lengths):
        key[row, :, length:] = value[row, :, length:] = torch.nan
    return query, key, value, torch.tensor(lengths)


def check(new, lengths, *, window=None, **shape):
    inputs = example(new, lengths, **shape)
    query, key, value = (x.double().nan_to_num() for x in inputs[:3])
    expected = attention_decode_reference(query, key, value, inputs[3], query.shape[-1] ** -0.5, window)
    found = attention_decode(*inputs, window=window)
    assert found.shape == expected.shape and found.dtype == inputs[0].dtype
    bound = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}[found.dtype]
    assert (found.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize(
    ("new", "lengths", "options"),
    [
        *((new, [3, 129, 300], {"window": window}) for new in (1, 3) for window in (None, 1, 48, 200, 1000)),
        *((1, [100, 257], {"heads": heads}) for heads in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2))),
        *((40, [40, 150], {"window": window}) for window in (None, 7)),  # extending a prefix
        (1, [1, 60], {"capacity": 60}),  # a cache of one split
    ],
)
def test_any_rows_heads_and_windows(interpreted, new, lengths, options):
    check(new, lengths, **options)


@pytest.mark.parametrize("size", [24, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_head_size(interpreted, size, dtype):
    check(1, [130], size=size, capacity=130, dtype=dtype)


def test_a_query_without_keys_gives_zeros(interpreted, monkeypatch):
    inputs = example(3, [0, 2, 140])
    found = attention_decode(*inputs)
    assert found[0].abs().max() == 0 and found[1, :, 0].abs().max() == 0
    assert found[1, :, 1:].isfinite().all() and found[1, :, 1:].abs().min() > 0
    monkeypatch.setenv("LLMKIT_KERNELS", "torch")
    query, key, value, lengths = inputs
    torch.testing.assert_close(attention_decode(query, key.nan_to_num(), value.nan_to_num(), lengths), found)


def test_a_row_has_the_same_bits_in_any_batch_and_any_capacity(interpreted):
    query, key, value, lengths = example(1, [50, 300, 200])
    together = attention_decode(query, key, value, lengths)
    for row in range(3):
        one = slice(row, row + 1)
        alone = attention_decode(query[one], key[one], value[one], lengths[one])
        assert torch.equal(alone[0], together[row])
        used = int(lengths[row])
        short = attention_decode(query[one], key[one, :, :used], value[one, :, :used], lengths[one])
        assert torch.equal(short[0], together[row])


def test_keys_before_the_window_are_not_read(interpreted):
    query, key, value, lengths = example(1, [300])
    value[:, :, :224] = key[:, :, :224] = torch.nan
    assert attention_decode(query, key, value, lengths, window=64).isfinite().all()


def test_the_last_rows_of_whole_attention_are_the_same(interpreted):
    query, key, value, _ = example(5, [70], capacity=70)
    whole = torch.cat([torch.zeros(1, 4, 65, 16), query], 2)
    expected = scaled_dot_product_attention(whole, key, value, is_causal=True, enable_gqa=True)[:, :, 65:]
    torch.testing.assert_close(attention_decode(query, key, value, torch.tensor([70])), expected)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    new=st.integers(1, 6),
    lengths=st.lists(st.integers(6, 280), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 300)),
    heads=st.sampled_from([(2, 2), (6, 2), (5, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_lengths_and_window(interpreted, new, lengths, window, heads, dtype):
    check(new, lengths, window=window, heads=heads, capacity=max(lengths), dtype=dtype)


def test_torch_accepts_the_operator(interpreted):
    query, key, value, lengths = example(2, [20, 9], capacity=20)
    arguments = query, key.nan_to_num(), value.nan_to_num(), lengths, 0.25, 5
    torch.library.opcheck(fused_attention.decode_operator, arguments)


def test_compiled_it_is_the_same(interpreted):
    torch._dynamo.reset()
    compiled = torch.compile(attention_decode, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([20, 9], [40, 33, 7]):
        inputs = example(1, lengths, capacity=max(lengths))
        assert torch.equal(compiled(*inputs), attention_decode(*inputs))


def test_wrong_arguments_are_refused():
    query, key, value, lengths = example(1, [3, 4])
    with pytest.raises(ValueError, match="lengths: expected 2"):
        attention_decode(query, key, value, lengths[:1])
    with pytest.raises(ValueError, match="window"):
        attention_decode(query, key, value, lengths, window=0)
