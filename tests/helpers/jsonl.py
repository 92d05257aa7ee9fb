"""Writes and reads JSONL without the reader and writer under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, *rows: Any) -> Path:
    """Write rows as JSONL; a string is a raw line."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
