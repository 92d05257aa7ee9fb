"""The batch of each step: problems drawn, attempts made, judged and logged, advantages, rows to train on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.data.batches import shuffled
from llmkit.errors import UserError
from llmkit.model.transformer import Transformer
from llmkit.rl.actor import Actor, Asking
from llmkit.rl.algorithms import Algorithm, advantages, is_informative, token_weights
from llmkit.rl.asking import AskedProblem
from llmkit.rl.policy_loss import PolicyLoss, reference_logprobs
from llmkit.rl.rollouts import Rollout, RolloutLog
from llmkit.rl.rows import PolicyRows, pack_rollouts

OVERLONG_BUFFER = 0.2  # share of the longest attempt over which a penalty grows to 1: DAPO's 4,096 of 20,480
REFERENCE_TOKENS = 8192  # at once, without gradients
DRAWS_WITHOUT_SIGNAL = 8  # rounds of attempts, all worth the same within their groups, after which a run stops


@dataclass(frozen=True)
class BatchSettings:
    """How batches are made.

    problems      of a step
    refill        at most so many times as many more, in place of groups whose rewards are all equal
    kl_coef       weight of the divergence from the reference
    share         whether a prompt is computed once for all attempts at it, by a mask that only torch's attention takes
    """

    problems: int
    refill: float
    kl_coef: float
    share: bool
    seed: int


class Collector:
    """Makes the batches of a run, each from the policy as it is then.

    `figures` tells of the last batch: rewards, success, lengths, groups, what sampling cost.
    """

    def __init__(
        self,
        actor: Actor,
        asked: Sequence[AskedProblem],
        algorithm: Algorithm,
        how: Asking,
        settings: BatchSettings,
        *,
        loss: PolicyLoss,
        log: RolloutLog,
        pad: int,
        reference: Transformer | None = None,
    ) -> None:
        self._actor, self._asked, self._algorithm, self._how, self._settings = actor, asked, algorithm, how, settings
        self._loss, self._log, self._pad, self._reference = loss, log, pad, reference
        self._quiet_rounds = 0
        self.figures: dict[str, float] = {}
        self.rollouts: list[Rollout] = []  # of the last batch
        self.handed_over = time.monotonic()

    def batches(self, step: int) -> Iterator[PolicyRows]:
        """The batches from a step on, each made when it is asked for."""
        while True:
            yield self.collect(step)
            step += 1

    def collect(self, step: int) -> PolicyRows:
        """The batch of a step. Raises UserError where rewards do not tell attempts apart."""
        tokens, seconds, judging = self._actor.tokens, self._actor.seconds, self._actor.judging
        groups, all_groups = self._sample(step)
        rollouts = [rollout for group in groups for rollout in group]
        if self._reference is not None:
            how, share = self._how, self._settings.share
            reference_logprobs(self._reference, rollouts, how.temperature, share, REFERENCE_TOKENS)
        self._set_advantages(groups)
        trained = [rollout for rollout in rollouts if rollout.trained]
        weights = token_weights(self._algorithm.weighting, [one.sampled for one in trained], self._how.max_tokens)
        batch, _ = pack_rollouts(trained, weights.tolist(), self._pad, self._settings.share)
        self.rollouts = [rollout for group in all_groups for rollout in group]
        self._log.write(self.rollouts)
        self._loss.start(len(batch.token_ids))
        spent = self._actor.seconds - seconds
        self.figures = {
            **describe(all_groups),
            "groups": len(all_groups),
            "groups_without_signal": sum(not is_informative(_rewards(group)) for group in all_groups),
            "sampled_tokens": self._actor.tokens - tokens,
            "sampled_tokens_per_second": round((self._actor.tokens - tokens) / max(spent, 1e-9), 1),
            "sampling_seconds": round(spent, 3),
            "judging_seconds": round(self._actor.judging - judging, 3),
        }
        self.handed_over = time.monotonic()
        return batch

    def example(self) -> str:
        """The first attempt of the last batch, for a look at a run."""
        first = self.rollouts[0]
        return f"{first.problem.prompt} -> {first.completion.text} ({first.reward:g})"

    def _sample(self, step: int) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """The groups to train on, and all that were sampled for them."""
        settings, every, useful = self._settings, [], []
        allowed, count = round(settings.problems * (1 + settings.refill)), settings.problems
        while True:
            groups = self._attempts(step, count)
            every += groups
            useful += [group for group in groups if _tells_apart(group)]
            if not useful:
                self._note_quiet_round(every)
                continue
            self._quiet_rounds = 0
            missing, left = settings.problems - len(useful), allowed - len(every)
            if missing <= 0 or left <= 0:
                break
            count = min(left, math.ceil(missing * len(every) / len(useful)))
        used = useful[: settings.problems]
        numbers = {group[0].group for group in used}
        for rollout in (rollout for group in every for rollout in group):
            rollout.trained &= rollout.group in numbers
        return used, every

    def _note_quiet_round(self, groups: Sequence[Sequence[Rollout]]) -> None:
        self._quiet_rounds += 1
        if self._quiet_rounds < DRAWS_WITHOUT_SIGNAL:
            return
        figures = describe(groups)
        raise UserError(
            f"all attempts at a problem have been worth the same in {self._quiet_rounds} rounds (the mean reward is "
            f"{figures['reward']:.3g}), so there is nothing to learn; give problems that are sometimes solved, more "
            "attempts (--group), or more --max-tokens"
        )

    def _attempts(self, step: int, count: int) -> list[list[Rollout]]:
        first, total = self._log.groups, len(self._asked)
        orders = {epoch: shuffled(total, self._settings.seed, epoch) for epoch in _epochs(first, count, total)}
        asked = [self._asked[orders[number // total][number % total]] for number in range(first, first + count)]
        groups = self._actor.attempt(asked, self._how, step=step, first_group=first)
        self._log.groups += count
        for rollout in (rollout for group in groups for rollout in group):
            handle_overlong(rollout, self._algorithm.overlong, self._how.max_tokens)
        return groups

    def _set_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        penalty = self._settings.kl_coef if self._algorithm.kl == "reward" else 0.0
        worth = [[one.reward - penalty * _divergence(one) for one in group] for group in groups]
        for group, found in zip(groups, advantages(self._algorithm, worth), strict=True):
            for rollout, advantage in zip(group, found.tolist(), strict=True):
                rollout.advantage = advantage


def _epochs(first: int, count: int, total: int) -> range:
    return range(first // total, (first + count - 1) // total + 1)


def _rewards(group: Sequence[Rollout]) -> list[float]:
    return [rollout.reward for rollout in group]


def _tells_apart(group: Sequence[Rollout]) -> bool:
    return any(rollout.trained for rollout in group) and is_informative(_rewards(group))


def _divergence(rollout: Rollout) -> float:
    """log(policy / reference) of a whole attempt, whose mean is the divergence."""
    if rollout.reference is None:
        return 0.0
    chosen = np.array(rollout.completion.sampled, bool)
    return float((np.array(rollout.completion.logprobs) - rollout.reference)[chosen].sum())


def handle_overlong(rollout: Rollout, overlong: str, max_tokens: int) -> None:
    """What becomes of an attempt that was cut: "keep", "mask" (no part in the loss), or "penalise": up to 1 is taken
    away over the last fifth of the length (Yu et al. 2025, arXiv 2503.14476, equation 13)."""
    if overlong == "mask":
        rollout.trained = rollout.completion.finish_reason != "length"
    elif overlong == "penalise":
        buffer = max(1.0, OVERLONG_BUFFER * max_tokens)
        beyond = rollout.sampled - (max_tokens - buffer)
        over = min(1.0, max(0.0, beyond / buffer))
        rollout.reward -= over


def describe(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Figures of groups of attempts: the mean `reward`, its standard error over groups and its parts, `length` in
    tokens, `cut` (share that was), `called` (share that called a tool, where any did), and where there is a verifier
    `success` and `pass_at_group` (share of groups with a right attempt)."""
    every = [rollout for group in groups for rollout in group]
    found = {"reward": float(np.mean(_rewards(every))), "length": float(np.mean([one.sampled for one in every]))}
    means = [float(np.mean(_rewards(group))) for group in groups]
    found["reward_se"] = float(np.std(means) / math.sqrt(len(means)))
    found["cut"] = float(np.mean([one.completion.finish_reason == "length" for one in every]))
    called = [bool(one.completion.tool_calls) for one in every]
    if any(called):
        found["called"] = float(np.mean(called))
    for name in every[0].rewards:
        found[f"reward/{name}"] = float(np.mean([one.rewards[name] for one in every]))
    verifier = next((name for name in every[0].rewards if name.split("=")[0] == "verifier"), None)
    if verifier is not None:
        right = [[one.rewards[verifier] >= 1.0 for one in group] for group in groups]
        found["success"] = float(np.mean([one for group in right for one in group]))
        found["pass_at_group"] = float(np.mean([any(group) for group in right]))
    return {name: round(value, 5) for name, value in found.items()}
