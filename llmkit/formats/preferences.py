"""Preferences: every format that `train-reward` accepts, turned into one comparison of answers to a prompt.

    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 1.0}     strings, messages, or lists of messages
    {"chosen": [...], "rejected": [...]}                        conversations; the prompt is what they begin with
    {"chosen": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4", "rejected": ...}      transcripts, as in hh-rlhf
    {"chosen": "The sky is blue.", "rejected": "The sky is green."}     texts; the prompt is the words they begin with
    {"prompt": ..., "completions": [...], "ranking": [1, 3, 2]}   a rank for each, 1 the best; equal ranks are ties
    {"conversations": [...], "chosen": ..., "rejected": ...}    ShareGPT's; also "instruction" (and "input")

Ranks say only which is better: 1, 2, 3 and 1, 5, 9 are the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, find_prompt, read_messages, said_in
from llmkit.io.progress import counted
from llmkit.io.records import ANSWERS, CHOSEN, PROMPT_FIRST, SYSTEM, Row, fields_of, first_of, kind_of, not_used

TURN = re.compile(r"\n\n(Human|Assistant):")
WORD_END = re.compile(r"(?<=\S)\s+\S*\Z")  # where the last whole word of a text ends
STATED = ("prompt", "conversations", "question", "problem", "query", "instruction")  # messages hold the answer, too
LARGEST_MARGIN = 10_000  # between scores; beyond it the loss is no number that training could lower
EXPECTED = "'chosen' and 'rejected', or 'completions' and 'ranking'"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to a prompt and their ranks.

    prompt      what all answers follow
    candidates  the answers, two or more
    ranks       of each, from 1, the best
    margin      by how much the score of the better of two should lie above the other's, at least
    where       its place in a file
    losses      what of its record is not used
    """

    prompt: tuple[Message, ...]
    candidates: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    margin: float = 0.0
    where: str = ""
    losses: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """All its words but those of a system message."""
        return "\n".join(map(said_in, (self.prompt, *self.candidates)))


def read_comparison(row: Row) -> Comparison | str:
    """The comparison in a record of any format, or why there is nothing to learn from it.

    Raises UserError that names the place and what was expected.
    """
    value = row.value
    renamed = {CHOSEN.get(name, name): content for name, content in value.items()}
    if len(renamed) == len(value):  # of StackExchange's pairs; else a record has both, and ours are used
        value, row = renamed, replace(row, value=renamed)
    if value.get("completions") is not None:
        comparison = _ranked(row)
    elif "chosen" in value or "rejected" in value:
        comparison = _pair(row)
    else:
        raise UserError(f"{row.where}: expected {EXPECTED}, found {fields_of(value)}")
    if all(candidate == comparison.candidates[0] for candidate in comparison.candidates):
        return "chosen equals rejected" if "completions" not in value else "all completions equal"
    return comparison


def read_prompt(row: Row, lost: list[str] | None = None) -> tuple[Message, ...]:
    """The prompt of a record: `messages`, or a `prompt` of text or messages, or what else asks. Raises UserError."""
    prompt = find_prompt(row, PROMPT_FIRST)
    if prompt is None:
        raise UserError(f"{row.where}: expected field 'prompt' or 'messages', found {fields_of(row.value)}")
    return read_messages(row, prompt.entries, lost)


def read_answers(row: Row) -> list[tuple[Message, ...]]:
    """The answer of a record, `completion` or `response`, or all its `completions`. Raises UserError."""
    if row.value.get("completions") is not None:
        return _completions(row)
    name = first_of(row.value, ANSWERS)
    if name is None:
        raise UserError(f"{row.where}: expected field 'completion' or 'completions', found {fields_of(row.value)}")
    return [_messages(row, name, row.value[name], "assistant")]


# ---- formats


def _pair(row: Row) -> Comparison:
    value = row.value
    missing = [side for side in ("chosen", "rejected") if value.get(side) is None]
    if missing:
        raise UserError(f"{row.where}: expected {EXPECTED}, found no {missing[0]!r} in {fields_of(value)}")
    margin = 0.0 if value.get("margin") is None else value["margin"]
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin <= LARGEST_MARGIN:
        raise UserError(f"{row.where}: expected 'margin' to be a number from 0 to {LARGEST_MARGIN}, found {margin!r}")
    stated, lost = find_prompt(row, STATED), list[str]()
    prompt = None if stated is None else read_messages(row, stated.entries, lost)
    system = _system(row) if stated is None else ()
    used = SYSTEM if system else () if stated is None else stated.used
    unused = not_used(value, (*used, "chosen", "rejected", "margin"))
    if prompt is None and (texts := _continuations(value["chosen"], value["rejected"])):
        start, *answers = texts
        candidates = tuple(_messages(row, "chosen", text, "assistant") for text in answers)
        prompt = (*system, *_messages(row, "prompt", start, "user"))
        return Comparison(prompt, candidates, (1, 2), float(margin), row.where, unused)
    sides = [_side(row, side, prompt is None, lost) for side in ("chosen", "rejected")]
    if prompt is None:
        prompt = _common_start(*sides)
        sides = [side[len(prompt) :] for side in sides]
        short = [name for name, side in zip(("chosen", "rejected"), sides, strict=True) if not side]
        if short and sides[0] != sides[1]:
            raise UserError(f"{row.where}: expected an answer of its own in {short[0]!r}, found only the prompt")
        if sides[0] != sides[1] and any(side[0].role != "assistant" for side in sides):
            raise UserError(f"{row.where}: expected 'chosen' and 'rejected' to begin with the same prompt; they differ")
        if not prompt or prompt[0].role != "system":
            prompt = (*system, *prompt)
    else:
        sides = [_after(row, side, prompt, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    return Comparison(prompt, tuple(sides), (1, 2), float(margin), row.where, (*lost, *unused))


def _ranked(row: Row) -> Comparison:
    lost: list[str] = []
    prompt, candidates = read_prompt(row, lost), _completions(row, lost)
    ranking = row.value.get("ranking")
    if not isinstance(ranking, list) or len(ranking) != len(candidates):
        got = counted(len(ranking), "number") if isinstance(ranking, list) else kind_of(ranking)
        raise UserError(
            f"{row.where}: expected 'ranking' to be {counted(len(candidates), 'rank')}, one a completion, found {got}"
        )
    for rank in ranking:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
            raise UserError(f"{row.where}: expected 'ranking' to hold numbers, 1 the best, found {rank!r}")
    levels = sorted(set(ranking))
    ranks = tuple(levels.index(rank) + 1 for rank in ranking)
    stated = find_prompt(row, PROMPT_FIRST)
    unused = not_used(row.value, (*(stated.used if stated else ()), "completions", "ranking"))
    return Comparison(prompt, tuple(candidates), ranks, 0.0, row.where, (*lost, *unused))


def _completions(row: Row, lost: list[str] | None = None) -> list[tuple[Message, ...]]:
    values = row.value["completions"]
    if not isinstance(values, list) or not values or ("ranking" in row.value and len(values) < 2):
        instead = f"{len(values)}" if isinstance(values, list) else kind_of(values)
        raise UserError(f"{row.where}: expected 'completions' to be a list of answers, found {instead}")
    return [_messages(row, "completions", value, "assistant", lost) for value in values]


def _system(row: Row) -> tuple[Message, ...]:
    """The system message of a record whose sides begin with their prompt."""
    name = next((name for name in SYSTEM if row.value.get(name)), None)
    return () if name is None else _messages(row, name, row.value[name], "system")


def _continuations(chosen: Any, rejected: Any) -> tuple[str, str, str] | None:
    """Prompt and answers of two texts that begin alike: TRL's implicit prompt, up to a word. None for other values."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)) or TURN.search(chosen) or TURN.search(rejected):
        return None
    pairs = enumerate(zip(chosen, rejected, strict=False))
    same = next((i for i, (first, other) in pairs if first != other), min(len(chosen), len(rejected)))
    alike = WORD_END.search(chosen[:same])
    if alike is None:
        return None
    end = alike.start()
    return chosen[:end], chosen[end:], rejected[end:]


def _side(row: Row, name: str, whole: bool, lost: list[str]) -> tuple[Message, ...]:
    value = row.value[name]
    if isinstance(value, str) and whole:
        return _transcript(row, name, value)
    return _messages(row, name, value, "assistant", lost)


def _transcript(row: Row, name: str, text: str) -> tuple[Message, ...]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    begin, *turns = TURN.split(text)
    if begin.strip() or not turns:
        raise UserError(
            f"{row.where}: expected 'prompt' beside {name!r}, or {name!r} to begin with '\\n\\nHuman:', "
            f"found {text[:30]!r}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    entries = [
        {"role": roles[speaker], "content": turn.strip()} for speaker, turn in zip(turns[::2], turns[1::2], strict=True)
    ]
    return read_messages(row, entries)


def _messages(row: Row, name: str, value: Any, role: str, lost: list[str] | None = None) -> tuple[Message, ...]:
    """Messages from text said by `role`, from one message, or from a list of them (ShareGPT's, too)."""
    if isinstance(value, str):
        return read_messages(row, [{"role": role, "content": value}])
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{row.where}: expected {name!r} to be text or messages, found {kind_of(value)}")
    messages = read_messages(row, entries, lost)
    loss = "'weight' of a message not used"  # what is compared is compared whole
    if (
        lost is not None
        and loss not in lost
        and any(entry.weight == 0 and entry.role == "assistant" for entry in messages)
    ):
        lost.append(loss)
    return messages


def _common_start(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the common beginning of two conversations, up to the answers that are compared."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    if same == len(first) == len(second) and first[-1].role == "assistant":
        same -= 1
    return first[:same]


def _after(row: Row, side: tuple[Message, ...], prompt: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """A side without the prompt, which it may repeat."""
    if side and side[0].role == "assistant":
        return side
    if prompt[0].role == "system" and side[0].role != "system":  # that of the record, which the side does not repeat
        prompt = prompt[1:]
    if side[: len(prompt)] != prompt:
        raise UserError(f"{row.where}: expected {name!r} to be an answer, or to begin with the prompt; it does neither")
    if len(side) == len(prompt):
        raise UserError(f"{row.where}: expected an answer in {name!r}, found only the prompt")
    return side[len(prompt) :]
