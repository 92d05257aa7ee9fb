"""What probe reports say: what is known by kind of question, and what has changed from one report to another."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from llmkit.io.progress import counted
from llmkit.report.values import parsed, raw_lines

NAMES = {"yes": "known", "no": "unknown", "mixed": "mixed", "evasive": "evasive"}


def read_probe(
    path: str, note: Callable[[str], object], limit: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of a report (`probe-knowledge --report`), and what each question was found to be."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    verdicts: Counter[str] = Counter()
    makers: dict[str, set[str]] = {"written_by": set(), "judged_by": set()}
    known_of: dict[str, str] = {}
    bad = 0
    for _, line in islice(raw_lines(path), limit):
        record = parsed(line)
        known = NAMES.get(str(record.get("known"))) if record else None
        if record is None or known is None or not isinstance(record.get("question"), str):
            bad += 1
            continue
        kinds[str(record.get("kind", "other"))][known] += 1
        known_of[record["question"]] = known
        judgements = record.get("judgements")
        verdicts.update(map(str, judgements if isinstance(judgements, list) else ()))
        for name, found in makers.items():
            found.add(str(record.get(name, "")))
    if bad:
        note(f"{path}: left out {counted(bad, 'line')}: no record of a probe")
    totals = sum(kinds.values(), Counter[str]())
    ordered = sorted(kinds.items(), key=lambda kind: (-kind[1].total(), kind[0]))
    figures = {
        "path": path,
        "questions": totals.total(),
        **{name: totals[name] for name in NAMES.values()},
        "by_kind": {kind: {name: counts[name] for name in NAMES.values()} for kind, counts in ordered},
        "answers": dict(verdicts.most_common()),
        **{name: sorted(found - {""}) for name, found in makers.items()},
    }
    return figures, known_of


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """Of the questions in both reports: how many went from what to what, {"known": {"known": 3, ...}, ...}."""
    both = [question for question in before if question in after]
    moved = Counter((before[question], after[question]) for question in both)
    names = list(NAMES.values())
    return {"questions": len(both), "table": {old: {new: moved[old, new] for new in names} for old in names}}
