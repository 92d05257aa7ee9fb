"""A policy's training watched: metrics of every step, evaluations, and what ends it early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.engine.trainer import Trainer
from llmkit.progress import say
from llmkit.rl.collecting import Collector
from llmkit.rl.evaluating import HeldOut
from llmkit.rl.guards import CollapseGuard, HackWatch, check_difference
from llmkit.rl.policy_loss import PolicyLoss


@dataclass(frozen=True)
class Limits:
    """Where a run ends: `difference` between sampler and trainer (nats a token, an error), `kl` from the reference
    (nats an attempt), mean `reward`."""

    difference: float
    kl: float | None = None
    reward: float | None = None


class Watch:
    """Watches a trainer.

    rows  of the metrics of the run that is resumed
    `stopped` says in words why training has ended before its horizon.
    """

    def __init__(
        self,
        trainer: Trainer,
        collector: Collector,
        loss: PolicyLoss,
        limits: Limits,
        rows: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        rows = list(rows)
        self._trainer, self._collector, self._loss, self._limits = trainer, collector, loss, limits
        self._collapse, self._hack = CollapseGuard(rows), HackWatch(rows)
        self.stopped: str | None = None
        self._warned = False
        trainer.describe_step = self.describe_step

    def describe_step(self) -> dict[str, float]:
        """The metrics of the step just made: rewards, lengths, divergences, costs. Raises UserError where sampler and
        trainer disagree."""
        seconds, loss, batch = time.monotonic() - self._collector.handed_over, self._loss.figures, self._collector
        check_difference(loss, self._limits.difference)
        trained = sum(len(rollout.token_ids) for rollout in batch.rollouts if rollout.trained)
        found = {
            **batch.figures,
            **{name: float(f"{value:.6g}") for name, value in loss.items()},
            "training_seconds": round(seconds, 3),
            "trained_tokens_per_second": round(
                self._trainer.settings.updates_per_batch * trained / max(seconds, 1e-9), 1
            ),
        }
        limits = self._limits
        if "kl" in loss:
            found["kl_per_attempt"] = float(f"{loss['kl'] * batch.figures['length']:.6g}")
        if limits.kl is not None and found["kl_per_attempt"] > limits.kl:
            self._stop(f"the policy is {found['kl_per_attempt']:.3g} nats an attempt from its beginning (--max-kl)")
        if limits.reward is not None and found["reward"] >= limits.reward:
            self._stop(f"the mean reward is {found['reward']:.3g} (--max-reward)")
        if collapsed := self._collapse.note(found):
            self._stop(f"collapsed: {collapsed}; try a lower --learning-rate")
        return found

    def evaluation(self, held_out: HeldOut, stop_on_hack: bool) -> Callable[[], dict[str, float]]:
        """What evaluates the policy; with `stop_on_hack` it ends the run where the reward is gamed."""

        def evaluate() -> dict[str, float]:
            scores = held_out.evaluate()
            gamed = self._hack.note(scores) if "val_gold" in scores else None
            if gamed and stop_on_hack:
                self._stop(gamed)
            elif gamed and not self._warned:
                say(f"{gamed}; --stop-on-hack would stop here")
            self._warned = gamed is not None
            return scores

        return evaluate

    def _stop(self, reason: str) -> None:
        if self.stopped is None:
            say(f"stopping after step {self._trainer.step}: {reason}")
            self.stopped, self._trainer.stopping = reason, True
