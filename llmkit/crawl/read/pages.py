"""The bytes of a record as a page, or the reason why it is none.

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
    from isal import isal_zlib as inflating  # unpacks twice as fast as zlib
except ImportError:  # no wheels for this machine
    inflating = zlib

GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, getattr(inflating, "error", zlib.error))
STEP = 1 << 16  # of compressed bytes unpacked at once: at most 68 MB come out
MAX_HEADER = 1 << 16
OVERLAP = 1 << 13  # the start of a record that lies across two blocks; the longest header line of an ARC file
BLANK_LINE = re.compile(rb"\n\r?\n")
WARC_START = re.compile(rb"WARC/\d\.\d+\r?\n(?=[A-Za-z-]+:)")
_WARC_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,18})[ \t]*\r?$")
# URL, address, date, type, length; a URL may hold spaces
ARC_START = re.compile(rb"[a-z][a-z0-9+.-]*:[^\n]* [0-9a-f.:]+ \d{8,14} [^ \n]+ (\d{1,18})\r?$", re.MULTILINE)

HTML_TYPES = ("text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml", "text/xhtml")
# types that servers send for want of a better one, or for XHTML: the body tells
UNSURE_TYPES = ("", "unknown", "unk", "no-type", "application/octet-stream", "*/*", "text/xml", "application/xml")
KNOWN_TYPES = ("warcinfo", "request", "revisit", "metadata", "continuation", "resource", "conversion", "response")

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?[ \t]+(\d{3})(?!\d)")
# the tags of https://mimesniff.spec.whatwg.org/#identifying-a-resource-with-an-unknown-mime-type
_HTML = re.compile(
    rb"(?i)(?:<!--(?:(?!-->).)*-->|<\?xml[^>]*>|\s)*"  # one way alone through many comments
    rb"<(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p|meta|link)[\s/>]",
    re.DOTALL,
)
_CHUNK = re.compile(rb"(?:\r?\n)?[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def page_of(frame: Frame, max_bytes: int = MAX_PAGE_BYTES, columns: Mapping[str, str] = {}) -> Page | Skipped:
    """Read a frame as a page, or the reason why it is none.

    The fields of a line of JSONL are renamed as `columns` (of `--columns`) has it. One that is no JSON object in UTF-8
    is skipped as `bad_json`, one without a string under `html` or `text` as `no_text`. For records of archives see
    `page_of_record`.
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
    """Read a record of WARC or ARC as a page, from the bytes of its header and block.

    A `response` of status 200, or a `resource`, that is HTML by its Content-Type, or by its beginning where that
    says nothing, is a page of `html`; a `conversion` to plain text is one of `text`. The reasons of the rest are
    the record's type, `http_status`, `not_html`, `no_http` (a response without its header), `empty`, and
    `too_large` (when unpacked).
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
    """The bytes of the header with which a record begins and of its block; None where no record begins."""
    if arc:
        match = ARC_START.match(ahead, 0, OVERLAP)
        return (match.end() + 1, int(match[1])) if match else None
    if not WARC_START.match(ahead):
        return None
    end = BLANK_LINE.search(ahead, 0, MAX_HEADER)
    length = _WARC_LENGTH.search(ahead, 0, end.end()) if end else None
    return (end.end(), int(length[1])) if end and length else None


def _head_of(data: bytes) -> tuple[dict[str, str], memoryview]:
    """The fields of a WARC header by their lower-cased names, and the block; an ARC header is put in WARC's terms."""
    arc = not data.startswith(b"WARC/")
    header = header_of(data, arc)
    assert header, "a frame begins with a whole header"
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
    """The fields of a header whose first line names the protocol; of a repeated field the first, folded lines joined.

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
    """Make it a page of `html`, or return the reason why it is none."""
    kind = _media_type(content_type)
    if kind not in HTML_TYPES and not (kind in UNSURE_TYPES and looks_like_html(body)):
        return "not_html"
    if not body or body.isspace():
        return "empty"
    page.html, page.content_type = body, content_type or None
    return None


def looks_like_html(body: bytes) -> bool:
    """True if bytes begin as HTML does, after byte order mark, space and comments; UTF-16 by its mark."""
    head = body[:4096]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.replace(b"\0", b"")[2:]
    return bool(_HTML.match(head.removeprefix(b"\xef\xbb\xbf")))


def decoded(body: bytes, fields: Mapping[str, str], max_bytes: int) -> bytes:
    """An HTTP body without the chunks and packing that its header names and that it has, as far as it is whole.

    The result is longer than `max_bytes` where the body would be: it is cut there.
    """
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = without_chunks(body)
    names = [name.strip() for name in fields.get("content-encoding", "").lower().split(",")]
    for name in reversed(names):
        if looks_like_html(body):  # archives often store the body unpacked and the header as it came
            break
        body = _unpacked(body, name, max_bytes + 1)
    return body


def without_chunks(body: bytes) -> bytes:
    """A chunked body joined; as it is where it does not begin with a chunk.

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
    """The body unpacked, about `most` bytes at most, of a cut one what there is; as it is where it is not packed so."""
    if body.startswith(GZIP_MAGIC):  # whatever the header says
        return inflated(body, 31, most)
    if body.startswith(ZSTD_MAGIC):
        from zstandard import ZstdDecompressor, ZstdError

        with suppress(ZstdError):
            return ZstdDecompressor().stream_reader(body, read_across_frames=True).read(most)
        return b""
    if name == "deflate":  # with the header of zlib, as RFC 9110 says, or without, as many servers do
        return inflated(body, 15, most) or inflated(body, -15, most) or body
    if name == "br":
        import brotli

        unpacker, chunks, size = brotli.Decompressor(), [], 0
        with suppress(brotli.error):
            chunks.append(unpacker.process(body, output_buffer_limit=most))
            while chunks[-1] and not unpacker.is_finished() and (size := size + len(chunks[-1])) < most:
                chunks.append(unpacker.process(b"", output_buffer_limit=most))  # of a cut body it gives 32 kB at a time
        return b"".join(chunks) or body
    return body


def inflated(body: bytes, format: int, most: int, step: int = STEP) -> bytes:
    """What can be unpacked of a body, about `most` bytes at most; format: the `wbits` of zlib."""
    inflater, chunks, size = inflating.decompressobj(format), [], 0
    with suppress(*GZIP_ERRORS):
        for begin in range(0, len(body), step):
            chunks.append(inflater.decompress(body[begin : begin + step]))
            size += len(chunks[-1])
            if inflater.eof or size > most:
                break
    return b"".join(chunks)
