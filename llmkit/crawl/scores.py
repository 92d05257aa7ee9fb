"""The scores file: what every page measured, so that other thresholds can be tried without extracting again.

Its first line holds the recipe that it was made with. Then one line for each record of the input, in order: a page
that was extracted with its text, language and the measures of every filter; the others with what dropped them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import orjson

from llmkit import __version__
from llmkit.crawl.page import Page, Skipped, Span
from llmkit.crawl.recipe import Recipe, as_json
from llmkit.crawl.steps import Journey
from llmkit.errors import UserError
from llmkit.stream import open_input

KIND = "scores"  # of a span of lines from a scores file
VERSION = 1
SPAN_LINES = 256
FIXED = ("url", "extract")  # what these steps dropped has no text: their part of the recipe cannot be changed


def scores_header(recipe: Recipe) -> dict[str, Any]:
    """The first line."""
    return {"scores_version": VERSION, "llmkit": __version__, "recipe": as_json(recipe)}


def scores_of(record: Journey | Skipped) -> dict[str, Any]:
    """The line of one record."""
    if isinstance(record, Skipped):
        return {
            "path": record.path,
            "offset": record.offset,
            "url": record.url,
            "step": "read",
            "reason": record.reason,
        }
    page = record.page
    told = {"path": page.path, "offset": page.offset, "url": page.url, "record": page.record}
    if record.extracted is None:
        return told | {"step": record.step, "reason": record.reason, "score": record.score, "text": record.text}
    told |= {"title": record.title, "text": record.extracted}
    return told | {"language": record.language, "language_score": record.language_score, "measures": record.measures}


def open_scores(path: str, recipe: Recipe) -> Iterator[Span]:
    """Check the first line of a scores file against the recipe, and yield its lines in spans.

    Raises UserError when it is no scores file, or was made with other steps before the text was there.
    """
    name = "stdin" if path == "-" else path
    with open_input(path) as handle:
        try:
            header = orjson.loads(handle.readline())
            version, before = header["scores_version"], header["recipe"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{name}:1: not a scores file; --write-scores makes one") from None
        if version != VERSION or header["llmkit"] != __version__:
            raise UserError(f"{name}: made by llmkit {header['llmkit']}, this is {__version__}; make it again")
        now = as_json(recipe)
        for step in FIXED:
            if before[step] != now[step] or (step in before["steps"]) != (step in now["steps"]):
                raise UserError(f"{name}: made with another [{step}]; other values of it need the pages themselves")
        same = all(before[key] == now[key] for key in ("c4", "fineweb")) and ("c4" in before["steps"]) == (
            "c4" in now["steps"]
        )
        numbered = enumerate(handle, 2)
        for index in count():
            if not (lines := tuple(islice(numbered, SPAN_LINES))):
                return
            # what fineweb measured was what c4 left: with another c4 it is measured again
            yield Span(path, index, KIND, lines[0][0], exact=same, frames=lines)


def read_scores(span: Span) -> Iterator[Journey | Skipped]:
    """The records of a span as they stood before the first filter.

    Raises UserError naming the line that is none of a scores file.
    """
    name = "stdin" if span.path == "-" else span.path
    for number, line in span.frames or ():
        try:
            yield _restored(orjson.loads(line), keep_fineweb=span.exact)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{name}:{number}: not a line of a scores file; make it again") from None


def _restored(told: dict[str, Any], keep_fineweb: bool) -> Journey | Skipped:
    if told.get("step") == "read":
        return Skipped(told["path"], told["offset"], told["reason"], told["url"])
    page = Page(told["path"], told["offset"], told["url"], None, None, None, told["record"])
    journey = Journey(page, told["text"], told.get("title"))
    if "step" in told:
        journey.step, journey.reason, journey.score = told["step"], told["reason"], told["score"]
        return journey
    journey.language, journey.language_score = told["language"], told["language_score"]
    journey.measures = told["measures"]
    if not keep_fineweb:
        del journey.measures["fineweb"]
    return journey
