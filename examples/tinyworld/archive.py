"""WARC files of gzip members, like those of crawlers, including damaged records and records that are not pages."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

DATE = "2026-01-01T00:00:00Z"


def http(body: bytes, status: str = "200 OK", media: str = "text/html; charset=utf-8") -> bytes:
    """Return an HTTP response."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def record(url: str, block: bytes, number: int, kind: str = "response") -> bytes:
    """Return a WARC record (ISO 28500:2017)."""
    media = "application/http; msgtype=response" if kind == "response" else "application/warc-fields"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{UUID(int=number)}>\r\nWARC-Date: {DATE}\r\n"
        f"WARC-Target-URI: {url}\r\nContent-Type: {media}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def damaged(member: bytes) -> bytes:
    """Overwrite the second half of a gzip member."""
    half = len(member) // 2
    return member[:half] + bytes(byte ^ 0xA5 for byte in member[half:])


def write_warc(path: Path, members: Sequence[bytes]) -> None:
    """Write a `warcinfo` record, then the members."""
    info = record("", b"software: examples/tinyworld\r\n", 0, "warcinfo").replace(b"WARC-Target-URI: \r\n", b"")
    with path.open("wb") as handle:
        for member in (member_of(info), *members):
            handle.write(member)


def member_of(one: bytes) -> bytes:
    """Compress a record deterministically."""
    return gzip.compress(one, 6, mtime=0)
