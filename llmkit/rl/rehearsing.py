"""One step rehearsed, for --dry-run: where the policy stands, and what a step takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.engine.speed import batch_seconds
from llmkit.progress import duration, quantity
from llmkit.rl.actor import Actor, Asking
from llmkit.rl.algorithms import is_informative
from llmkit.rl.asking import AskedProblem
from llmkit.rl.collecting import describe
from llmkit.rl.policy_loss import PolicyLoss
from llmkit.rl.rows import pack_rollouts


@dataclass(frozen=True)
class Rehearsal:
    """Figures of the attempts of one step (see `describe`), how many of its groups tell attempts apart, the seconds of
    its attempts and of an update, and the tokens that are trained on."""

    figures: dict[str, float]
    groups: int
    informative: int
    sampling_seconds: float
    training_seconds: float
    tokens: int

    def lines(self, steps: int | None, updates: int, memory: float) -> list[str]:
        """What a user wants to know before a run of so many steps, which takes `memory` bytes."""
        figures = self.figures
        solved = (
            ""
            if "success" not in figures
            else (
                f"; {figures['success']:.1%} of the attempts are right, and {figures['pass_at_group']:.1%} of the "
                "problems are solved by one of them"
            )
        )
        step = self.sampling_seconds + updates * self.training_seconds
        whole = "" if steps is None else f", {duration(steps * step)} for {steps} steps"
        return [
            f"a step tried: mean reward {figures['reward']:.3g}, length {figures['length']:.1f} tokens, "
            f"{figures['cut']:.0%} cut{solved}",
            f"{self.informative} of {self.groups} groups tell attempts apart",
            f"about {memory / 1e9:.2f} GB of memory; a step takes {self.sampling_seconds:.1f} s of sampling and "
            f"{updates * self.training_seconds:.1f} s of training on {quantity(self.tokens)} tokens{whole}",
        ]


def rehearse(
    actor: Actor, asked: Sequence[AskedProblem], how: Asking, loss: PolicyLoss, micro_batch_rows: int, share: bool
) -> Rehearsal:
    """Make the attempts of a step and compute its gradient, and change nothing."""
    started = time.monotonic()
    groups = actor.attempt(asked, how, step=0, first_group=0)
    sampling = time.monotonic() - started
    rollouts = [rollout for group in groups for rollout in group]
    rows, _ = pack_rollouts(rollouts, [1.0] * len(rollouts), 0, share)
    loss.start(len(rows.token_ids))
    training = batch_seconds(actor.model, loss, rows, micro_batch_rows, actor.model.embed_tokens.device)
    informative = sum(is_informative([one.reward for one in group]) for group in groups)
    return Rehearsal(describe(groups), len(groups), informative, sampling, training, rows.token_ids.size)
