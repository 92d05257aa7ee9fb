"""The schemas of the records that pass between stages (JSONL, one object a line; unknown keys pass through).

- document `{"text", "id"?, "url"?, "source"?, ...}`: read by train-bpe and pretrain
- prompt `{"prompt", ...}` and what else asks (ASKING): read by sample and rl
- completion `{"prompt", "completion", "token_ids", "finish_reason", "seed", ...input}`: written by sample

Each check raises UserError that names file, line, the field expected and what was found.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import UserError

# The one table of the fields that hold what is said, for all readers; of several the first is taken
CONVERSATIONS = ("messages", "conversations")
QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "context", "input", "sQuestion")
ASKING = (*CONVERSATIONS, *QUESTIONS)
PROMPT_FIRST = ("prompt", *ASKING)  # of records with an answer, whose `messages` may hold it, too
SYSTEM = ("system", "system_prompt")  # in front of what is asked, as is "history"
SHOWN = ("tools", "functions", "images", "image", "audio", "videos")  # beside a prompt, to models of another kind
PROMPT_FIELDS = (*ASKING, *SYSTEM, "history", *SHOWN)  # all that a prompt is made of
# what servers take with each prompt, and sample as options of a whole run
SAMPLING = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "n")
# Answers in the order in which they are looked for: what is said, at length first; what is right, the short form first
ANSWERS = ("completion", "response", "output", "solution", "answer", "answers", "target", "continuation")
FACTS = ("answer", "answers", "continuation")  # the whole text is right
SOLVED_BY = (*FACTS[:2], "solution", "target", "continuation", "correct", "lSolutions", "answerKey", "gold", "output")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # before an answer
CHOSEN = {"response_j": "chosen", "response_k": "rejected"}  # other names of what is compared
COMPARED = ("chosen", "rejected", *CHOSEN, "completions", "ranking", "margin")
CHOICES = ("choices", "options")
OTHERS = ("text", *CHOICES)
OUTSIDE = "characters outside the vocabulary"  # of the tokenizer, which become <unk>; told as what is not used
KNOWN = frozenset((*PROMPT_FIELDS, *ANSWERS, *THOUGHTS, *COMPARED, *OTHERS))


def not_used(
    value: dict[str, Any], used: Collection[str], known: Collection[str] = KNOWN, shown_text: str = ""
) -> tuple[str, ...]:
    """List the fields of a record that have a known name and are not used; text within `shown_text` does not count.

    >>> not_used({"text": "Once", "id": 7, "prompt": "Tell a story.", "tools": []}, ["text"])
    ("'prompt' not used",)
    """
    unused = [name for name in value if name in known and name not in used and value[name]]
    lost = [name for name in unused if not (isinstance(value[name], str) and value[name].strip() in shown_text)]
    return tuple(f"{name!r} not used" for name in lost)


@dataclass(frozen=True, slots=True)
class Row:
    """One record and the place it came from; line 0 where `path` says it all. `losses`: its unused parts."""

    value: dict[str, Any]
    path: str
    line: int
    losses: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


def kind_of(value: Any) -> str:
    """Name the type of a JSON value, for messages: "a list", "null"."""
    numbers = {int: "a number", float: "a number"}
    names = {str: "a string", type(None): "null", bool: "a boolean", list: "a list", dict: "an object", **numbers}
    return names.get(type(value), type(value).__name__)


def with_made(given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Add fields to a record; values that it had under their names move to `given`.

    >>> with_made({"prompt": "2+2?", "completion": "4"}, {"completion": "Four.", "seed": 0})
    {'prompt': '2+2?', 'completion': 'Four.', 'seed': 0, 'given': {'completion': '4'}}
    """
    taken = {name: given[name] for name in fields if given.get(name) not in (None, fields[name])}
    if taken and "given" in given:
        taken["given"] = given["given"]
    return {**given, **fields, **({"given": taken} if taken else {})}


def check_document(row: Row) -> Row:
    """The row, if it is a document: it has `text`, a string; `source`, where given, is a string."""
    if "text" not in row.value:
        raise UserError(f"{row.where}: expected field 'text' (a document), found {sorted(row.value)}")
    if not isinstance(row.value["text"], str):
        raise UserError(f"{row.where}: expected 'text' to be a string, found {kind_of(row.value['text'])}")
    if not isinstance(row.value.get("source", ""), str):
        raise UserError(f"{row.where}: expected 'source' to be a string, found {kind_of(row.value['source'])}")
    losses = not_used(row.value, ("text",)) if len(row.value) > 1 else ()
    return replace(row, losses=losses) if losses else row


def fields_of(value: dict[str, Any]) -> list[str]:
    """The fields of a record, for messages, with those that are null as such."""
    return [name if value[name] is not None else f"{name}: null" for name in sorted(value)]


def first_of(value: dict[str, Any], names: Collection[str]) -> str | None:
    """The first of some fields that a record has, and that is not null."""
    return next((name for name in names if value.get(name) is not None), None)
