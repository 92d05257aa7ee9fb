"""Guards of a policy's training, which end a run that goes wrong.

Three faults are looked for: log-probabilities of sampler and trainer that disagree, rewards that collapse, and a reward
that is gamed. The guards read metrics alone, so that a resumed run feeds them the rows of `metrics.jsonl` and goes on
with the same state.
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
KEEP_EVERY = 10  # steps between parameters kept against a collapse, where nothing is held out
# between sampler and trainer, in nats a token: usual are 1e-6 and 5e-3; another program computes otherwise
MOST_DIFFERENCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.05, "a server": 0.05}


class CollapseGuard:
    """Tells when the rewards of training have fallen beyond noise.

    Compared are means over WINDOW steps. A collapse is a fall from the best of them by more than ERRORS standard
    errors, by more than half of what had been gained since the first, and by more than a quarter of the best, seen
    WINDOW times in succession. The error is that of the difference of two such means, from the median change between
    neighbouring steps, in which what is learnt slowly has little part.
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
        """See the figures of a step; in words what has collapsed, or None."""
        self._rewards.append(figures["reward"])
        if len(self._rewards) < self.WINDOW:
            return None
        mean = self._mean(-self.WINDOW, None)
        self._best = max(self._best, mean)
        changes = sorted(abs(b - a) for a, b in pairwise(self._rewards))
        deviation = changes[len(changes) // 2] / 0.954  # the median of |x - y| of two normal numbers, in deviations
        noise = self.ERRORS * deviation * math.sqrt(2 / self.WINDOW)
        gained = self._best - self._mean(0, self.WINDOW)
        low = self._best - mean > max(noise, gained / 2, abs(self._best) / 4, 1e-6)
        self._low_steps = self._low_steps + 1 if low else 0
        if self._low_steps < self.WINDOW:
            return None
        return f"the mean reward of {self.WINDOW} steps has fallen from {self._best:.3g} to {mean:.3g}"


class HackWatch:
    """Tells when a reward, `proxy` of an evaluation, rises while the gold one falls beyond noise: it is being gamed
    (Gao et al. 2022, arXiv 2210.10760).

    Compared is each evaluation with that at which the gold reward was highest. Gamed is a gold reward lower by more
    than ERRORS standard errors of the difference with a reward no lower, at two evaluations in succession.
    """

    # The highest of many is high by luck, too: with 2, runs whose reward rose and whose gold reward stayed the same
    # were stopped within 60 evaluations in 48 to 84 of 100 cases, with 3 in 4 to 8, with 3.5 in 1 or 2. A fall by a
    # point an evaluation, at 200 problems, was seen 20 evaluations after it began, by 2 after 12.
    ERRORS = 3.5

    def __init__(self, rows: Iterable[Mapping[str, float]] = (), proxy: str = "val_reward") -> None:
        self._best: Mapping[str, float] | None = None
        self._suspicious, self.proxy = 0, proxy
        self.gamed: str | None = None
        for row in rows:
            if {"val_gold", "val_gold_se", proxy} <= row.keys():
                self.note(row)

    def note(self, scores: Mapping[str, float]) -> str | None:
        """See an evaluation; in words how the reward is gamed, or None, which `gamed` has, too."""
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
            f"the reward is gamed: it has gone from {best[self.proxy]:.3g} to {scores[self.proxy]:.3g} on held-out "
            f"problems, and the gold one from {best['val_gold']:.3g} to {scores['val_gold']:.3g}"
        )
        return self.gamed


class Watch:
    """The guards of one run, which stop its trainer.

    difference  at most between sampler and trainer, in nats a token: an error
    kl          at most from the reference, in nats an attempt
    rows        of the metrics so far, where the run is resumed: one that was to stop stops again
    proxy       name of what is trained on, in the scores of an evaluation
    stop_on_hack  stop where the reward is gamed, and do not only say so
    `stopped` says in words why training has ended before its horizon.
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
        """See the figures of a step. Raises SavedError, after a checkpoint, where sampler and trainer disagree."""
        gap = figures["logprob_difference"]
        if not gap <= self._difference:  # NaN, too: the loss would be biased
            self._trainer.save(wait=True)
            raise SavedError(
                f"sampler and trainer disagree: their log-probabilities differ by {gap:.2g} nats a token in the mean, "
                f"where at most {self._difference:g} is expected; saved in {self._trainer.checkpoints.folder}; begin "
                "again with --dtype float32, or without --engine"
            )
        if self._kl is not None and figures["kl_per_attempt"] > self._kl:
            self._stop(f"the policy is {figures['kl_per_attempt']:.3g} nats an attempt from its beginning (--max-kl)")
        if collapsed := self._collapse.note(figures):
            self._stop(f"{COLLAPSED}: {collapsed}; try a lower --learning-rate")

    def note_evaluation(self, scores: Mapping[str, float]) -> None:
        """See an evaluation; where the reward is gamed, stop the run or say so once."""
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
        """True if the run was stopped because its rewards had fallen."""
        return self.stopped is not None and self.stopped.startswith(COLLAPSED)

    @property
    def keeps(self) -> bool:
        """True if the parameters of this step are worth keeping: the rewards of the last steps are the highest."""
        return self._collapse.is_best and self._trainer.step % KEEP_EVERY == 0
