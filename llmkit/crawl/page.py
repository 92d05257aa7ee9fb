"""What passes from step to step of a crawl, and the bound on the work for one page.

    read      Frame -> Page | Skipped           the bytes of a record become a page
    judge     Page -> Document | Dropped        a page becomes a text that stays, or goes for a reason
    seen      Document -> Repeat | None         (llmkit.crawl.dedup.duplicates)

A `Batch` of frames is the work of one process at a time, the `Part` made of it its answer, and a piece of the state on
disk.
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
READ = "read"  # the step before all others: a record that is no page ends there
SECONDS, BYTES_PER_SECOND = 30.0, 30_000  # of the processor: for every page, and more for a long one


class Frame(NamedTuple):
    """The bytes of one record, or the reason why there are none."""

    path: str
    kind: str  # warc (and arc), jsonl, html
    offset: int  # as in `Page`
    data: bytes | str


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
    id: Any = None

    def reject(self) -> dict[str, Any]:
        """The entry of --rejects."""
        where = f"{self.path}:{self.offset}" if self.offset else self.path  # as of a document
        entry = {"id": where if self.id is None else self.id}
        entry |= {"url": self.url} if self.url is not None else {}
        return entry | {"source": Path(self.path).name, "offset": self.offset, "step": READ, "reason": self.reason}


@dataclass(slots=True)
class Document:
    """A page with what the steps have found of it so far: after the last, a document."""

    page: Page
    text: str | None = None
    title: str | None = None
    language: str | None = None
    language_score: float | None = None
    items: Sequence[tuple[str, float]] = ()  # of evaluations, that it holds or held, with scores, the highest first
    measures: dict[str, Mapping[str, float]] = field(default_factory=dict)  # by step
    split: Split | None = None

    def words(self) -> Split:
        """The text with its words, split once for all filters until a step changes the text."""
        if self.split is None or self.split.text is not self.text:
            self.split = Split(self.text or "")
        return self.split

    @property
    def contamination(self) -> str | None:
        """The item of the highest score."""
        return self.items[0][0] if self.items else None

    @property
    def identity(self) -> Any:
        """The record's own id, or where it stands."""
        page = self.page
        return page.record.get("id", f"{page.path}:{page.offset}" if page.offset else page.path)

    def record(self, tell_language: bool = True) -> dict[str, Any]:
        """The line of the output: our fields first, then what passes through."""
        record = {"text": self.text, "id": self.identity, "url": self.page.url, "source": Path(self.page.path).name}
        own = self.page.record
        if tell_language:
            record |= {"language": self.language, "language_score": self.language_score}
            own = {key: value for key, value in own.items() if key not in record or key in ("id", "url", "source")}
        record |= {"title": self.title, "contamination": self.contamination}
        return {key: value for key, value in record.items() if value is not None} | own

    def entry(self, step: str | None = None, reason: str | None = None, score: float | None = None) -> dict[str, Any]:
        """The entry of --rejects for a page that is dropped here, with its text where it came so far."""
        record = self.record()
        entry = {key: record[key] for key in ("id", "url", "source") if key in record}
        entry |= {"offset": self.page.offset, "step": step, "reason": reason, "score": score}
        entry |= {"contamination": self.contamination}
        entry |= {"language": self.language, "language_score": self.language_score, "text": self.text}
        return {key: value for key, value in entry.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Dropped:
    """A page that goes, with what was found of it: by which step, for which reason, by which measure."""

    document: Document
    step: str
    reason: str
    score: float | None = None

    def reject(self) -> dict[str, Any]:
        """The entry of --rejects."""
        return self.document.entry(self.step, self.reason, self.score)


# ---- to the processes and back


@dataclass(frozen=True)
class Batch:
    """Frames in a row; which ones depends on the input alone, never on the number of processes."""

    frames: list[Frame]
    size: int  # bytes of the input that they were read from
    seconds: float  # of the processor that reading them took

    @cached_property
    def key(self) -> str:
        """CRC-32 of all that decides what becomes of the batch."""
        checksum = 0
        for path, kind, offset, data in self.frames:
            checksum = crc32(f"{path} {kind} {offset} {len(data)}\n".encode("utf-8", "surrogateescape"), checksum)
            checksum = crc32(data if isinstance(data, bytes) else data.encode(), checksum)
        return f"{checksum:08x}"

    def __str__(self) -> str:
        """The batch as errors name it."""
        first, last = self.frames[0], self.frames[-1]
        end = f"{last.offset}" if first.path == last.path else f"{last.path}: {last.offset}"
        return f"{first.path}: {first.offset} to {end}"


@dataclass(slots=True)
class Outcome:
    """Fate of one record: kept so far when `step` is None, else dropped by that step for that reason."""

    step: str | None
    reason: str | None
    path: str
    offset: int
    line: bytes = b""  # JSON and a newline: the document, or the entry of --rejects; empty where nobody asked
    identity: Any = None  # of a document that holds or held
    items: Sequence[tuple[str, float]] = ()  # of evaluations: each with its score


@dataclass(slots=True)
class Part:
    """Outcomes in the order of their records, with the signatures (n,) of the n kept ones."""

    outcomes: list[Outcome]
    signatures: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of the processor, by step

    def pack(self) -> bytes:
        """The part as bytes: the size of a JSON header, the header, the lines, the signatures.

        >>> part = Part([Outcome(None, None, "a", 0, b"{}\\n"), Outcome("c4", "few", "a", 9)], None, {"c4": 0.5})
        >>> Part.unpack(part.pack()) == part
        True
        """
        outcomes = [
            (o.step, o.reason, o.path, o.offset, len(o.line), *([o.identity, o.items] if o.items else []))
            for o in self.outcomes
        ]
        header = {"outcomes": outcomes, "seconds": self.seconds}
        head = json.dumps(header).encode()  # orjson refuses the name of a file that is no UTF-8
        packed = io.BytesIO()
        packed.write(len(head).to_bytes(8, "little") + head)
        packed.writelines(outcome.line for outcome in self.outcomes)
        if self.signatures is not None:
            np.save(packed, self.signatures, allow_pickle=False)
        return packed.getvalue()

    @classmethod
    def unpack(cls, packed: bytes) -> Part:
        """The part that `pack` made."""
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
        """Several parts, in order, as one."""
        signatures = [part.signatures for part in parts if part.signatures is not None]
        seconds = Counter[str]()
        for part in parts:
            seconds.update(part.seconds)  # pyright: ignore[reportArgumentType]
        outcomes = [outcome for part in parts for outcome in part.outcomes]
        return cls(outcomes, np.concatenate(signatures) if signatures else None, dict(seconds))


# ---- no page stops a crawl


class TooMuchWork(BaseException):
    """A page took more than its time; no `except Exception` of a library may take it for its own."""


@contextmanager
def work_limit(size: int) -> Iterator[None]:
    """Raise TooMuchWork inside the block when a page of `size` bytes takes far longer than any should.

    The bound is a hundred times what slow pages take, so that what is kept does not depend on the machine. Without
    effect outside of the main thread, and where the system has no such clock.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TooMuchWork

    before = signal.signal(signal.SIGVTALRM, stop)
    # raised again each second, for a library that calls back into Python and prints what is raised there
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + size / BYTES_PER_SECOND, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
