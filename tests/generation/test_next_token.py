"""Sampling the next token: random numbers, the distribution, and its truncation compared with transformers'."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.generation.next_token import Sampling, choose_tokens, philox, seed_of_repeat, truncate, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, the authors' library
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_authors_numbers(counter, key, expected):
    assert tuple(int(word) for word in philox(counter, key)) == expected


def test_a_number_depends_on_each_of_the_four_and_on_nothing_else():
    whole = uniforms(7, 3, 1, 0, 300)
    assert np.array_equal(uniforms(7, 3, 1, 130, 50), whole[130:180])
    others = [uniforms(8, 3, 1, 0, 300), uniforms(7, 4, 1, 0, 300), uniforms(7, 3, 2, 0, 300)]
    others += [uniforms(7, 3 + 2**40, 1, 0, 300), uniforms(7 + 2**40, 3, 1, 0, 300), uniforms(7, 3, 1, 300, 300)]
    for other in others:
        assert not np.intersect1d(whole, other).size
    assert len(np.unique(whole)) == 300


def test_the_numbers_are_uniform():
    draws = np.concatenate([uniforms(0, request, 0, 0, 500) for request in range(200)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared, 99 degrees of freedom: p = 1e-4


def test_repeats_get_seeds_of_their_own_that_json_keeps():
    seeds = [seed_of_repeat(7, repeat) for repeat in range(1000)]
    assert seeds[0] == 7 and len(set(seeds)) == 1000 and max(seeds) < 2**53


def frequencies(logits, sampling, draws=20000):
    rows = torch.tensor(logits).expand(draws, -1)
    chosen, _, _, sound = choose_tokens(rows, uniforms(0, 0, 0, 0, draws), sampling)
    assert sound.all()
    return np.bincount(chosen.numpy(), minlength=len(logits)) / draws


def test_tokens_come_as_often_as_they_should():
    logits = [1.0, 3.0, -2.0, 2.0, 0.0]
    expected = torch.softmax(torch.tensor(logits) / 0.7, -1).numpy()
    assert np.abs(frequencies(logits, Sampling(0.7)) - expected).max() < 0.012


def test_truncated_tokens_are_never_sampled():
    logits = [1.0, 3.0, -2.0, 2.0, 0.0]
    assert (frequencies(logits, Sampling(1.0, top_k=2)) > 0).tolist() == [False, True, False, True, False]
    assert (frequencies(logits, Sampling(1.0, min_p=0.12)) > 0).tolist() == [True, True, False, True, False]
    assert frequencies(logits, Sampling(1.0, top_p=1e-9)).tolist() == [0, 1, 0, 0, 0]
    assert frequencies([0.0, -float("inf"), 0.0], Sampling(1.0))[1] == 0


def test_temperature_zero_takes_the_first_of_equal_maxima():
    logits = torch.tensor([[0.0, 5.0, 5.0], [1.0, 0.0, -1.0]])
    for temperature in (0.0, 1e-30):
        chosen, _, _, sound = choose_tokens(logits, np.array([0.99, 0.99]), Sampling(temperature))
        assert chosen.tolist() == [1, 0] and sound.all()


def test_the_ends_of_the_interval_choose_tokens_that_may_come():
    logits = torch.tensor([[-float("inf"), 0.0, 0.1, -float("inf")]] * 2)
    chosen, *_ = choose_tokens(logits, np.array([0.0, 1 - 2**-53]), Sampling(1.0))
    assert chosen.tolist() == [1, 2]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(0.7, 3), Sampling(1.3, 4, 0.8, 0.01), Sampling(0.0)], ids=str
)
def test_log_probabilities_are_those_before_and_after_truncation(sampling):
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 2
    chosen = choose_tokens(logits, uniforms(0, 0, 0, 0, 50), sampling, vocab_size=9)
    rows = torch.arange(50)
    whole = torch.softmax(logits.double() / (sampling.temperature or 1), -1)
    assert torch.allclose(chosen.logprobs.double(), whole[rows, chosen.tokens].log(), atol=1e-5)
    kept = truncate(whole[:, :9].float(), sampling).double()
    expected = (kept / kept.sum(-1, keepdim=True))[rows, chosen.tokens].log() if sampling.temperature else 0.0 * rows
    assert torch.allclose(chosen.truncated_logprobs.double(), expected.double(), atol=1e-5)
    assert (chosen.truncated_logprobs >= chosen.logprobs).all() and chosen.tokens.max() < 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_logits_are_reported_by_row(temperature, bad):
    logits = torch.zeros(3, 8)
    logits[1, 3] = bad
    *_, sound = choose_tokens(logits, np.full(3, 0.5), Sampling(temperature, top_k=4))
    assert sound.tolist() == [True, False, True]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([5, 300, 1000]),
    top_k=st.none() | st.integers(1, 1200),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    flat=st.booleans(),
)
def test_truncation_is_transformers_own(seed, size, top_k, top_p, min_p, flat):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) * (0.3 if flat else 3.0)
    expected = logits
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(None, expected)
    kept = truncate(torch.softmax(logits, -1), Sampling(1.0, top_k, top_p, min_p)) > 0
    # they sum from the small end in float32, we from the large end in float64: the cut may differ by a token
    allowed = 0 if top_p is None or top_p == 1 else 1
    assert ((kept != expected.isfinite()).sum(-1) <= allowed).all()
    assert kept.any(-1).all()


def test_truncation_of_a_row_does_not_depend_on_rows_that_need_the_full_sort():
    sharp, flat = torch.randn(1, 4000) * 5, torch.randn(1, 4000) * 0.01
    both = torch.softmax(torch.cat([sharp, flat]), -1)
    sampling = Sampling(1.0, top_p=0.9)
    assert torch.equal(truncate(both, sampling)[:1], truncate(both[:1], sampling))
    assert (truncate(both, sampling)[1] > 0).sum() > 3000
