"""People's judgements of answers, as lines that `train-reward` and `sft` read as they are.

    judgements = Judgements("judged.jsonl")
    judgements.add({"kind": "comparison", "messages": [...], "answers": [one, other], "better": 0}, {"model": "chat"})

Of `judged.jsonl` there are two files, for no record is both: `judged.preferences.jsonl` has comparisons (a tie as two
completions of equal rank) and an ideal answer before the one that it replaces; `judged.conversations.jsonl` has ideal
answers, and answers with a thumb as `label`, of which sft leaves out the rejected. Of these conversations the last
answer alone is learnt.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, as_record, message
from llmkit.io.jsonl import PACKED
from llmkit.serving.fields import ApiError, Fields
from llmkit.serving.models import ServedModel, read_entries

KINDS = ("thumb", "comparison", "rewrite")
MOST_NAME = 200  # characters of a labeller's name


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
                raise UserError(f"--collect {path}: expected a file at {file}, found another thing")
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise UserError(f"--collect {path}: expected a folder that can be written to, found none at {file}")

    def add(self, fields: Fields, model: ServedModel) -> None:
        """Append a judgement, durably and as whole lines. Raises ApiError for what is none."""
        kind = fields.take("kind")
        if kind not in KINDS:
            raise ApiError(f"'kind': expected one of {', '.join(KINDS)}, found {kind!r}", "kind")
        prompt, answers = read_entries(fields.take("messages"), "messages"), fields.take("answers")
        sides = [read_entries([answer], "answers") for answer in answers] if isinstance(answers, list) else []
        if len(sides) != 1 + (kind == "comparison") or any(side[0].role != "assistant" for side in sides):
            raise ApiError("'answers': expected one message of the assistant's, two of a comparison", "answers")
        better, ideal = fields.take("better"), fields.take("rewritten")
        about = {
            "kind": kind,
            "labeller": (fields.text("labeller") or "")[:MOST_NAME] or None,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": model.name,
            "fingerprint": model.generator.identity.get("the model"),
            "seeds": fields.take("seeds"),
            "settings": fields.take("settings"),
        }
        fields.check_all_taken()
        if kind == "rewrite":
            if not isinstance(ideal, str) or not ideal.strip():
                raise ApiError("'rewritten': expected the ideal answer as text", "rewritten")
            sides = [(message("assistant", ideal),), *sides]
        elif better not in (0, 1) and not (kind == "comparison" and better is None):
            raise ApiError("'better': expected 0 or 1; null for a tie of a comparison", "better")
        records = []
        if kind != "thumb":
            chosen, rejected = map(as_record, sides if kind == "rewrite" or better != 1 else sides[::-1])
            tie = kind == "comparison" and better is None
            ranked = {"completions": [chosen, rejected], "ranking": [1, 1]}
            pair = ranked if tie else {"chosen": chosen, "rejected": rejected}
            records.append((self.preferences, {"prompt": as_record(prompt), **pair}))
        if kind != "comparison":
            label = {"label": bool(better)} if kind == "thumb" else {}
            records.append((self.conversations, {"messages": _last_learnt([*prompt, *sides[0]]), **label}))
        with self._lock:
            for file, record in records:
                _append(file, orjson.dumps({**record, **about}) + b"\n")


def _last_learnt(messages: list[Message]) -> Sequence[Mapping[str, Any]]:
    """The messages as a record, the answers before the last one without weight."""
    entries = as_record(messages)
    return [{**one, "weight": 0} if one["role"] == "assistant" else one for one in entries[:-1]] + entries[-1:]


def _append(path: Path, line: bytes) -> None:
    """Append a line that is on the disk when this returns; nothing of it where there is no room for it."""
    with path.open("ab", buffering=0) as handle:
        size = handle.tell()
        try:
            if handle.write(line) != len(line):
                raise OSError(f"{path}: no space left there")
            os.fsync(handle.fileno())
        except OSError:
            with suppress(OSError):
                handle.truncate(size)
            raise
