"""What reading hands on: pages, records that are no pages, and the spans in which an input is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_PAGE_BYTES = 50_000_000


@dataclass(slots=True)
class Page:
    """One record that may become a document.

    `offset` is the byte at which the record starts in its file: for `.gz`, of its gzip member in the
    compressed file, or in the unpacked bytes where the whole file is one compressed stream. It is the line
    number for JSONL, and 0 for an HTML file. Exactly one of `html` and `text` is not None.
    """

    path: str
    offset: int
    url: str | None
    html: bytes | str | None  # bytes: the character set is not yet decided
    content_type: str | None  # the HTTP header, with the charset if it names one
    text: str | None  # ready text: WET, JSONL `text`
    record: dict[str, Any]  # what passes through: JSONL keys but `html` and `text`; "id" and "date" of a WARC record


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is no page, or bytes that are no record: counted by reason."""

    path: str
    offset: int
    reason: str
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of one input, of a size that never depends on the number of workers; cheap to pickle.

    A span of a file that can be sought owns the records that start at byte `start` or after and before `stop`.
    What cannot be sought travels along in `frames`: (offset, the bytes of a record), or (offset, reason) where
    the bytes were passed over. A span of HTML files names them in `files`.
    """

    path: str
    index: int  # over all inputs, from 0
    kind: str  # warc, warc.gz, arc, arc.gz, jsonl, html
    start: int = 0
    stop: int = 0
    exact: bool = False  # a record is known to start at `start`; otherwise the first one after it is looked for
    frames: tuple[tuple[int, bytes | str], ...] | None = None
    files: tuple[str, ...] = ()
    limit: int | None = None  # at most so many pages are wanted of it
    max_page_bytes: int = MAX_PAGE_BYTES

    @property
    def payload(self) -> bytes:
        """What travels along, as bytes: it tells the span of a pipe from another."""
        return b"".join(data if isinstance(data, bytes) else data.encode() for _, data in self.frames or ())

    def __str__(self) -> str:
        """The span as errors name it."""
        name = "stdin" if self.path == "-" else self.path
        if self.files:
            return f"{self.files[0]} to {self.files[-1]}"
        return f"{name}: from {self.start} on" if self.stop <= self.start else f"{name}: {self.start} to {self.stop}"
