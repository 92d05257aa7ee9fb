"""A policy's training watched: metrics of every step, evaluations, and what ends it early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.errors import SavedError
from llmkit.io.progress import say
from llmkit.rl.batches import Collector
from llmkit.rl.evaluation import HeldOut
from llmkit.rl.guards import CollapseGuard, HackWatch, difference_beyond
from llmkit.rl.policy_loss import PolicyLoss
from llmkit.training.trainer import Trainer

COLLAPSED = "collapsed"


@dataclass(frozen=True)
class Limits:
    """Where a run ends: `difference` between sampler and trainer (nats a token, an error), `kl` from the reference
    (nats an attempt)."""

    difference: float
    kl: float | None = None


class Watch:
    """Watches a run.

    rows  of its metrics so far, where it is resumed
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
        self._warned = False
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """Why the run has ended before its horizon; None where it has not."""
        return self._stopped or self._collector.ended

    def describe(self) -> dict[str, float]:
        """The metrics of the step just made: rewards, lengths, divergences, costs. Stops the run where it should end.

        Raises UserError, after a checkpoint, where sampler and trainer disagree.
        """
        seconds, loss, batch = time.monotonic() - self._collector.handed_over, self._loss.figures, self._collector
        tokens = self._trainer.settings.updates_per_batch * batch.figures["batch_tokens"]
        found = {
            **batch.figures,
            **{name: float(f"{value:.6g}") for name, value in loss.items()},
            "training_seconds": round(seconds, 3),
            "trained_tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }
        self._check(found)
        return found

    def _check(self, figures: Mapping[str, float]) -> None:
        limits = self._limits
        if apart := difference_beyond(figures, limits.difference):
            self._trainer.save(wait=True)
            place = self._trainer.checkpoints.folder
            raise SavedError(f"{apart}; saved in {place}; --resume with a higher bound, or begin again in float32")
        if limits.kl is not None and figures["kl_per_attempt"] > limits.kl:
            self._stop(f"the policy is {figures['kl_per_attempt']:.3g} nats an attempt from its beginning (--max-kl)")
        if collapsed := self._collapse.note(figures):
            self._stop(f"{COLLAPSED}: {collapsed}; try a lower --learning-rate")

    @property
    def has_collapsed(self) -> bool:
        """True if the run was stopped because its rewards had fallen."""
        return self._stopped is not None and self._stopped.startswith(COLLAPSED)

    @property
    def at_its_best(self) -> bool:
        """True if the rewards of the last steps are the highest so far."""
        return self._collapse.is_best

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
        if self._stopped is None:
            say(f"stopping after step {self._trainer.step}: {reason}")
            self._stopped, self._trainer.stopping = reason, True
