"""Guards that end a policy's training when it goes wrong.

They look for three faults: sampler and trainer disagree on log-probabilities, rewards collapse, or the reward is gamed.
They see metrics only, so a resumed run restores their state from the rows of `metrics.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from llmkit.errors import SavedError
from llmkit.io.progress import say
from llmkit.training.trainer import Trainer

COLLAPSED = "collapsed"
KEEP_EVERY = 10  # steps between parameters kept against a collapse, without --val
# between sampler and trainer, in nats per token; 1e-6 and 5e-3 are usual, a server's kernels differ
MOST_DIFFERENCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.05, "a server": 0.05}


class CollapseGuard:
    """Detects that training rewards have fallen beyond noise.

    It compares means over WINDOW steps. A collapse is a fall from the best mean by more than ERRORS standard errors,
    by more than half of the gain since the first mean, and by more than a quarter of the best, WINDOW times in
    succession. The standard error of the difference of two means comes from the median change between neighbouring
    steps, which slow learning hardly affects.
    """

    WINDOW, ERRORS = 5, 6.0

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._rewards: list[float] = []
        self._best, self._low_steps = -math.inf, 0
        for row in rows:
            if "reward" in row:
                self.note(row)

    @property
    def is_best(self) -> bool:
        """True if the mean of the last steps is the highest so far."""
        return len(self._rewards) >= self.WINDOW and self._mean(-self.WINDOW, None) == self._best

    def _mean(self, start: int | None, stop: int | None) -> float:
        part = self._rewards[start:stop]
        return sum(part) / len(part)

    def note(self, figures: Mapping[str, float]) -> str | None:
        """Add the metrics of a step; return a description of the collapse, or None."""
        self._rewards.append(figures["reward"])
        if len(self._rewards) < self.WINDOW:
            return None
        mean = self._mean(-self.WINDOW, None)
        self._best = max(self._best, mean)
        changes = sorted(abs(b - a) for a, b in pairwise(self._rewards))
        deviation = (
            changes[len(changes) // 2] / 0.954
        )  # median of |x - y| of two normal variables, in standard deviations
        noise = self.ERRORS * deviation * math.sqrt(2 / self.WINDOW)
        gained = self._best - self._mean(0, self.WINDOW)
        low = self._best - mean > max(noise, gained / 2, abs(self._best) / 4, 1e-6)
        self._low_steps = self._low_steps + 1 if low else 0
        if self._low_steps < self.WINDOW:
            return None
        return f"the mean reward of {self.WINDOW} steps has fallen from {self._best:.3g} to {mean:.3g}"


class HackWatch:
    """Detects reward hacking: the reward `proxy` rises while the gold reward falls beyond noise (Gao et al. 2022,
    arXiv 2210.10760).

    It compares each evaluation with the one with the highest gold reward. A reward is gamed if in two successive
    evaluations the gold reward is lower by more than ERRORS standard errors of the difference, and the reward is not.
    """

    # The highest of many values is also high by luck. With a rising reward and a constant gold reward, 2 errors stopped
    # 48 to 84 of 100 runs within 60 evaluations, 3 errors 4 to 8, and 3.5 errors 1 or 2. With 200 problems, 3.5 errors
    # detected a fall of a point per evaluation after 20 evaluations, 2 errors after 12.
    ERRORS = 3.5

    def __init__(self, rows: Iterable[Mapping[str, float]] = (), proxy: str = "val_reward") -> None:
        self._best: Mapping[str, float] | None = None
        self._suspicious, self.proxy = 0, proxy
        self.gamed: str | None = None
        for row in rows:
            if {"val_gold", "val_gold_se", proxy} <= row.keys():
                self.note(row)

    def note(self, scores: Mapping[str, float]) -> str | None:
        """Add an evaluation; set and return `gamed`, a description of the hack, or None."""
        self.gamed, best = None, self._best
        if best is None or scores["val_gold"] > best["val_gold"]:
            self._best, self._suspicious = scores, 0
            return None
        noise = self.ERRORS * math.hypot(best["val_gold_se"], scores["val_gold_se"])
        falls = best["val_gold"] - scores["val_gold"] > noise and scores[self.proxy] >= best[self.proxy]
        self._suspicious = self._suspicious + 1 if falls else 0
        if self._suspicious < 2:
            return None
        self.gamed = (
            f"the reward is gamed: it went from {best[self.proxy]:.3g} to {scores[self.proxy]:.3g} on held-out "
            f"problems, and the gold reward from {best['val_gold']:.3g} to {scores['val_gold']:.3g}"
        )
        return self.gamed


class Watch:
    """The guards of one run, which stop its trainer.

    difference  largest difference of sampler and trainer, in nats per token; more is an error
    kl          largest KL to the reference, in nats per rollout
    rows        metrics so far of a resumed run; one that was about to stop stops again
    proxy       name of the trained reward in the scores of an evaluation
    stop_on_hack  stop if the reward is gamed, instead of only saying so
    `stopped` is the reason why training ended before its horizon, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        difference: float = math.inf,
        kl: float | None = None,
        rows: Iterable[Mapping[str, Any]] = (),
        proxy: str = "val_reward",
        stop_on_hack: bool = False,
    ) -> None:
        rows = list(rows)
        self._trainer, self._difference, self._kl, self._stop_on_hack = trainer, difference, kl, stop_on_hack
        self._collapse, self._hack, self._warned = CollapseGuard(rows), HackWatch(rows, proxy), False
        self.stopped: str | None = None
        if self._hack.gamed and stop_on_hack:  # killed between its last evaluation and its end
            self._stop(self._hack.gamed)

    def note_step(self, figures: Mapping[str, float]) -> None:
        """Add the metrics of a step. Raises SavedError, after a checkpoint, if sampler and trainer disagree."""
        gap = figures["logprob_difference"]
        if not gap <= self._difference:  # NaN, too: the loss would be biased
            self._trainer.save(wait=True)
            raise SavedError(
                f"sampler and trainer disagree: their log-probabilities differ by {gap:.2g} nats per token on average, "
                f"expected at most {self._difference:g}; saved in {self._trainer.checkpoints.folder}; start again with "
                "--dtype float32, or without --engine"
            )
        if self._kl is not None and figures["kl_per_attempt"] > self._kl:
            self._stop(f"the policy is {figures['kl_per_attempt']:.3g} nats per attempt from MODEL (--max-kl)")
        if collapsed := self._collapse.note(figures):
            self._stop(f"{COLLAPSED}: {collapsed}; try a lower --learning-rate")

    def note_evaluation(self, scores: Mapping[str, float]) -> None:
        """Add an evaluation; if the reward is gamed, stop the run or say so once."""
        gamed = self._hack.note(scores) if {"val_gold", self._hack.proxy} <= scores.keys() else None
        if gamed and self._stop_on_hack:
            self._stop(gamed)
        elif gamed and not self._warned:
            say(f"{gamed}; --stop-on-hack would stop here")
        self._warned = gamed is not None

    def _stop(self, reason: str) -> None:
        if self.stopped is None:
            say(f"stopping after step {self._trainer.step}: {reason}")
            self.stopped, self._trainer.stopping = reason, True

    @property
    def has_collapsed(self) -> bool:
        """True if the run was stopped because its rewards collapsed."""
        return self.stopped is not None and self.stopped.startswith(COLLAPSED)

    @property
    def keeps(self) -> bool:
        """True if this step's parameters should be kept: the mean reward of the last steps is the highest so far."""
        return self._collapse.is_best and self._trainer.step % KEEP_EVERY == 0
