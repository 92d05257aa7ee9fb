"""Interface of all rewards: attempts go in, one finite number each comes out."""

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
    from llmkit.tokenizer.encoding import Tokenizer  # brings numpy, which a mistyped SPEC does without

LARGEST = 1e9  # of rewards and weights: squares of their sums stay finite in float32


@dataclass(frozen=True, slots=True)
class Attempt:
    """One completion of a problem.

    completion     its text, without special tokens
    token_count    tokens sampled
    finish_reason  "stop", "length", "tool_limit" or "tool_calls"
    max_tokens     that could have been sampled
    tool_calls     {"tool", "input", "result"} of each, without "result" where nobody ran it
    """

    problem: Problem
    completion: str
    token_count: int
    finish_reason: str
    max_tokens: int
    tool_calls: Sequence[Mapping[str, Any]] = ()


class Reward:
    """A way to judge attempts.

    name      its key in logs, such as "verifier" or "rm:judge/"
    where     the option that it comes from, with its name, for errors
    verifies  whether 1 means right and 0 wrong
    """

    verifies = False

    def __init__(self, name: str, flag: str = "--reward") -> None:
        self.name, self.where = name, f"{flag} {name}"

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


class ModelReward(Reward):
    """The score of a reward model, the mean of its heads; a truncated completion is scored as it stands.

    spread  give minus the standard deviation over the heads instead: low where they have learnt nothing that holds
            (Coste et al. 2023, arXiv 2310.02743, take it for the uncertainty of a judge)
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
        """Raise UserError where the policy's tokens are not the reward model's."""
        if not self.tokenizer.same_vocabulary(tokenizer):
            raise UserError(
                f"{self.where}: expected the vocabulary of {tokenizer.path.parent} "
                f"({tokenizer.vocab_size} tokens), found another ({self.tokenizer.vocab_size}); train the judge from it"
            )

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """Return the reward of each. Raises UserError for a completion that does not fit the model's context."""
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
        """Let the model go."""
        del self.scorer
