"""The schemas of the records that pass between stages (JSONL, one object a line; unknown keys pass through).

- document `{"text", "id"?, "url"?, "source"?, ...}`: read by train-bpe and pretrain
- prompt `{"prompt", ...}`: read by sample
- completion `{"prompt", "completion", "token_ids", "finish_reason", "seed", ...input}`: written by sample

Each check raises UserError that names file, line, the field expected and what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One record and the place it came from; line 0 where `path` says it all."""

    value: dict[str, Any]
    path: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


def _text_field(row: Row, name: str, what: str) -> str:
    if name not in row.value:
        raise UserError(f"{row.where}: expected field '{name}' ({what}), found {sorted(row.value)}")
    value = row.value[name]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: expected '{name}' to be a string, found {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages: "a list", "null"."""
    names = {
        str: "a string",
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def check_document(row: Row) -> Row:
    """The row, if it is a document: it has `text`, a string; `source`, where given, is a string."""
    _text_field(row, "text", "a document")
    if not isinstance(row.value.get("source", ""), str):
        raise UserError(f"{row.where}: expected 'source' to be a string, found {kind_of(row.value['source'])}")
    return row


def check_prompt(row: Row) -> str:
    """The prompt of a record: `prompt`, a string."""
    return _text_field(row, "prompt", "a prompt")
