"""From what a user names to pages: WARC, ARC, WET, HTML files and folders of them, JSONL, stdin.

    for span in cut_spans(["crawl.warc.gz", "pages/", "-"]):
        reader = read_span(span)
        for record in reader:      # Page | Skipped
            ...
        reader.began, reader.ended

Where spans are cut depends on the input alone. WARC and ARC files that can be sought are cut at byte positions; the
reader of a span looks for the first record there, and `Seam` checks that it is the one that the span before ended at.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from llmkit.crawl.page import MAX_PAGE_BYTES, Page, Skipped, Span
from llmkit.crawl.read.framing import ARC_START, WARC_START, Frame, Frames, GzipStream, Window, beginning, is_one_stream
from llmkit.crawl.read.warc import looks_like_html, page_of
from llmkit.crawl.work_limit import TooMuchWork, work_limit
from llmkit.errors import UserError
from llmkit.io.jsonl import BYTE_ORDER_MARK, GZIP_MAGIC, is_zstd, json_row, name_of, open_packed, zstd_frames
from llmkit.io.tables import Lines

SPAN_BYTES = 4 << 20
SPAN_FILES = 256
FIRST_BYTES = 1 << 16  # in the first span of a pipe, then twice as many in each: its first records go on at once
BAD_FILE = ((0, "bad_file"),)  # the frames of a file that gives nothing
HTML_NAMES = (".html", ".htm", ".xhtml")
_JSONL_NAME = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$")
_ARCHIVE_NAME = re.compile(r"\.w?arc(\.w[ea]t)?(\.gz|\.zst)?$")


# ---- cutting


def cut_spans(
    paths: Sequence[str],
    limit: int | None = None,
    *,
    max_page_bytes: int = MAX_PAGE_BYTES,
    span_bytes: int = SPAN_BYTES,
    on_bad: Callable[[UserError], object] | None = None,
) -> Iterator[Span]:
    """Yield the spans of files, folders (walked in sorted order) and stdin (`-`), in the order of `paths`.

    limit: no span gives more pages than that; the caller stops when so many were taken in all.
    max_page_bytes: larger records are passed over as `too_large`.
    span_bytes: of the file as it lies, where it can be sought; of unpacked records otherwise.
    on_bad: is told of a missing file, a folder without files, a file of a kind that is not read, and one that holds
    no records; each gives one record, skipped as `bad_file`. Raises the first such UserError where there is no
    `on_bad`, and when no input was any better.
    """
    cutter = _Cutter(span_bytes, max_page_bytes, on_bad)
    good = False
    for index, span in enumerate(chain.from_iterable(map(cutter.spans, paths))):
        good = good or span.frames != BAD_FILE
        yield replace(span, index=index, limit=limit, max_page_bytes=max_page_bytes)
    if cutter.first_bad and not good:
        raise cutter.first_bad


class _Cutter:
    def __init__(self, span_bytes: int, max_bytes: int, on_bad: Callable[[UserError], object] | None) -> None:
        self.span_bytes, self.max_bytes, self.on_bad = span_bytes, max_bytes, on_bad
        self.first_bad: UserError | None = None

    def spans(self, path: str) -> Iterator[Span]:
        return self._unless_bad(path, self._any(path))

    def _unless_bad(self, path: str, spans: Iterator[Span]) -> Iterator[Span]:
        try:
            yield from spans
        except UserError as error:
            if self.on_bad is None:
                raise
            self.first_bad = self.first_bad or error
            self.on_bad(error)
            yield Span(path, 0, "bad", frames=BAD_FILE)

    def _any(self, path: str) -> Iterator[Span]:
        if path != "-" and os.path.isdir(path):
            return self._folder(path)
        if path.lower().endswith(HTML_NAMES) and os.path.isfile(path):
            return self._pages(path, [path])
        return self._file(path)

    def _folder(self, path: str) -> Iterator[Span]:
        """Archives and JSONL in a folder are known by their names; what else lies there is a page or passed over."""
        walk = os.walk(path, onerror=_refused)
        names = sorted(os.path.join(folder, name) for folder, _, names in walk for name in names)
        if not names:
            raise UserError(f"{path}: expected files in this folder, found none")
        pages: list[str] = []
        for name in names:
            if _JSONL_NAME.search(name.lower()) or _ARCHIVE_NAME.search(name.lower()):
                yield from self._pages(path, pages)
                pages = []
                yield from self._unless_bad(name, self._file(name))
            else:
                pages.append(name)
        yield from self._pages(path, pages)

    def _pages(self, path: str, names: Iterable[str]) -> Iterator[Span]:
        """Spans of files that are one page each."""
        batch: list[str] = []
        size = 0
        for name in names:
            batch.append(name)
            size += os.path.getsize(name) if os.path.isfile(name) else 0
            if size >= self.span_bytes or len(batch) == SPAN_FILES:
                yield Span(path, 0, "html", files=tuple(batch))
                batch, size = [], 0
        if batch:
            yield Span(path, 0, "html", files=tuple(batch))

    def _file(self, path: str) -> Iterator[Span]:
        """The spans of one file, or of stdin."""
        name = name_of(path)
        with open_packed(path) as handle:
            window = Window(handle)
            if zstd := is_zstd(window.look(4)[:4]):
                window = Window(Lines(zstd_frames(_buffered(window), name)))
            head, packed = beginning(window), window.look(2).startswith(GZIP_MAGIC)
            kind = _kind_of(name, head)
            if packed and kind in ("warc", "arc") and not is_one_stream(window, kind == "arc", self.max_bytes):
                kind += ".gz"
            frames = self._frames(window, kind, packed)
            first = _first_record(frames, name, kind, head)
            can_seek = path != "-" and stat.S_ISREG(os.stat(path).st_mode)
            if can_seek and (kind.endswith(".gz") or (kind == "warc" and not packed and not zstd)):
                yield from self._by_offset(path, kind)
            else:
                yield from self._batches(path, kind, chain(first, frames))

    def _frames(self, window: Window, kind: str, packed: bool) -> Iterator[Frame]:
        """The records of an open file; where `kind` ends in .gz, of one gzip member each."""
        if packed and not kind.endswith(".gz"):
            window = Window(GzipStream(window))
        if kind == "jsonl":
            return _lines(window, self.max_bytes)
        if kind == "html":
            return _single_page(window, self.max_bytes)
        return iter(Frames(window, kind, max_bytes=self.max_bytes))

    def _by_offset(self, path: str, kind: str) -> Iterator[Span]:
        size = os.path.getsize(path)
        for start in range(0, size, self.span_bytes):
            yield Span(path, 0, kind, start, min(start + self.span_bytes, size), exact=start == 0)

    def _batches(self, path: str, kind: str, frames: Iterable[Frame]) -> Iterator[Span]:
        batch: list[Frame] = []
        size, most = 0, min(FIRST_BYTES, self.span_bytes)
        for frame in frames:
            batch.append(frame)
            size += len(frame[1])
            if size >= most:
                yield Span(path, 0, kind, start=batch[0][0], frames=tuple(batch))
                batch, size, most = [], 0, min(2 * most, self.span_bytes)
        if batch:
            yield Span(path, 0, kind, start=batch[0][0], frames=tuple(batch))


def _buffered(window: Window) -> io.BufferedReader:
    return io.BufferedReader(window, 1 << 18)


def _refused(error: OSError) -> None:
    raise UserError(f"{error.filename}: expected a folder that can be read: {str(error.strerror).lower()}")


def _kind_of(name: str, head: bytes) -> str:
    """The kind of a file by its name or, where that says nothing, by its first bytes (unpacked)."""
    archive = _ARCHIVE_NAME.search(name.lower())
    if WARC_START.match(head) or ARC_START.match(head) or archive:
        arc = ARC_START.match(head) or (archive and archive[0].startswith(".arc") and not WARC_START.match(head))
        return "arc" if arc else "warc"
    begins = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if _JSONL_NAME.search(name.lower()) or begins.startswith(b"{"):
        return "jsonl"
    if begins.startswith(b"<") or looks_like_html(head):
        return "html"
    content = f"one that begins with {bytes(head[:16])!r}" if head else "nothing in it"
    raise UserError(f"{name}: expected WARC, ARC, WET, HTML or JSONL, found {content}; convert or leave out the file")


def _first_record(frames: Iterator[Frame], name: str, kind: str, head: bytes) -> list[Frame]:
    """The frames up to the first record. Raises UserError where there is no record at all."""
    first: list[Frame] = []
    for frame in frames:
        first.append(frame)
        if isinstance(frame[1], bytes) or frame[1] == "too_large":
            return first
    what = {"jsonl": "JSON lines", "html": "page"}.get(kind, kind.split(".")[0].upper() + " records")
    if not head:
        reason = "the file is empty"
    elif first and first[0][1] == "truncated":
        reason = "it is cut off inside the first"
    else:
        reason = f"it begins with {bytes(head[:16])!r}"
    raise UserError(f"{name}: no {what}: {reason}; mend or leave out the file")


def _lines(window: Window, max_bytes: int) -> Iterator[Frame]:
    """The lines of a file that are not blank, by number; the last of a cut file is `truncated`."""
    source, number = _buffered(window), 0
    while line := source.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            while line and not line.endswith(b"\n"):
                line = source.readline(max_bytes)
            yield number, "too_large"
        elif window.cut and not line.endswith(b"\n"):
            number -= 1
        elif not line.isspace():
            yield number, line
    if window.cut:
        yield number + 1, "truncated"


def _single_page(window: Window, max_bytes: int) -> Iterator[Frame]:
    """The whole file as one page."""
    page = bytes(window.look(max_bytes + 1))
    if page.strip() or window.cut:
        yield 0, "truncated" if window.cut else page if len(page) <= max_bytes else "too_large"


# ---- reading


def read_span(span: Span) -> SpanReader:
    """The pages and the skipped records of a span, in order: an iterator, of which `began` and `ended` can be asked.

    A line of JSONL that is no JSON object in UTF-8 is skipped as `bad_json`, one without a string under `html` or
    `text` as `no_text`.
    """
    return SpanReader(span)


class SpanReader:
    """Reads a span once.

    began: the offset of the span's first record, known when that was read; None where none begins in the span.
    ended: the offset of the first record after it, known when all was read; None where bytes that are no record
    lie across the end of the span. Both are None for spans that are not cut by byte positions.
    """

    def __init__(self, span: Span) -> None:
        self.span, self._pages, self._frames = span, 0, None
        self._records = self._read()

    @property
    def began(self) -> int | None:
        return self._frames.began if self._frames else None

    @property
    def ended(self) -> int | None:
        return self._frames.ended if self._frames else None

    def __iter__(self) -> SpanReader:
        return self

    def __next__(self) -> Page | Skipped:
        if self.span.limit is not None and self._pages >= self.span.limit:
            raise StopIteration
        record = next(self._records)
        self._pages += isinstance(record, Page)
        return record

    def _read(self) -> Iterator[Page | Skipped]:
        span = self.span
        if span.files:
            yield from (_page_in(file, span.max_page_bytes) for file in span.files)
        elif span.frames is not None:
            yield from self._parsed(span.frames)
        else:
            with open_packed(span.path) as handle:
                handle.seek(span.start)
                window = Window(handle, span.start)
                self._frames = Frames(window, span.kind, span.exact, span.stop, span.max_page_bytes)
                yield from self._parsed(self._frames)

    def _parsed(self, frames: Iterable[Frame]) -> Iterator[Page | Skipped]:
        kind, name, most = self.span.kind, name_of(self.span.path), self.span.max_page_bytes
        for offset, data in frames:
            if isinstance(data, str):
                yield Skipped(name, offset, data)
            elif kind == "jsonl":
                yield _page_of_line(data, name, offset)
            elif kind == "html":
                yield Page(name, offset, None, data, None, None, {})
            else:
                yield _page_in_time(name, offset, data, most)


def _page_in_time(name: str, offset: int, data: bytes, max_bytes: int) -> Page | Skipped:
    try:
        with work_limit(len(data)):
            return page_of(name, offset, data, max_bytes)
    except TooMuchWork:
        return Skipped(name, offset, "too_slow")


def _page_in(path: str, max_bytes: int) -> Page | Skipped:
    """A file as a page."""
    try:
        if not os.path.isfile(path):
            return Skipped(path, 0, "unreadable")  # a pipe would be waited for
        with open(path, "rb") as handle:
            head = handle.read(4096)
            if not path.lower().endswith(HTML_NAMES) and not looks_like_html(head):
                return Skipped(path, 0, "not_html")
            html = head + handle.read(max(0, max_bytes + 1 - len(head)))
    except OSError:
        return Skipped(path, 0, "unreadable")
    if len(html) > max_bytes:
        return Skipped(path, 0, "too_large")
    return Page(path, 0, None, html, None, None, {}) if html.strip() else Skipped(path, 0, "empty")


def _page_of_line(line: bytes, name: str, number: int) -> Page | Skipped:
    try:
        row = json_row(line, name, number)
    except UserError:
        return Skipped(name, number, "bad_json")
    assert row is not None, "blank lines are no frames"
    values = dict(row.value)
    html, text = values.pop("html", None), values.pop("text", None)
    if not isinstance(text if html is None else html, str):
        return Skipped(name, number, "no_text")
    url = values.pop("url") if isinstance(values.get("url"), str) else None
    return Page(name, number, url, html, None, None if html is not None else text, values)


class Seam:
    """Checks, in the order of the input, that each span begins at the record at which the one before it ended.

    A record may hold what looks like the start of another, such as an archive within an archive, and the reader of
    a span that is cut there begins too early. Then the span is read again, from the right place:

        seam = Seam()
        for span, reader in ...:
            if again := seam.check(span, reader.began):  # when its first record was read, or there was none
                span, reader = again, read_span(again)
            ...
            seam.passed(span, reader.began, reader.ended)
    """

    def __init__(self) -> None:
        self._expected: int | None = None

    def check(self, span: Span, began: int | None) -> Span | None:
        """The span to read in place of this one; None when this one stands."""
        expected = self._expected
        if span.exact or span.files or span.frames is not None or expected is None or began == expected:
            return None
        if began is None and expected >= span.stop:
            return None
        return replace(span, start=expected, exact=True)

    def passed(self, span: Span, began: int | None, ended: int | None) -> None:
        """Take note of where a span that stands has ended."""
        if span.exact or began is not None:
            self._expected = ended
