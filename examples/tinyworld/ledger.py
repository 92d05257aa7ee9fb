"""What should become of every page and why, and what is true: the truth that every stage is scored against."""

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

    kind      what sort of page it is; of pages that should go, what is wrong with it
    keep      whether it should come out of crawl-filter
    steps     those that may rightly drop it
    text      the main text, of pages that should stay
    personal  what must not come out with it
    repeats   the address of the page that it repeats
    facts     the [name, fact] that it tells
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
    """One JSON object: `pages`, `entities` (without the glimpsed), and `details`."""
    asked = [asdict(entity) for entity in entities if entity.tier != "glimpsed"]
    path.write_text(json.dumps({**details, "entities": asked, "pages": [asdict(entry) for entry in entries]}, indent=1))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote, or a stage of llmkit."""
    return [json.loads(line) for line in path.read_text().splitlines()]
