"""The algorithms of `llmkit rl`: an advantage and the choices in one loss (rl/policy_loss.py); the `Horizon` of a run.

With r, the ratio of a token's probability under the policy to that under the sampler, and its advantage A, its loss is

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

and the loss of a batch is the mean over tokens, weighted by `weighting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from llmkit.errors import UserError
from llmkit.rewards import Weighted
from llmkit.rewards.reward import ModelReward
from llmkit.rl.rollouts import Rollout, rewards_of

KL_COEF = 0.05  # with a reward model
STEPS = 300  # with a reward model, which is gamed after a few hundred
WARMUP_STEPS = 10  # at least: Adam's first steps follow signs alone, which once cost two thirds of the success
SMALLEST_DEVIATION = 1e-6  # of rewards; below this all count as equal
LENGTH_BUFFER = 0.2  # share of --max-tokens over which a penalty grows to 1: DAPO's 4,096 of 20,480
ROUNDS_WITHOUT_SIGNAL = 8  # after which a run ends: within each group all rewards were equal
REFILL = 1.0  # upper bound of extra groups, as a share of a step's, to replace those with equal rewards


@dataclass(frozen=True)
class Horizon:
    """Length of a run: steps (None: as the time budget allows), warm-up steps, and the KL coefficient."""

    steps: int | None
    warmup_steps: int
    kl_coef: float


def choose_horizon(
    rewards: Sequence[Weighted],
    problems: int,
    batch_size: int,
    max_steps: int | None,
    time_budget: float | None,
    kl_coef: float | None,
) -> Horizon:
    """Fill in options that are None: one pass over the problems, or `STEPS` and a KL penalty with a reward model."""
    with_model = any(isinstance(weighted.reward, ModelReward) for weighted in rewards)
    if kl_coef is None:
        kl_coef = KL_COEF if with_model else 0.0
    if time_budget is not None:
        return Horizon(None, WARMUP_STEPS, kl_coef)
    steps = max_steps or (STEPS if with_model else ceil(problems / batch_size))
    return Horizon(steps, max(min(WARMUP_STEPS, steps // 4), steps // 20), kl_coef)


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    baseline   subtracted from a reward: the mean of its "group", of the "others" in its group, or of the "batch"
    scale      divides the difference: the standard deviation of the "group" or the "batch", or None
    weighting  of tokens: "token" weights all equally, "sequence" weights sequences equally, "constant" divides sums by
               --max-tokens, and "sum" only by the number of sequences
    ratio      per "token", or its geometric mean over the "sequence"
    clip       (low, high), or None
    kl         whether the KL to the reference is part of the "loss" or of the "reward"
    penalises_length  whether rollouts near --max-tokens lose up to 1 of their reward
    """

    baseline: str
    scale: str | None
    weighting: str
    ratio: str = "token"
    clip: tuple[float, float] | None = (0.2, 0.2)
    kl: str = "loss"
    penalises_length: bool = False

    @property
    def compares_within_groups(self) -> bool:
        """True if a group without two different rewards gives no gradient."""
        return self.baseline != "batch"


ALGORITHMS = {
    # Shao et al. 2024 (arXiv 2402.03300), section 4.1
    "grpo": Algorithm("group", "group", "sequence"),
    # Liu et al. 2025 (arXiv 2503.20783), section 3.2: dividing by lengths and deviations favours long wrong answers
    # and problems that are too easy or too hard
    "dr-grpo": Algorithm("group", None, "constant"),
    # Yu et al. 2025 (arXiv 2503.14476), section 3
    "dapo": Algorithm("group", "group", "token", clip=(0.2, 0.28), penalises_length=True),
    # Ahmadian et al. 2024 (arXiv 2402.14740), section 3: REINFORCE on whole sequences
    "rloo": Algorithm("others", None, "sum", clip=None, kl="reward"),
    # Hu et al. 2025 (arXiv 2501.03262), section 3: normalised over the batch, so one rollout per problem suffices
    "reinforce++": Algorithm("batch", "batch", "token", kl="reward"),
    # Zheng et al. 2025 (arXiv 2507.18071), sections 4.1 and 5.1
    "gspo": Algorithm("group", "group", "sequence", ratio="sequence", clip=(3e-4, 4e-4)),
}


def check_group(algo: str, group: int, batch_size: int) -> None:
    """Raise UserError if an algorithm has too few rollouts to compare."""
    if group == 1 and ALGORITHMS[algo].compares_within_groups:
        raise UserError(
            f"--group 1: --algo {algo} compares the attempts at a problem with each other and needs 2 or more; "
            "--algo reinforce++ compares those of a step"
        )
    if group == batch_size == 1:
        raise UserError("--group 1 --batch-size 1: expected at least two attempts per step, to compare")


def advantages(algorithm: Algorithm, rewards: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Return the advantages of each group of rewards, as float64; 0 if its rewards are equal.

    >>> advantages(ALGORITHMS["rloo"], [[1.0, 0.0, 0.0]])
    [array([ 1. , -0.5, -0.5])]
    """
    every = np.concatenate([np.asarray(group, np.float64) for group in rewards])
    normalised = []
    for group in (np.asarray(group, np.float64) for group in rewards):
        centred = group - (every if algorithm.baseline == "batch" else group).mean()
        if algorithm.baseline == "others":
            centred = centred * len(group) / max(1, len(group) - 1)
        deviation = {"group": group.std(), "batch": every.std(), None: 1.0}[algorithm.scale]
        # equal rewards differ from their mean by rounding, which a division would amplify
        normalised.append(centred / deviation if deviation > SMALLEST_DEVIATION else np.zeros_like(centred))
    return normalised


def set_advantages(algorithm: Algorithm, groups: Sequence[Sequence[Rollout]], kl_coef: float) -> None:
    """Set the advantage of every rollout, from its reward, minus the KL penalty if the algorithm puts it there."""
    penalty = kl_coef if algorithm.kl == "reward" else 0.0
    rewards = [[rollout.reward - penalty * rollout.divergence for rollout in group] for group in groups]
    for group, values in zip(groups, advantages(algorithm, rewards), strict=True):
        for rollout, advantage in zip(group, values.tolist(), strict=True):
            rollout.advantage = advantage


def penalise_length(rollout: Rollout, max_tokens: int) -> None:
    """Subtract up to 1 over the last fifth of max_tokens (Yu et al. 2025, arXiv 2503.14476, equation 13)."""
    buffer = max(1.0, LENGTH_BUFFER * max_tokens)
    rollout.reward -= min(1.0, max(0.0, (rollout.token_count - (max_tokens - buffer)) / buffer))


def teaches(algorithm: Algorithm, group: Sequence[Rollout]) -> bool:
    """True if a group has nonzero advantages."""
    apart = not algorithm.compares_within_groups or is_informative(rewards_of(group))
    return apart and any(rollout.trained for rollout in group)


def groups_missing(wanted: int, useful: int, sampled: int) -> int:
    """Return how many more groups to sample to replace those without a signal; 0 if none was useful.

    >>> groups_missing(4, useful=2, sampled=4), groups_missing(4, useful=1, sampled=4), groups_missing(4, 3, sampled=8)
    (4, 4, 0)
    """
    if useful == 0:
        return 0
    return max(0, min(round(wanted * (1 + REFILL)) - sampled, ceil((wanted - useful) * sampled / useful)))


def is_informative(rewards: Sequence[float]) -> bool:
    """True if the rewards differ."""
    return len(rewards) > 0 and max(rewards) - min(rewards) > SMALLEST_DEVIATION


def token_weights(weighting: str, lengths: Sequence[int], max_tokens: int) -> np.ndarray:
    """Return the weight of the tokens of each sequence, float64, for a mean over all tokens of the batch.

    >>> token_weights("sequence", [1, 3], 8)
    array([2.        , 0.66666667])
    """
    sizes = np.asarray(lengths, np.float64)
    mean = sizes.mean()  # tokens per sequence
    if weighting == "token":
        return np.ones_like(sizes)
    if weighting == "sequence":
        return mean / sizes
    return np.full_like(sizes, mean / max_tokens if weighting == "constant" else mean)
