"""Advantages and weights against their papers' formulas, worked out by hand."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from attempts import attempt

from llmkit.rl import algorithms
from llmkit.rl.algorithms import ALGORITHMS, advantages, is_informative, penalise_length, token_weights

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]]


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_groups_are_centred_and_scaled(name):
    first, second = advantages(ALGORITHMS[name], REWARDS)
    assert first == pytest.approx([1, -1, -1, 1])
    deviation = np.sqrt((3 * 0.75**2 + 2.25**2) / 4)
    assert second == pytest.approx(np.array([-0.75, -0.75, -0.75, 2.25]) / deviation)


def test_dr_grpo_does_not_divide():
    assert advantages(ALGORITHMS["dr-grpo"], REWARDS)[1] == pytest.approx([-0.75, -0.75, -0.75, 2.25])


def test_rloo_excludes_each_rollout_from_its_baseline():
    for group, found in zip(REWARDS, advantages(ALGORITHMS["rloo"], REWARDS), strict=True):
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            assert found[i] == pytest.approx(reward - sum(others) / len(others))


def test_reinforce_plus_plus_takes_mean_and_deviation_of_the_batch():
    every = np.concatenate(REWARDS)
    found = np.concatenate(advantages(ALGORITHMS["reinforce++"], REWARDS))
    assert found == pytest.approx((every - every.mean()) / every.std())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equal_rewards_give_no_advantage(name):
    for found in advantages(ALGORITHMS[name], [[0.1 + 0.2] * 3, [0.3] * 3]):
        assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("length", "penalty"), [(80, 0.0), (90, 0.5), (100, 1.0)])
def test_long_rollouts_are_penalized_by_equation_13_of_dapo(length, penalty):
    rollout = attempt([1], [2] * length, reward=1.0, finish_reason="length" if length == 100 else "stop")
    penalise_length(rollout, max_tokens=100)
    assert rollout.reward == pytest.approx(1.0 - penalty) and rollout.trained


def test_the_examples_of_the_documentation_hold():
    assert doctest.testmod(algorithms).failed == 0


def test_informative_groups_have_different_rewards():
    assert is_informative([0, 0, 1]) and not is_informative([0.3, 0.1 + 0.2]) and not is_informative([1])


def test_weights_of_tokens():
    lengths = [2, 6]

    def mean_of(weighting, values_by_sequence):
        weights = token_weights(weighting, lengths, max_tokens=8)
        summed = sum(w * v * n for w, v, n in zip(weights, values_by_sequence, lengths, strict=True))
        return summed / sum(lengths)

    assert mean_of("token", [1, 0]) == pytest.approx(2 / 8)
    assert mean_of("sequence", [1, 0]) == pytest.approx(1 / 2)
    assert mean_of("constant", [1, 0]) == pytest.approx(2 / 8 / 2)  # (2 tokens / max_tokens), mean over 2 sequences
    assert mean_of("sum", [1, 0]) == pytest.approx(2 / 2)
