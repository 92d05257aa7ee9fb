"""Preferences: read every format that `train-reward` accepts as a comparison of answers to a prompt.

    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 1.0}     strings, messages, or lists of messages
    {"chosen": [...], "rejected": [...]}                        conversations; the prompt is their common prefix
    {"chosen": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4", "rejected": ...}      transcripts, as in hh-rlhf
    {"chosen": "The sky is blue.", "rejected": "The sky is green."}     texts; the prompt is their common prefix
    {"prompt": ..., "completions": [...], "ranking": [1, 3, 2]}   a rank for each, 1 the best; equal ranks are ties
    {"conversations": [...], "chosen": ..., "rejected": ...}    ShareGPT's; also "instruction" (and "input")
    {"prompt": ..., "completion": ..., "label": true}   KTO's, and any conversation with a label: not for train-reward

Only the order of ranks matters: 1, 2, 3 and 1, 5, 9 are the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import (
    VERDICTS,
    Message,
    entries_of,
    find_prompt,
    read_conversation,
    read_messages,
    said_in,
)
from llmkit.formats.questions import placed
from llmkit.io.progress import counted
from llmkit.io.records import (
    ANSWERS,
    CHOSEN,
    COMPARED,
    PROMPT_FIRST,
    SYSTEM,
    Row,
    fields_of,
    first_of,
    kind_of,
    not_used,
)

TURN = re.compile(r"\n\n(Human|Assistant):")
WORD_END = re.compile(r"(?<=\S)\s+\S*\Z")  # end of the last complete word of a text
STATED = ("prompt", "conversations", "question", "problem", "query", "instruction")  # `messages` includes the answer
LARGEST_MARGIN = 10_000  # between scores; the loss of larger ones cannot be minimized
SIDES = ("chosen", "rejected")
Messages = tuple[Message, ...]
EXPECTED = "'chosen' and 'rejected', or 'completions' and 'ranking'"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to a prompt and their ranks.

    prompt      shared by all answers
    candidates  the answers, two or more
    ranks       rank of each candidate, 1 the best
    margin      smallest difference between the score of the better and the worse answer
    where       FILE:LINE
    losses      unused parts of the record
    """

    prompt: Messages
    candidates: tuple[Messages, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0
    where: str = ""
    losses: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """Text without the system message."""
        return "\n".join(map(said_in, (self.prompt, *self.candidates)))


@placed
def read_comparison(row: Row) -> Comparison | str:
    """Read the comparison in a record, or the reason why it teaches nothing. Raise UserError with file and line."""
    value = row.value
    renamed = {CHOSEN.get(name, name): content for name, content in value.items()}
    if len(renamed) == len(value):  # StackExchange's names; if a record has both, ours are used
        value, row = renamed, replace(row, value=renamed)
    if value.get("completions") is not None:
        comparison = _ranked(row)
    elif "chosen" in value or "rejected" in value:
        comparison = _pair(row)
    else:
        raise UserError(f"expected {EXPECTED}, found {fields_of(value)}")
    if all(candidate == comparison.candidates[0] for candidate in comparison.candidates):
        return "chosen equals rejected" if "completions" not in value else "all completions equal"
    return comparison


@placed
def read_verdict(row: Row) -> Comparison | str:
    """Read a comparison, or one answer with a `label` as rank 1 (desirable) or 2. Raise UserError."""
    value = row.value
    if not any(value.get(name) is not None for name in VERDICTS) or {"chosen", "rejected", "ranking"} & value.keys():
        if not value.keys() & {*COMPARED}:
            raise UserError(f"expected an answer and its 'label', {EXPECTED}, found {fields_of(value)}")
        return read_comparison(row)
    conversation = read_conversation(row)
    if unclear := next((name for name in VERDICTS if f"{name!r} not used" in conversation.losses), None):
        raise UserError(f"expected a {unclear!r} of true or false, found {value[unclear]!r:.40}")
    messages = conversation.messages
    start = max((number for number, turn in enumerate(messages, 1) if turn.role != "assistant"), default=0)
    if start == len(messages):
        raise UserError("expected an answer of the assistant, found a conversation that ends with another role")
    ranks = (2 if conversation.rejected else 1,)
    return Comparison(messages[:start], (messages[start:],), ranks, 0.0, row.where, conversation.losses)


@placed
def read_prompt(row: Row, lost: list[str] | None = None) -> Messages:
    """Read the prompt of a record: `messages`, a `prompt` of text or messages, or another field. Raise UserError."""
    prompt = find_prompt(row, PROMPT_FIRST)
    if prompt is None:
        raise UserError(f"expected field 'prompt' or 'messages', found {fields_of(row.value)}")
    return read_messages(row, prompt.entries, lost)


@placed
def read_answers(row: Row) -> list[Messages]:
    """Read the answer of a record, such as `completion`, or all its `completions`. Raise UserError."""
    if row.value.get("completions") is not None:
        return _completions(row)
    name = first_of(row.value, ANSWERS)
    if name is None:
        raise UserError(f"expected field 'completion' or 'completions', found {fields_of(row.value)}")
    return [_messages(row, name, row.value[name], "assistant")]


# ---- formats


def _pair(row: Row) -> Comparison:
    value = row.value
    missing = [side for side in SIDES if value.get(side) is None]
    if missing:
        raise UserError(f"expected {EXPECTED}, found no {missing[0]!r} in {fields_of(value)}")
    margin = 0.0 if value.get("margin") is None else value["margin"]
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin <= LARGEST_MARGIN:
        raise UserError(f"expected 'margin' to be a number from 0 to {LARGEST_MARGIN}, found {margin!r}")
    lost: list[str] = []
    stated = find_prompt(row, STATED)
    if stated is None:
        prompt, sides, used = _split(row, lost)
    else:
        prompt, used = read_messages(row, stated.entries, lost), stated.used
        sides = [_after(_messages(row, name, value[name], "assistant", lost), prompt, name) for name in SIDES]
    lost += not_used(value, (*used, *SIDES, "margin"))
    return Comparison(prompt, tuple(sides), (1, 2), float(margin), row.where, tuple(lost))


def _split(row: Row, lost: list[str]) -> tuple[Messages, list[Messages], tuple[str, ...]]:
    """Split two sides into their common prompt and the answers; also return the other fields used."""
    value = row.value
    name = next((name for name in SYSTEM if value.get(name)), None)
    system = () if name is None else _messages(row, name, value[name], "system")
    used = SYSTEM if system else ()
    texts = [value[name] for name in SIDES]
    if all(isinstance(text, str) and not TURN.search(text) for text in texts):
        # like TRL's implicit prompt, up to the last common word
        end = WORD_END.search(commonprefix(texts))  # noqa: RUF071  (of characters, as intended)
        if end:
            prompt = (*system, *_messages(row, "prompt", texts[0][: end.start()], "user"))
            return prompt, [_messages(row, "chosen", text[end.start() :], "assistant") for text in texts], used
    first, second = (
        _transcript(row, name, value[name])
        if isinstance(value[name], str)
        else _messages(row, name, value[name], "assistant", lost)
        for name in SIDES
    )
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    if first == second and first[-1].role == "assistant":
        same -= 1
    prompt, sides = first[:same], [first[same:], second[same:]]
    if first != second:
        for name, side in zip(SIDES, sides, strict=True):
            if not side:
                raise UserError(f"expected an answer in {name!r}, found only the prompt")
        if any(side[0].role != "assistant" for side in sides):
            raise UserError("expected 'chosen' and 'rejected' to begin with the same prompt; they differ")
    return prompt if prompt and prompt[0].role == "system" else (*system, *prompt), sides, used


def _ranked(row: Row) -> Comparison:
    lost: list[str] = []
    prompt, candidates = read_prompt(row, lost), _completions(row, lost)
    ranking = row.value.get("ranking")
    if not isinstance(ranking, list) or len(ranking) != len(candidates):
        got = counted(len(ranking), "number") if isinstance(ranking, list) else kind_of(ranking)
        wanted = f"{counted(len(candidates), 'rank')}, one per completion"
        raise UserError(f"expected 'ranking' to be {wanted}, found {got}")
    for rank in ranking:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
            raise UserError(f"expected 'ranking' to be a list of numbers, 1 the best, found {rank!r}")
    levels = sorted(set(ranking))
    ranks = tuple(levels.index(rank) + 1 for rank in ranking)
    stated = find_prompt(row, PROMPT_FIRST)
    unused = not_used(row.value, (*(stated.used if stated else ()), "completions", "ranking"))
    return Comparison(prompt, tuple(candidates), ranks, 0.0, row.where, (*lost, *unused))


def _completions(row: Row, lost: list[str] | None = None) -> list[Messages]:
    values = row.value["completions"]
    if not isinstance(values, list) or not values or ("ranking" in row.value and len(values) < 2):
        instead = len(values) if isinstance(values, list) else kind_of(values)
        raise UserError(f"expected 'completions' to be a list of answers, found {instead}")
    return [_messages(row, "completions", value, "assistant", lost) for value in values]


def _transcript(row: Row, name: str, text: str) -> Messages:
    """Read the turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    begin, *turns = TURN.split(text)
    if begin.strip() or not turns:
        raise UserError(f"expected field 'prompt', or {name!r} to begin with '\\n\\nHuman:', found {text[:30]!r}")
    pairs = zip(turns[::2], turns[1::2], strict=True)  # "Human" is in ROLES
    return read_messages(row, [{"role": speaker, "content": turn.strip()} for speaker, turn in pairs])


def _messages(row: Row, name: str, value: Any, role: str, lost: list[str] | None = None) -> Messages:
    messages = read_messages(row, entries_of(name, [value] if isinstance(value, dict) else value, role), lost)
    loss = "'weight' of a message not used"  # answers are compared completely
    unlearnt = any(turn.weight == 0 and turn.role == "assistant" for turn in messages)
    if unlearnt and lost is not None and loss not in lost:
        lost.append(loss)
    return messages


def _after(side: Messages, prompt: Messages, name: str) -> Messages:
    """Remove the prompt from the beginning of a side, which may repeat it."""
    if side and side[0].role == "assistant":
        return side
    if prompt[0].role == "system" and side[0].role != "system":  # a side may omit the record's system message
        prompt = prompt[1:]
    if side[: len(prompt)] != prompt:
        raise UserError(f"expected {name!r} to be an answer, or to begin with the prompt; it does neither")
    if len(side) == len(prompt):
        raise UserError(f"expected an answer in {name!r}, found only the prompt")
    return side[len(prompt) :]
