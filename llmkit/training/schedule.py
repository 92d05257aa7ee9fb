"""The learning rate over a run: a factor as a function of the step and of the progress, which runs from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.io.progress import counted, say


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


def warn_of_long_warmup(warmup_steps: int, total_steps: int | None, quiet: bool) -> None:
    """Say so where a run ends before its warm-up does."""
    if total_steps is not None and warmup_steps >= total_steps > 1:
        say(
            f"--warmup-steps {warmup_steps}: the run has {counted(total_steps, 'step')}, and never reaches the full "
            "learning rate",
            quiet,
        )
