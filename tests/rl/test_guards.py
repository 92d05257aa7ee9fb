"""When a run is stopped, and when noise is only noise."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.errors import UserError
from llmkit.rl.guards import CollapseGuard, HackWatch, check_difference


def test_a_difference_above_the_bound_is_told():
    check_difference({"logprob_difference": 1e-4}, 1e-3)
    for found in (2e-3, float("nan")):
        with pytest.raises(UserError, match=r"disagree.*--max-difference is 0.001"):
            check_difference({"logprob_difference": found}, 1e-3)


def steps(rewards, error=0.02):
    return [{"reward": reward, "reward_se": error} for reward in rewards]


def test_a_collapse_is_seen_and_noise_is_not():
    rng = np.random.default_rng(0)
    rising = np.linspace(0.2, 0.8, 60) + rng.normal(0, 0.02, 60)
    guard = CollapseGuard()
    assert not any(guard.note(row) for row in steps(rising))
    assert not any(guard.note(row) for row in steps([0.7, 0.2, 0.68, 0.8, 0.7, 0.75, 0.8]))
    assert "fallen from" in str([guard.note(row) for row in steps([0.05] * 8)])


def test_a_fall_from_the_very_beginning_is_a_collapse():
    guard = CollapseGuard()
    found = [guard.note(row) for row in steps([0.5] * 6 + [0.1] * 8)]
    assert any(found) and not any(found[:10])


def test_a_resumed_guard_goes_on_where_it_was():
    history = steps([0.2] * 5 + [0.8] * 5)
    guard = CollapseGuard(history)
    assert [bool(guard.note(row)) for row in steps([0.1] * 8)][-1]


def look(reward, gold, error=0.02):
    return {"val_reward": reward, "val_gold": gold, "val_gold_se": error}


def test_a_reward_that_rises_while_the_gold_one_falls_is_gamed():
    watch = HackWatch()
    assert not any(watch.note(row) for row in (look(0.1, 0.3), look(0.4, 0.5), look(0.6, 0.48)))
    assert watch.note(look(0.7, 0.3)) is None  # once may be chance
    assert "gamed" in str(watch.note(look(0.8, 0.2)))


def looks_at(shares, rng):
    """Evaluations of 200 problems, right or wrong, with a reward that rises; a tenth change from one to the next."""
    right = rng.random(200) < shares[0]
    for step, share in enumerate(shares):
        right = np.where(rng.random(200) < 0.1, rng.random(200) < share, right)
        yield look(step, right.mean(), right.std() / 200**0.5)


def test_luck_is_no_gaming_and_a_slow_fall_is():
    rng = np.random.default_rng(0)
    stopped = [any(map(HackWatch().note, looks_at([0.8] * 60, rng))) for _ in range(100)]
    assert sum(stopped) <= 5
    falling = [0.8] * 20 + [0.8 - 0.01 * i for i in range(40)]
    assert all(any(map(HackWatch().note, looks_at(falling, rng))) for _ in range(100))


@pytest.mark.parametrize(
    "then",
    [
        [look(0.7, 0.47), look(0.8, 0.46), look(0.9, 0.45)],  # within noise
        [look(0.2, 0.2), look(0.1, 0.1)],  # both fall: no gaming
        [look(0.7, 0.3), look(0.8, 0.6), look(0.9, 0.5)],  # the gold one comes back
    ],
)
def test_what_is_not_gaming(then):
    watch = HackWatch([look(0.4, 0.5)])
    assert not any(watch.note(row) for row in then)
