"""Render templates with escaping: the page, one self-contained HTML file, and curves as SVG."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmkit.errors import UserError
from llmkit.io.files import atomic_file
from llmkit.io.metrics import METRICS, read_metrics
from llmkit.io.progress import counted
from llmkit.report.ancestry import rails
from llmkit.report.charts import COLOURS, FORMS, MOST_POINTS, STYLES, WORDS, draw, figure_text
from llmkit.report.figures import given_runs, shorten
from llmkit.report.records import thinned

TEMPLATES = Path(__file__).with_name("templates")
MOST_BYTES = 1_000_000
LOSS_CURVE = {"training": "loss", "validation": "val_loss"}
PALETTE = ("#3b6fb6", "#d1495b", "#3c9d6b", "#b07d2b", "#7a5ba8")  # for curves outside the page
# characters not allowed in HTML, and those that change the text direction
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def render_page(figures: Mapping[str, Any], title: str) -> tuple[bytes, dict[str, Any]]:
    """Return the page, under MOST_BYTES, and the figures that it shows.

    If it would be too large, drops records and points of curves, and adds a note. Raises UserError if that does not
    suffice.
    """
    for share in (1.0, 0.5, 0.25, 0.1, 0.03):
        shown = dict(figures) if share == 1.0 else shorten(dict(figures), share)
        if share < 1.0:
            note = f"{share:.0%} of records and points are shown, to fit {MOST_BYTES // 1000} kB; --json has all"
            shown["notes"] = [*figures["notes"], note]
        page = _render(shown, title)
        if len(page) < MOST_BYTES:
            return page, shown
    raise UserError(
        f"the page for {counted(len(figures['runs']), 'run')} has {len(page) / 1e6:.1f} MB; give fewer, or use --json"
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters.update(
        figure=figure_text,
        words=lambda key: WORDS.get(key, key.replace("_", " ")),
        percent=lambda part, whole: f"{part / whole:.1%}" if whole else "",
        json=json.dumps,
    )
    environment.globals.update(draw=draw, forms=FORMS, styles=STYLES, colours=COLOURS, palette=PALETTE)
    return environment


def _render(figures: Mapping[str, Any], title: str) -> bytes:
    figures, folder = relative_to_folder(figures)
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    text = (
        _environment()
        .get_template("page.html")
        .render(
            figures=figures,
            given=given_runs(figures),
            title=title,
            folder=folder,
            style=style,
            script=script,
            # allow only this script and this style
            policy=f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
            "img-src data:; base-uri 'none'; form-action 'none'",
            rails=rails({run["name"]: run["parents"] for run in figures["runs"]}),
            path_of={run["name"]: run["path"] for run in figures["runs"]},
        )
    )
    return text.encode("utf-8", "replace")


def curve_svg(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw named lines of (step, value) as a standalone SVG, without non-finite values."""
    lines = []
    for name, line in curves.items():
        if points := [point for point in line if math.isfinite(point[1])]:
            points = thinned(points, MOST_POINTS)
            lines.append({"run": "", "name": name, "metric": "loss", "label": name, "points": points})
    empty = {"run": "", "name": "", "metric": "", "label": "", "points": [(0, 0)]}
    drawn = draw({"unit": "", "runs": [""], "lines": lines or [empty]})
    return _environment().get_template("curve.svg").render(drawn=drawn)


def write_curves(folder: Path, curves: Mapping[str, Mapping[str, str]]) -> None:
    """Draw loss.svg and other curves from `metrics.jsonl`.

    curves  file name -> line name -> key in metrics.jsonl
    """
    rows = [row for row in read_metrics(folder / METRICS) if "step" in row]
    for name, lines in {"loss.svg": LOSS_CURVE, **curves}.items():
        points = {label: [(row["step"], row[key]) for row in rows if key in row] for label, key in lines.items()}
        with atomic_file(folder / name, "w") as handle:
            handle.write(curve_svg(points))


def relative_to_folder(figures: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Make paths, commands and notes relative to the folder with most runs and files; return figures and folder.

    The folder is "" if none has two of them. The text of records is not changed.
    """
    paths = [entry["path"] for kind in ("runs", "samples", "probes") for entry in figures[kind]]
    folders = Counter(os.path.dirname(path.rstrip("/")) for path in paths)
    folder, count = max(folders.items(), key=lambda entry: (entry[1], -len(entry[0])), default=("", 0))
    if count < 2 or folder in ("", "/", "."):
        return dict(figures), ""
    prefix = re.compile(rf"(?<![\w./-]){re.escape(folder)}/(?=[^\s/])")

    def shortened(value: Any, key: str = "") -> Any:
        if key in ("text", "token"):
            return value
        if isinstance(value, str):
            return prefix.sub("", value)
        if isinstance(value, Mapping):
            return {prefix.sub("", key): shortened(item, key) for key, item in value.items()}
        return [shortened(item) for item in value] if isinstance(value, (list, tuple)) else value

    records = [{**file, "path": shortened(file["path"])} for file in figures["samples"]]
    return {**shortened({**figures, "samples": []}), "samples": records}, folder


def clean(text: str) -> str:
    """Escape characters that cannot be shown as `\\xNN`.

    >>> clean("a\\x00b")
    'a\\\\x00b'
    """
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
