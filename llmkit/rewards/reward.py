"""Interface of all rewards: attempts go in, one finite number each comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.errors import UserError
from llmkit.formats.problems import Problem

if TYPE_CHECKING:
    from llmkit.tokenizer.encoding import Tokenizer  # brings numpy, which a mistyped SPEC does without

LARGEST = 1e9  # of rewards and weights: squares of their sums stay finite in float32


@dataclass(frozen=True, slots=True)
class Attempt:
    """One completion of a problem.

    completion     its text, without special tokens
    token_count    tokens sampled
    finish_reason  "stop", "length" or "tool_limit"
    max_tokens     that could have been sampled
    """

    problem: Problem
    completion: str
    token_count: int
    finish_reason: str
    max_tokens: int


class Reward:
    """A way to judge attempts.

    name      its key in logs, such as "verifier" or "rm:judge/"
    verifies  whether 1 means right and 0 wrong
    """

    name: str
    verifies = False

    def check(self, problem: Problem) -> None:
        """Raise UserError where this problem cannot be judged; asked of every problem before training."""

    def check_policy(self, tokenizer: Tokenizer) -> None:
        """Raise UserError where attempts of a policy with this tokenizer cannot be judged."""

    def score(self, attempts: Sequence[Attempt]) -> Sequence[float | None]:
        """A finite number for each attempt, in their order, None for one that cannot be judged.

        Raises UserError where the reward itself fails.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release processes and memory."""


@dataclass(frozen=True)
class Weighted:
    """A reward and its share of the sum."""

    reward: Reward
    weight: float


def judge(
    attempts: Sequence[Attempt], weighted: Sequence[Weighted]
) -> list[tuple[dict[str, float | None], float | None]]:
    """For each attempt, what each reward gives it, by its name, and the weighted sum; None where one cannot judge."""
    columns = {item.reward.name: item.reward.score(attempts) for item in weighted}
    judged = []
    for values in zip(*columns.values(), strict=True):
        known = [item.weight * value for item, value in zip(weighted, values, strict=True) if value is not None]
        total = math.fsum(known) if len(known) == len(values) else None
        judged.append((dict(zip(columns, values, strict=True)), total))
    return judged


def finite(values: Sequence[float | None], what: str) -> list[float | None]:
    """The values. Raises UserError that names the first which is NaN, infinite or beyond `LARGEST`."""
    for number, value in enumerate(values, 1):
        if value is not None and not abs(value) <= LARGEST:
            expected = f"rewards from {-LARGEST:g} to {LARGEST:g}" if math.isfinite(value) else "finite rewards"
            raise UserError(f"{what}: expected {expected}, found {value} for completion {number} of {len(values)}")
    return list(values)
