"""Problems as the policy reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from llmkit.conversations import message
from llmkit.engine.finetuning import Finetuning
from llmkit.engine.generation import prompt_ids
from llmkit.errors import UserError
from llmkit.problems import Problem
from llmkit.rewards import Weighted
from llmkit.rewards.reward_models import ModelReward


@dataclass(frozen=True)
class AskedProblem:
    """A problem and its tokens."""

    problem: Problem
    prompt_ids: Sequence[int]


def ask(
    problems: Iterable[Problem], tuning: Finetuning, rewards: Sequence[Weighted], system: str | None, max_tokens: int
) -> tuple[list[AskedProblem], int]:
    """The problems in tokens, and how many are left out, being with `max_tokens` more longer than the context.

    An assistant is asked in its format, a base model's prompt is text. Raises UserError for a problem that a reward
    cannot judge, a reward model of another vocabulary, and a conversation with a base model.
    """
    for weighted in rewards:
        if isinstance(weighted.reward, ModelReward):
            weighted.reward.check_vocabulary(tuning.tokenizer)
    asked, too_long = [], 0
    for problem in problems:
        for weighted in rewards:
            weighted.reward.check(problem)
        ids = _ids(problem, tuning, system)
        if len(ids) + max_tokens > tuning.context:
            too_long += 1
        else:
            asked.append(AskedProblem(problem, ids))
    return asked, too_long


def _ids(problem: Problem, tuning: Finetuning, system: str | None) -> list[int]:
    if not tuning.is_assistant:
        if problem.messages:
            raise UserError(
                f"{problem.where}: a conversation, and {tuning.folder} is a base model; tune it by llmkit sft"
            )
        return prompt_ids(tuning.tokenizer, problem.prompt)
    messages = problem.messages or (message("user", problem.prompt),)
    if system is not None and messages[0].role != "system":
        messages = (message("system", system), *messages)
    return tuning.chat.encode(messages, prompt=True).token_ids.tolist()


def digest(asked: Iterable[AskedProblem]) -> str:
    """A hash of what is asked and what is right."""
    found = sha256()
    for one in asked:
        found.update(f"{list(one.prompt_ids)} {one.problem.answer!r} {one.problem.verifier}\n".encode())
    return found.hexdigest()
