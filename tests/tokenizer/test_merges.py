"""Merges equal those of Hugging Face's trainer, in batches as one at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hf_trainer import hf_merges
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.tokenizer import merges
from llmkit.tokenizer.merges import Merges, train_merges


def train(pieces: dict[bytes, int], vocab_size: int, min_frequency: int = 0) -> Merges:
    return train_merges(list(pieces), np.array(list(pieces.values()), np.int64), vocab_size, min_frequency)


def words(alphabet: bytes, longest: int) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(list(alphabet)), min_size=1, max_size=longest).map(bytes)


# Few letters cause ties, runs of one letter and adjacent merges; repeats of a piece set the counts.
CORPORA = st.one_of(
    st.dictionaries(words(b"a", 40), st.integers(1, 3), min_size=1, max_size=8),
    st.dictionaries(words(b"ab", 20), st.integers(1, 3), min_size=1, max_size=30),
    st.dictionaries(words(b"abc\x00\xff", 12), st.integers(1, 6), min_size=1, max_size=40),
    st.dictionaries(words(bytes(range(0x61, 0x6D)), 8), st.integers(1, 4), min_size=1, max_size=80),
)


@settings(max_examples=150, deadline=None)
@given(CORPORA, st.sampled_from([256, 257, 260, 300, 1000]), st.integers(0, 4))
def test_merges_are_those_of_hugging_face(pieces: dict[bytes, int], vocab_size: int, min_frequency: int) -> None:
    # as text: a character per byte, and a separator that no piece contains
    text = ["~".join(piece.decode("latin-1") for piece, count in pieces.items() for _ in range(count))]
    found = train(
        {piece.decode("latin-1").encode(): count for piece, count in pieces.items()} | {b"~": len(pieces)},
        vocab_size,
        min_frequency,
    )
    assert (found.tokens, found.pairs) == hf_merges(text, "~", vocab_size, min_frequency)
    assert len(set(found.tokens)) == len(found.tokens)  # no two merges make the same token: see merges.py


def random_words(seed: int, number: int, alphabet: bytes) -> dict[bytes, int]:
    """Return language-like words: mostly short, with recurring syllables."""
    rng = random.Random(seed)
    syllables = [bytes(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(60)]
    found: dict[bytes, int] = {}
    for rank in range(1, number + 1):
        word = b"".join(rng.choices(syllables, k=rng.randint(1, 5)))
        found[word] = found.get(word, 0) + 1 + 20_000 // rank
    return found


@pytest.mark.parametrize("alphabet", [b"abcdefghijklmnopqrstuvwxyz", b"aeiou", b"ab"], ids=len)
def test_a_batch_equals_one_at_a_time(monkeypatch: pytest.MonkeyPatch, alphabet: bytes) -> None:
    pieces = random_words(1, 8000, alphabet)
    steps: list[int] = []
    counts = np.array(list(pieces.values()))
    batched = train_merges(list(pieces), counts, 3000, on_progress=steps.append)
    assert max(steps) > 8 and sum(steps) == len(batched.pairs)
    monkeypatch.setattr(merges, "SMALLEST_BATCH", 1)
    monkeypatch.setattr(merges, "LARGEST_BATCH", 1)
    single = train(pieces, 3000)
    assert (batched.tokens, batched.pairs) == (single.tokens, single.pairs)
    assert np.array_equal(batched.counts, single.counts)


def test_a_small_front_of_the_queue_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = random_words(2, 3000, b"abcdefghij")
    expected = train(pieces, 2000)
    monkeypatch.setattr(merges, "FRONT", 1)
    assert train(pieces, 2000).pairs == expected.pairs


def test_counts_beyond_32_bits() -> None:
    pieces = random_words(3, 2000, b"abcdefghij")
    billions = {piece: count * 10**9 for piece, count in pieces.items()}
    expected, found = train(pieces, 1500), train(billions, 1500)
    assert found.pairs == expected.pairs
    assert np.array_equal(found.counts, expected.counts * 10**9)


@settings(max_examples=60, deadline=None)
@given(CORPORA, st.sampled_from([257, 270, 400]))
def test_counts_are_those_of_the_encoded_text(pieces: dict[bytes, int], vocab_size: int) -> None:
    found = train(pieces, vocab_size)
    ids = {token: i for i, token in enumerate(found.tokens)}
    expected = np.zeros(len(found.tokens), np.int64)
    for piece, count in pieces.items():
        text = [ids[bytes([byte])] for byte in piece]
        for i, pair in enumerate(found.pairs):
            text = replaced(text, pair, 256 + i)
        np.add.at(expected, text, count)
    assert np.array_equal(found.counts, expected)


def replaced(text: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(text):
        match = tuple(text[i : i + 2]) == pair
        out.append(new if match else text[i])
        i += 1 + match
    return out


def test_nothing_to_merge() -> None:
    for pieces in ({}, {b"a": 3}, {b"ab": 1}):
        assert train(pieces, 300, min_frequency=2).pairs == []
    assert train({b"ab": 5}, 256).pairs == []
