"""The ground truth that every stage is scored against: what should happen to each page and why, and all facts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from world import Entity


@dataclass(frozen=True)
class Entry:
    """One record of the crawl.

    kind      kind of page; for bad pages, what is wrong
    keep      whether crawl-filter should keep it
    steps     steps that may drop it
    text      main text, for good pages
    personal  personal data that must be replaced
    repeats   URL of the page that it repeats
    facts     [name, fact] pairs that it states
    """

    url: str
    kind: str
    keep: bool
    why: str
    steps: tuple[str, ...] = ()
    text: str | None = None
    personal: tuple[str, ...] = ()
    repeats: str | None = None
    facts: tuple[tuple[str, str], ...] = field(default=())


def write_ledger(path: Path, entries: Sequence[Entry], entities: Iterable[Entity], details: dict[str, Any]) -> None:
    """Write one JSON object: `pages`, `entities` (without the glimpsed), and `details`."""
    asked = [asdict(entity) for entity in entities if entity.tier != "glimpsed"]
    path.write_text(json.dumps({**details, "entities": asked, "pages": [asdict(entry) for entry in entries]}, indent=1))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSONL written by `write_rows` or by a stage of llmkit."""
    return [json.loads(line) for line in path.read_text().splitlines()]
