"""The records that pass between the steps of a crawl, and the CPU limit for one page.

    read      Frame -> Page | Skipped           parses the bytes of a record
    judge     Page -> Document | Dropped        extracts the text, and keeps or drops it
    seen      Document -> Repeat | None         (llmkit.crawl.dedup.duplicates)

A worker process turns a `Batch` of frames into a `Part`. The resume state on disk consists of parts.
"""

from __future__ import annotations

import io
import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from llmkit.text.words import Split

MAX_PAGE_BYTES = 50_000_000
READ = "read"  # the first step; records that are not pages end here
SECONDS, BYTES_PER_SECOND = 30.0, 30_000  # CPU limit of a page: 30 s plus 1 s per 30 kB


class Frame(NamedTuple):
    """The bytes of one record, or the reason why they could not be read."""

    path: str
    kind: str  # warc (and arc), jsonl, html
    offset: int  # as in `Page`
    data: bytes | str


@dataclass(slots=True)
class Page:
    """One record that may become a document.

    `offset` is the byte offset of the record in its file; for `.gz`, the offset of its gzip member in the
    compressed file, or the offset in the unpacked bytes if the whole file is one compressed stream. For JSONL
    it is the line number, for an HTML file 0. Exactly one of `html` and `text` is not None.
    """

    path: str
    offset: int
    url: str | None
    html: bytes | str | None  # bytes if the character set is not decided yet
    content_type: str | None  # the HTTP header, with the charset if it names one
    text: str | None  # plain text: WET, or JSONL `text`
    record: dict[str, Any]  # passed through: JSONL keys except `html` and `text`; "id" and "date" of WARC


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is not a page, or bytes that are not a record; counted by reason."""

    path: str
    offset: int
    reason: str
    url: str | None = None
    id: Any = None

    def reject(self) -> dict[str, Any]:
        """Return the --rejects entry."""
        where = f"{self.path}:{self.offset}" if self.offset else self.path  # as in Document.identity
        entry = {"id": where if self.id is None else self.id}
        entry |= {"url": self.url} if self.url is not None else {}
        return entry | {"source": Path(self.path).name, "offset": self.offset, "step": READ, "reason": self.reason}


@dataclass(slots=True)
class Document:
    """A page and the results of the steps so far; after the last step, a document."""

    page: Page
    text: str | None = None
    title: str | None = None
    language: str | None = None
    language_score: float | None = None
    items: Sequence[tuple[str, float]] = ()  # evaluation items found, with scores, highest first
    measures: dict[str, Mapping[str, float]] = field(default_factory=dict)  # by step
    split: Split | None = None

    def words(self) -> Split:
        """Return the text split into words; cached until a step changes the text."""
        if self.split is None or self.split.text is not self.text:
            self.split = Split(self.text or "")
        return self.split

    @property
    def contamination(self) -> str | None:
        """The evaluation item with the highest score."""
        return self.items[0][0] if self.items else None

    @property
    def identity(self) -> Any:
        """The record's own id, or its path and offset."""
        page = self.page
        return page.record.get("id", f"{page.path}:{page.offset}" if page.offset else page.path)

    def record(self, tell_language: bool = True) -> dict[str, Any]:
        """Return the output record: our fields first, then those passed through."""
        record = {"text": self.text, "id": self.identity, "url": self.page.url, "source": Path(self.page.path).name}
        own = self.page.record
        if tell_language:
            record |= {"language": self.language, "language_score": self.language_score}
            own = {key: value for key, value in own.items() if key not in record or key in ("id", "url", "source")}
        record |= {"title": self.title, "contamination": self.contamination}
        return {key: value for key, value in record.items() if value is not None} | own

    def entry(self, step: str | None = None, reason: str | None = None, score: float | None = None) -> dict[str, Any]:
        """Return the --rejects entry of a page dropped by this step, with its text if already extracted."""
        record = self.record()
        entry = {key: record[key] for key in ("id", "url", "source") if key in record}
        entry |= {"offset": self.page.offset, "step": step, "reason": reason, "score": score}
        entry |= {"contamination": self.contamination}
        entry |= {"language": self.language, "language_score": self.language_score, "text": self.text}
        return {key: value for key, value in entry.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped page with its results so far: the step, the reason, and the measure that broke a threshold."""

    document: Document
    step: str
    reason: str
    score: float | None = None

    def reject(self) -> dict[str, Any]:
        """Return the --rejects entry."""
        return self.document.entry(self.step, self.reason, self.score)


# ---- the input and output of worker processes


@dataclass(frozen=True)
class Batch:
    """Consecutive frames. Batch boundaries depend on the input only, not on the number of processes."""

    frames: list[Frame]
    size: int  # input bytes read
    seconds: float  # CPU time of reading

    @cached_property
    def key(self) -> str:
        """CRC-32 of everything that determines the resulting part."""
        checksum = 0
        for path, kind, offset, data in self.frames:
            checksum = crc32(f"{path} {kind} {offset} {len(data)}\n".encode("utf-8", "surrogateescape"), checksum)
            checksum = crc32(data if isinstance(data, bytes) else data.encode(), checksum)
        return f"{checksum:08x}"

    def __str__(self) -> str:
        """Return the batch's name for error messages."""
        first, last = self.frames[0], self.frames[-1]
        end = f"{last.offset}" if first.path == last.path else f"{last.path}: {last.offset}"
        return f"{first.path}: {first.offset} to {end}"


@dataclass(slots=True)
class Outcome:
    """Fate of one record: kept so far if `step` is None, else dropped by `step` for `reason`."""

    step: str | None
    reason: str | None
    path: str
    offset: int
    line: bytes = b""  # JSON and a newline: the document; of a dropped page the --rejects entry, or empty
    identity: Any = None  # set if there are items
    items: Sequence[tuple[str, float]] = ()  # evaluation items found, with scores


@dataclass(slots=True)
class Part:
    """Outcomes in the order of their records, and the signatures (n,) of the n kept ones."""

    outcomes: list[Outcome]
    signatures: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # CPU time by step

    def pack(self) -> bytes:
        """Serialize as header size, JSON header, lines, signatures.

        >>> part = Part([Outcome(None, None, "a", 0, b"{}\\n"), Outcome("c4", "few", "a", 9)], None, {"c4": 0.5})
        >>> Part.unpack(part.pack()) == part
        True
        """
        outcomes = [
            (o.step, o.reason, o.path, o.offset, len(o.line), *([o.identity, o.items] if o.items else []))
            for o in self.outcomes
        ]
        header = {"outcomes": outcomes, "seconds": self.seconds}
        head = json.dumps(header).encode()  # orjson rejects file names that are not UTF-8
        packed = io.BytesIO()
        packed.write(len(head).to_bytes(8, "little") + head)
        packed.writelines(outcome.line for outcome in self.outcomes)
        if self.signatures is not None:
            np.save(packed, self.signatures, allow_pickle=False)
        return packed.getvalue()

    @classmethod
    def unpack(cls, packed: bytes) -> Part:
        """Deserialize the output of `pack`."""
        at = 8 + int.from_bytes(packed[:8], "little")
        header = json.loads(packed[8:at])
        outcomes = []
        for step, reason, path, offset, size, *of_kept in header["outcomes"]:
            identity, items = of_kept or (None, ())
            outcomes.append(Outcome(step, reason, path, offset, packed[at : at + size], identity, items))
            at += size
        signatures = np.load(io.BytesIO(packed[at:]), allow_pickle=False) if at < len(packed) else None
        return cls(outcomes, signatures, header["seconds"])

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Concatenate parts."""
        signatures = [part.signatures for part in parts if part.signatures is not None]
        seconds = Counter[str]()
        for part in parts:
            seconds.update(part.seconds)  # pyright: ignore[reportArgumentType]
        outcomes = [outcome for part in parts for outcome in part.outcomes]
        return cls(outcomes, np.concatenate(signatures) if signatures else None, dict(seconds))


# ---- the CPU limit


class TooMuchWork(BaseException):
    """A page exceeded its CPU limit. A BaseException, so that no library's `except Exception` swallows it."""


@contextmanager
def work_limit(size: int) -> Iterator[None]:
    """Raise TooMuchWork inside the block if a page of `size` bytes exceeds its CPU limit.

    The limit is a hundred times what slow pages take, so that the output does not depend on the machine. No effect
    outside the main thread, or if the system has no CPU timer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TooMuchWork

    before = signal.signal(signal.SIGVTALRM, stop)
    # raised again every second: a library that calls back into Python may print the exception and carry on
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + size / BYTES_PER_SECOND, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
