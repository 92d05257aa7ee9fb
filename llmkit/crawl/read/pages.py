"""Parse the bytes of a record into a page.

Sources: WARC 1.1 (ISO 28500:2017), the ARC 1.0 format of the Internet Archive, RFC 9112 (HTTP/1.1).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress

from llmkit.crawl.page import MAX_PAGE_BYTES, Frame, Page, Skipped, TooMuchWork, work_limit
from llmkit.errors import UserError
from llmkit.io.jsonl import GZIP_MAGIC, ZSTD_MAGIC, json_row
from llmkit.io.records import with_columns

try:
    from isal import isal_zlib as inflating  # twice as fast as zlib
except ImportError:  # no wheel for this platform
    inflating = zlib

GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, getattr(inflating, "error", zlib.error))
STEP = 1 << 16  # compressed bytes per call: unpack to at most 68 MB
MAX_HEADER = 1 << 16
OVERLAP = 1 << 13  # for record starts that cross a block border; also the longest header line of an ARC file
BLANK_LINE = re.compile(rb"\n\r?\n")
WARC_START = re.compile(rb"WARC/\d\.\d+\r?\n(?=[A-Za-z-]+:)")
_WARC_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,18})[ \t]*\r?$")
# URL, IP address, date, type, length; a URL may contain spaces
ARC_START = re.compile(rb"[a-z][a-z0-9+.-]*:[^\n]* [0-9a-f.:]+ \d{8,14} [^ \n]+ (\d{1,18})\r?$", re.MULTILINE)

HTML_TYPES = ("text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml", "text/xhtml")
# types sent by servers that do not know better, or for XHTML: look at the body
UNSURE_TYPES = ("", "unknown", "unk", "no-type", "application/octet-stream", "*/*", "text/xml", "application/xml")
KNOWN_TYPES = ("warcinfo", "request", "revisit", "metadata", "continuation", "resource", "conversion", "response")

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?[ \t]+(\d{3})(?!\d)")
# the tags of https://mimesniff.spec.whatwg.org/#identifying-a-resource-with-an-unknown-mime-type
_HTML = re.compile(
    rb"(?i)(?:<!--(?:(?!-->).)*-->|<\?xml[^>]*>|\s)*"  # unambiguous: many comments cause no backtracking
    rb"<(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p|meta|link)[\s/>]",
    re.DOTALL,
)
_CHUNK = re.compile(rb"(?:\r?\n)?[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def page_of(frame: Frame, max_bytes: int = MAX_PAGE_BYTES, columns: Mapping[str, str] = {}) -> Page | Skipped:
    """Parse a frame into a page, or return why it is not one.

    Fields of JSONL are renamed by `columns` (from `--columns`). A line that is not a JSON object in UTF-8 is skipped
    as `bad_json`, one without a string under `html` or `text` as `no_text`. For archives see `page_of_record`.
    """
    path, kind, offset, data = frame
    if isinstance(data, str):
        return Skipped(path, offset, data)
    if kind == "html":
        return Page(path, offset, None, data, None, None, {})
    if kind == "jsonl":
        try:
            row = json_row(data, path, offset)
        except UserError:
            return Skipped(path, offset, "bad_json")
        assert row is not None, "blank lines are no frames"
        try:
            values = dict(with_columns(row, columns).value)
        except UserError:
            return Skipped(path, offset, "no_text")
        html, text = values.pop("html", None), values.pop("text", None)
        url = values.pop("url") if isinstance(values.get("url"), str) else None
        if not isinstance(text if html is None else html, str):
            return Skipped(path, offset, "no_text", url, values.get("id"))
        return Page(path, offset, url, html, None, None if html is not None else text, values)
    try:
        with work_limit(len(data)):
            return page_of_record(path, offset, data, max_bytes)
    except TooMuchWork:
        return Skipped(path, offset, "too_slow")


def page_of_record(path: str, offset: int, data: bytes, max_bytes: int) -> Page | Skipped:
    """Parse a WARC or ARC record, given the bytes of its header and block.

    A `response` with status 200, or a `resource`, gives a page with `html` if its Content-Type is HTML, or if the
    Content-Type is inconclusive and the body begins like HTML. A `conversion` to plain text gives a page with `text`.
    Reasons to skip others: the record's type, `http_status`, `not_html`, `no_http` (a response without HTTP header),
    `empty`, and `too_large` (after decompression).
    """
    fields, block = _head_of(data)
    url = fields.get("warc-target-uri", "").strip("<>") or None
    kind = fields.get("warc-type", "").lower()
    record = {"id": fields.get("warc-record-id", "").strip("<>"), "date": fields.get("warc-date", "")}
    page = Page(path, offset, url, None, None, None, {key: value for key, value in record.items() if value})
    if kind == "response":
        reason = _read_response(page, fields.get("content-type", ""), block, max_bytes)
    elif kind == "resource":
        reason = _read_html(page, fields.get("content-type", ""), bytes(block))
    elif kind == "conversion":
        page.text = bytes(block).decode("utf-8", "replace").strip("\r\n")
        is_plain = _media_type(fields.get("content-type", "text/plain")) == "text/plain"
        reason = "not_html" if not is_plain else None if page.text else "empty"
    else:
        reason = kind if kind in KNOWN_TYPES else "unknown_type"
    return Skipped(path, offset, reason, url, page.record.get("id")) if reason else page


def header_of(ahead: bytes | bytearray, arc: bool) -> tuple[int, int] | None:
    """Return the sizes in bytes of the header and the block of the record that begins here; None if none does."""
    if arc:
        match = ARC_START.match(ahead, 0, OVERLAP)
        return (match.end() + 1, int(match[1])) if match else None
    if not WARC_START.match(ahead):
        return None
    end = BLANK_LINE.search(ahead, 0, MAX_HEADER)
    length = _WARC_LENGTH.search(ahead, 0, end.end()) if end else None
    return (end.end(), int(length[1])) if end and length else None


def _head_of(data: bytes) -> tuple[dict[str, str], memoryview]:
    """Return the WARC header fields by lower-case name, and the block. An ARC header is converted to WARC fields."""
    arc = not data.startswith(b"WARC/")
    header = header_of(data, arc)
    assert header, "a frame begins with a complete header"
    block = memoryview(data)[header[0] : sum(header)]
    if not arc:
        return fields_of(data[: header[0]]), block
    url, _, date, content_type, _ = data[: header[0]].decode("utf-8", "replace").rsplit(" ", 4)
    if url.startswith("filedesc:"):
        return {"warc-type": "warcinfo", "warc-target-uri": url}, block
    http = url.startswith(("http:", "https:")) and _STATUS.match(block)
    day, time = f"{date[:4]}-{date[4:6]}-{date[6:8]}", f"{date[8:10]}:{date[10:12]}:{date[12:14]}"
    return {
        "warc-type": "response" if http else "resource",
        "warc-target-uri": url,
        "warc-date": f"{day}T{time}Z" if len(date) == 14 else day,
        "content-type": "application/http" if http else content_type,
    }, block


def fields_of(head: bytes) -> dict[str, str]:
    """Parse the header fields after the first line. The first of repeated fields counts; folded lines are joined.

    >>> fields_of(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/html;\\r\\n charset=x\\r\\nbad line")
    {'content-type': 'text/html; charset=x'}
    """
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        text = head.decode("latin-1")
    fields: dict[str, str] = {}
    for line in re.sub(r"\r?\n[ \t]+", " ", text).split("\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    return fields


def _read_response(page: Page, content_type: str, block: memoryview, max_bytes: int) -> str | None:
    if not content_type.lower().startswith("application/http"):
        return _read_html(page, content_type, bytes(block))
    status = _STATUS.match(block)
    if status is None:
        return _read_html(page, "", bytes(block)) and ("no_http" if bytes(block).strip() else "empty")
    if status[1] != b"200":
        return "http_status"
    end = BLANK_LINE.search(block, 0, MAX_HEADER)
    if end is None:
        return "empty"
    fields = fields_of(bytes(block[: end.start()]))
    content_type = fields.get("content-type", "")
    if _media_type(content_type) not in (*HTML_TYPES, *UNSURE_TYPES):
        return "not_html"
    body = decoded(bytes(block[end.end() :]), fields, max_bytes)
    return "too_large" if len(body) > max_bytes else _read_html(page, content_type, body)


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].partition(",")[0].strip().lower()


def _read_html(page: Page, content_type: str, body: bytes) -> str | None:
    """Set the page's `html`, or return the reason why the body is not HTML."""
    kind = _media_type(content_type)
    if kind not in HTML_TYPES and not (kind in UNSURE_TYPES and looks_like_html(body)):
        return "not_html"
    if not body or body.isspace():
        return "empty"
    page.html, page.content_type = body, content_type or None
    return None


def looks_like_html(body: bytes) -> bool:
    """Return True if the bytes begin like HTML after a byte order mark, space and comments; UTF-16 needs its mark."""
    head = body[:4096]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.replace(b"\0", b"")[2:]
    return bool(_HTML.match(head.removeprefix(b"\xef\xbb\xbf")))


def decoded(body: bytes, fields: Mapping[str, str], max_bytes: int) -> bytes:
    """Undo transfer and content encodings of an HTTP body, if it really has those that its header names.

    Of a truncated body, decode what there is. A result beyond `max_bytes` is cut, but stays longer than `max_bytes`.
    """
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = without_chunks(body)
    names = [name.strip() for name in fields.get("content-encoding", "").lower().split(",")]
    for name in reversed(names):
        if looks_like_html(body):  # archives often store the decoded body with the original header
            break
        body = _unpacked(body, name, max_bytes + 1)
    return body


def without_chunks(body: bytes) -> bytes:
    """Join a chunked body; return it unchanged if it does not begin with a chunk.

    >>> without_chunks(b"5\\r\\n<p>hi\\r\\n4;x=y\\r\\n</p>\\r\\n0\\r\\n\\r\\n")
    b'<p>hi</p>'
    """
    chunks: list[bytes] = []
    at = 0
    while size := _CHUNK.match(body, at):
        start, at = size.end(), size.end() + int(size[1], 16)
        if not chunks and body[at : at + 2].strip(b"\r\n"):
            return body  # the first line only looked like a length
        chunks.append(body[start:at])
        if at == start or at >= len(body):
            break
    return b"".join(chunks) if chunks else body


def _unpacked(body: bytes, name: str, most: int) -> bytes:
    """Decompress a body to about `most` bytes; of a truncated one, what there is. Others are returned unchanged."""
    if body.startswith(GZIP_MAGIC):  # whatever the header says
        return inflated(body, 31, most)
    if body.startswith(ZSTD_MAGIC):
        from zstandard import ZstdDecompressor, ZstdError

        with suppress(ZstdError):
            return ZstdDecompressor().stream_reader(body, read_across_frames=True).read(most)
        return b""
    if name == "deflate":  # with zlib's header, as in RFC 9110, or without, as many servers send it
        return inflated(body, 15, most) or inflated(body, -15, most) or body
    if name == "br":
        import brotli

        unpacker, chunks, size = brotli.Decompressor(), [], 0
        with suppress(brotli.error):
            chunks.append(unpacker.process(body, output_buffer_limit=most))
            while chunks[-1] and not unpacker.is_finished() and (size := size + len(chunks[-1])) < most:
                chunks.append(unpacker.process(b"", output_buffer_limit=most))  # a truncated body gives 32 kB at a time
        return b"".join(chunks) or body
    return body


def inflated(body: bytes, format: int, most: int, step: int = STEP) -> bytes:
    """Decompress as much of a body as possible, to about `most` bytes; format: `wbits` of zlib."""
    inflater, chunks, size = inflating.decompressobj(format), [], 0
    with suppress(*GZIP_ERRORS):
        for begin in range(0, len(body), step):
            chunks.append(inflater.decompress(body[begin : begin + step]))
            size += len(chunks[-1])
            if inflater.eof or size > most:
                break
    return b"".join(chunks)
