"""Evaluating a policy between steps: metrics of rollouts, the gold reward, logged samples, and messages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from attempts import attempt

from llmkit.rewards import Reward, Weighted, judge, parse_rewards
from llmkit.rl.evaluation import describe, gold_figures, write_disagreements
from llmkit.rl.monitor import Watch
from tests.helpers.jsonl import lines

# rewards of rollouts with 2, 4, 6 and 8 tokens
ROLLOUTS = [
    attempt([1], [65] * n, reward=reward) for n, reward in zip(range(2, 10, 2), [0.1, 0.9, 0.8, 0.5], strict=True)
]


def judged_by(spec: str) -> list[float]:
    return [reward for _, reward in judge([rollout.as_attempt(8) for rollout in ROLLOUTS], parse_rewards([spec]))]


def test_the_gold_reward_has_its_weight():
    gold = judged_by("length:-2")
    figures = gold_figures(gold, 4, "length")
    assert gold == [-0.5, -1, -1.5, -2] and figures["val_gold"] == -1.25
    assert figures["val_gold_se"] == pytest.approx(0.3125**0.5 / 2, abs=1e-4)


def test_samples_with_a_high_reward_and_a_low_gold_reward_are_shown_first(tmp_path):
    write_disagreements(tmp_path, ROLLOUTS, judged_by("length:-1"), 2)
    shown = lines(tmp_path / "disagreements.jsonl")
    assert [(row["reward"], row["gold"]) for row in shown] == [(0.8, -0.75), (0.5, -1)]  # 1.17 and 1.10 deviations
    assert shown[0]["difference"] > shown[1]["difference"] > 0


def test_figures_of_groups():
    class Verifier(Reward):
        verifies = True

    groups = [[attempt([1], [2], reward=1.0), attempt([1], [2, 3])], [attempt([1], [2]), attempt([1], [2])]]
    figures = describe(groups, [Weighted(Verifier("verifier"), 1.0)])
    assert figures["reward"] == figures["success"] == figures["reward/verifier"] == 0.25
    assert figures["pass_at_group"] == 0.5 and figures["length"] == 1.25 and np.isfinite(list(figures.values())).all()


def test_the_share_of_rollouts_with_a_call_is_reported():
    called, plain = attempt([1], [65]), attempt([1], [66])
    called.completion.tool_calls.append({"tool": "calc", "input": "1 + 1", "result": "2"})
    assert describe([[called, plain], [plain, plain]], [])["called"] == 0.25
    assert describe([[called, plain]], [])["calls_failed"] == 0.0
    assert "called" not in describe([[plain]], [])


@pytest.mark.parametrize("stop", [False, True])
def test_gaming_is_reported_once_and_stops_the_run_on_request(capsys, stop):
    trainer = SimpleNamespace(step=7, stopping=False)
    watch = Watch(trainer, 1e-3, None, stop_on_hack=stop)
    for gold in (0.5, 0.1, 0.1, 0.1, 0.1, 0.6):
        trainer.step += 1
        watch.note_evaluation({"val_reward": trainer.step, "val_gold": gold, "val_gold_se": 0.01})
    said = capsys.readouterr().err
    assert said.count("the reward is gamed: it went from 8 to 10") == 1 and said.count("gamed") == 1
    assert trainer.stopping is stop and (watch.stopped is not None) is stop
    assert ("--stop-on-hack would stop here" in said) is not stop
