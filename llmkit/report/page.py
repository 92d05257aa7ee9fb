"""The page: one HTML file that holds all it needs, made of the figures by templates that escape what they are given."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmkit.errors import UserError
from llmkit.progress import quantity
from llmkit.report.ancestry import rails
from llmkit.report.drawing import draw
from llmkit.report.figures import given_runs, shorten

TEMPLATES = Path(__file__).with_name("templates")
MOST_BYTES = 1_000_000
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
# characters that no page may hold, or that turn the direction of what follows
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def render_page(figures: Mapping[str, Any], title: str) -> tuple[bytes, dict[str, Any]]:
    """The page, under MOST_BYTES, and the figures that it shows: where they are too many, fewer records to browse and
    fewer points of curves, with a note. Raises UserError where the rest alone is longer."""
    for share in (1.0, 0.5, 0.25, 0.1, 0.03):
        shown = dict(figures) if share == 1.0 else shorten(dict(figures), share)
        if share < 1.0:
            note = f"{share:.0%} of the records and points are shown, to fit {MOST_BYTES // 1000} kB; --json has all"
            shown["notes"] = [*figures["notes"], note]
        page = _render(shown, title)
        if len(page) < MOST_BYTES:
            return page, shown
    raise UserError(
        f"{len(figures['runs'])} runs make a page of {len(page) / 1e6:.1f} MB; name fewer of them, or use --json"
    )


def _render(figures: Mapping[str, Any], title: str) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters.update(figure=figure_text, words=words, percent=percent, quantity=quantity, json=json.dumps)
    environment.globals["draw"] = draw
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    text = environment.get_template("page.html").render(
        figures=figures,
        given=given_runs(figures),
        title=title,
        style=style,
        script=script,
        policy=_policy(style, script),
        rails=rails({run["name"]: run["parents"] for run in figures["runs"]}),
        path_of={run["name"]: run["path"] for run in figures["runs"]},
    )
    return text.encode("utf-8", "replace")


def _policy(style: str, script: str) -> str:
    """What the page may do: run this script, use this style, and nothing else."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def clean(text: str) -> str:
    """Text with what cannot be shown as `\\xNN`.

    >>> clean("a\\x00b")
    'a\\\\x00b'
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def figure_text(value: Any) -> str:
    """A number to be read: thousands apart, four decimals at most.

    >>> figure_text(1234567), figure_text(0.52630), figure_text(2.0), figure_text(0.000012)
    ('1,234,567', '0.5263', '2', '1.2e-05')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 0.001 or abs(value) >= 1e15:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.1f}"


def words(key: str) -> str:
    """A key of results as people say it."""
    return WORDS.get(key, key.replace("_", " "))


def percent(part: float, whole: float) -> str:
    """A share, such as 12.5%; nothing of nothing."""
    return f"{part / whole:.1%}" if whole else ""
