"""The comparison loss against its definition, shared prompts against single answers, and a judge's figures."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, make_model

from llmkit.data.batches import Mixture, Source
from llmkit.errors import UserError
from llmkit.reward_model.comparisons import Candidates, Comparisons, packed_comparisons
from llmkit.reward_model.evaluation import biases, confidence_error, correlation, evaluate, fitted_temperature, wilson
from llmkit.reward_model.head import (
    ComparisonLoss,
    RewardModel,
    answer_scores,
    bootstrap_weights,
    plackett_luce,
    row_length,
    score_comparisons,
)
from llmkit.training.loss import rows_of

PAD = 0


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.of(make_model(), heads=2, seed=3).eval()


def some_comparisons(count: int, seed: int = 0) -> list[Candidates]:
    rng = np.random.default_rng(seed)

    def text(low: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, rng.integers(low, 20)).astype(np.int32)

    return [
        Candidates(text(0), tuple(text(1) for _ in range(answers)), tuple(range(answers)), 0.0, number)
        for number, answers in enumerate(rng.integers(2, 5, count))
    ]


def alone(model: RewardModel, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return the scores of one answer as in transformers: from the last token of the complete sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, answer])).long().unsqueeze(0)
    with torch.no_grad():
        return model.scores(model(ids))[0, -1].numpy()


@pytest.mark.parametrize("row_tokens", [90, 512])
def test_an_answer_has_the_same_score_alone_and_in_any_row(model, row_tokens):
    comparisons = some_comparisons(30)
    found = dict(score_comparisons(model, comparisons, row_tokens, PAD))
    assert sorted(found) == list(range(30))
    for number, one in enumerate(comparisons):
        expected = [alone(model, one.prompt, answer) for answer in one.answers]
        np.testing.assert_allclose(found[number], expected, atol=1e-5)


def test_other_rows_and_another_padding_change_nothing(model):
    one, *others = some_comparisons(6)
    with torch.no_grad():
        scores = [
            answer_scores(model, packed_comparisons(rows, 200, pad))[row, place, : len(one.answers)]
            for rows, row, place, pad in (
                ([[one]], 0, 0, 0), ([[one]], 0, 0, 7), ([others[:2], [others[2], one]], 1, 1, 0),
            )
        ]  # fmt: skip
    for found in scores[1:]:
        torch.testing.assert_close(found, scores[0], atol=1e-5, rtol=0)


def test_two_answers_are_bradley_terry_and_its_margin():
    scores = torch.tensor([[[1.0], [0.3]], [[-2.0], [1.5]]])
    ranks, margins = torch.tensor([[1.0, 2.0], [5.0, 3.0]]), torch.tensor([0.0, 0.5])
    expected = -torch.nn.functional.logsigmoid(torch.tensor([0.7, 3.5 - 0.5]))
    torch.testing.assert_close(plackett_luce(scores, ranks, margins)[:, 0], expected)


def test_rankings_are_a_distribution():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5]).view(1, 4, 1)
    losses = [plackett_luce(scores, torch.tensor([order]).float(), torch.zeros(1)) for order in permutations(range(4))]
    torch.testing.assert_close(torch.stack(losses).neg().exp().sum(), torch.tensor(1.0))


def test_missing_answers_change_nothing_and_ties_want_equal_scores():
    scores = torch.tensor([[0.3, -1.0, 9.0]]).unsqueeze(-1).requires_grad_()
    three = plackett_luce(scores, torch.tensor([[2.0, 1.0, torch.inf]]), torch.zeros(1))
    torch.testing.assert_close(three, plackett_luce(scores[:, :2], torch.tensor([[2.0, 1.0]]), torch.zeros(1)))
    three.sum().backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 2] == 0
    tied, zero = torch.tensor([[1.0, 1.0]]), torch.zeros(1)
    at = [float(plackett_luce(torch.tensor([[[0.0], [gap]]]), tied, zero)) for gap in (-1.0, 0.0, 1.0)]
    assert at[1] < at[0] == pytest.approx(at[2])


def test_the_loss_counts_comparisons_and_does_not_depend_on_their_rows(model):
    comparisons = some_comparisons(8)
    losses = []
    for rows in ([comparisons], [comparisons[:3], comparisons[3:]]):
        loss, count, _ = ComparisonLoss(seed=0)(model, packed_comparisons(rows, 700, PAD))
        assert count == 8
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_one_long_comparison_makes_no_other_row_long(model):
    """Otherwise each row would cost its quadratic attention."""
    rng = np.random.default_rng(1)
    long = Candidates(np.full(9, 3), tuple(rng.integers(1, VOCABULARY, 80) for _ in range(5)), (1, 2, 3, 4, 5), 0.0, 90)
    comparisons = [*some_comparisons(40), long]
    source = Source(Comparisons("c", comparisons), 1.0)
    mixture = Mixture([source], 128, 4, PAD, 0, packed_comparisons)
    batches = [mixture.batch(step) for step in range(mixture.steps_for(source.examples.inputs))]
    widths = [sorted({part.token_ids.shape[1] for part in batch.by_size()}) for batch in batches]
    assert any(width[-1] == 409 for width in widths) and all(width[:-1] < [129] for width in widths)
    batch = next(one for one in batches if 90 in one.numbers)
    assert batch.tokens == sum(comparisons[i if i < 90 else -1].size for i in batch.numbers[batch.numbers >= 0])
    whole, count, _ = ComparisonLoss(seed=0)(model, batch)
    apart = [ComparisonLoss(seed=0)(model, rows_of(batch, row, row + 1)) for row in range(4)]
    assert count == sum(one.targets for one in apart) == (batch.numbers >= 0).sum()
    torch.testing.assert_close(whole, sum(one.total for one in apart))


def test_a_row_is_as_long_as_most_comparisons_need():
    assert row_length(np.array([30] * 95 + [4000] * 5)) == 512
    assert row_length(np.array([30] * 50 + [900] * 45 + [4000] * 5)) == 900


def test_no_prompt_is_both_learnt_and_held_out():
    of_prompts = [np.full(3, number % 7) for number in range(50)]
    held = [Candidates(prompt, (np.ones(1), np.zeros(2)), (1, 2), 0.0, n) for n, prompt in enumerate(of_prompts)]
    learnt, kept = Comparisons("c", held).split(0.3, seed=1)
    assert len(learnt) + len(kept) == 50
    assert not {one.prompt.tobytes() for one in learnt.candidates} & {one.prompt.tobytes() for one in kept.candidates}
    assert len({one.prompt.tobytes() for one in kept.candidates}) == 2
    with pytest.raises(UserError, match="comparisons of one prompt cannot be split"):
        Comparisons("c", held[:1]).split(0.3, seed=1)


def test_many_answers_of_a_prompt_are_cut_into_rows():
    one = Candidates(np.zeros(4), tuple(np.zeros(n) for n in (3, 3, 9, 2)), (1, 2, 3, 4))
    assert list(one.spans(10)) == [(0, 2), (2, 3), (3, 4)] and list(one.spans(100)) == [(0, 4)]


def test_heads_of_an_ensemble_see_different_data():
    weights = bootstrap_weights(np.arange(20000), 3, seed=5)
    assert weights.shape == (20000, 3) and np.corrcoef(weights.T)[0, 1] == pytest.approx(0, abs=0.02)
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.03)
    np.testing.assert_allclose(weights.var(0), 1, atol=0.05)
    np.testing.assert_array_equal(weights[100:], bootstrap_weights(np.arange(100, 20000), 3, seed=5))


# ---- figures


def test_accuracy_interval_and_equal_scores():
    pairs = [Candidates(np.zeros(1), (np.zeros(1), np.zeros(2)), (1, 2))] * 4
    found = evaluate([np.array(s) for s in ((2.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))], pairs)
    assert found["accuracy"] == 0.625 and found["comparisons"] == 4
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_calibration_of_a_judge_that_is_too_sure():
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, 50000)
    right = np.where(rng.random(50000) < 1 / (1 + np.exp(-np.abs(honest))), 1, -1) * np.abs(honest)
    assert confidence_error(right) < 0.01 and fitted_temperature(right) == pytest.approx(1, abs=0.05)
    assert confidence_error(4 * right) > 0.1 and fitted_temperature(4 * right) == pytest.approx(4, rel=0.05)


def test_a_judge_that_counts_tokens_is_seen_through():
    comparisons = Comparisons("c", some_comparisons(200, seed=4))
    lengths = [np.array([len(answer) for answer in one.answers], float) for one in comparisons.candidates]
    found = biases(lengths, comparisons.candidates, SimpleNamespace(decode=lambda ids, skip_specials: ""), seed=0)
    assert found["length"]["score"] > 0.99 and abs(found["length"]["label"]) < 0.2
    assert found["formatting"] == {"score": 0.0, "label": 0.0}


def test_rank_correlation_with_ties():
    assert correlation(np.array([1.0, 2.0, 2.0, 3.0]), np.array([10.0, 20.0, 20.0, 90.0])) == 1.0
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == -1.0
