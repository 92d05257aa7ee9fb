"""What a worker hands back: a part of a span's outcomes, packed so that it can go through a pipe or into a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import orjson


@dataclass(slots=True)
class Outcome:
    """What became of one record: kept so far when `step` is None, else dropped by that step for that reason."""

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
