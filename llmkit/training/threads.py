"""Choose the number of threads of a training step: all of them where that is faster, else one.

Threads wait for each other hundreds of times a step. On cores that others use too, a second thread may cost more than
it gains, so both numbers are timed on steps of the training itself: at its start, when steps slow down, and now and
then. Results are the same on one thread and on several (tests/training/test_threads.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GAIN = 1.15  # more threads must be so much faster than one
TRIAL_STEPS, TRIAL_SECONDS = 2, 0.1  # of each count, at least
LONGEST_STEP = 10.0  # seconds on one thread, expected: beyond, a trial costs more than it can save
SLOWER, RECENT = 1.3, 5  # a mean of so many steps, over that of the last trial, asks for another
PAUSE, SHARE = 30.0, 0.02  # seconds between trials, and the share of the time that they may take


class StepThreads:
    """Sets torch's threads for each step.

    with threads.step(size=batch.size):
        train(batch)
    """

    def __init__(self, most: int) -> None:
        self.most = self.chosen = most
        self._usual = math.inf  # seconds for a unit of work, at the last trial
        self._recent: list[float] = []
        self._begin_trial()
        self._warm = False

    @contextmanager
    def step(self, size: int) -> Iterator[None]:
        """Compute a step of `size` units of work, whose time counts for later ones."""
        count = self.count
        if self.most > 1:
            torch.set_num_threads(count)
        started = time.perf_counter()
        yield
        self.record(count, time.perf_counter() - started, size)

    @property
    def count(self) -> int:
        """Threads of the next step."""
        if not self._trial:
            return self.chosen
        return min(self._trial, key=lambda count: (len(self._trial[count]), -count))

    def record(self, count: int, seconds: float, size: int) -> None:
        """Take note of a step."""
        if self.most == 1:
            return
        if not self._warm:  # the first step allocates memory
            self._warm = True
            if seconds * self.most > LONGEST_STEP:
                self._trial, self.most = {}, 1  # what torch has set stays
            return
        self._seconds += seconds
        if self._trial:
            self._trial[count].append(seconds / size)
            enough = all(len(steps) >= TRIAL_STEPS for steps in self._trial.values())
            if enough and self._seconds > TRIAL_SECONDS * len(self._trial):
                self._choose()
            return
        self._recent = [*self._recent[1 - RECENT :], seconds / size]
        slower = len(self._recent) == RECENT and sum(self._recent) / RECENT > SLOWER * self._usual
        if self._seconds > max(PAUSE / 6 if slower else PAUSE, self._cost / SHARE):
            self._begin_trial()

    def _begin_trial(self) -> None:
        self._trial: dict[int, list[float]] = {count: [] for count in {1, self.most}} if self.most > 1 else {}
        self._seconds = self._cost = 0.0

    def _choose(self) -> None:
        means = {count: sum(steps) / len(steps) for count, steps in self._trial.items()}
        self.chosen = self.most if means[1] > GAIN * means[self.most] else 1
        self._usual, self._recent = means[self.chosen], []
        self._trial, self._cost, self._seconds = {}, self._seconds, 0.0


def most_threads(device: torch.device, processes: int, compiled: bool) -> int:
    """Return the largest number of threads to try.

    It is 1 on a GPU, beside processes of the same job, where the user set a number, and under torch.compile, which
    compiles anew for another number.
    """
    if device.type != "cpu" or processes > 1 or compiled or "OMP_NUM_THREADS" in os.environ:
        return 1
    return torch.get_num_threads()
