"""Where the parts come together, in the order of the input: duplicates, the funnel, and the files that are written."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import thread_time
from typing import Any

import orjson

from llmkit.crawl.funnel import READ, Funnel
from llmkit.crawl.page import Outcome, Part, Span
from llmkit.crawl.pipeline import DUPLICATES
from llmkit.crawl.read.inputs import Seam
from llmkit.crawl.recipe import Recipe
from llmkit.crawl.state import State
from llmkit.io.jsonl import JSON_LINE, dump_json, load_json, name_of
from llmkit.io.pool import Work, in_order

BAD = ("bad_json", "no_text", "bad_file", "truncated", "damaged")  # reasons of records that were to be read

Write = Callable[[bytes], object]


class Collector:
    """Takes parts in order, drops what repeats an earlier document, and writes each line where it belongs."""

    def __init__(
        self,
        recipe: Recipe,
        document: Write,
        reject: Write | None = None,
        spill: Path | None = None,
        limit: int | None = None,
        records: int | None = None,
    ) -> None:
        """`limit`: take so many pages; `records`: so many records, those that are no pages among them."""
        self.funnel = Funnel([READ, *recipe.taken])
        self.read, self.pages, self.limit, self.records = 0, 0, limit, records
        self._document, self._reject = document, reject
        self._names = Names(spill)
        self.duplicates: Any = None  # what says what repeats what: has add() of `Duplicates`
        self._last_step = recipe.taken[-1] if recipe.taken else READ
        wanted = [step for step in DUPLICATES if step in recipe.steps]
        if wanted:
            from llmkit.crawl.dedup.duplicates import Duplicates

            exact, near = (step in wanted for step in DUPLICATES)
            self.duplicates = Duplicates(spill, recipe.near_duplicates.min_similarity, exact, near)

    @property
    def full(self) -> bool:
        """True if as many pages or records were taken as are wanted."""
        if self.records is not None and self.funnel.records >= self.records:
            return True
        return self.limit is not None and self.pages >= self.limit

    def add(self, part: Part) -> None:
        """Take the next part."""
        started = thread_time()
        repeats = iter(self.duplicates.add(part.signatures) if part.signatures is not None else ())
        self.funnel.spend(part.seconds)
        if part.signatures is not None:
            self.funnel.spend({self._last_step: thread_time() - started})
        for outcome in part.outcomes:
            if self.full:
                return
            if outcome.step is None:
                self._keep(outcome, next(repeats, None))
            else:
                self._drop(outcome.step, outcome.reason, outcome.line)
            self.pages += outcome.step != READ
        self.read += part.read

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exception: object) -> None:
        self._names.close()

    def finish(self) -> None:
        """All parts were taken: check that nothing was lost on the way."""
        records = self.funnel.records
        assert self.full or records == self.read, f"{self.read} records were read, {records} are accounted for"

    def _keep(self, outcome: Outcome, repeat: Any) -> None:
        if repeat is None:
            self.funnel.count(None, None)
            self._document(outcome.line)
        else:
            step = f"{repeat.kind}_duplicates"
            line = self._repeats(outcome, repeat, step) if self._reject else b""
            self._drop(step, "repeats", line)
        if self.duplicates is not None:
            self._names.add(outcome.line)

    def _drop(self, step: str, reason: str | None, line: bytes) -> None:
        self.funnel.count(step, reason)
        if self._reject:
            self._reject(line)

    def _repeats(self, outcome: Outcome, repeat: Any, step: str) -> bytes:
        """Return the line of --rejects for a document that repeats an earlier one."""
        document = load_json(outcome.line)
        entry = {key: document[key] for key in ("id", "url", "source") if key in document}
        entry |= {"offset": outcome.offset, "step": step, "reason": "repeats"}
        entry |= {"score": round(repeat.similarity, 4), "repeats": self._names[repeat.index], "text": document["text"]}
        return dump_json(entry, JSON_LINE)


def collect(
    spans: Iterable[Span],
    make: Callable[[], Work],
    workers: int,
    collector: Collector,
    state: State | None = None,
    on_progress: Callable[[int], object] = lambda amount: None,
    on_bad: Callable[[str, str], object] = lambda where, reason: None,
) -> None:
    """Have the spans worked on and their parts collected in order.

    state: keeps finished spans and gives back those of an earlier run. on_progress gets the bytes done, part by part;
    on_bad the place of each record that is not what it should be, and the reason.
    """
    done = state.has if state else lambda span: False
    seam = Seam()
    for span, parts in in_order(spans, make, workers, finished=done):
        if done(span):
            parts = state.load(span) if state else parts
        else:
            parts = _standing(seam, span, parts, make)
            parts = state.saving(span, parts) if state and span.kind != "bad" else parts  # it may be read the next time
        began, ended, position = None, None, span.start
        for part in parts:
            for outcome in part.outcomes:
                if outcome.step == READ and outcome.reason in BAD:
                    on_bad(f"{name_of(span.path)}:{outcome.offset}", outcome.reason)
            collector.add(part)
            if collector.full:
                return
            began, ended = part.began, part.ended
            reached = part.outcomes[-1].offset if part.outcomes and span.frames is None else position
            on_progress(max(0, reached - position))
            position = max(position, reached)
        seam.passed(span, began, ended)
        on_progress(max(0, size_of(span) - (position - span.start)))
    collector.finish()


def _standing(seam: Seam, span: Span, parts: Iterator[Part], make: Callable[[], Work]) -> Iterator[Part]:
    """The parts of a span, read again from the right place where it did not begin at the end of the one before."""
    first = next(parts)
    again = seam.check(span, first.began)
    if again is None:
        yield first
        yield from parts
        return
    for _ in parts:
        pass
    yield from make()(again)


def size_of(span: Span) -> int:
    """The bytes of input in a span."""
    if span.files:
        return sum(os.path.getsize(path) for path in span.files if os.path.isfile(path))
    return sum(len(data) for _, data in span.frames) if span.frames is not None else span.stop - span.start


class Names:
    """The ids of documents by number, to name the one that another repeats; on disk where there is a spill folder.

    In memory a WARC-Record-ID takes 57 bytes.
    """

    def __init__(self, spill: Path | None) -> None:
        self._ends = array("Q", [0])
        self._bytes = bytearray()
        self._file = tempfile.TemporaryFile(dir=spill) if spill else None  # noqa: SIM115

    def add(self, line: bytes) -> None:
        """The id of the next document, given its line."""
        name = dump_json(load_json(line)["id"])
        self._ends.append(self._ends[-1] + len(name))
        if self._file:
            self._file.write(name)
        else:
            self._bytes += name

    def __getitem__(self, number: int) -> Any:
        start, end = self._ends[number], self._ends[number + 1]
        if self._file is None:
            return orjson.loads(self._bytes[start:end])
        self._file.flush()
        return orjson.loads(os.pread(self._file.fileno(), end - start, start))

    def close(self) -> None:
        """Give the file back."""
        if self._file:
            self._file.close()
