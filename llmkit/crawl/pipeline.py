"""One process's side of the work: the records of a span go through the steps of the recipe, one by one.

    for part in Pipeline(Recipe())(span):
        ...

Everything here is a function of the record and the recipe alone, so that it does not matter which process does it.
What depends on other records (duplicates) is done where the parts come together, in `llmkit.crawl.output`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from time import thread_time
from typing import Any

import orjson

from llmkit.crawl.filters.urls import UrlFilter
from llmkit.crawl.funnel import READ
from llmkit.crawl.page import Outcome, Page, Part, Skipped, Span
from llmkit.crawl.recipe import Recipe
from llmkit.crawl.steps import Journey, Steps, source_of
from llmkit.io.jsonl import JSON_LINE

PART_RECORDS = 64  # in one part
FIRST_RECORDS = 1  # in the first, doubled from part to part, for a first document at once
DUPLICATES = ("exact_duplicates", "near_duplicates")


class Pipeline:
    """Process a span: read its records, follow each through the steps, pack the outcomes."""

    def __init__(self, recipe: Recipe, url_filter: UrlFilter | None = None, rejects: bool = False) -> None:
        self.steps, self.rejects = Steps(recipe, url_filter), rejects
        self.duplicates = [step for step in DUPLICATES if step in recipe.steps]
        self.near = recipe.near_duplicates
        self.tell_language = "language" in recipe.steps

    def __call__(self, span: Span) -> Iterator[Part]:
        """Yield the outcomes of a span's records, in order, a few at a time."""
        records = Records(span)
        size, part = FIRST_RECORDS, Part(0, [])
        texts: list[str] = []
        while (record := self._next(records, part.seconds)) is not None:
            part.read += 1
            part.outcomes.append(self._outcome(record, part.seconds))
            if part.outcomes[-1].step is None:
                texts.append(record.text or "")  # type: ignore[union-attr]
            if part.read == size:
                yield self._finished(part, texts, records)
                size, part, texts = min(2 * size, PART_RECORDS), Part(0, []), []
        yield self._finished(part, texts, records)

    def _next(self, records: Records, seconds: dict[str, float]) -> Journey | Skipped | None:
        started = thread_time()
        record = next(records, None)
        seconds[READ] = seconds.get(READ, 0.0) + thread_time() - started
        return record

    def _finished(self, part: Part, texts: list[str], records: Records) -> Part:
        part.began, part.ended = records.began, records.ended
        if self.duplicates and texts:
            from llmkit.crawl.dedup.duplicates import signatures

            started = thread_time()
            part.signatures = signatures(texts, self.near.bands, self.near.rows)
            part.seconds[self.duplicates[-1]] = thread_time() - started
        return part

    def _outcome(self, record: Journey | Skipped, seconds: dict[str, float]) -> Outcome:
        """Follow one record to its outcome."""
        if isinstance(record, Skipped):
            step, reason, offset, entry = READ, record.reason, record.offset, _told_of(record)
        else:
            if record.step is None:
                self.steps.follow(record, seconds)
            step, reason, offset = record.step, record.reason, record.page.offset
            entry = record.document(self.tell_language) if step is None else record.reject()
        line = _line(entry) if step is None or self.rejects else b""
        return Outcome(step, reason, offset, line)


def _told_of(record: Skipped) -> dict[str, Any]:
    """Return the entry of --rejects for a record that is no page."""
    entry = {"url": record.url} if record.url is not None else {}
    return entry | {"source": source_of(record.path), "offset": record.offset, "step": READ, "reason": record.reason}


class Records:
    """The records of a span at the start of their journey; `began` and `ended` are those of the reader."""

    def __init__(self, span: Span) -> None:
        from llmkit.crawl.read.inputs import read_span

        self._source: Any = read_span(span)

    began = property(lambda self: getattr(self._source, "began", None))
    ended = property(lambda self: getattr(self._source, "ended", None))

    def __iter__(self) -> Records:
        return self

    def __next__(self) -> Journey | Skipped:
        record = next(self._source)
        return Journey(record, record.text) if isinstance(record, Page) else record


def all_records(spans: Iterable[Span]) -> Iterator[tuple[int, Journey | Skipped]]:
    """The records of all spans with their spans' numbers, read in this process."""
    from llmkit.crawl.read.inputs import Seam

    seam = Seam()
    for span in spans:
        records = Records(span)
        first = next(records, None)
        if again := seam.check(span, records.began):
            records = Records(again)
            first = next(records, None)
        if first is not None:
            yield span.index, first
        yield from ((span.index, record) for record in records)
        seam.passed(span, records.began, records.ended)


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(record, option=JSON_LINE)
    except TypeError:  # half of a surrogate pair, which no UTF-8 can hold
        text = json.dumps(record, ensure_ascii=False)
        return text.encode("utf-8", "replace") + b"\n"
