"""Batches of attempts: refills, the end of what can be learnt, overlong attempts, and a log that is gone on with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from attempts import attempt, problem

from llmkit.errors import UserError
from llmkit.rewards import Reward, Weighted
from llmkit.rl.algorithms import ALGORITHMS
from llmkit.rl.batches import BatchSettings, Collector, describe, handle_overlong
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import RolloutLog, RolloutSettings


class Verifier(Reward):
    name, verifies = "verifier", True


VERIFIER = [Weighted(Verifier(), 1.0)]


class Actor:
    """Attempts of two at each problem; `worth` tells what those of a group are worth."""

    tokens, seconds, judging, rewards = 0, 0.0, 0.0, VERIFIER

    def __init__(self, worth):
        self.worth, self.asked = worth, []

    def renew(self):
        pass

    def attempt(self, problems, settings, *, step, first_group):
        self.asked.append(len(problems))
        groups = []
        for number in range(first_group, first_group + len(problems)):
            group = [attempt([1, 2], [3, 4], group=number, reward=float(reward)) for reward in self.worth(number)]
            for one in group:
                one.step = step
                if np.isnan(one.reward):  # as the actor marks what a reward could not judge
                    one.rewards, one.judged, one.trained = {"verifier": None}, False, False
            groups.append(group)
        return groups


def collector(worth, tmp_path, *, problems=4, refill=1.0, of=100, algo="grpo"):
    algorithm, actor = ALGORITHMS[algo], Actor(worth)
    settings = BatchSettings(problems, refill, 0.0, True, 0)
    encoded = [EncodedProblem(problem(f"{i}?"), [1, 2]) for i in range(of)]
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    made = Collector(actor, encoded, algorithm, RolloutSettings(2, 8), settings, log=log, pad=0)
    return made, actor


def logged(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_at_its_end_knows_what_it_has_sampled(tmp_path):
    made, _ = collector(lambda number: (0, 1), tmp_path)
    next(made.batches(0))
    again, _ = collector(lambda number: (0, 1), tmp_path)
    again.batches(1)  # no step follows
    assert again.groups == made.groups == 4


def test_groups_without_signal_are_replaced(tmp_path):
    made, actor = collector(lambda number: (0, number % 2), tmp_path)
    batch = next(made.batches(0))
    assert actor.asked == [4, 4] and made.figures["groups"] == 8 and made.figures["groups_without_signal"] == 4
    assert len({row["group"] for row in logged(tmp_path) if row["trained"]}) == 4
    assert (batch.targets >= 0).sum() == 4 * 2 * 2


def test_a_baseline_of_the_batch_learns_from_groups_whose_rewards_are_all_equal(tmp_path):
    """REINFORCE++ (arXiv 2501.03262) normalises over the batch: a problem solved is worth more than others."""
    made, actor = collector(lambda number: (number % 2,) * 2, tmp_path, algo="reinforce++")
    next(made.batches(0))
    assert actor.asked == [4] and made.figures["groups_without_signal"] == 0
    assert [row["advantage"] for row in logged(tmp_path)] == [-1, -1, 1, 1] * 2
    alone, _ = collector(lambda number: (number % 2,), tmp_path, algo="reinforce++")
    next(alone.batches(0))
    assert [row["advantage"] for row in logged(tmp_path)] == [-1, 1] * 2
    equal, actor = collector(lambda number: (1, 1), tmp_path, algo="reinforce++")
    assert next(equal.batches(0), None) is None and len(actor.asked) == 8
    assert "all attempts at 32 problems were worth the same" in equal.ended


def test_replacements_are_bounded(tmp_path):
    made, actor = collector(lambda number: (0, number % 4 == 0), tmp_path, refill=0.5)
    next(made.batches(0))
    assert sum(actor.asked) == 6
    made, actor = collector(lambda number: (0, number % 4 == 0), tmp_path / "none", refill=0.0)
    (tmp_path / "none").mkdir()
    next(made.batches(0))
    assert actor.asked == [4]


def test_more_than_is_needed_is_logged_and_not_trained_on(tmp_path):
    made, _ = collector(lambda number: (0, number != 1), tmp_path)
    next(made.batches(0))
    rows = logged(tmp_path)
    assert len({row["group"] for row in rows if row["trained"]}) == 4 < len({row["group"] for row in rows})


def test_it_ends_when_there_is_nothing_left_to_learn(tmp_path):
    made, actor = collector(lambda number: (1, 0 if number in (1, 3) else 1), tmp_path)
    batches = made.batches(0)
    assert next(batches) is not None and made.ended is None
    assert next(batches, None) is None
    assert "nothing left to learn" in made.ended and "harder problems" in made.ended
    assert "--max-tokens" not in made.ended
    assert len(actor.asked) == 2 + 8


def test_problems_that_are_never_solved_are_told_of(tmp_path):
    made, _ = collector(lambda number: (0, 0), tmp_path)
    assert next(made.batches(0), None) is None
    assert "sometimes solved" in made.ended


def test_a_killed_step_is_made_again_from_the_same_group(tmp_path):
    made, _ = collector(lambda number: (0, 1), tmp_path)
    batches = made.batches(0)
    for _ in range(3):
        next(batches)
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    with (tmp_path / "rollouts.jsonl").open("ab") as handle:
        handle.write(b'{"step": 4, "gro')
    resumed, _ = collector(lambda number: (0, 1), tmp_path)
    next(resumed.batches(2))
    assert (tmp_path / "rollouts.jsonl").read_bytes() == before and resumed.groups == 12


def test_every_epoch_goes_through_all_problems_in_another_order(tmp_path):
    made, _ = collector(lambda number: (0, 1), tmp_path, of=6)
    asked = [made._problem(number).problem.prompt for number in range(12)]
    assert sorted(asked[:6]) == sorted(asked[6:]) == [f"{i}?" for i in range(6)] and asked[:6] != asked[6:]


@pytest.mark.parametrize(("length", "penalty"), [(80, 0.0), (90, 0.5), (100, 1.0)])
def test_overlong_attempts_are_penalised_by_equation_13_of_dapo(length, penalty):
    one = attempt([1], [2] * length, reward=1.0, finish_reason="length" if length == 100 else "stop")
    handle_overlong(one, "penalise", max_tokens=100)
    assert one.reward == pytest.approx(1.0 - penalty) and one.trained


def test_overlong_attempts_are_masked_or_kept():
    cut, whole = (attempt([1], [2], reward=1.0, finish_reason=reason) for reason in ("length", "stop"))
    for one in (cut, whole):
        handle_overlong(one, "mask", max_tokens=1)
    assert (cut.trained, whole.trained, cut.reward) == (False, True, 1.0)
    kept = attempt([1], [2], finish_reason="length")
    handle_overlong(kept, "keep", max_tokens=1)
    assert kept.trained and kept.reward == 0


def test_an_attempt_that_cannot_be_judged_has_no_part_in_its_group(tmp_path):
    made, _ = collector(lambda number: (1.0, np.nan, 0.0, 0.0), tmp_path, problems=2)
    batch = next(made.batches(0))
    assert made.figures["unjudged"] == 0.25 and made.figures["reward"] == pytest.approx(1 / 3, abs=1e-4)
    assert made.figures["success"] == pytest.approx(1 / 3, abs=1e-4) and made.figures["groups_without_signal"] == 0
    records = logged(tmp_path)
    assert [record["reward"] for record in records[:4]] == [1, None, 0, 0]
    assert [record["trained"] for record in records[:4]] == [True, False, True, True]
    assert sum(record["advantage"] for record in records[:4]) == pytest.approx(0, abs=1e-4)
    assert batch.token_ids.flatten().tolist().count(3) == 2 * 3  # three attempts in each of two groups


def test_a_reward_that_can_judge_nothing_ends_the_run(tmp_path):
    made, _ = collector(lambda number: (np.nan, np.nan), tmp_path)
    with pytest.raises(UserError, match=r"--reward verifier: expected a number for some of \d+ attempts, found None"):
        next(made.batches(0))


def test_figures_of_groups():
    groups = [[attempt([1], [2], reward=1.0), attempt([1], [2, 3])], [attempt([1], [2]), attempt([1], [2])]]
    found = describe(groups, VERIFIER)
    assert found["reward"] == found["success"] == found["reward/verifier"] == 0.25
    assert found["pass_at_group"] == 0.5 and found["length"] == 1.25 and np.isfinite(list(found.values())).all()
