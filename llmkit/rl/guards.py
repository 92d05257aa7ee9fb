"""What stops a run that goes wrong: sampler and trainer that disagree, a collapse, a reward that is gamed.

The guards see metrics alone, so that a resumed run feeds them the rows of `metrics.jsonl` and goes on as it was.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

from llmkit.errors import UserError


def check_difference(figures: Mapping[str, float], bound: float) -> None:
    """Raise UserError where the sampler's log-probabilities are not the trainer's: the loss would be biased."""
    gap = figures["logprob_difference"]
    if not gap <= bound:
        raise UserError(
            f"sampler and trainer disagree: their log-probabilities differ by {gap:.2g} nats a token in the mean, and "
            f"--max-difference is {bound:g}; use --dtype float32, or tell us"
        )


class CollapseGuard:
    """Tells when the rewards of training have fallen beyond noise.

    Compared are means over WINDOW steps. A collapse is a fall from the best of them by more than 6 standard errors and
    by more than half of what had been gained since the first, seen WINDOW times in succession.
    """

    WINDOW = 5

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.WINDOW)
        self._first = self._best = math.nan
        self._low_steps = 0
        for row in rows:
            if "reward" in row:
                self.note(row)

    def note(self, figures: Mapping[str, float]) -> str | None:
        """See the figures of a step; in words what has collapsed, or None."""
        self._recent.append((figures["reward"], figures["reward_se"]))
        if len(self._recent) < self.WINDOW:
            return None
        mean = sum(reward for reward, _ in self._recent) / self.WINDOW
        error = math.sqrt(sum(se * se for _, se in self._recent)) / self.WINDOW
        if math.isnan(self._first):
            self._first = self._best = mean
        self._best = max(self._best, mean)
        low = self._best - mean > max(6 * error, (self._best - self._first) / 2, 1e-6)
        self._low_steps = self._low_steps + 1 if low else 0
        if self._low_steps >= self.WINDOW:
            return f"the mean reward of {self.WINDOW} steps has fallen from {self._best:.3g} to {mean:.3g}"
        return None


class HackWatch:
    """Tells when a reward rises while the gold one falls beyond noise: it is being gamed (Gao et al. 2022, arXiv
    2210.10760).

    Compared is each evaluation with that at which the gold reward was highest. Gamed is a gold reward lower by more
    than ERRORS standard errors of the difference with a reward no lower, at two evaluations in succession.
    """

    # The highest of many is high by luck, too: with 2, runs whose reward rose and whose gold reward stayed the same
    # were stopped within 60 evaluations in 48 to 84 of 100 cases, with 3 in 4 to 8, with 3.5 in 1 or 2. A fall by a
    # point an evaluation, at 200 problems, was seen 19 evaluations after it began, by 2 after 9.
    ERRORS = 3.5

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._best: Mapping[str, float] | None = None
        self._suspicious = 0
        for row in rows:
            if "val_gold" in row:
                self.note(row)

    def note(self, scores: Mapping[str, float]) -> str | None:
        """See an evaluation; in words how the reward is gamed, or None."""
        best = self._best
        if best is None or scores["val_gold"] > best["val_gold"]:
            self._best, self._suspicious = scores, 0
            return None
        noise = self.ERRORS * math.hypot(best["val_gold_se"], scores["val_gold_se"])
        falls = best["val_gold"] - scores["val_gold"] > noise and scores["val_reward"] >= best["val_reward"]
        self._suspicious = self._suspicious + 1 if falls else 0
        if self._suspicious < 2:
            return None
        return (
            f"the reward is gamed: it has gone from {best['val_reward']:.3g} to {scores['val_reward']:.3g} on held-out "
            f"problems, and the gold one from {best['val_gold']:.3g} to {scores['val_gold']:.3g}"
        )
