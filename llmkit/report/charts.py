"""Charts of trainings: the metrics of each stage, sampled evenly over the steps, and their SVG coordinates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.io.metrics import scan_metrics
from llmkit.io.progress import counted, duration, quantity
from llmkit.report.records import Thinned, is_number, thinned

MOST_POINTS = 240  # per line; the frame is 300 pixels wide
MOST_SAMPLES = 24  # per training
MOST_LINES = 12  # drawn per chart; its table has all


@dataclass(frozen=True)
class Chart:
    """One frame with curves; `lines` maps keys in metrics.jsonl to display names."""

    title: str
    unit: str
    lines: dict[str, str]


LOSS = Chart("Loss", "nats per token", {"loss": "training", "val_loss": "held out"})
CHARTS = {
    "pretrain": (LOSS, Chart("Bits per byte", "of held-out text", {"val_bits_per_byte": "held out"})),
    "sft": (LOSS,),
    "train-reward": (
        Chart("Loss", "nats per pair", {"loss": "training", "val_loss": "held out"}),
        Chart("Accuracy", "share of held-out comparisons", {"val_accuracy": "held out"}),
    ),
    "rl": (
        Chart("Success", "share of attempts that are right", {"success": "training", "val_success": "held out"}),
        Chart(
            "Reward",
            "mean of attempts; gold is not trained on",
            {"reward": "training", "val_reward": "held out", "val_gold": "gold"},
        ),
        Chart("Length", "tokens per attempt", {"length": "training", "val_length": "held out"}),
        Chart("Calls", "share of attempts that call a tool", {"called": "training", "val_called": "held out"}),
        Chart("Divergence", "nats per attempt, from the initial policy", {"kl_per_attempt": "training"}),
        Chart("Entropy", "nats per token", {"entropy": "training"}),
    ),
}
PART = "reward/"  # prefix of a reward's name, if there are several
TASK = "task/"  # prefix of a task scored by --evaluate


class Series:
    """One metric over the steps of a run: thinned points, and exact statistics over all."""

    def __init__(self) -> None:
        self._points: Thinned[tuple[float, float]] = Thinned(MOST_POINTS)
        self._low, self._high = math.inf, -math.inf
        self._not_finite = 0

    def add(self, step: float, value: Any) -> None:
        """Add a value; null stands for NaN and infinity in JSON. Fast enough for a million rows: 0.5 us each."""
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
        """Return points and statistics; None if there is no finite value."""
        if not self._points.count:
            return None
        points = self._points.values()
        return {
            "points": [list(point) for point in points],
            "values": self._points.count,
            "first": points[0][1],
            "last": points[-1][1],
            "lowest": self._low,
            "highest": self._high,
            "not_finite": self._not_finite,
        }


class Metrics(NamedTuple):
    """The metrics of one run: series by key, samples during training, and the number of rows."""

    series: dict[str, Series]
    samples: Thinned[dict[str, Any]]
    rows: int


def read_series(path: Path, stage: str, note: Callable[[str], object], limit: int | None = None) -> Metrics:
    """Read the curves of a stage from metrics.jsonl, in one pass; `note` is called for unreadable rows."""
    drawn = {key for chart in CHARTS.get(stage, (LOSS,)) for key in chart.lines}
    series: dict[str, Series] = defaultdict(Series)
    samples: Thinned[dict[str, Any]] = Thinned(MOST_SAMPLES)
    bad: list[str] = []
    rows = without_step = 0
    for row in scan_metrics(path, bad.append):
        rows += 1
        step: Any = row.get("step")
        if not is_number(step):
            without_step += 1
        elif isinstance(row.get("sample"), str):
            samples.add({"step": step, "text": row["sample"]})
        else:
            for key, value in row.items():
                if key in drawn or key.startswith((PART, TASK)):
                    series[key].add(step, value)
        if rows == limit:
            break
    cut = bad.count("cut")
    if cut:
        note(f"{path}: left out the last line, which is truncated")
    if len(bad) > cut:
        note(f"{path}: left out {counted(len(bad) - cut, 'line')}, the first: {bad[0]}")
    if without_step:
        note(f"{path}: left out {counted(without_step, 'row')} without a step")
    return Metrics(series, samples, rows)


def charts_of(stage: str, runs: Sequence[tuple[str, str, Metrics]]) -> list[dict[str, Any]]:
    """Return the charts of a stage with the curves of its runs, each (node name, display name, metrics), without empty
    charts."""
    charts = []
    own = [[key for key in metrics.series if key.startswith(PART)] for _, _, metrics in runs]
    part_keys = sorted({key for keys in own if len(keys) > 1 for key in keys})
    known = CHARTS.get(stage, (LOSS,))
    if part_keys:
        lines = {key: key.removeprefix(PART) for key in part_keys}
        known = (*known, Chart("Parts of the reward", "before their weights", lines))
    task_keys = sorted({key for _, _, metrics in runs for key in metrics.series if key.startswith(TASK)})
    if task_keys:
        known = (*known, Chart("Tasks", "score", {key: key.removeprefix(TASK) for key in task_keys}))
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


# ---- numbers and coordinates

WORDS = {  # display names of keys that do not speak for themselves
    "val_loss": "held-out loss",
    "val_bits_per_byte": "bits per byte",
    "val_accuracy": "accuracy",
    "val_success": "held-out success",
    "val_reward": "held-out reward",
    "val_gold": "gold reward",
    "vocab_size": "vocabulary",
    "bytes_per_token": "bytes per token",
    "kept_step": "step kept",
    "val_comparisons": "held-out comparisons",
}
SHARES = ("accuracy", "val_accuracy", "success", "val_success", "called", "val_called")
FORMS = {"seconds": "seconds", **dict.fromkeys(SHARES, "share")}  # formats by key
WIDTH, HEIGHT = 360, 232  # of a frame, in pixels at its natural size
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 20, 36
FARTHEST = 1e300  # values are clipped, because differences of larger ones overflow
MOST_BANDS = 90  # hover stripes, 3 pixels each
CLIPPED = ("loss", "val_loss")  # the high values of the first steps would flatten the rest
QUANTILE = 0.95
STYLES = {"training": "training", "held out": "held-out", "gold": "gold"}
SMOOTHED_FROM = 40  # points; shorter lines are not smoothed
SMOOTHED_OVER = 15  # the average's width is the number of points divided by this
COLOURS = 6  # in the style sheet, used in turn


def figure_text(value: Any, form: str = "") -> str:
    """Format a number for display, with thousands separators and at most four decimals.

    form  "share", "seconds", "short" (three significant digits) or ""

    >>> figure_text(1234567), figure_text(0.52630), figure_text(2.0), figure_text(0.000012)
    ('1,234,567', '0.5263', '2', '1.2e-05')
    >>> figure_text(0.61, "share"), figure_text(0.8125, "share"), figure_text(516.2, "seconds")
    ('61%', '81.2%', '8m36s')
    >>> figure_text(0.49921, "short"), figure_text(2.8052, "short"), figure_text(1234.5, "short")
    ('0.499', '2.81', '1,234.5')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if form == "share":
        return f"{100 * value:.1f}".removesuffix(".0") + "%"
    if form == "seconds":
        return duration(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 0.001 or abs(value) >= 1e15:
        return f"{value:.3g}"
    if form == "short" and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.1f}"


def draw(chart: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a chart of `charts_of` to coordinates: `lines` with `path` and `dots`, `bands` that show the values at a
    step on hover, and the ticks of both axes."""
    lines = chart["lines"][:MOST_LINES]
    points = [(step, max(-FARTHEST, min(FARTHEST, value))) for line in lines for step, value in line["points"]]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    ordered = sorted(value for _, value in points)
    low, high, bound = ordered[0], ordered[-1], ordered[int(QUANTILE * (len(ordered) - 1))]
    if lines[0]["metric"] in CLIPPED and len(ordered) >= 20 and high - low > 1.5 * (bound - low) > 0:
        high = bound
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high))
    else:
        high += 0.02 * (high - low)
    x_of = _scale(first, last, LEFT, WIDTH - RIGHT)
    y_of = _scale(low, high, HEIGHT - BOTTOM, TOP)
    form = "share" if chart["unit"].startswith("share") else ""
    runs = chart["runs"]  # all runs of the stage, so that a run keeps its colour in all charts
    drawn = []
    for number, line in enumerate(lines):
        values = [max(-FARTHEST, min(FARTHEST, value)) for _, value in line["points"]]
        xs, ys = [x_of(step) for step, _ in line["points"]], list(map(y_of, values))
        own_style = line["label"] in STYLES
        smooth = line["label"] == "training" and len(values) >= SMOOTHED_FROM
        bold = list(map(y_of, smoothed(values, len(values) / SMOOTHED_OVER))) if smooth else ys
        few = len(values) <= 30 and line["label"] in ("held out", "gold")
        drawn.append(
            {
                "name": f"{line['name']}, {line['label']}" if len(runs) > 1 else line["label"],
                "classes": f"s{(runs.index(line['run']) if own_style else number) % COLOURS} "
                + STYLES.get(line["label"], "training"),
                "path": _path(xs, bold),
                "raw": _path(xs, ys) if smooth else "",
                "dots": [(x, max(y, TOP)) for x, y in zip(xs, ys, strict=True)] if few or len(values) == 1 else [],
            }
        )
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "lines": drawn,
        "own_legend": any(line["label"] not in STYLES for line in lines),  # colours that are not in the stage's legend
        "above": sum(value > high for _, value in points),
        "bands": _bands(lines, [line["name"] for line in drawn], x_of, form),
        "x_ticks": [(x_of(tick), text) for tick, text in ticks(first, last, 4, integers=True)],
        "y_ticks": [(y_of(tick), text) for tick, text in ticks(low, high, 5, form)],
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    }


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return the SVG path through points, clipped at the top of the frame.

    >>> _path([0, 10, 20], [0, 40, 50])  # enters halfway along the first segment
    'M5 20L10 40L20 50'
    """
    path, last = "", None
    for (x, y), (to_x, to_y) in pairwise(zip(xs, ys, strict=True)):
        if max(y, to_y) < TOP:
            continue
        crossing = x + (to_x - x) * (TOP - y) / (to_y - y) if min(y, to_y) < TOP else x
        start, end = ((crossing, TOP) if y < TOP else (x, y)), ((crossing, TOP) if to_y < TOP else (to_x, to_y))
        path += ("" if start == last else f"M{start[0]:.5g} {start[1]:g}") + f"L{end[0]:.5g} {end[1]:g}"
        last = end
    return path


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Return the exponential moving average over about `width` values, with bias correction (Kingma and Ba 2015,
    section 3).

    >>> smoothed([1.0, 3.0], 2)
    [1.0, 2.5]
    """
    keep = 1 - 2 / (width + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        result.append(total / weight)
    return result


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the map from values to coordinates, rounded to one decimal."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def ticks(low: float, high: float, most: int, form: str = "", integers: bool = False) -> list[tuple[float, str]]:
    """Return at most about `most` round numbers from `low` to `high` with their text; without fractions if `integers`.

    >>> ticks(0, 97, 4)
    [(0, '0'), (50, '50')]
    >>> ticks(0.11, 0.52, 5)
    [(0.2, '0.2'), (0.3, '0.3'), (0.4, '0.4'), (0.5, '0.5')]
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [(low, f"{low:.4g}")]
    power = 10 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most)
    step = max(step, 1) if integers else step
    multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    values = [round(multiple * step, 12) for multiple in multiples]
    return [(value, figure_text(value, form) if abs(value) < 1e6 else quantity(value)) for value in values]


def _bands(
    lines: Sequence[Mapping[str, Any]], names: Sequence[str], x_of: Callable[[float], float], form: str
) -> list[dict[str, Any]]:
    """Return hover stripes over the frame, each with the values of all lines at the step nearest to its middle."""
    chosen = thinned(sorted({step for line in lines for step, _ in line["points"]}), MOST_BANDS)
    middles = [x_of(step) for step in chosen]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), WIDTH - RIGHT]
    bands = []
    for step, (left, right) in zip(chosen, pairwise(edges), strict=True):
        notes = [f"step {step:,}"]
        for line, name in zip(lines, names, strict=True):
            at, value = min(line["points"], key=lambda point: abs(point[0] - step))
            beside = "" if at == step else f" at step {at:,}"
            notes.append(f"{name} {figure_text(value, form) if form else f'{value:.6g}'}{beside}")
        bands.append({"x": round(left, 1), "width": max(0.5, round(right - left, 1)), "text": "\n".join(notes)})
    return bands
