"""The kinds of records that stages write, as a report knows and shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Fields by which a record is known and shown.

    has     all of which a record of the kind has
    input, output, worth  what went in, what came out, what it was worth
    about   told beside, by their names
    stage   that alone writes such files
    """

    has: tuple[str, ...]
    input: str
    output: str
    worth: str
    about: tuple[str, ...]
    stage: str | None = None


# by what people call them: a record is of the first kind whose fields it has; a page has files in this order
KINDS = {
    "rollouts": Kind(
        ("prompt", "completion", "reward", "group", "step"),
        "prompt", "completion", "reward", ("answer", "finish_reason"),
    ),
    "disagreements": Kind(
        ("prompt", "completion", "gold", "difference"),
        "prompt", "completion", "reward", ("gold", "difference"),
    ),
    "recitations": Kind(
        ("prefix", "completion", "matched"),
        "prefix", "completion", "share", ("repeats",), "probe-knowledge",
    ),
    "completions": Kind(
        ("completion", "finish_reason"),
        "prompt", "completion", "reward", ("finish_reason",), "sample",
    ),
    "probed questions": Kind(
        ("question", "responses", "judgements", "known"),
        "question", "responses", "known", ("answer", "judgements"), "probe-knowledge",
    ),
    # that people have written, as those of sft are
    "examples": Kind(("prompt", "completion"), "prompt", "completion", "reward", ("source",)),
    "conversations": Kind(("messages",), "messages", "messages", "known", ("source",)),
    "rejected documents": Kind(("source", "step", "reason"), "url", "text", "reason", ("step", "score")),
    "documents": Kind(("text",), "url", "text", "reward", ("language", "source")),
}  # fmt: skip


def kind_of_record(record: Mapping[str, Any]) -> str | None:
    """Which of KINDS a record is; None for none."""
    return next((name for name, kind in KINDS.items() if all(field in record for field in kind.has)), None)
