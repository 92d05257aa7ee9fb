"""Problems as the policy reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import orjson

from llmkit.conversations import message
from llmkit.engine.finetuning import Finetuning
from llmkit.engine.generation import prompt_ids
from llmkit.errors import UserError
from llmkit.problems import Problem, read_problems
from llmkit.progress import say
from llmkit.rewards import Weighted
from llmkit.stream import names_of


@dataclass(frozen=True)
class EncodedProblem:
    """A problem, as the policy is asked it, and its tokens."""

    problem: Problem
    prompt_ids: Sequence[int]


def encode_problems(
    problems: Iterable[Problem], tuning: Finetuning, rewards: Sequence[Weighted], system: str | None, max_tokens: int
) -> tuple[list[EncodedProblem], int]:
    """The problems in tokens, and how many are left out, being with `max_tokens` more longer than the context.

    An assistant is asked in its format, with `system` before problems that have no system message; a base model's
    prompt is text. Raises UserError for a problem that a reward cannot judge, for a reward that cannot judge this
    policy, and for a conversation with a base model.
    """
    for weighted in rewards:
        weighted.reward.check_policy(tuning.tokenizer)
    encoded, too_long = [], 0
    for problem in problems:
        for weighted in rewards:
            weighted.reward.check(problem)
        one = _encode(problem, tuning, system)
        if len(one.prompt_ids) + max_tokens > tuning.context:
            too_long += 1
        else:
            encoded.append(one)
    return encoded, too_long


def load_problems(
    paths: Sequence[str],
    limit: int | None,
    tuning: Finetuning,
    rewards: Sequence[Weighted],
    system: str | None,
    max_tokens: int,
    quiet: bool,
) -> list[EncodedProblem]:
    """`encode_problems` of files; says how many there are. Raises UserError where there are none."""
    encoded, too_long = encode_problems(read_problems(paths, limit), tuning, rewards, system, max_tokens)
    left_out = f"{too_long} longer than the context of {tuning.context} with --max-tokens {max_tokens}"
    if not encoded:
        raise UserError(f"{names_of(paths)}: expected problems, found {left_out if too_long else 'none'}")
    say(f"{names_of(paths)}: {len(encoded)} problems{f', {left_out} left out' if too_long else ''}", quiet)
    for name, count in Counter(name for one in encoded for name in one.problem.unused).items():
        say(f"{names_of(paths)}: {name!r} of {count} problems is not asked: another field is", quiet)
    return encoded


def _encode(problem: Problem, tuning: Finetuning, system: str | None) -> EncodedProblem:
    if not tuning.is_assistant:
        if problem.messages:
            raise UserError(
                f"{problem.where}: a conversation, and {tuning.folder} is a base model; tune it by llmkit sft"
            )
        return EncodedProblem(problem, prompt_ids(tuning.tokenizer, problem.prompt))
    messages = problem.messages or (message("user", problem.prompt),)
    if system is not None and messages[0].role != "system":
        messages = (message("system", system), *messages)
        problem = replace(problem, messages=messages)
    return EncodedProblem(problem, tuning.chat.encode(messages, prompt=True).token_ids.tolist())


def digest(encoded: Iterable[EncodedProblem]) -> str:
    """A hash of what is asked, and of all that it is judged by."""
    found = sha256()
    for one in encoded:
        found.update(orjson.dumps([list(one.prompt_ids), one.problem.record], default=str))
    return found.hexdigest()
