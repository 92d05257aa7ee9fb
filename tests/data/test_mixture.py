"""Packed examples: nothing is lost, documents do not attend to each other, and the mixture keeps its shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.batches import IGNORED, Mixture, PackedEvaluation, Source, best_fit, packed
from llmkit.data.examples import Examples, parse_data
from llmkit.errors import UserError
from llmkit.model.config import ModelConfig
from llmkit.model.transformer import Transformer
from llmkit.training.loss import next_token_loss

PAD = 0


@dataclass
class Chat:
    """Turns of 5 tokens; the second of each pair is trained on."""

    token_ids: np.ndarray
    trained: np.ndarray
    turn_ends: tuple[int, ...]
    questions: tuple[int, ...] = ()
    preamble: int = 0


def chat(turns, first=1):
    ids = np.arange(first, first + 5 * turns, dtype=np.int32) % 50 + 1
    return Chat(
        ids, np.arange(5 * turns) // 5 % 2 == 1, tuple(range(5, 5 * turns + 1, 5)), tuple(range(0, 5 * turns, 10))
    )


def examples(lengths, name="a", longest=33):
    return Examples.gather(name, ((f"{name}:{i}", chat(n, i)) for i, n in enumerate(lengths)), longest)


# ---- examples that fit a row


def test_conversations_are_held_whole():
    held = examples([2, 4, 6])
    assert len(held) == 3 and held.inputs == 9 + 19 + 29 and held.targets == 5 + 10 + 15
    ids, trained = held[1]
    np.testing.assert_array_equal(ids, chat(4, 1).token_ids)
    np.testing.assert_array_equal(trained, chat(4, 1).trained)


@pytest.mark.parametrize(
    ("on_long", "lengths", "counts"),
    [
        ("truncate", [10, 10], {"read": 2, "truncated": 1}),
        ("drop", [10], {"read": 2, "dropped: too long": 1}),
        ("split", [10, 10, 10], {"read": 2, "split": 1}),
    ],
)
def test_too_long_conversations_are_cut_between_turns_and_counted(on_long, lengths, counts):
    held = Examples.gather("a", [("a:1", chat(2)), ("a:2", chat(5))], 14, on_long)
    assert held.lengths.tolist() == lengths and held.counts == Counter(counts)


def test_too_long_may_be_an_error_that_names_the_place():
    with pytest.raises(UserError, match=r"a.jsonl:2: 24 tokens are more than the 13 of a row; shorten it, or choose"):
        Examples.gather("a", [("a.jsonl:1", chat(2)), ("a.jsonl:2", chat(5))], 14, "error")


def test_an_answer_longer_than_a_row_is_cut_within():
    one = Chat(np.arange(1, 41, dtype=np.int32), np.arange(40) >= 5, (5, 40))
    held = Examples.gather("a", [("a:1", one)], 16)
    assert held.lengths.tolist() == [16] and held.counts["cut within a turn"] == 1 and held.targets == 11


@pytest.mark.parametrize("on_long", ["truncate", "split"])
@pytest.mark.parametrize("length", [16, 17, 31, 32, 101])
def test_a_document_longer_than_a_row_is_split_without_loss(on_long, length):
    document = Chat(np.arange(1, length + 1, dtype=np.int32), np.arange(length) > 0, (length,))
    held = Examples.gather("a", [("a:1", document)], 16, on_long)
    learnt = [token for place in range(len(held)) for token in held[place][0][1:].tolist()]
    assert learnt == list(range(2, length + 1))
    assert held.counts["documents split"] == (length > 16) and held.lengths.max() <= 16


def test_a_source_that_teaches_nothing_is_an_error():
    silent = Chat(np.arange(10, dtype=np.int32), np.zeros(10, bool), (10,))
    with pytest.raises(UserError, match=r"a.jsonl: nothing to train on in 1 conversation \(nothing trained 1\)"):
        Examples.gather("a.jsonl", [("a.jsonl:1", silent)], 16)
    with pytest.raises(UserError, match="it is empty"):
        Examples.gather("a.jsonl", [], 16)


# ---- packing


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_holds_every_item_once_within_capacity(sizes):
    bins = best_fit(sizes, 20)
    assert sorted(item for one in bins for item in one) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in one) <= 20 for one in bins)
    fewest = -(-sum(sizes) // 20)
    assert len(bins) <= 11 / 9 * fewest + 1 or len(bins) <= sum(size > 10 for size in sizes) + 1


def test_packed_loss_is_that_of_each_alone():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
        ),
        seed=1,
    )  # fmt: skip
    held = examples([2, 4, 2, 6, 4])
    together = packed([[held[i] for i in row] for row in best_fit((held.lengths - 1).tolist(), 32)], 32, PAD)
    assert len(together.token_ids_BT) < len(held)
    loss, count, _ = next_token_loss(model, together)
    alone = [next_token_loss(model, packed([[held[i]]], int(held.lengths[i]) - 1, PAD)) for i in range(len(held))]
    assert count == sum(one.targets for one in alone) == held.targets
    assert abs(float(loss.detach()) - sum(float(one.total.detach()) for one in alone)) / count < 1e-5


# ---- the mixture


def mixture(weights=(1.0, 1.0), seed=0, batch_size=4):
    sources = [Source(examples([2, 4, 2, 6, 4, 2, 2], "a"), weights[0]), Source(examples([4] * 9, "b"), weights[1])]
    return Mixture(sources, 32, batch_size, PAD, seed)


def test_batches_are_a_function_of_seed_and_step():
    first, again, other = mixture(), mixture(), mixture(seed=1)
    expected = [first.batch(step) for step in range(12)]
    for step in (7, 3, 11, 0):
        for one, two in zip(expected[step], again.batch(step), strict=True):
            np.testing.assert_array_equal(one, two)
    assert any((expected[step].token_ids_BT != other.batch(step).token_ids_BT).any() for step in range(12))
    for step, batch in zip(range(2, 9), mixture().prefetch(2), strict=False):
        np.testing.assert_array_equal(batch.token_ids_BT, expected[step].token_ids_BT)


def test_every_example_is_seen_once_an_epoch():
    one = Mixture([Source(examples(list(range(2, 7)) * 8), 1.0)], 32, 2, PAD)
    seen = Counter(example for row in one._planned(400)[:400] for _, example in row)
    assert max(seen.values()) - min(seen.values()) <= 2 + 64 * 32 // one.inputs


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 20))
def test_sources_keep_their_shares_of_tokens(weight):
    mixed = mixture((weight, 1.0))
    epochs = [epochs for _, epochs in mixed.epochs(200)]
    tokens = [count * source.examples.inputs for count, source in zip(epochs, mixed.sources, strict=True)]
    assert abs(tokens[0] / sum(tokens) - weight / (weight + 1)) < 0.02


def test_steps_for_an_epoch_go_through_it():
    mixed = mixture()
    steps = mixed.steps_for(mixed.inputs * 50)
    assert 48 < sum(epochs for _, epochs in mixed.epochs(steps)) / 2 < 54
    assert mixture().steps_for(1) == 1


def test_evaluation_predicts_every_target_once():
    held = examples([2, 4, 2, 6, 4])
    batches = list(PackedEvaluation(held, 32, 2, PAD))
    assert len(batches) == len(PackedEvaluation(held, 32, 2, PAD))
    assert sum(int((batch.targets_BT != IGNORED).sum()) for batch in batches) == held.targets


@pytest.mark.parametrize(("named", "files"), [("*.jsonl", ["a.jsonl", "b.jsonl"]), ("d/", ["d/c.jsonl", "d/e/f.csv"])])
def test_a_pattern_or_a_folder_is_one_source(tmp_path, monkeypatch, named, files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / "e").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "d/c.jsonl", "d/e/f.csv", "other.json"):
        (tmp_path / name).touch()
    first, second = parse_data([f"{named}:0.3", "other.json:0.7"])
    assert (first.path, first.weight, first.files) == (named, 0.3, files)
    assert (second.path, second.weight, second.files) == ("other.json", 0.7, ["other.json"])
    with pytest.raises(UserError, match=r"none/\*: expected files that match this pattern, found none"):
        parse_data(["none/*:0.3"])
