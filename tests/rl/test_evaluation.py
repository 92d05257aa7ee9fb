"""A policy looked at between steps: the gold reward with its weight, what is shown of it, and what is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from attempts import attempt

from llmkit.rewards import parse_rewards
from llmkit.rl.batches import describe
from llmkit.rl.evaluation import HeldOut
from llmkit.rl.monitor import Limits, Watch
from llmkit.rl.rollouts import RolloutSettings

REWARDS = [0.1, 0.9, 0.8, 0.5]  # of attempts of 2, 4, 6 and 8 tokens
HOW = RolloutSettings(1, 8)


def held_out(gold: str) -> HeldOut:
    def attempts(*_, **__):
        lengths = range(2, 10, 2)
        return [[attempt([1], [65] * n, reward=worth)] for n, worth in zip(lengths, REWARDS, strict=True)]

    actor = SimpleNamespace(attempt=attempts, renew=lambda: None, rewards=[])
    return HeldOut(actor, [], HOW, parse_rewards([gold])[0])


def test_the_gold_reward_has_its_weight():
    looked = held_out("length:-2")
    found = looked.evaluate()
    assert looked.gold_rewards == [-0.5, -1, -1.5, -2] and found["val_gold"] == -1.25
    assert found["val_gold_se"] == pytest.approx(0.3125**0.5 / 2, abs=1e-4)


def test_the_share_of_attempts_with_a_call_is_told():
    called, plain = attempt([1], [65]), attempt([1], [66])
    called.completion.tool_calls.append({"tool": "calc", "input": "1 + 1", "result": "2"})
    assert describe([[called, plain], [plain, plain]], [])["called"] == 0.25
    assert describe([[called, plain]], [])["calls_failed"] == 0.0
    assert "called" not in describe([[plain]], [])


def test_most_is_shown_of_what_the_rewards_like_and_the_gold_one_does_not():
    looked = held_out("length:-1")
    looked.evaluate()
    shown = looked.disagreements(2)
    assert [(row["reward"], row["gold"]) for row in shown] == [(0.8, -0.75), (0.5, -1)]  # 1.17 and 1.10 deviations
    assert shown[0]["difference"] > shown[1]["difference"] > 0


@pytest.mark.parametrize("stop", [False, True])
def test_gaming_is_told_once_and_stops_where_that_is_wanted(capsys, stop):
    trainer = SimpleNamespace(step=7, stopping=False)
    watch = Watch(trainer, SimpleNamespace(ended=None), False, Limits(1e-3))
    golds = iter([0.5, 0.1, 0.1, 0.1, 0.1, 0.6])
    looked = SimpleNamespace(
        evaluate=lambda: {"val_reward": trainer.step, "val_gold": next(golds), "val_gold_se": 0.01}
    )
    evaluate = watch.evaluation(looked, stop)
    for _ in range(6):
        trainer.step += 1
        evaluate()
    said = capsys.readouterr().err
    assert said.count("the reward is gamed: it has gone from 8 to 10") == 1 and said.count("gamed") == 1
    assert trainer.stopping is stop and (watch.stopped is not None) is stop
    assert ("--stop-on-hack would stop here" in said) is not stop
