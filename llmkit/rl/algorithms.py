"""The algorithms of `llmkit rl`: an advantage and four choices in one loss (rl/policy_loss.py); the `Horizon` of a run.

The loss of a token, for its ratio r of the policy's probability to that under which it was sampled, is

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

and the loss of a batch is a mean over tokens, weighted by `weighting`.
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

KL_COEF = 0.05  # against a reward model
STEPS = 300  # against a reward model: beyond a few hundred it is gamed
WARMUP_STEPS = 10  # at least: Adam's first steps go by signs alone, and cost a model two thirds of its success
SMALLEST_DEVIATION = 1e-6  # of rewards; below it, all are equal
LENGTH_BUFFER = 0.2  # share of the longest attempt over which a penalty grows to 1: DAPO's 4,096 of 20,480
ROUNDS_WITHOUT_SIGNAL = 8  # of attempts, all worth the same within their groups, after which a run ends
REFILL = 1.0  # of the groups of a step: how many more are sampled at most, for those whose rewards are all equal


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
    """Fill in options that are None: one pass over the problems, or with a reward model `STEPS` and a KL penalty."""
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

    baseline   what is subtracted from a reward: the mean of its group ("group"), of the others of its group
               ("others"), or of the batch ("batch")
    scale      what the difference is divided by: the deviation of the "group" or the "batch", or nothing
    weighting  of tokens: "token" gives all the same, "sequence" gives each sequence the same, "constant" divides sums
               by the longest that a sequence may be, and "sum" only by the number of sequences
    ratio      of one "token", or the geometric mean over its "sequence"
    clip       (low, high), or None
    kl         whether the divergence from the reference is part of the "loss" or of the "reward"
    penalises_length  whether attempts near the longest lose up to 1 of their reward
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
        """True if a group needs two attempts of different worth to teach anything."""
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
    # Hu et al. 2025 (arXiv 2501.03262), section 3: normalised over the batch, so that one attempt at a problem will do
    "reinforce++": Algorithm("batch", "batch", "token", kl="reward"),
    # Zheng et al. 2025 (arXiv 2507.18071), sections 4.1 and 5.1
    "gspo": Algorithm("group", "group", "sequence", ratio="sequence", clip=(3e-4, 4e-4)),
}


def check_group(algo: str, group: int, batch_size: int) -> None:
    """Raise UserError for so few attempts that an algorithm compares nothing."""
    if group == 1 and ALGORITHMS[algo].compares_within_groups:
        raise UserError(
            f"--group 1: --algo {algo} compares the attempts at a problem with one another and needs 2 or more; "
            "--algo reinforce++ compares those of a step"
        )
    if group == batch_size == 1:
        raise UserError("--group 1 --batch-size 1: expected two attempts a step at least, to compare")


def advantages(algorithm: Algorithm, rewards: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """float64 of each group of rewards: how much better an attempt is than was to be expected.

    >>> advantages(ALGORITHMS["rloo"], [[1.0, 0.0, 0.0]])
    [array([ 1. , -0.5, -0.5])]

    Where rewards are all equal the advantages are 0.
    """
    every = np.concatenate([np.asarray(group, np.float64) for group in rewards])
    normalised = []
    for group in (np.asarray(group, np.float64) for group in rewards):
        centred = group - (every if algorithm.baseline == "batch" else group).mean()
        if algorithm.baseline == "others":
            centred = centred * len(group) / max(1, len(group) - 1)
        deviation = {"group": group.std(), "batch": every.std(), None: 1.0}[algorithm.scale]
        # equal rewards differ by their mean's rounding, which a division would blow up
        normalised.append(centred / deviation if deviation > SMALLEST_DEVIATION else np.zeros_like(centred))
    return normalised


def set_advantages(algorithm: Algorithm, groups: Sequence[Sequence[Rollout]], kl_coef: float) -> None:
    """Give every attempt its advantage, from rewards less the divergence from the reference where that is in them."""
    penalty = kl_coef if algorithm.kl == "reward" else 0.0
    worth = [[rollout.reward - penalty * rollout.divergence for rollout in group] for group in groups]
    for group, values in zip(groups, advantages(algorithm, worth), strict=True):
        for rollout, advantage in zip(group, values.tolist(), strict=True):
            rollout.advantage = advantage


def penalise_length(rollout: Rollout, max_tokens: int) -> None:
    """Take up to 1 away over the last fifth of the length (Yu et al. 2025, arXiv 2503.14476, equation 13)."""
    buffer = max(1.0, LENGTH_BUFFER * max_tokens)
    rollout.reward -= min(1.0, max(0.0, (rollout.token_count - (max_tokens - buffer)) / buffer))


def teaches(algorithm: Algorithm, group: Sequence[Rollout]) -> bool:
    """True if a group has advantages other than 0."""
    apart = not algorithm.compares_within_groups or is_informative(rewards_of(group))
    return apart and any(rollout.trained for rollout in group)


def groups_missing(wanted: int, useful: int, sampled: int) -> int:
    """How many groups more to sample where some of those sampled taught nothing; none where none was useful.

    >>> groups_missing(4, useful=2, sampled=4), groups_missing(4, useful=1, sampled=4), groups_missing(4, 3, sampled=8)
    (4, 4, 0)
    """
    if useful == 0:
        return 0
    return max(0, min(round(wanted * (1 + REFILL)) - sampled, ceil((wanted - useful) * sampled / useful)))


def is_informative(rewards: Sequence[float]) -> bool:
    """True if a group tells one attempt from another."""
    return len(rewards) > 0 and max(rewards) - min(rewards) > SMALLEST_DEVIATION


def token_weights(weighting: str, lengths: Sequence[int], max_tokens: int) -> np.ndarray:
    """float64 weight of every token of each sequence, for a mean over all tokens of the batch.

    >>> token_weights("sequence", [1, 3], 8)
    array([2.        , 0.66666667])
    """
    sizes = np.asarray(lengths, np.float64)
    mean = sizes.mean()  # tokens of the batch for each of its sequences
    if weighting == "token":
        return np.ones_like(sizes)
    if weighting == "sequence":
        return mean / sizes
    return np.full_like(sizes, mean / max_tokens if weighting == "constant" else mean)
