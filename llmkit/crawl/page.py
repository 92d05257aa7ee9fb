"""The records between the steps of a crawl.

Reading yields a `Page`, or `Skipped` for a record that is no page; a `Span` is the piece of an input that one worker
reads. Filtering turns each record into an `Outcome`, kept or dropped. A `Part` packs the outcomes of a few records,
with the signatures of the kept ones, as bytes: a worker's answer, and a piece of the state on disk (`write_part`,
`read_parts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import orjson

MAX_PAGE_BYTES = 50_000_000


@dataclass(slots=True)
class Outcome:
    """Fate of one record: kept so far when `step` is None, else dropped by that step for that reason."""

    step: str | None
    reason: str | None
    offset: int  # of the record in its input, as in `Page`
    line: bytes = b""  # JSON and a newline: the document, or what --rejects tells of it; empty where nobody asked


@dataclass(slots=True)
class Part:
    """Some outcomes in the order of their records, with the signatures (n, ...) of the n kept ones.

    began and ended are those of the span's reader (`llmkit.crawl.read.inputs.SpanReader`) when the part was made: the
    first part knows where the span's first record stood, the last where the next span's should.
    """

    read: int  # records taken from the input, counted where they are read: the check on nothing being lost
    outcomes: list[Outcome]
    signatures: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of the processor, by step
    began: int | None = None
    ended: int | None = None

    def pack(self) -> bytes:
        """The part as bytes: the size of a JSON header, the header, then its lines and signatures as they are.

        >>> part = Part(2, [Outcome(None, None, 0, b"{}\\n"), Outcome("language", "other", 9)], None, {"read": 0.5})
        >>> Part.unpack(part.pack()) == part
        True
        """
        signatures = None if self.signatures is None else np.ascontiguousarray(self.signatures)
        header: dict[str, Any] = {
            "read": self.read,
            "outcomes": [(o.step, o.reason, o.offset, len(o.line)) for o in self.outcomes],
            "signatures": None if signatures is None else (signatures.dtype.descr, signatures.shape),
            "seconds": self.seconds,
            "bounds": (self.began, self.ended),
        }
        head = orjson.dumps(header)
        body = [outcome.line for outcome in self.outcomes]
        last = b"" if signatures is None else signatures.tobytes()
        return b"".join([len(head).to_bytes(8, "little"), head, *body, last])

    @classmethod
    def unpack(cls, packed: bytes) -> Part:
        """The part that `pack` made."""
        at = 8 + int.from_bytes(packed[:8], "little")
        header = orjson.loads(packed[8:at])
        outcomes = []
        for step, reason, offset, size in header["outcomes"]:
            outcomes.append(Outcome(step, reason, offset, packed[at : at + size]))
            at += size
        signatures = None
        if header["signatures"]:
            names, shape = header["signatures"]
            dtype = np.dtype([tuple(name) for name in names]) if names[0][0] else np.dtype(names[0][1])
            signatures = np.frombuffer(packed, dtype, offset=at).reshape(shape)
        return cls(header["read"], outcomes, signatures, header["seconds"], *header["bounds"])


def write_part(handle: IO[bytes], part: Part) -> None:
    """Append a part to a file."""
    packed = part.pack()
    handle.write(len(packed).to_bytes(8, "little"))
    handle.write(packed)


def read_parts(handle: IO[bytes]) -> Iterator[Part]:
    """The parts of a file, in order."""
    while size := handle.read(8):
        yield Part.unpack(handle.read(int.from_bytes(size, "little")))


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
