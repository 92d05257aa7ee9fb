"""Warm-up, plateau, decay."""

import pytest

from llmkit.training.optimizer import Schedule


def test_factor_rises_stays_and_falls_to_the_end():
    schedule = Schedule(warmup_steps=4, decay_fraction=0.5, final_factor=0.1)
    factors = [schedule.factor(step, step / 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[20] == pytest.approx(0.1)
    assert sorted(factors[10:], reverse=True) == factors[10:]
