"""One step rehearsed, for --dry-run: where the policy stands, and what a step takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.io.progress import counted, duration, quantity
from llmkit.rl.actor import Actor
from llmkit.rl.algorithms import Algorithm, is_informative
from llmkit.rl.batches import describe, handle_overlong
from llmkit.rl.policy_loss import PolicyLoss
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import RolloutSettings
from llmkit.rl.rows import pack_rollouts
from llmkit.training.speed import batch_seconds


@dataclass(frozen=True)
class Rehearsal:
    """Figures of the attempts of one step (see `describe`), how many `groups` there are and how many tell attempts
    apart, the seconds of sampling and judging and those of a forward and backward pass, and the tokens of that."""

    figures: dict[str, float]
    groups: int
    informative: int
    sampling_seconds: float
    training_seconds: float
    tokens: int

    def lines(self, steps: int | None, updates: int, memory: float) -> list[str]:
        """Describe a run of `steps` steps, whose training takes `memory` bytes: rewards, time and memory."""
        figures = self.figures
        solved = ""
        if "success" in figures:
            solved = (
                f"; {figures['success']:.1%} of the attempts are right, and {figures['pass_at_group']:.1%} of the "
                "problems are solved by one of them"
            )
        step = self.sampling_seconds + updates * self.training_seconds
        whole = "" if steps is None else f", {duration(steps * step)} or more for {counted(steps, 'step')}"
        return [
            f"a step tried: mean reward {figures['reward']:.3g}, length {figures['length']:.1f} tokens, "
            f"{figures['cut']:.0%} cut{solved}",
            f"{self.informative} of {counted(self.groups, 'group')} tell attempts apart",
            f"about {memory / 1e9:.2f} GB of memory for training; a step takes {self.sampling_seconds:.1f} s of "
            f"sampling and judging and {updates * self.training_seconds:.1f} s of training on {quantity(self.tokens)} "
            f"tokens{whole}",
        ]


def rehearse(
    actor: Actor,
    problems: Sequence[EncodedProblem],
    settings: RolloutSettings,
    loss: PolicyLoss,
    algorithm: Algorithm,
    micro_batch_tokens: int,
    share_prompts: bool,
) -> Rehearsal:
    """Make the attempts of a step and compute its gradient, and change nothing."""
    started = time.monotonic()
    groups = actor.attempt(problems, settings, step=0, first_group=0)
    sampling = time.monotonic() - started
    rollouts = [rollout for group in groups for rollout in group]
    for rollout in rollouts:
        handle_overlong(rollout, algorithm.overlong, settings.max_tokens)
    rows, _ = pack_rollouts(rollouts, [1.0] * len(rollouts), 0, share_prompts)
    rows_at_once = max(1, micro_batch_tokens // rows.token_ids.shape[1])
    training = batch_seconds(actor.model, loss, rows, rows_at_once, actor.model.embed_tokens.device)
    compared = groups if algorithm.compares_within_groups else [rollouts]
    informative = sum(is_informative([rollout.reward for rollout in some if rollout.judged]) for some in compared)
    return Rehearsal(describe(groups, actor.rewards), len(compared), informative, sampling, training, rows.tokens)
