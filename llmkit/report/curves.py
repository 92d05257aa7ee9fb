"""Curves from metrics: which figures a stage logs, and an even sample of each over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.io.metrics import scan_metrics
from llmkit.report.values import SPARE, Thinned, is_number, thinned

MOST_POINTS = 240  # of a line, whose frame is 300 pixels wide
MOST_SAMPLES = 24  # over a training
MOST_LINES = 12  # of a chart; their figures stand in its table all the same


@dataclass(frozen=True)
class Chart:
    """One frame with curves: `lines` are names for people by the key in metrics.jsonl."""

    title: str
    unit: str
    lines: dict[str, str]


LOSS = Chart("Loss", "nats a token", {"loss": "training", "val_loss": "held out"})
CHARTS = {
    "pretrain": (LOSS, Chart("Bits per byte", "of held-out text", {"val_bits_per_byte": "held out"})),
    "sft": (LOSS,),
    "train-reward": (
        Chart("Loss", "nats a pair", {"loss": "training", "val_loss": "held out"}),
        Chart("Accuracy", "share of held-out comparisons", {"val_accuracy": "held out"}),
    ),
    "rl": (
        Chart("Success", "share of attempts that are right", {"success": "training", "val_success": "held out"}),
        Chart(
            "Reward",
            "mean of attempts; gold is not trained on",
            {"reward": "training", "val_reward": "held out", "val_gold": "gold"},
        ),
        Chart("Length", "tokens of an attempt", {"length": "training", "val_length": "held out"}),
        Chart("Calls", "share of attempts that call a tool", {"called": "training", "val_called": "held out"}),
        Chart("Divergence", "nats an attempt, from the beginning", {"kl_per_attempt": "training"}),
        Chart("Entropy", "nats a token", {"entropy": "training"}),
    ),
}
PART = "reward/"  # of a reward's name, where several are added up


class Series:
    """One figure over the steps of one run: its points, thinned, and what is exact of all of them."""

    def __init__(self) -> None:
        self._points: Thinned[tuple[float, float]] = Thinned(SPARE * MOST_POINTS)
        self._low, self._high = math.inf, -math.inf
        self._not_finite = 0

    def add(self, step: float, value: Any) -> None:
        """One value; null is what JSON makes of NaN and infinity. Written for a million rows: 0.5 us each."""
        kind = type(value)
        if kind is not float and kind is not int:
            self._not_finite += value is None
            return
        self._points.add((step, value))
        if value < self._low:
            self._low = value
        if value > self._high:
            self._high = value

    def figures(self) -> dict[str, Any] | None:
        """None without a finite value."""
        if not self._points.count:
            return None
        points = thinned(self._points.values(), MOST_POINTS)
        return {
            "points": [list(point) for point in points],
            "values": self._points.count,
            "first": points[0][1],
            "last": points[-1][1],
            "lowest": self._low,
            "highest": self._high,
            "not_finite": self._not_finite,
        }


@dataclass(frozen=True)
class Metrics:
    """Metrics of one run: series by key, samples over the training, and the number of rows."""

    series: dict[str, Series]
    samples: Thinned[dict[str, Any]]
    rows: int


def read_series(path: Path, stage: str, note: Callable[[str], object], limit: int | None = None) -> Metrics:
    """Read the curves of a stage from metrics.jsonl, in one pass; `note` hears of rows that cannot be read."""
    drawn = {key for chart in CHARTS.get(stage, (LOSS,)) for key in chart.lines}
    series: dict[str, Series] = {}
    others: set[str] = set()
    samples: Thinned[dict[str, Any]] = Thinned(SPARE * MOST_SAMPLES)
    bad: list[tuple[int, str]] = []
    rows = without_step = 0
    for row in scan_metrics(path, lambda number, wrong: bad.append((number, wrong))):
        rows += 1
        step: Any = row.get("step")
        if not is_number(step):
            without_step += 1
        elif isinstance(row.get("sample"), str):
            samples.add({"step": step, "text": row["sample"]})
        else:
            for key, value in row.items():
                if key in series:
                    series[key].add(step, value)
                elif key not in others:
                    if key in drawn or key.startswith(PART):
                        series[key] = Series()
                        series[key].add(step, value)
                    else:
                        others.add(key)
        if rows == limit:
            break
    cut = sum(wrong == "cut" for _, wrong in bad)
    if cut:
        note(f"{path}: the last line is cut and was left out")
    if len(bad) > cut:
        note(f"{path}: lines left out: {len(bad) - cut}, the first {path.name}:{bad[0][0]}: {bad[0][1]}")
    if without_step:
        note(f"{path}: rows without a step, left out: {without_step}")
    return Metrics(series, samples, rows)


def charts_of(stage: str, runs: Sequence[tuple[str, str, Metrics]]) -> list[dict[str, Any]]:
    """The charts of a stage with the curves of its runs, each (name of its node, name for people, metrics); charts
    without a line are left out."""
    charts = []
    own = [[key for key in metrics.series if key.startswith(PART)] for _, _, metrics in runs]
    part_keys = sorted({key for keys in own if len(keys) > 1 for key in keys})
    known = CHARTS.get(stage, (LOSS,))
    if part_keys:
        lines = {key: key.removeprefix(PART) for key in part_keys}
        known = (*known, Chart("Parts of the reward", "before their weights", lines))
    for chart in known:
        lines = []
        for node, name, metrics in runs:
            for key, label in chart.lines.items():
                figures = metrics.series[key].figures() if key in metrics.series else None
                if figures is not None:
                    lines.append({"run": node, "name": name, "metric": key, "label": label, **figures})
        if lines:
            names = [node for node, _, _ in runs]
            charts.append({"title": chart.title, "unit": chart.unit, "runs": names, "lines": lines})
    return charts
