"""Explain one page: each step's verdict and measures, and whether the page repeats an earlier one."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import orjson

from llmkit.crawl.judge import Judge, Reason, Worker
from llmkit.crawl.output import Collector, Parts, parts_of
from llmkit.crawl.page import READ, Document, Dropped, Page, Skipped
from llmkit.crawl.read.frames import Reader
from llmkit.crawl.read.pages import page_of
from llmkit.crawl.recipe import DUPLICATES, Recipe
from llmkit.display import printable
from llmkit.errors import UserError
from llmkit.io.jsonl import JSON_LINE, open_bytes
from llmkit.io.progress import counted

SHOWN_MEASURES = 4  # on the terminal; the JSON has all


def explain(
    inputs: Sequence[str],
    recipe: Recipe,
    make: Callable[[], Worker],
    wanted: str,
    workers: int,
    on_bad: Callable[[UserError], object] | None = None,
    quiet: bool = False,
) -> None:
    """Explain each page whose URL or id is `wanted`: a JSON line on stdout, and a table on stderr.

    `{"id", "url", "source", "offset", "kept", "step"?, "reason"?, "steps": [{"step", "verdict", "score"?,
    "measures"?, "characters", "seconds"}], "text"?}`. Duplicates depend on all earlier documents: if the page passes
    the other steps, everything before it is filtered too, which takes as long as a run up to there. Stdin can be read
    only once, so duplicates are not looked for there. `make`: factory of a worker that writes rejects. Raises
    UserError if there is no such page.
    """
    worker, pages = make(), 0
    duplicates = [step for step in DUPLICATES if step in recipe.steps]
    for number, frame in enumerate(Reader(inputs, on_bad=on_bad, columns=worker.columns)):
        page = page_of(frame, columns=worker.columns)
        if wanted not in (page.url, page.reject()["id"] if isinstance(page, Skipped) else Document(page).identity):
            continue
        pages += 1
        if isinstance(page, Skipped):
            entry = page.reject() | {"kept": False, "steps": [{"step": READ, "verdict": page.reason}]}
        else:
            entry = _judged(page, worker.judge)
        if entry["kept"] and "-" in inputs:
            entry["steps"] += [{"step": step, "verdict": "not checked: stdin"} for step in duplicates]
        elif entry["kept"] and duplicates:
            outcome = _outcome(recipe, parts_of(inputs, make, workers, on_bad=on_bad), number)
            for step in duplicates:
                if outcome.get("step") == step:
                    repeat = {key: outcome[key] for key in ("score", "repeats")}
                    entry["steps"].append({"step": step, "verdict": outcome["reason"], **repeat})
                    entry |= {"step": step, "reason": outcome["reason"], **repeat, "kept": False}
                    break
                entry["steps"].append({"step": step, "verdict": "kept"})
        if not quiet:
            _show(entry)
        with open_bytes("-") as handle:
            handle.write(orjson.dumps(entry, option=JSON_LINE))
            handle.flush()
    if not pages:
        raise UserError(f"--explain: no page with URL or id {wanted!r} in {' '.join(inputs)}")


def _judged(page: Page, judge: Judge) -> dict[str, Any]:
    """Run a page through the steps and return its explanation."""
    rows: list[dict[str, Any]] = []

    def note(step: str, document: Document, reason: Reason, seconds: float) -> None:
        row: dict[str, Any] = {"step": step, "verdict": reason[0] if reason else "kept"}
        row["score"] = reason[1] if reason else None
        if step == "language":
            row |= {"language": document.language, "language_score": document.language_score}
        if step in document.measures:
            row["measures"] = {key: round(value, 4) for key, value in document.measures[step].items()}
        row["characters"] = len(document.text) if document.text is not None else None
        row["seconds"] = round(seconds, 4)
        rows.append({key: value for key, value in row.items() if value is not None})

    judged = judge(page, note)
    entry = judged.reject() if isinstance(judged, Dropped) else judged.entry()
    text = {"text": entry.pop("text")} if "text" in entry else {}
    return {**entry, "kept": isinstance(judged, Document), "steps": rows, **text}


def _outcome(recipe: Recipe, parts: Parts, number: int) -> dict[str, Any]:
    """Filter everything up to record `number`, and return its output record or rejects entry."""
    last = deque[bytes](maxlen=1)
    collector, left = Collector(recipe, last.append, last.append), number + 1
    with closing(parts):
        for _, part in parts:
            part.outcomes = part.outcomes[:left]
            collector.add(part)
            left -= len(part.outcomes)
            if not left:
                break
    return orjson.loads(last[0])


def _show(entry: dict[str, Any]) -> None:
    """Print an explanation as a table."""
    lines = [f"{entry.get('url') or entry.get('id')}  ({entry['source']}, {entry['offset']})"]
    for row in entry["steps"]:
        details = [f"{row['language']} {row['language_score']}"] if "language" in row else []
        details += [f"score {row['score']:.4g}"] if "score" in row else []
        details += [f"repeats {row['repeats']}"] if "repeats" in row else []
        measures = list(row.get("measures", {}).items())
        details += [f"{key} {value:.4g}" for key, value in measures[:SHOWN_MEASURES]]
        details += ["..."] if len(measures) > SHOWN_MEASURES else []
        size = counted(row["characters"], "character") if "characters" in row else ""
        lines.append(f"  {row['step']:<18} {row['verdict']:<24} {size:>18}  {', '.join(details)}".rstrip())
    lines.append("  kept" if entry["kept"] else f"  dropped by {entry['step']}: {entry['reason']}")
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)
