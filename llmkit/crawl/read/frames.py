"""Read the records of WARC, ARC, WET, HTML and JSONL files, of folders, and of stdin as bytes.

    for batch in batches(Reader(["crawl.warc.gz", "pages/", "-"])):
        for path, kind, offset, data in batch.frames:    # data: the bytes of one record, or the reason they are missing
            ...

Unreadable bytes become one frame with a reason: `truncated` (the file ends inside a record), `damaged`, `too_large`,
`garbage` (not a record) or `unsearched` (searching them for records would take minutes). Reading continues at the next
record. WARC libraries do not do this: FastWARC 2.0 accepts a record truncated at the end of the file as complete, and
stops at garbage.

A single process reads: 1,360 pages of 118 kB take 0.4 s of CPU time to read and 16 s to filter, so one reader can feed
35 workers.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from time import thread_time
from typing import Any, NamedTuple

from llmkit.crawl.page import MAX_PAGE_BYTES, Batch, Frame
from llmkit.crawl.read.pages import (
    ARC_START,
    BLANK_LINE,
    GZIP_ERRORS,
    MAX_HEADER,
    OVERLAP,
    STEP,
    WARC_START,
    header_of,
    inflated,
    inflating,
    looks_like_html,
)
from llmkit.errors import UserError
from llmkit.io.files import file_path
from llmkit.io.jsonl import (
    BYTE_ORDER_MARK,
    GZIP_MAGIC,
    DamagedData,
    expanded,
    is_zstd,
    name_of,
    open_packed,
    zstd_frames,
)
from llmkit.io.tables import Lines, table_lines

PACKING_ERRORS = (*GZIP_ERRORS, DamagedData)
Record = tuple[int, bytes | str]  # offset, and the bytes or the reason why they could not be read

BLOCK = 1 << 18
FIRST_STEP = 1 << 12  # first bytes of a member to inflate; doubles, so that steps do not run far past its end
FOREVER = 1 << 62
BATCH_FRAMES, BATCH_BYTES = 64, 4 << 20  # per batch; bytes after decompression
HTML_NAMES = (".html", ".htm", ".xhtml")
_JSONL_NAME = re.compile(r"\.(jsonl|ndjson|parquet|csv|tsv)(\.gz|\.zst)?$")
_ARCHIVE_NAME = re.compile(r"\.w?arc(\.w[ea]t)?(\.gz|\.zst)?$")
# Budget for inflating bytes that turn out not to be a gzip member: WASTE bytes per byte skipped, beyond the first
# 64 MB; each attempt counts as at least 16 kB. Otherwise input that looks like a member every ten bytes, or members
# damaged near their end, would take minutes. In noise, one position in 2^29 looks like a member.
WASTE, LEAST_WASTE, FIRST_WASTE = 16, 1 << 14, 1 << 26

GZIP_START = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")
_WARC_TYPE = re.compile(rb"(?im)^warc-type:")
_ARC_LINE = re.compile(rb"(?<=\n)" + ARC_START.pattern, re.MULTILINE)  # only at the start of a line


class Window:
    """A look-ahead buffer over a stream that cannot seek. `position` counts the bytes skipped."""

    def __init__(self, handle: Any) -> None:
        self.position, self.cut = 0, False  # cut: the compressed stream ended early or is damaged
        self._ahead, self._ended = bytearray(), False
        self._read = handle.read1 if hasattr(handle, "read1") else handle.read

    def look(self, size: int) -> bytearray:
        """Return the bytes ahead, at least `size` unless the stream ends first. Valid until the next call."""
        while len(self._ahead) < size and not self._ended:
            try:
                block = self._read(BLOCK)
            except PACKING_ERRORS:
                block, self.cut = b"", True
            self._ahead += block
            self._ended = not block
        return self._ahead

    def skip(self, size: int) -> None:
        """Skip `size` bytes, or as many as there are."""
        while size and self.look(1):
            count = min(size, len(self._ahead))
            del self._ahead[:count]
            self.position += count
            size -= count

    def skip_over(self, what: bytes) -> None:
        """Skip all leading bytes that are in `what`."""
        while head := self.look(1)[:4096]:
            count = len(head) - len(head.lstrip(what))
            self.skip(count)
            if count < len(head):
                return

    def as_file(self) -> io.BufferedReader:
        """Return the remaining bytes as a file object."""

        def blocks() -> Iterator[bytes]:
            while block := bytes(self.look(1)):
                self.skip(len(block))
                yield block

        return io.BufferedReader(Lines(blocks()), BLOCK)


def gzip_blocks(window: Window) -> Iterator[bytes]:
    """Yield the contents of consecutive gzip members. A truncated stream raises EOFError after its last good byte.

    Python's GzipFile loses the last 256 KB then.
    """
    inflater: Any = None
    while True:
        if inflater is None:
            window.skip_over(b"\0")
            inflater = inflating.decompressobj(31)
            if not window.look(1):
                return
        step = bytes(window.look(1)[:4096])  # small: a step with an error in it is lost completely
        if not step:
            raise EOFError
        data = inflater.decompress(step)
        window.skip(len(step) - len(inflater.unused_data))
        inflater = None if inflater.eof else inflater
        if data:
            yield data


def find(window: Window, stop: int, start: re.Pattern[bytes], bytes_without: Callable[[], int]) -> bool:
    """Move the window to the next record before `stop`, or else to `stop` or the end. Return True if there is one.

    bytes_without: counts the bytes ahead in which no record begins, 0 if one begins here.
    """
    while window.position < stop and window.look(1):
        ahead = window.look(BLOCK)
        match = start.search(ahead)
        count = len(ahead) - (OVERLAP if len(ahead) >= BLOCK else 0)
        if match is not None and match.start() <= count:
            count = match.start()
            if window.position + count < stop:
                window.skip(count)
                count = bytes_without()
                if not count:
                    return True
        window.skip(min(count, stop - window.position))
    return False


def beginning(window: Window) -> bytes:
    """Return the first bytes ahead, at least a kilobyte if there is as much, decompressed if they are gzip."""
    ahead = bytes(window.look(OVERLAP)[:STEP])
    return inflated(ahead[:OVERLAP], 31, OVERLAP, 512) if ahead.startswith(GZIP_MAGIC) else ahead


class Records:
    """The records of a file, in order, each with its offset.

    kind: "warc" or "arc", with ".gz" if each record is a separate gzip member.
    """

    def __init__(self, window: Window, kind: str, max_bytes: int = MAX_PAGE_BYTES) -> None:
        self.window, self.max_bytes = window, max_bytes
        self.arc, self.packed = kind.startswith("arc"), kind.endswith(".gz")
        self._start = _ARC_LINE if self.arc else WARC_START
        self._wasted, self._wasted_until = 0, window.position  # bytes inflated in vain, and the position of that count
        self._unpacked_to = window.position  # end of the bytes inflated in vain; attempts after it share none of them
        self._unsearched = False

    def __iter__(self) -> Iterator[Record]:
        window, data = self.window, None
        window.skip_over(b"\0" if self.packed else b"\r\n")
        while window.look(1):
            offset = window.position
            for data in self._member() if self.packed else self._record():
                yield offset, data
            window.skip_over(b"\0" if self.packed else b"\r\n")
        if window.cut and data != "truncated":
            yield window.position, "truncated"

    def _record(self) -> Iterator[bytes | str]:
        """Yield the record that starts here."""
        window = self.window
        head = window.look(MAX_HEADER)
        header = header_of(head, self.arc)
        if header is None:
            begun = b"\n" not in head if self.arc else head[:5] == b"WARC/"[: len(head)] and not BLANK_LINE.search(head)
            yield "truncated" if begun and len(head) < MAX_HEADER else "garbage"
            yield from self._resume()
            return
        size = sum(header)
        if header[1] > self.max_bytes:  # skip it; if the length is wrong, only up to the next record
            stop = window.position + size
            window.skip(header[0])
            if find(window, stop, self._start, lambda: self._bytes_without_record() or int(not self._is_record(0))):
                yield "damaged"
                return
            window.skip(stop - window.position)
            yield "too_large" if window.position == stop else "truncated"
            return
        ahead = window.look(size + 1)
        if len(ahead) < size:
            yield "truncated"
            yield from self._resume()
            return
        if not self._is_followed(0, *header):
            ahead = window.look(size + OVERLAP)
            # every WARC block ends in a newline: without one the length is wrong; with one it may be there by chance
            chance = self.arc or not ahead[size : size + 1].strip(b"\r\n")
            swallowed = self._start.search(ahead, header[0], size + OVERLAP)
            at = swallowed.start() if swallowed else size
            if at < size and (not chance or self._is_record(at)):
                yield "damaged"
                window.skip(at)
                return
        data = bytes(memoryview(window.look(size))[:size])
        window.skip(size)
        yield data

    def _bytes_without_record(self) -> int:
        """Count the bytes ahead in which no record begins; 0 if one begins here.

        Checks the complete header, because pages quote the first line of records. If a field is missing, everything up
        to the blank line is skipped: text with ten thousand such first lines is not searched again for each.
        """
        header = header_of(self.window.look(MAX_HEADER), self.arc)
        if self.arc:
            return 0 if header else 1
        ahead = self.window.look(BLOCK)
        if header and _WARC_TYPE.search(ahead, 0, header[0]):
            return 0
        end = BLANK_LINE.search(ahead)
        behind = end.end() if end else len(ahead)
        return max(1, behind if behind <= MAX_HEADER else behind - MAX_HEADER)

    def _is_record(self, at: int) -> bool:
        """Return True if a record begins `at` bytes ahead and another follows it."""
        header = header_of(self.window.look(at + MAX_HEADER)[at : at + MAX_HEADER], self.arc)
        return header is not None and header[1] <= self.max_bytes and self._is_followed(at, *header)

    def _is_followed(self, at: int, header: int, block: int) -> bool:
        """Return True if a record of these sizes, `at` bytes ahead, is followed by another one or by the end."""
        end = at + header + block
        ahead = self.window.look(end + OVERLAP)
        behind = ahead[end : end + OVERLAP].lstrip(b"\r\n")
        start = ARC_START if self.arc else WARC_START
        return len(ahead) >= end and (not behind or bool(start.match(behind)))

    def _member(self) -> Iterator[bytes | str]:
        """Yield the records of the gzip member that starts here, usually one."""
        window = self.window
        magic = bytes(window.look(4)[:4])
        if not GZIP_START.match(magic):
            yield "truncated" if GZIP_MAGIC.startswith(magic[:2]) and len(magic) < 4 else "garbage"
            yield from self._resume()
            return
        data = self._unpack()
        if isinstance(data, str):
            yield data
            if data != "too_large":
                yield from self._resume()
            return
        header = header_of(data, self.arc)
        size = sum(header) if header else 0
        if header and header[1] <= self.max_bytes and size <= len(data) and not data[size:].strip(b"\r\n"):
            yield data  # shortcut for the usual case, saves three copies
            return
        for _, record in Records(Window(io.BytesIO(data)), "arc" if self.arc else "warc", self.max_bytes):
            yield record

    def _unpack(self) -> bytes | str:
        """Inflate the gzip member that starts here and move the window past it; or return why that failed."""
        window, inflater = self.window, inflating.decompressobj(31)
        chunks, size, at, start = [], 0, 0, window.position
        most, count = self.max_bytes + 2 * MAX_HEADER, FIRST_STEP
        while not inflater.eof:
            step = window.look(at + count)[at : at + count]
            count = min(2 * count, STEP)
            if not step:
                self._note_vain(start, at, min(size, most))
                return "truncated"
            try:
                part = inflater.decompress(step)
            except GZIP_ERRORS:
                self._note_vain(start, at + len(step), min(size, most))
                return "damaged"
            at += len(step) - len(inflater.unused_data)
            size += len(part)
            chunks.append(part)
            if size > most:  # read to its end, but keep nothing
                chunks.clear()
                window.skip(at)
                at = 0
        window.skip(at)
        return b"".join(chunks) if size <= most else "too_large"

    def _note_vain(self, start: int, ahead: int, unpacked: int) -> None:
        """Add a failed attempt to the budget, if it overlaps an earlier one; the others cost linear time only."""
        if start < self._unpacked_to:
            self._wasted += max(ahead, unpacked)
        self._unpacked_to = max(self._unpacked_to, self.window.position + ahead)

    def _bytes_without_member(self) -> int:
        """Return 0 if a gzip member that begins with a record starts here, else the number of bytes to skip."""
        position = self.window.position
        self._wasted = max(0, self._wasted - WASTE * (position - self._wasted_until))
        self._wasted_until = position
        if self._wasted > FIRST_WASTE:
            self._unsearched = True
            return 1 + (self._wasted - FIRST_WASTE) // WASTE
        if (ARC_START if self.arc else WARC_START).match(beginning(self.window)):
            return 0
        self._wasted += LEAST_WASTE
        return 1

    def _resume(self) -> Iterator[str]:
        """Skip a byte and move to the next record; yield "unsearched" if bytes were skipped without a search."""
        self.window.skip(1)
        if self.packed:
            find(self.window, FOREVER, GZIP_START, self._bytes_without_member)
        else:
            find(self.window, FOREVER, self._start, self._bytes_without_record)
        if self._unsearched:
            self._unsearched = False
            yield "unsearched"


def is_one_stream(window: Window, arc: bool, max_bytes: int = MAX_PAGE_BYTES) -> bool:
    """Return True if the gzip member ahead contains more than one record."""
    inflater, unpacked, at = inflating.decompressobj(31), bytearray(), 0
    while not inflater.eof and len(unpacked) <= max_bytes:
        step = window.look(at + STEP)[at : at + STEP]
        try:
            unpacked += inflater.decompress(step)
        except GZIP_ERRORS:
            return False
        at += len(step)
        header = header_of(unpacked, arc)
        if header and unpacked[sum(header) :].strip(b"\r\n"):
            return True
        if not step or (header is None and len(unpacked) >= MAX_HEADER):
            return False
    return False


# ---- files, folders and pipes


class Source(NamedTuple):
    """A file, or `-` for stdin. `page`: the file is a single page, by its name or because it is in a folder."""

    path: str
    page: bool = False


def sources(paths: Iterable[str]) -> Iterator[Source]:
    """Expand paths, folders and glob patterns to files, those of a folder or pattern in sorted order.

    In a folder, archives and JSONL are recognized by name; every other file is a page, or skipped if it is not HTML.
    """
    for path in paths:
        if path == "-" or not os.path.isdir(path):
            for name in expanded(path):
                yield Source(name, name.lower().endswith(HTML_NAMES) and os.path.isfile(name))
            continue
        closed: list[str] = []
        walk = os.walk(path, onerror=lambda error, closed=closed: closed.append(error.filename))
        names = sorted([os.path.join(folder, name) for folder, _, names in walk for name in names])
        for name in sorted([*names, *closed]) or [path]:
            lowered = name.lower()
            known = _JSONL_NAME.search(lowered) or _ARCHIVE_NAME.search(lowered) or os.path.isdir(name)
            yield Source(name, page=not known)


class Reader:
    """Iterate once over the frames of files, folders and stdin, in the given order.

    max_page_bytes: larger records are skipped as `too_large`.
    on_bad: called with the UserError of a missing file, an empty folder, a file of an unknown kind or one without
    records; each gives one frame `bad_file`. Without on_bad the UserError is raised.
    columns: from `--columns`; a table without one of them is a bad file. `page_of` renames the fields.
    """

    def __init__(
        self,
        paths: Iterable[str | Source],
        max_page_bytes: int = MAX_PAGE_BYTES,
        on_bad: Callable[[UserError], object] | None = None,
        columns: Mapping[str, str] = {},
    ) -> None:
        self.paths, self.max_bytes, self.on_bad, self._columns = paths, max_page_bytes, on_bad, columns
        self._read, self._window = 0, None
        self.version: tuple[int | None, str] = None, ""  # size and ETag of the last remote file read

    @property
    def position(self) -> int:
        """Bytes read so far, before decompression."""
        return self._read + (self._window.position if self._window else 0)

    def __iter__(self) -> Iterator[Frame]:
        for path in self.paths:
            for source in [path] if isinstance(path, Source) else sources([path]):
                try:
                    yield from self._page(source.path) if source.page else self._file(source.path)
                except UserError as error:
                    if self.on_bad is None:
                        raise
                    self.on_bad(error)
                    self.version = None, ""
                    yield Frame(name_of(source.path), "bad", 0, "bad_file")
                self._read, self._window = self.position, None

    def _page(self, path: str) -> Iterator[Frame]:
        """Yield the frame of a file that is one page."""
        html: bytes | str = "unreadable"
        with suppress(OSError):
            if os.path.isfile(path):  # opening a named pipe would block
                with open(path, "rb") as handle:
                    html = handle.read(self.max_bytes + 1)
        if isinstance(html, bytes):
            self._read += len(html)
            if not path.lower().endswith(HTML_NAMES) and not looks_like_html(html):
                html = "not_html"
            elif len(html) > self.max_bytes:
                html = "too_large"
            elif not html.strip():
                html = "empty"
        yield Frame(path, "html", 0, html)

    def _file(self, path: str) -> Iterator[Frame]:
        """Yield the frames of one file, or of stdin."""
        name = name_of(path)
        if path != "-" and os.path.isdir(path):
            raise UserError(f"{path}: expected files in this folder, found none that can be read")
        with open_packed(path) as handle:
            self.version = getattr(handle.raw, "size", None), getattr(handle.raw, "version", "")
            rows = table_lines(handle, name, self._columns)
            window = self._window = Window(handle if rows is None else Lines(rows))
            if is_zstd(window.look(4)[:4]):
                window = Window(Lines(zstd_frames(window.as_file(), name)))
            head, packed = beginning(window), window.look(2).startswith(GZIP_MAGIC)
            kind = _kind_of(name, head)
            if packed and kind in ("warc", "arc") and not is_one_stream(window, kind == "arc", self.max_bytes):
                kind += ".gz"
            elif packed:
                window = Window(Lines(gzip_blocks(window)))
            if kind == "jsonl":
                records = _lines(window, self.max_bytes)
            elif kind == "html":
                page = bytes(window.look(self.max_bytes + 1))
                content = "truncated" if window.cut else page if len(page) <= self.max_bytes else "too_large"
                records = iter([(0, content)] if page.strip() or window.cut else [])
            else:
                records = iter(Records(window, kind, self.max_bytes))
            kind = kind.removesuffix(".gz")
            for offset, data in chain(_first_record(records, name, kind, head), records):
                yield Frame(name, kind, offset, data)


def _kind_of(name: str, head: bytes) -> str:
    """Return the kind of a file, by its name or its first (decompressed) bytes."""
    path = file_path(name).lower()
    archive = _ARCHIVE_NAME.search(path)
    if WARC_START.match(head) or ARC_START.match(head) or archive:
        arc = ARC_START.match(head) or (archive and archive[0].startswith(".arc") and not WARC_START.match(head))
        return "arc" if arc else "warc"
    begins = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if _JSONL_NAME.search(path) or begins.startswith(b"{"):
        return "jsonl"
    if begins.startswith(b"<") or looks_like_html(head):
        return "html"
    found = f"a file that begins with {bytes(head[:16])!r}" if head else "an empty file"
    raise UserError(f"{name}: expected WARC, ARC, WET, HTML, JSONL, Parquet or CSV, found {found}; convert or omit it")


def _first_record(records: Iterator[Record], name: str, kind: str, head: bytes) -> list[Record]:
    """Return the records up to the first complete one. Raises UserError if there is none."""
    first: list[Record] = []
    for record in records:
        first.append(record)
        if isinstance(record[1], bytes) or record[1] == "too_large":
            return first
    what = {"jsonl": "JSON lines", "html": "page"}.get(kind, kind.upper() + " records")
    if not head:
        reason = "the file is empty or a table without rows"
    elif first and first[0][1] == "truncated":
        reason = "it ends inside the first one"
    else:
        reason = f"it begins with {bytes(head[:16])!r}"
    raise UserError(f"{name}: no {what}: {reason}; repair or omit the file")


def _lines(window: Window, max_bytes: int) -> Iterator[Record]:
    """Yield the non-blank lines of a file with their numbers; the last line of a truncated file is `truncated`."""
    source, number = window.as_file(), 0
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


# ---- batches for worker processes


def batches(reader: Reader) -> Iterator[Batch]:
    """Yield frames in batches of 1, 2, 4, ... 64 frames, or of 4 MB if that is less.

    Frames read before an error are yielded before it is raised.
    """
    frames: list[Frame] = []
    most, size, position, started = 1, 0, 0, thread_time()
    source, error = iter(reader), None
    while True:
        try:
            frame = next(source, None)
        except UserError as raised:
            frame, error = None, raised
        if frame is not None:
            frames.append(frame)
            size += len(frame.data)
        if frames and (frame is None or len(frames) == most or size >= BATCH_BYTES):
            yield Batch(frames, reader.position - position, thread_time() - started)
            frames, most, size = [], min(2 * most, BATCH_FRAMES), 0
            position, started = reader.position, thread_time()
        if error:
            raise error
        if frame is None:
            return
