"""Problems as token ids for the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from llmkit.data.overlap import Overlap
from llmkit.errors import UserError, naming
from llmkit.formats.conversations import TOOL_FIELDS, definitions_of, message
from llmkit.formats.problems import Problem, answer_text, read_problem
from llmkit.generation.generator import prompt_ids
from llmkit.generation.tool_calls import ToolUse
from llmkit.io.jsonl import dump_json, names_of, read_jsonl
from llmkit.io.progress import counted, say
from llmkit.io.records import OUTSIDE, BadRecords, Row
from llmkit.rewards import Weighted
from llmkit.training.finetuning import Tuning

LEAST_MAX_TOKENS = 256  # per rollout, if the context has room: short answers may need long reasoning
MAX_TOKENS_SHARE = 0.95  # quantile of prompt and answer lengths that determines the default: a few long ones do not

NOT_USED = {f"{name!r} not used" for name in TOOL_FIELDS}


@dataclass(frozen=True)
class EncodedProblem:
    """A problem with its prompt as token ids."""

    problem: Problem
    prompt_ids: Sequence[int]
    losses: tuple[str, ...] = ()  # fields of the record that the prompt does not use
    tools: ToolUse | None = None  # replaces the policy's tools


def load_problems(
    paths: Sequence[str],
    limit: int | None,
    tuning: Tuning,
    rewards: Sequence[Weighted],
    system: str | None,
    max_tokens: int | None,
    bad: BadRecords,
    quiet: bool,
    columns: Mapping[str, str] = {},
    tools: ToolUse | None = None,
) -> tuple[list[EncodedProblem], int]:
    """Read problems from files and encode them; return them and the maximum tokens of a rollout.

    If `max_tokens` is None, it is twice the length of the answers and at least 256, if the context has room. The prompt
    has the assistant's chat format, with `system` for problems without a system message; for a base model it is text.
    `tools` may be called, and functions that a problem offers, which are not run. Problems longer than the context with
    their rollout are left out and counted. Records that a reward cannot judge are bad, and conversations for a base
    model.

    Raises UserError if a reward cannot judge this policy, or no problem is left.
    """
    for weighted in rewards:
        weighted.reward.check_policy(tuning.tokenizer)

    def encoded_problem(row: Row) -> EncodedProblem:
        problem = read_problem(row)
        for weighted in rewards:
            weighted.reward.check(problem)
        encoded = _encode(problem, tuning, system, tools)
        outside = (OUTSIDE,) if tuning.tokenizer.unk_id in encoded.prompt_ids else ()
        return replace(encoded, losses=encoded.problem.losses + outside)

    read = list(read_jsonl(paths, limit, encoded_problem, bad, columns))
    if max_tokens is None:
        _, counts = tuning.tokenizer.encode_batch([answer_text(item.problem.record) for item in read])
        longest = _at_share(counts.tolist())
        room = max(1, tuning.context - _at_share([len(item.prompt_ids) for item in read]))
        max_tokens = min(room, max(LEAST_MAX_TOKENS, 2 * longest))
        if max_tokens == room:
            say(f"--max-tokens {max_tokens}: all that the context of {tuning.context} leaves after the problems", quiet)
        elif max_tokens > LEAST_MAX_TOKENS:
            say(f"--max-tokens {max_tokens}: twice the {longest} tokens of long answers in the data", quiet)
    encoded = [item for item in read if len(item.prompt_ids) + max_tokens <= tuning.context]
    too_long = len(read) - len(encoded)
    left_out = f"{too_long} longer than the context of {tuning.context} with --max-tokens {max_tokens}"
    if too_long and not encoded and tools is not None and tools.schemas:
        shortest = counted(min(len(item.prompt_ids) for item in read), "token")
        left_out += f"; the shortest has {shortest}, with --tools' definitions"
    if not encoded:
        raise UserError(f"{names_of(paths)}: expected problems, found {left_out if too_long else 'none'}")
    say(f"{names_of(paths)}: {counted(len(encoded), 'problem')}{f', {left_out} left out' if too_long else ''}", quiet)
    return encoded, max_tokens


def _at_share(lengths: Sequence[int]) -> int:
    """Return the `MAX_TOKENS_SHARE` quantile of the lengths."""
    return sorted(lengths)[int(MAX_TOKENS_SHARE * (len(lengths) - 1))] if lengths else 0


def _encode(problem: Problem, tuning: Tuning, system: str | None, tools: ToolUse | None) -> EncodedProblem:
    if not tuning.is_assistant:
        if problem.messages:
            raise UserError(
                f"{problem.where}: a conversation, but {tuning.folder} is a base model; tune it with llmkit sft"
            )
        return EncodedProblem(problem, prompt_ids(tuning.tokenizer, problem.prompt))
    messages = problem.messages or (message("user", problem.prompt),)
    if system is not None and messages[0].role != "system":
        messages = (message("system", system), *messages)
        problem = replace(problem, messages=messages)
    with naming(problem.where):
        own = None
        if tools is not None and (definitions := definitions_of(problem.record)):
            tools = own = tools.offering(definitions)
            problem = replace(problem, losses=tuple(loss for loss in problem.losses if loss not in NOT_USED))
        schemas = () if tools is None else tools.schemas
        return EncodedProblem(
            problem, tuning.chat.encode(messages, prompt=True, tools=schemas).token_ids.tolist(), tools=own
        )


def digest(encoded: Iterable[EncodedProblem]) -> str:
    """Return a hash of the prompts and of the records that they are judged by."""
    hasher = sha256()
    for item in encoded:
        hasher.update(dump_json([list(item.prompt_ids), item.problem.record], default=str))
    return hasher.hexdigest()


def report_overlap(problems: Sequence[EncodedProblem], held_out: Sequence[EncodedProblem], quiet: bool) -> None:
    """Report how many of the problems are also held out, exactly or nearly."""
    overlap = Overlap.of_texts(encoded.problem.prompt for encoded in held_out)
    overlap.compare_texts(encoded.problem.prompt for encoded in problems)
    overlap.report(quiet)
