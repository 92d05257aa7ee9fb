"""WARC and ARC records, built byte by byte."""

from __future__ import annotations

import gzip

HTML = b"<!doctype html><html><body><p>%s</p></body></html>"


def http(body: bytes, status: str = "200 OK", **fields: str) -> bytes:
    """Return an HTTP response; keywords such as `Content_Type` are header fields, by default text/html."""
    named = {"Content-Type": "text/html", **{name.replace("_", "-"): value for name, value in fields.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in named.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def record(block: bytes, kind: str = "response", url: str = "http://a.example/", **fields: str) -> bytes:
    """Return a WARC record; a response is an HTTP response unless `Content_Type` differs."""
    media = {"response": "application/http; msgtype=response", "request": "application/http; msgtype=request"}
    named = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:x:{abs(hash(block)) % 10**9}>",
        "WARC-Date": "2026-01-01T00:00:00Z",
        "WARC-Target-URI": url,
        "Content-Type": media.get(kind, "text/plain"),
        "Content-Length": str(len(block)),
        **{name.replace("_", "-"): value for name, value in fields.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return f"WARC/1.0\r\n{head}\r\n".encode() + block + b"\r\n\r\n"


def page(text: bytes, **fields: str) -> bytes:
    """Return a WARC record of a page with this text."""
    return record(http(HTML % text), **fields)


def members(records: list[bytes], level: int = 6) -> bytes:
    """Compress each record to a separate gzip member."""
    return b"".join(gzip.compress(one, level, mtime=0) for one in records)


def arc(block: bytes, url: str = "http://a.example/", media: str = "text/html") -> bytes:
    """Return an ARC record."""
    return f"{url} 127.0.0.1 20140216050221 {media} {len(block)}\n".encode() + block + b"\n"


ARC_HEAD = arc(
    b"1 0 Crawler\nURL IP-address Archive-date Content-type Archive-length\n", "filedesc://x.arc", "text/plain"
)
