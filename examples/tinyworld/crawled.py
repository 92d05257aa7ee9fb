"""crawl-filter's output, scored against the ledger."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ledger import read_rows
from sites import BOILERPLATE

Figure = tuple[str, float | None, str, float | None]  # figure, value, against, beside


def crawl_effects(run: Path) -> list[Figure]:
    """Return the figures of the complete run, of each step, and of the extracted text."""
    pages = json.loads((run / "data" / "ledger.json").read_text())["pages"]
    kept = {row["url"]: row["text"] for row in read_rows(run / "docs.jsonl")}
    steps = {row["url"]: row["step"] for row in read_rows(run / "rejects.jsonl") if "url" in row}
    good, bad = ([page for page in pages if page["keep"] is keep] for keep in (True, False))
    stayed, gone = [page for page in good if page["url"] in kept], [page for page in bad if page["url"] not in kept]
    found: list[Figure] = [
        ("good pages kept", len(stayed) / len(good), "of the kept, good", len(stayed) / len(kept)),
        ("bad pages dropped", len(gone) / len(bad), "of the dropped, bad", len(gone) / (len(pages) - len(kept))),
    ]
    found += _by_step(pages, kept, steps)
    return [*found, *_of_text(stayed, kept)]


def _by_step(pages: list[dict[str, Any]], kept: dict[str, str], steps: dict[str, str]) -> list[Figure]:
    """Return recall and precision of each step: recall over its own bad pages, precision over the pages it dropped.

    Unreadable records have no URL in the rejects: they count as dropped by `read`.
    """
    meant, caught, dropped, rightly = (defaultdict(int) for _ in range(4))
    order = {}
    for page in pages:
        step = None if page["url"] in kept else steps.get(page["url"], "read")
        if page["steps"]:
            order[page["steps"][0]] = None
            meant[page["steps"][0]] += 1
            caught[page["steps"][0]] += step in page["steps"]
        if step:
            dropped[step] += 1
            rightly[step] += step in page["steps"]
    return [
        (
            f"recall of {step}",
            caught[step] / meant[step],
            "precision",
            rightly[step] / dropped[step] if dropped[step] else None,
        )
        for step in sorted(order, key=STEPS.index)
    ]


STEPS = ("read", "url", "extract", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb",
         "exact_duplicates", "near_duplicates")  # fmt: skip


def _of_text(stayed: list[dict[str, Any]], kept: dict[str, str]) -> list[Figure]:
    """Return word F1 of the main text of the good pages kept, leaked boilerplate, and replaced personal data."""
    scores = [word_f1(page["text"], kept[page["url"]]) for page in stayed]
    phrases = re.compile("|".join(rf"\b{re.escape(phrase)}(?!\w)" for phrase in BOILERPLATE))
    leaked = sum(bool(phrases.search(kept[page["url"]])) for page in stayed)
    personal = [(page, hidden) for page in stayed for hidden in page["personal"]]
    hidden = sum(secret not in kept[page["url"]] for page, secret in personal)
    return [
        ("word F1 of the main text", sum(scores) / len(scores), "pages with boilerplate", leaked / len(stayed)),
        ("personal data replaced", hidden / len(personal) if personal else None, "", None),
    ]


def word_f1(truth: str, extracted: str) -> float:
    """Return F1 of the words of two texts, ignoring their order."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (truth, extracted))
    shared = (one & other).total()
    return 2 * shared / max(1, one.total() + other.total())


def explain_page(run: Path, url: str) -> dict[str, Any]:
    """Return the ledger's entry of a page, and what crawl-filter did with it."""
    pages = json.loads((run / "data" / "ledger.json").read_text())["pages"]
    expected = next((page for page in pages if page["url"] == url), None)
    if expected is None:
        raise SystemExit(f"{url}: no such page in {run / 'data' / 'ledger.json'}")
    kept = next((row for row in read_rows(run / "docs.jsonl") if row["url"] == url), None)
    dropped = next((row for row in read_rows(run / "rejects.jsonl") if row.get("url") == url), None)
    return {"should": expected, "did": kept or dropped}
