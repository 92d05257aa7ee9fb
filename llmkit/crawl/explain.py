"""Explain one page: each step's verdict and measures, and whether the page repeats an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from time import perf_counter
from typing import Any, TextIO

import orjson

from llmkit.crawl.output import Collector, collect
from llmkit.crawl.page import Skipped, Span
from llmkit.crawl.pipeline import DUPLICATES, Pipeline, all_records
from llmkit.crawl.recipe import Recipe
from llmkit.crawl.steps import Journey, Steps
from llmkit.display import printable
from llmkit.io.progress import counted

SHOWN_MEASURES = 4  # on the terminal; the JSON has all


def explain(
    spans: Callable[[], Iterable[Span]],
    recipe: Recipe,
    make: Callable[[], Pipeline],
    wanted: str,
    workers: int,
    again: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield what became of each page whose address or id is `wanted`.

    `{"id", "url", "source", "offset", "kept", "step"?, "reason"?, "steps": [{"step", "verdict", "score"?,
    "measures"?, "characters", "seconds"}], "text"?}`. Duplicates depend on all earlier documents: for a page that
    comes so far they are filtered too, which takes as long as a run up to there; `again` says that the spans can
    be read a second time. `make` is a pipeline of the recipe that writes rejects.
    """
    steps = make().steps
    dedups = [step for step in DUPLICATES if step in recipe.steps]
    for number, (span, record) in enumerate(all_records(spans())):
        if isinstance(record, Skipped):
            if record.url == wanted:
                yield _explained_skip(record)
            continue
        if wanted not in (record.page.url, record.identity):
            continue
        entry = _followed(record, steps)
        if entry["kept"] and dedups:
            if again:
                _add_duplicates(entry, islice(spans(), span + 1), recipe, make, number, workers)
            else:
                entry["steps"] += [{"step": step, "verdict": "not looked for: read once"} for step in dedups]
        yield entry


def _explained_skip(record: Skipped) -> dict[str, Any]:
    verdict = {"step": "read", "verdict": record.reason}
    entry = {"url": record.url, "source": record.path, "offset": record.offset, "kept": False}
    return entry | {"step": "read", "reason": record.reason, "steps": [verdict]}


def _followed(journey: Journey, steps: Steps) -> dict[str, Any]:
    """Take a page through the steps, and note each."""
    rows: list[dict[str, Any]] = []
    for name, step in steps.in_order if journey.step is None else ():
        started = perf_counter()
        journey.reason = step(journey)
        row: dict[str, Any] = {"step": name, "verdict": journey.reason or "kept"}
        row |= {"score": journey.score} if journey.score is not None else {}
        if name == "language":
            row |= {"language": journey.language, "language_score": journey.language_score}
        if name in journey.measures:
            row["measures"] = {key: round(value, 4) for key, value in journey.measures[name].items()}
        row["characters"] = len(journey.text) if journey.text is not None else None
        row["seconds"] = round(perf_counter() - started, 4)
        rows.append({key: value for key, value in row.items() if value is not None})
        if journey.reason:
            journey.step = name
            break
    entry = journey.reject()
    text = {"text": entry.pop("text")} if "text" in entry else {}
    return {**entry, "kept": journey.step is None, "steps": rows, **text}


def _add_duplicates(
    entry: dict[str, Any],
    spans: Iterable[Span],
    recipe: Recipe,
    make: Callable[[], Pipeline],
    number: int,
    workers: int,
) -> None:
    """Filter everything up to record `number`, and note whether that one repeats an earlier document."""
    last: list[bytes] = []

    def keep_last(line: bytes) -> None:
        last[:] = [line]

    collector = Collector(recipe, keep_last, keep_last, records=number + 1)
    with collector:
        collect(spans, make, workers, collector)
    outcome = orjson.loads(last[0])
    for step in (step for step in DUPLICATES if step in recipe.steps):
        dropped = outcome.get("step") == step
        row = {"step": step, "verdict": outcome["reason"] if dropped else "kept"}
        entry["steps"].append(row | {key: outcome[key] for key in ("score", "repeats") if dropped})
        if dropped:
            entry |= {key: outcome[key] for key in ("step", "reason", "score", "repeats")} | {"kept": False}
            return


def show_explanation(entry: dict[str, Any], to: TextIO) -> None:
    """A readable table of one explanation."""
    print(printable(f"{entry.get('url') or entry.get('id')}  ({entry['source']}, {entry['offset']})"), file=to)
    for row in entry["steps"]:
        details = [f"{row['language']} {row['language_score']}"] if "language" in row else []
        details += [f"score {row['score']:.4g}"] if "score" in row else []
        details += [f"repeats {row['repeats']}"] if "repeats" in row else []
        measures = list(row.get("measures", {}).items())
        details += [f"{key} {value:.4g}" for key, value in measures[:SHOWN_MEASURES]]
        details += ["..."] if len(measures) > SHOWN_MEASURES else []
        size = counted(row["characters"], "character") if "characters" in row else ""
        line = f"  {row['step']:<18} {row['verdict']:<24} {size:>18}  {', '.join(details)}"
        print(printable(line.rstrip()), file=to)
    verdict = "kept" if entry["kept"] else f"dropped by {entry['step']}: {entry['reason']}"
    print(printable(f"  {verdict}"), file=to, flush=True)
