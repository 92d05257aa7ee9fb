"""How far a run is, and what learning rate that means.

Progress runs from 0 to 1. A run of a known number of steps moves by 1/steps each step; a run with a time budget
moves as fast as the clock demands, so that the rate reaches its end when the time does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then constant, then linear decay: the factor on the learning rates at a progress in [0, 1].

    Warmup-stable-decay, Hu et al. 2024 (arXiv 2404.06395); linear decay to zero, Defazio et al. 2023
    (arXiv 2310.07831).
    """

    warmup_steps: int
    decay_fraction: float
    final_factor: float = 0.0

    def factor(self, step: int, progress: float) -> float:
        """The factor for the update that is number `step` (from 0) and begins at `progress`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = max(0.0, 1.0 - progress)
        if self.decay_fraction <= 0 or left >= self.decay_fraction:
            return warmup
        return warmup * (self.final_factor + (1 - self.final_factor) * left / self.decay_fraction)


@dataclass
class Pace:
    """Progress per step: fixed by a number of steps, or re-planned against a deadline.

    `replan` is called now and then with the seconds left and the seconds a step takes; what it sets goes into the
    checkpoint, so that a resumed run goes on at the same pace.
    """

    per_step: float
    progress: float = 0.0

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0 - 1e-9

    def advance(self) -> None:
        self.progress += self.per_step

    def replan(self, seconds_left: float, seconds_per_step: float) -> None:
        steps_left = max(1.0, seconds_left / seconds_per_step)
        self.per_step = (1.0 - self.progress) / steps_left
