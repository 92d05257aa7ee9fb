"""What stops a run that goes wrong: sampler and trainer that disagree, a collapse, a reward that is gamed.

The guards see metrics alone, so that a resumed run feeds them the rows of `metrics.jsonl` and goes on as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise


def difference_beyond(figures: Mapping[str, float], bound: float) -> str | None:
    """In words, that the sampler's log-probabilities are not the trainer's, which biases the loss; None within
    `bound` nats a token in the mean."""
    gap = figures["logprob_difference"]
    if gap <= bound:
        return None
    return (
        f"sampler and trainer disagree: their log-probabilities differ by {gap:.2g} nats a token in the mean, and "
        f"--max-difference is {bound:g}"
    )


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
    """Tells when a reward rises while the gold one falls beyond noise: it is being gamed (Gao et al. 2022, arXiv
    2210.10760).

    Compared is each evaluation with that at which the gold reward was highest. Gamed is a gold reward lower by more
    than ERRORS standard errors of the difference with a reward no lower, at two evaluations in succession.
    """

    # The highest of many is high by luck, too: with 2, runs whose reward rose and whose gold reward stayed the same
    # were stopped within 60 evaluations in 48 to 84 of 100 cases, with 3 in 4 to 8, with 3.5 in 1 or 2. A fall by a
    # point an evaluation, at 200 problems, was seen 20 evaluations after it began, by 2 after 12.
    ERRORS = 3.5

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._best: Mapping[str, float] | None = None
        self._suspicious = 0
        for row in rows:
            if {"val_gold", "val_gold_se", "val_reward"} <= row.keys():
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
