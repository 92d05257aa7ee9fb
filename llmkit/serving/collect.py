"""Human judgements of answers, stored as JSONL that `train-reward` and `sft` read directly.

`--collect judged.jsonl` writes two files. `judged.preferences.jsonl` has comparisons (a tie as two completions of equal
rank), and rewritten answers as chosen over the original ones. `judged.conversations.jsonl` has rewritten answers, and
answers with a thumb as `label`; sft skips the rejected ones.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field, model_validator

from llmkit.errors import UserError
from llmkit.formats.conversations import as_record, message
from llmkit.io.jsonl import PACKED
from llmkit.serving.models import ServedModel, messages_of
from llmkit.serving.protocol import ApiError, Body


class JudgementBody(Body):
    """`/collect`: an answer to `messages` with a thumb or a rewrite; or two, where `better` is 0, 1 or None (a tie)."""

    nullable: ClassVar = ("better",)
    kind: Literal["thumb", "comparison", "rewrite"]
    messages: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    better: int | None = Field(None, ge=0, le=1)
    rewritten: str | None = None
    labeller: str | None = Field(None, max_length=200)
    seeds: Any = None
    settings: Any = None

    @model_validator(mode="after")
    def _check_kind(self) -> JudgementBody:
        if self.kind == "thumb" and self.better is None:
            raise ApiError("'better': expected 0 or 1", "better")
        if self.kind == "comparison" and "better" not in self.model_fields_set:
            raise ApiError("'better': expected 0, 1, or null for a tie, found nothing", "better")
        unused = "better" if self.kind == "rewrite" else "rewritten"
        if getattr(self, unused) is not None:
            raise ApiError(f"{unused!r} is not used by kind {self.kind}; omit it", unused)
        if self.kind == "rewrite" and not (self.rewritten or "").strip():
            raise ApiError("'rewritten': expected the ideal answer as text", "rewritten")
        return self


class Judgements:
    """The two files of --collect."""

    def __init__(self, path: str) -> None:
        self._lock, base = threading.Lock(), Path(path)
        if path.endswith(PACKED) or path == "-":
            raise UserError(f"--collect {path}: expected the name of a JSONL file, such as judged.jsonl")
        self.preferences, self.conversations = (
            base.with_name(f"{base.stem}.{kind}{base.suffix}") for kind in ("preferences", "conversations")
        )
        for file in (self.preferences, self.conversations):
            if file.exists() and not file.is_file():
                raise UserError(f"--collect {path}: expected a file, found something else at {file}")
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise UserError(f"--collect {path}: cannot write to {file}")

    def add(self, body: JudgementBody, model: ServedModel) -> None:
        """Append a judgement durably. Raises ApiError for invalid messages."""
        messages = messages_of(body.messages, "messages")
        sides = [messages_of([answer], "answers") for answer in body.answers]
        if len(sides) != 1 + (body.kind == "comparison") or any(side[0].role != "assistant" for side in sides):
            raise ApiError("'answers': expected one assistant message, or two for a comparison", "answers")
        if messages[-1].role == "assistant":
            raise ApiError("'messages': expected the last message not to be the assistant's", "messages")
        prompt, answers = as_record(messages), [as_record(side) for side in sides]
        # only the last answer is trained
        earlier = [{**entry, "weight": 0} if entry["role"] == "assistant" else entry for entry in prompt]
        records: list[tuple[Path, dict[str, Any]]] = []
        if body.kind == "thumb":
            records.append((self.conversations, {"messages": earlier + answers[0], "label": bool(body.better)}))
        elif body.kind == "rewrite":
            ideal = as_record([message("assistant", body.rewritten or "")])
            records.append((self.preferences, {"prompt": prompt, "chosen": ideal, "rejected": answers[0]}))
            records.append((self.conversations, {"messages": earlier + ideal, "label": True}))
        elif body.better is None:
            records.append((self.preferences, {"prompt": prompt, "completions": answers, "ranking": [1, 1]}))
        else:
            chosen, rejected = answers[body.better], answers[1 - body.better]
            records.append((self.preferences, {"prompt": prompt, "chosen": chosen, "rejected": rejected}))
        source = {
            "kind": body.kind,
            "labeller": body.labeller or None,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": model.name,
            "fingerprint": model.fingerprint,
            "seeds": body.seeds,
            "settings": body.settings,
        }
        with self._lock:
            for file, record in records:
                _append(file, orjson.dumps({**record, **source}) + b"\n")


def _append(path: Path, line: bytes) -> None:
    """Append a line durably, or nothing if the disk is full. First ends an unfinished last line."""
    with path.open("ab+", buffering=0) as handle:
        size = handle.seek(0, os.SEEK_END)
        if size:
            handle.seek(size - 1)
            line = line if handle.read(1) == b"\n" else b"\n" + line
        try:
            if handle.write(line) != len(line):
                raise OSError(f"{path}: no space left on disk")
            os.fsync(handle.fileno())
        except OSError:
            with suppress(OSError):
                handle.truncate(size)
            raise
