"""The geometry of charts: from figures to coordinates in an SVG frame, which a template writes out."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from llmkit.report.curves import MOST_LINES
from llmkit.report.values import thinned

WORDS = {  # what people call a figure, where its key does not say it
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
FORMS = {"seconds": "seconds", **dict.fromkeys(SHARES, "share")}  # of figures, by their keys
WIDTH, HEIGHT = 360, 232  # of a frame, in pixels where it is drawn at its own size
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 20, 36
MOST_BANDS = 90  # stripes to be pointed at: 3 pixels each
CLIPPED = ("loss", "val_loss")  # whose first steps would flatten the rest
QUANTILE = 0.95
STYLES = {"training": "training", "held out": "held-out", "gold": "gold"}
SMOOTHED_FROM = 40  # points; a line of fewer is drawn as it is
SMOOTHED_OVER = 15  # of a line's points one in so many is the width of the average
COLOURS = 6  # of the style sheet, in turn


def figure_text(value: Any, form: str = "") -> str:
    """A number as people write it: thousands apart, four decimals at most; `form` is "share", "seconds", "short" (three
    digits, where a glance is enough) or "".

    >>> figure_text(1234567), figure_text(0.52630), figure_text(2.0), figure_text(0.000012)
    ('1,234,567', '0.5263', '2', '1.2e-05')
    >>> figure_text(0.61, "share"), figure_text(0.8125, "share"), figure_text(516.2, "seconds")
    ('61%', '81.2%', '8.6 min')
    >>> figure_text(0.49921, "short"), figure_text(2.8052, "short"), figure_text(1234.5, "short")
    ('0.499', '2.81', '1,234.5')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if form == "share":
        return f"{100 * value:.1f}".removesuffix(".0") + "%"
    if form == "seconds":
        for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
            if value >= 1.5 * length:
                return f"{value / length:.1f}".removesuffix(".0") + f" {unit}"
        return f"{value:.3g} s"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 0.001 or abs(value) >= 1e15:
        return f"{value:.3g}"
    if form == "short" and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.1f}"


def words(key: str) -> str:
    """A key of results as people say it."""
    return WORDS.get(key, key.replace("_", " "))


def percent(part: float, whole: float) -> str:
    """A share, such as 12.5%; nothing of nothing."""
    return f"{part / whole:.1%}" if whole else ""


def draw(chart: Mapping[str, Any]) -> dict[str, Any]:
    """A chart of `curves.charts_of` as coordinates: `lines` with `path` and `dots`, `bands` that tell the values at a
    step when they are pointed at, and the ticks of both axes."""
    lines = chart["lines"][:MOST_LINES]
    points = [point for line in lines for point in line["points"]]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = _range([value for _, value in points], clip=lines[0]["metric"] in CLIPPED)
    x_of = _scale(first, last, LEFT, WIDTH - RIGHT)
    y_of = _scale(low, high, HEIGHT - BOTTOM, TOP)
    form = "share" if chart["unit"].startswith("share") else ""
    runs = chart["runs"]  # of all charts of the stage, so that a run has one colour in them
    drawn = []
    for number, line in enumerate(lines):
        values = [value for _, value in line["points"]]
        smooth = line["label"] == "training" and len(values) >= SMOOTHED_FROM

        def place(values: Sequence[float], line: Mapping[str, Any] = line) -> list[tuple[float, float]]:
            return [(x_of(step), y_of(value)) for (step, _), value in zip(line["points"], values, strict=True)]

        places = place(values)
        own_style = line["label"] in STYLES
        colour = runs.index(line["run"]) if own_style else number
        few = len(places) <= 30 and line["label"] in ("held out", "gold")
        drawn.append(
            {
                "name": f"{line['name']}, {line['label']}" if len(runs) > 1 else line["label"],
                "classes": f"s{colour % COLOURS} {STYLES.get(line['label'], 'training')}",
                "path": _path(place(smoothed(values, len(values) / SMOOTHED_OVER)) if smooth else places),
                "raw": _path(places) if smooth else "",
                "dots": [(x, max(y, TOP)) for x, y in places] if few or len(places) == 1 else [],
            }
        )
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "lines": drawn,
        "own_legend": any(
            line["label"] not in STYLES for line in lines
        ),  # colours that the stage's legend does not tell
        "above": sum(value > high for _, value in points),
        "bands": _bands(lines, [line["name"] for line in drawn], x_of, form),
        "x_ticks": [(x_of(tick), text) for tick, text in ticks(first, last, 4, whole=True)],
        "y_ticks": [(y_of(tick), text) for tick, text in ticks(low, high, 5, share=form == "share")],
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    }


def _path(places: Sequence[tuple[float, float]]) -> str:
    """The line through some places, as far as it lies in the frame.

    >>> _path([(0, 0), (10, 40), (20, 50)])  # enters at half of the first stretch
    'M5 20L10 40L20 50'
    """
    path, last = "", None
    for (x, y), (to_x, to_y) in pairwise(places):
        if max(y, to_y) < TOP:
            continue
        crossing = x + (to_x - x) * (TOP - y) / (to_y - y) if min(y, to_y) < TOP else x
        start, end = ((crossing, TOP) if y < TOP else (x, y)), ((crossing, TOP) if to_y < TOP else (to_x, to_y))
        path += ("" if start == last else f"M{start[0]:.5g} {start[1]:g}") + f"L{end[0]:.5g} {end[1]:g}"
        last = end
    return path


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """The exponential moving average over about `width` values, without a pull to zero at the beginning (Kingma and Ba
    2015, section 3: bias correction).

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


def _range(values: list[float], clip: bool) -> tuple[float, float]:
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    bound = ordered[int(QUANTILE * (len(ordered) - 1))]
    if clip and len(ordered) >= 20 and high - low > 1.5 * (bound - low) > 0:
        high = bound
    if high - low < 1e-12 * max(1.0, abs(high)):
        return low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high))
    return low, high + 0.02 * (high - low)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From a value to a coordinate with one decimal."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def ticks(low: float, high: float, most: int, whole: bool = False, share: bool = False) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high`, at most `most` or one more, with their text; with `whole`, no fractions, with
    `share`, in percent.

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
    step = max(step, 1) if whole else step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    values = [round(multiple * step, 12) for multiple in places]
    if share:
        return [(value, f"{100 * value:.{max(0, decimals - 2)}f}%") for value in values]
    return [(value, short(value, decimals)) for value in values]


def short(value: float, decimals: int) -> str:
    """A number on an axis, such as 2.5, 400 or 12k."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (abs(value) >= scale and value % (scale / 10) == 0):
            return f"{value / scale:.4g}{letter}"
    return f"{value:.{decimals}f}" if decimals < 7 else f"{value:.2g}"


def _bands(
    lines: Sequence[Mapping[str, Any]], names: Sequence[str], x_of: Callable[[float], float], form: str
) -> list[dict[str, Any]]:
    """Stripes over the frame, each with the values of all lines at the step in its middle, or nearest to it."""
    steps = sorted({step for line in lines for step, _ in line["points"]})
    chosen = thinned(steps, MOST_BANDS)
    middles = [x_of(step) for step in chosen]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), WIDTH - RIGHT]
    bands = []
    for number, step in enumerate(chosen):
        notes = [f"step {step:,}"]
        for line, name in zip(lines, names, strict=True):
            at, value = _nearest(line["points"], step)
            beside = "" if at == step else f" at step {at:,}"
            notes.append(f"{name} {figure_text(value, form) if form else f'{value:.6g}'}{beside}")
        left, right = edges[number], edges[number + 1]
        bands.append({"x": round(left, 1), "width": max(0.5, round(right - left, 1)), "text": "\n".join(notes)})
    return bands


def _nearest(points: Sequence[Sequence[float]], step: float) -> Sequence[float]:
    index = bisect_left(points, step, key=lambda point: point[0])
    around = points[max(0, index - 1) : index + 1]
    return min(around, key=lambda point: abs(point[0] - step))
