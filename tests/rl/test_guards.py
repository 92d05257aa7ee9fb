"""When guards stop a run, and when they treat changes as noise."""

from __future__ import annotations

from unittest.mock import MagicMock

import numpy as np
import pytest

from llmkit.errors import UserError
from llmkit.rl.monitor import CollapseGuard, HackWatch, Watch


def test_a_difference_above_the_bound_is_reported():
    watch = Watch(MagicMock(), 1e-3)
    watch.note_step({"logprob_difference": 1e-4, "reward": 0.0})
    for found in (2e-3, float("nan")):
        with pytest.raises(UserError, match=r"expected at most 0\.001; saved in"):
            watch.note_step({"logprob_difference": found, "reward": 0.0})


def steps(rewards):
    return [{"reward": float(reward)} for reward in rewards]


def fallen(rewards, guard=None) -> list[int]:
    """Return the steps at which a collapse is reported."""
    guard = guard or CollapseGuard()
    return [step for step, row in enumerate(steps(rewards)) if guard.note(row)]


def test_a_collapse_is_seen_and_a_bad_step_is_not():
    rng = np.random.default_rng(0)
    rising = np.linspace(0.2, 0.8, 60) + rng.normal(0, 0.02, 60)
    assert not fallen([*rising, 0.1, 0.7, 0.75, 0.68, 0.8, 0.7, 0.75, 0.8])
    (first, *_) = fallen([*rising, *[0.05] * 12])
    assert 62 <= first <= 70


def test_a_fall_from_the_very_beginning_is_a_collapse():
    assert fallen([0.5] * 6 + [0.1] * 10)


@pytest.mark.parametrize("groups", [1, 2, 4, 16])
def test_noise_is_not_a_collapse(groups):
    rng = np.random.default_rng(groups)
    runs = [(rng.random((200, groups * 8)) < 0.5).mean(1) for _ in range(100)]
    assert not any(fallen(run) for run in runs)


def test_a_reward_below_zero_may_collapse_too():
    assert fallen([-1.0] * 6 + [-0.5] * 6 + [-3.0] * 10) and not fallen([-1.0, -1.1, -0.9, -1.05] * 10)


def test_a_resumed_guard_keeps_its_state():
    history = steps([0.2] * 5 + [0.8] * 5)
    whole = fallen([0.2] * 5 + [0.8] * 5 + [0.1] * 10)
    assert [10 + step for step in fallen([0.1] * 10, CollapseGuard(history))] == whole != []


def look(reward, gold, error=0.02):
    return {"val_reward": reward, "val_gold": gold, "val_gold_se": error}


def test_a_reward_that_rises_while_the_gold_one_falls_is_gamed():
    watch = HackWatch()
    assert not any(watch.note(row) for row in (look(0.1, 0.3), look(0.4, 0.5), look(0.6, 0.48)))
    assert watch.note(look(0.7, 0.3)) is None  # once may be noise
    assert "gamed" in str(watch.note(look(0.8, 0.2)))


def looks_at(shares, rng):
    """Return evaluations of 200 problems with a rising reward; a tenth of the problems change each time."""
    right = rng.random(200) < shares[0]
    for step, share in enumerate(shares):
        right = np.where(rng.random(200) < 0.1, rng.random(200) < share, right)
        yield look(step, right.mean(), right.std() / 200**0.5)


def test_noise_is_not_gaming_but_a_slow_fall_is():
    rng = np.random.default_rng(0)
    stopped = [any(map(HackWatch().note, looks_at([0.8] * 60, rng))) for _ in range(100)]
    assert sum(stopped) <= 5
    falling = [0.8] * 20 + [0.8 - 0.01 * i for i in range(40)]
    assert all(any(map(HackWatch().note, looks_at(falling, rng))) for _ in range(100))


@pytest.mark.parametrize(
    "then",
    [
        [look(0.7, 0.47), look(0.8, 0.46), look(0.9, 0.45)],  # within noise
        [look(0.2, 0.2), look(0.1, 0.1)],  # both fall: not gamed
        [look(0.7, 0.3), look(0.8, 0.6), look(0.9, 0.5)],  # the gold reward recovers
    ],
)
def test_changes_that_are_not_gaming(then):
    watch = HackWatch([look(0.4, 0.5)])
    assert not any(watch.note(row) for row in then)


def test_an_evaluation_without_what_is_trained_on_is_not_judged():
    watch = Watch(None, proxy="val_margin", stop_on_hack=True)  # margins need preferred and rejected answers
    for gold in (1.0, 0.0, 0.0):
        watch.note_evaluation({"val_gold": gold, "val_gold_se": 0.01})
    assert watch.stopped is None
