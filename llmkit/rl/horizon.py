"""How long a policy is trained, and how much the divergence from its beginning weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from llmkit.rewards import Weighted
from llmkit.rewards.reward_models import ModelReward

KL_COEF = 0.05  # against a reward model
STEPS = 300  # against a reward model: beyond a few hundred it is gamed
EPOCHS = 1.0
WARMUP_STEPS = 10  # at least: Adam's first steps go by signs alone, and cost a model two thirds of its success


@dataclass(frozen=True)
class Horizon:
    """Steps in all, None where the clock decides; those to the full rate; the weight of the divergence."""

    steps: int | None
    warmup_steps: int
    kl_coef: float


def choose_horizon(
    rewards: Sequence[Weighted],
    problems: int,
    batch_size: int,
    *,
    max_steps: int | None,
    epochs: float | None,
    time_budget: float | None,
    warmup_steps: int | None,
    kl_coef: float | None,
) -> Horizon:
    """What follows from the options, where None is what was not given, and from the rewards."""
    with_model = any(isinstance(weighted.reward, ModelReward) for weighted in rewards)
    if kl_coef is None:
        kl_coef = KL_COEF if with_model else 0.0
    steps = max_steps or ceil((epochs or EPOCHS) * problems / batch_size)
    if max_steps is None and epochs is None and with_model:
        steps = STEPS
    if time_budget is not None:
        steps = None
    if warmup_steps is None:
        warmup_steps = WARMUP_STEPS if steps is None else max(min(WARMUP_STEPS, steps // 4), steps // 20)
    return Horizon(steps, warmup_steps, kl_coef)
