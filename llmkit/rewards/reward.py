"""Interface of all rewards: each attempt gets one finite number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import UserError
from llmkit.formats.conversations import as_record
from llmkit.formats.problems import Problem
from llmkit.io.records import Row

if TYPE_CHECKING:
    from llmkit.tokenizer.encoding import Tokenizer  # imports numpy, which the check of a SPEC does not need

LARGEST = 1e9  # reward or weight: squares of sums stay finite in float32


@dataclass(frozen=True, slots=True)
class Attempt:
    """One completion of a problem.

    completion     text without special tokens
    token_count    number of sampled tokens
    finish_reason  "stop", "length", "tool_limit" or "tool_calls"
    max_tokens     limit of sampled tokens
    tool_calls     {"tool", "input", "result"} of each call, without "result" if it was not run
    """

    problem: Problem
    completion: str
    token_count: int
    finish_reason: str
    max_tokens: int
    tool_calls: Sequence[Mapping[str, Any]] = ()


class Reward:
    """A reward.

    name      key in logs, such as "verifier" or "rm:judge/"
    where     option and name, for errors
    verifies  whether 1 means right and 0 wrong
    """

    verifies = False

    def __init__(self, name: str, flag: str = "--reward") -> None:
        self.name, self.where = name, f"{flag} {name}"

    def check(self, problem: Problem) -> None:
        """Raise UserError if this problem cannot be judged; called for every problem before training."""

    def check_policy(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if attempts of a policy with this tokenizer cannot be judged."""

    def score(self, attempts: Sequence[Attempt]) -> Sequence[float | None]:
        """Return a finite number for each attempt, or None if it cannot be judged.

        Raises UserError if the reward itself fails.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release processes and memory."""


@dataclass(frozen=True)
class Weighted:
    """A reward and its weight in the sum."""

    reward: Reward
    weight: float


def judge(
    attempts: Sequence[Attempt], weighted: Sequence[Weighted]
) -> list[tuple[dict[str, float | None], float | None]]:
    """Return each attempt's rewards by name, and their weighted sum, None if one of them is None."""
    columns = {item.reward.name: item.reward.score(attempts) for item in weighted}
    judged = []
    for values in zip(*columns.values(), strict=True):
        known = [item.weight * value for item, value in zip(weighted, values, strict=True) if value is not None]
        total = math.fsum(known) if len(known) == len(values) else None
        judged.append((dict(zip(columns, values, strict=True)), total))
    return judged


def finite(values: Sequence[float | None], what: str) -> list[float | None]:
    """Return the values. Raises UserError for the first that is NaN, infinite or larger than `LARGEST`."""
    for number, value in enumerate(values, 1):
        if value is not None and not abs(value) <= LARGEST:
            expected = f"rewards from {-LARGEST:g} to {LARGEST:g}" if math.isfinite(value) else "finite rewards"
            raise UserError(f"{what}: expected {expected}, found {value} for completion {number} of {len(values)}")
    return list(values)


class ModelReward(Reward):
    """The score of a reward model, the mean of its heads; truncated completions are scored as they are.

    spread  return minus the standard deviation over the heads instead, a measure of uncertainty (Coste et al. 2023,
            arXiv 2310.02743)
    """

    def __init__(
        self, folder: str, device: str = "auto", dtype: str = "auto", spread: bool = False, flag: str = "--reward"
    ) -> None:
        from llmkit.model.devices import choose_device, choose_dtype
        from llmkit.reward_model.head import load_reward_model
        from llmkit.reward_model.scoring import Scorer
        from llmkit.tokenizer.encoding import load_tokenizer
        from llmkit.tokenizer.templates import chat_format

        super().__init__(f"{'spread' if spread else 'rm'}:{folder}", flag)
        self.folder, self._spread = folder, spread
        processor = choose_device(device)
        self.tokenizer = load_tokenizer(folder)
        model = load_reward_model(folder, dtype=choose_dtype(dtype, processor), device=processor)
        self.tokenizer.check_fits(model.config.vocab_size)
        if spread and len(model.score) < 2:
            raise UserError(
                f"{self.where}: expected a reward model of several heads, found one; train it with "
                "llmkit train-reward --ensemble 4"
            )
        chat = chat_format(self.tokenizer)
        self.context = model.config.max_position_embeddings
        self.scorer = Scorer(model, chat, chat.end_id)

    def check_policy(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the policy's vocabulary is not the reward model's."""
        if not self.tokenizer.same_vocabulary(tokenizer):
            raise UserError(
                f"{self.where}: expected the vocabulary of {tokenizer.path.parent} "
                f"({tokenizer.vocab_size} tokens), found another ({self.tokenizer.vocab_size}); train the judge from it"
            )

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """Return the reward of each attempt. Raises UserError if one does not fit the model's context."""
        import torch

        problems = [attempt.problem for attempt in attempts]
        prompts = [as_record(problem.messages) if problem.messages else problem.prompt for problem in problems]
        rows = [
            Row({"prompt": prompt, "completion": attempt.completion}, attempt.problem.where, 0)
            for attempt, prompt in zip(attempts, prompts, strict=True)
        ]
        with torch.inference_mode():
            records = list(self.scorer.score(rows))
        for attempt, record in zip(attempts, records, strict=True):
            if record["reward"] is None:
                raise UserError(
                    f"{self.where}: expected completions that fit its context of {self.context} tokens, found one of "
                    f"{attempt.token_count}; lower --max-tokens"
                )
        rewards = [-record["reward_std"] if self._spread else record["reward"] for record in records]
        return finite(rewards, self.where)

    def close(self) -> None:
        """Release the model."""
        del self.scorer
