"""Evaluate a policy on held-out problems, by its own rewards and by a gold reward that it never sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.errors import UserError
from llmkit.rewards import Weighted, total
from llmkit.rl.actor import Actor, score
from llmkit.rl.batches import describe
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import Rollout, RolloutSettings
from llmkit.training.distributed import world

FIRST_GROUP = 1 << 62  # request numbers of an evaluation, which no group in training has


class HeldOut:
    """Problems held out, tried the same way at each evaluation.

    gold  a reward that is not trained on, by which one that is can be seen to be gamed
    `rollouts` and `gold_rewards` are those of the last evaluation.
    """

    def __init__(
        self,
        actor: Actor,
        problems: Sequence[EncodedProblem],
        settings: RolloutSettings,
        gold: Weighted | None = None,
    ) -> None:
        self._actor, self._problems, self._settings, self._gold = actor, list(problems), settings, gold
        self.rollouts: list[Rollout] = []
        self.gold_rewards: list[float] = []

    def evaluate(self) -> dict[str, float]:
        """`val_reward`, `val_success`, `val_length` and others of `describe`; with a gold reward `val_gold` and its
        standard error over problems, `val_gold_se`."""
        self._actor.renew()
        groups = self._actor.attempt(self._problems, self._settings, step=0, first_group=FIRST_GROUP)
        self.rollouts = [rollout for group in groups for rollout in group]
        figures = {f"val_{name}": value for name, value in describe(groups, self._actor.rewards).items()}
        if self._gold is not None:
            self.gold_rewards = world().broadcast(self._gold_rewards(self._gold) if world().leads else None)
            by_group = np.array(self.gold_rewards).reshape(len(groups), -1)
            counts = (~np.isnan(by_group)).sum(1)
            means = np.nansum(by_group[counts > 0], 1) / counts[counts > 0]  # of attempts that it could judge
            if not len(means):
                raise UserError(
                    f"--gold {self._gold.reward.name}: expected a number for some attempt, found None for all"
                )
            figures["val_gold"] = round(float(means.mean()), 5)
            figures["val_gold_se"] = round(float(means.std() / math.sqrt(len(means))), 5)
        return figures

    def _gold_rewards(self, gold: Weighted) -> list[float]:
        rewards = total(score(self.rollouts, [gold], self._settings.max_tokens), [gold])
        return [math.nan if value is None else value for value in rewards]

    def disagreements(self, count: int) -> list[dict[str, Any]]:
        """The attempts of the last evaluation that the rewards think most of in comparison with the gold one.

        Both are measured in deviations from their means, and the records are ordered by the difference.
        """
        rewards = _standardised([rollout.reward for rollout in self.rollouts])
        difference = rewards - _standardised(self.gold_rewards)
        order = np.argsort(-difference, kind="stable")[:count]  # NaN, what one could not judge, comes last
        order = order[~np.isnan(difference[order])].tolist()
        return [
            {**_brief(self.rollouts[i]), "gold": self.gold_rewards[i], "difference": round(float(difference[i]), 3)}
            for i in order
        ]


def _brief(rollout: Rollout) -> dict[str, Any]:
    record = rollout.record()
    return {name: record[name] for name in ("prompt", "completion", "reward", "rewards", "finish_reason")}


def _standardised(values: Sequence[float]) -> np.ndarray:
    array = np.array(values, np.float64)
    return (array - np.nanmean(array)) / max(float(np.nanstd(array)), 1e-9)
