"""The batch of each step: problems drawn, attempts made, judged and logged, advantages, rows to train on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.data.batches import shuffled
from llmkit.errors import UserError
from llmkit.io.progress import counted
from llmkit.model.transformer import Transformer
from llmkit.rewards import Weighted
from llmkit.rl.actor import Actor
from llmkit.rl.algorithms import Algorithm, advantages, is_informative, token_weights
from llmkit.rl.policy_loss import reference_logprobs
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import Rollout, RolloutLog, RolloutSettings
from llmkit.rl.rows import PolicyRows, pack_rollouts
from llmkit.training.distributed import world

OVERLONG_BUFFER = 0.2  # share of the longest attempt over which a penalty grows to 1: DAPO's 4,096 of 20,480
ROUNDS_WITHOUT_SIGNAL = 8  # of attempts, all worth the same within their groups, after which a run ends


@dataclass(frozen=True)
class BatchSettings:
    """Settings of batches.

    problems       of a step
    refill         at most so many times as many more, in place of groups whose rewards are all equal
    kl_coef        weight of the divergence from the reference
    share_prompts  whether a prompt is computed once for all attempts at it, by a mask that only torch's attention takes
    """

    problems: int
    refill: float
    kl_coef: float
    share_prompts: bool
    seed: int


class Collector:
    """Makes the batches of a run, each from the policy as it is then.

    `figures` tells of the last batch: rewards, success, lengths, groups, what sampling cost; `rollouts` are its
    attempts, `groups` how many groups the run has sampled. `ended` says in words why there is no further batch.
    """

    def __init__(
        self,
        actor: Actor,
        problems: Sequence[EncodedProblem],
        algorithm: Algorithm,
        rollout_settings: RolloutSettings,
        settings: BatchSettings,
        *,
        log: RolloutLog,
        pad: int,
        reference: Transformer | None = None,
    ) -> None:
        self._actor, self._problems, self._algorithm = actor, problems, algorithm
        self._rollout_settings, self._settings = rollout_settings, settings
        self._log, self._pad, self._reference = log, pad, reference
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # of an epoch
        self.groups = 0
        self.figures: dict[str, float] = {}
        self.rollouts: list[Rollout] = []
        self.ended: str | None = None
        self.handed_over = time.monotonic()

    def batches(self, steps: int) -> Iterator[PolicyRows]:
        """The batches that follow so many steps, each made when it is asked for, until nothing can be learnt."""
        self.groups = self._log.trim(steps)  # also where no step follows: what was sampled is told at the end
        return self._batches(steps)

    def _batches(self, steps: int) -> Iterator[PolicyRows]:
        while (batch := self._collect(steps + 1)) is not None:
            self.handed_over = time.monotonic()
            yield batch
            steps += 1

    def _collect(self, step: int) -> PolicyRows | None:
        actor, settings, max_tokens = self._actor, self._settings, self._rollout_settings.max_tokens
        tokens, seconds, judging = actor.tokens, actor.seconds, actor.judging
        actor.renew()
        groups, all_groups = self._sample(step)
        if not groups:
            self.ended = self._nothing_to_learn(all_groups)
            return None
        groups = [[rollout for rollout in group if rollout.judged] for group in groups]
        rollouts = [rollout for group in groups for rollout in group]
        if self._reference is not None:
            temperature = self._rollout_settings.temperature
            reference_logprobs(self._reference, rollouts, temperature, settings.share_prompts)
        self._set_advantages(groups)
        trained = [rollout for rollout in rollouts if rollout.trained]
        weights = token_weights(self._algorithm.weighting, [rollout.token_count for rollout in trained], max_tokens)
        batch, _ = pack_rollouts(trained, weights.tolist(), self._pad, settings.share_prompts)
        self.rollouts = [rollout for group in all_groups for rollout in group]
        self._log.write(self.rollouts)
        sampled, spent = int(world().sum(actor.tokens - tokens)[0]), actor.seconds - seconds
        self.figures = {
            **describe(all_groups, self._actor.rewards),
            "groups": len(all_groups),
            "groups_without_signal": sum(not self._teaches(group) for group in all_groups),
            "sampled_tokens": sampled,
            "sampled_tokens_per_second": round(sampled / max(spent, 1e-9), 1),
            "sampling_seconds": round(spent, 3),
            "judging_seconds": round(actor.judging - judging, 3),
            "batch_tokens": batch.tokens,
        }
        return batch

    def example(self) -> str:
        """The first attempt of the last batch, for a look at a run."""
        first = self.rollouts[0]
        return f"{first.problem.prompt} -> {first.completion.text} ({first.reward:g})"

    def _sample(self, step: int) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """The groups to train on, none where no round had one, and all that were sampled for them."""
        settings, every, useful = self._settings, [], []
        allowed, count = round(settings.problems * (1 + settings.refill)), settings.problems
        for _ in range(ROUNDS_WITHOUT_SIGNAL):
            while count > 0:
                groups = self._attempts(step, count)
                every += groups
                useful += [group for group in groups if self._teaches(group)]
                if not useful:
                    break
                missing, left = settings.problems - len(useful), allowed - len(every)
                count = min(left, math.ceil(missing * len(every) / len(useful)))
            if is_informative([reward for group in useful for reward in _rewards(group)]):
                break
            useful, count = [], settings.problems  # a batch all of whose attempts are worth the same
        used = useful[: settings.problems]
        numbers = {group[0].group for group in used}
        for rollout in (rollout for group in every for rollout in group):
            rollout.trained &= rollout.group in numbers
        return used, every

    def _nothing_to_learn(self, groups: Sequence[Sequence[Rollout]]) -> str:
        figures = describe(groups, self._actor.rewards)
        advice = "harder problems, or more attempts (--group)"
        if (
            figures["reward"] <= min(worth for group in groups for worth in _rewards(group))
            and figures.get("success", 0.0) < 0.5
        ):
            advice = "problems that are sometimes solved, or more attempts (--group)"
        if figures["cut"] > 0:
            advice += ", or more --max-tokens"
        each = "each of " if self._algorithm.compares_within_groups else ""
        return (
            f"nothing left to learn: all attempts at {each}{counted(len(groups), 'problem')} were worth the same "
            f"(the mean reward is {figures['reward']:.3g}); give {advice}"
        )

    def _teaches(self, group: Sequence[Rollout]) -> bool:
        """True if a group has advantages other than 0."""
        apart = not self._algorithm.compares_within_groups or is_informative(_rewards(group))
        return apart and any(rollout.trained for rollout in group)

    def _attempts(self, step: int, count: int) -> list[list[Rollout]]:
        problems = [self._problem(number) for number in range(self.groups, self.groups + count)]
        groups = self._actor.attempt(problems, self._rollout_settings, step=step, first_group=self.groups)
        self.groups += count
        for rollout in (rollout for group in groups for rollout in group):
            handle_overlong(rollout, self._algorithm.overlong, self._rollout_settings.max_tokens)
        return groups

    def _problem(self, number: int) -> EncodedProblem:
        """The problem of a group; in every epoch they have another order."""
        epoch, index = divmod(number, len(self._problems))
        if self._order[0] != epoch:
            self._order = epoch, shuffled(len(self._problems), self._settings.seed, epoch)
        return self._problems[self._order[1][index]]

    def _set_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        penalty = self._settings.kl_coef if self._algorithm.kl == "reward" else 0.0
        worth = [[rollout.reward - penalty * _divergence(rollout) for rollout in group] for group in groups]
        for group, values in zip(groups, advantages(self._algorithm, worth), strict=True):
            for rollout, advantage in zip(group, values.tolist(), strict=True):
                rollout.advantage = advantage


def _rewards(group: Sequence[Rollout]) -> list[float]:
    return [rollout.reward for rollout in group if rollout.judged]


def _divergence(rollout: Rollout) -> float:
    """log(policy / reference) of a whole attempt, whose mean is the divergence."""
    if rollout.reference_logprobs is None:
        return 0.0
    chosen = np.array(rollout.completion.sampled, bool)
    return float((np.array(rollout.completion.logprobs) - rollout.reference_logprobs)[chosen].sum())


def handle_overlong(rollout: Rollout, overlong: str, max_tokens: int) -> None:
    """Treat an attempt that was cut: "keep", "mask" (no part in the loss), or "penalise".

    The penalty takes up to 1 away over the last fifth of the length (Yu et al. 2025, arXiv 2503.14476, equation 13).
    """
    if overlong == "mask":
        rollout.trained &= rollout.completion.finish_reason != "length"
    elif overlong == "penalise":
        buffer = max(1.0, OVERLONG_BUFFER * max_tokens)
        beyond = rollout.token_count - (max_tokens - buffer)
        over = min(1.0, max(0.0, beyond / buffer))
        rollout.reward -= over


def describe(groups: Sequence[Sequence[Rollout]], rewards: Sequence[Weighted]) -> dict[str, float]:
    """Figures of groups of attempts: the mean `reward` and its parts, `length` in tokens, `cut` (share that was),
    `called` (share that called a tool) and `calls_failed` (share of the calls that failed) where any did, and where a
    reward verifies `success` and `pass_at_group` (share of groups with a right attempt). Attempts that a reward could
    not judge count only in `length`, `cut`, and `unjudged`, their share where there are any.

    Raises UserError where none could be judged.
    """
    every = [rollout for group in groups for rollout in group]
    judged = [rollout for rollout in every if rollout.judged]
    if not judged:
        names = [
            weighted.reward.name for weighted in rewards if None in (one.rewards[weighted.reward.name] for one in every)
        ]
        raise UserError(
            f"--reward {' and '.join(names)}: expected a number for some of {counted(len(every), 'attempt')}, found "
            "None, which says that it cannot judge, for all"
        )
    figures: dict[str, Any] = {
        "reward": np.mean(_rewards(every)),
        "length": np.mean([rollout.token_count for rollout in every]),
        "cut": np.mean([rollout.completion.finish_reason == "length" for rollout in every]),
    }
    if len(judged) < len(every):
        figures["unjudged"] = 1 - len(judged) / len(every)
    called = [bool(rollout.completion.tool_calls) for rollout in every]
    if any(called):
        figures["called"] = np.mean(called)
        calls = [call for rollout in every for call in rollout.completion.tool_calls]
        figures["calls_failed"] = np.mean([call.get("failed", False) for call in calls])
    for weighted in rewards:
        name = weighted.reward.name
        figures[f"reward/{name}"] = np.mean([rollout.rewards[name] or 0.0 for rollout in judged])
    verifier = next((weighted.reward.name for weighted in rewards if weighted.reward.verifies), None)
    if verifier is not None:
        right = [[(rollout.rewards[verifier] or 0.0) >= 1.0 for rollout in group if rollout.judged] for group in groups]
        figures["success"] = np.mean([solved for group in right for solved in group])
        figures["pass_at_group"] = np.mean([any(group) for group in right])
    return {name: round(float(value), 5) for name, value in figures.items()}
