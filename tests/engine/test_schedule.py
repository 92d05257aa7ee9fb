"""Warm-up, plateau, decay; and a pace that follows the clock."""

import pytest

from llmkit.engine.schedule import Pace, Schedule


def test_factor_rises_stays_and_falls_to_the_end():
    schedule = Schedule(warmup_steps=4, decay_fraction=0.5, final_factor=0.1)
    factors = [schedule.factor(step, step / 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[20] == pytest.approx(0.1)
    assert sorted(factors[10:], reverse=True) == factors[10:]


def test_pace_reaches_the_end_when_the_time_is_up():
    """A machine that slows down to a third half-way still ends with progress 1 when the seconds are gone."""
    pace, clock, budget = Pace(per_step=0.001), 0.0, 100.0
    for step in range(10_000):
        seconds = 0.1 if clock < 50 else 0.3
        pace.advance()
        clock += seconds
        if step % 10 == 9:
            pace.replan(budget - clock, seconds)
        if pace.finished:
            break
    assert clock == pytest.approx(budget, abs=3.5)


def test_pace_without_time_left_ends_with_the_next_step():
    pace = Pace(per_step=0.01, progress=0.4)
    pace.replan(seconds_left=-5.0, seconds_per_step=0.1)
    pace.advance()
    assert pace.finished
