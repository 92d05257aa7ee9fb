"""Records of an archive become pages as sent by the server, or are skipped with a named reason."""

from __future__ import annotations

import gzip
import zlib

import brotli
import pytest
import zstandard
from archives import HTML, arc, http, record
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.crawl.page import Frame, Page, Skipped
from llmkit.crawl.read.pages import looks_like_html, page_of, without_chunks

BODY = HTML % ("Grüße, 世界. ".encode() * 30)
MOST = 1_000_000


def of(data: bytes, most: int = MOST) -> Page | Skipped:
    return page_of(Frame("x.warc", "warc", 7, data), most)


def html_of(data: bytes) -> bytes | str | None:
    found = of(data)
    assert isinstance(found, Page), found.reason
    return found.html


def chunked(body: bytes, size: int = 100) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


PACKED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}


def test_a_page_keeps_what_is_known_of_it():
    fields = {"WARC_Record_ID": "<urn:uuid:1>", "WARC_Date": "2026-02-03T04:05:06Z"}
    block = http(BODY, Content_Type="text/html; charset=utf-8")
    found = of(record(block, url="<http://a.example/x>", **fields))
    expected = {"id": "urn:uuid:1", "date": "2026-02-03T04:05:06Z"}
    assert found == Page("x.warc", 7, "http://a.example/x", BODY, "text/html; charset=utf-8", None, expected)


@pytest.mark.parametrize("name", PACKED)
def test_a_body_is_unpacked_as_its_header_says(name):
    packed = PACKED[name](BODY)
    assert html_of(record(http(packed, Content_Encoding=name))) == BODY
    assert html_of(record(http(chunked(packed), Content_Encoding=name, Transfer_Encoding="chunked"))) == BODY


def test_encodings_are_undone_from_the_last_to_the_first():
    packed = gzip.compress(brotli.compress(BODY))
    assert html_of(record(http(packed, Content_Encoding="br, gzip"))) == BODY
    assert html_of(record(http(raw_deflate(BODY), Content_Encoding="deflate"))) == BODY


@pytest.mark.parametrize("name", [*PACKED, "identity", "utf-8", "sdch", ""])
@pytest.mark.parametrize("body", [BODY, b"plain words, no tag"])
def test_a_header_that_is_not_so_loses_no_page(name, body):
    assert html_of(record(http(body, Content_Encoding=name, Transfer_Encoding="chunked"))) == body


def test_gzip_that_no_header_tells_of_is_unpacked():
    assert html_of(record(http(gzip.compress(BODY)))) == BODY


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd"])
def test_a_body_truncated_by_the_crawler_is_kept_as_far_as_it_goes(name):
    body = HTML % b"".join(b"%d " % (number * 7919) for number in range(40_000))
    packed = PACKED[name](body)
    found = html_of(record(http(packed[: len(packed) * 3 // 4], Content_Encoding=name)))
    assert isinstance(found, bytes) and body.startswith(found) and len(found) > len(body) // 3


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd"])
def test_a_body_that_swells_is_passed_over(name):
    packed = PACKED[name](HTML % (b"a" * 30_000_000))
    assert of(record(http(packed, Content_Encoding=name))).reason == "too_large"  # type: ignore[union-attr]


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=300), size=st.integers(1, 50))
def test_chunks_are_joined(body, size):
    assert without_chunks(chunked(body, size)) == (body or without_chunks(b"0\r\n\r\n"))


@settings(max_examples=200, deadline=None)
@given(block=st.binary(max_size=300), name=st.sampled_from([*PACKED, "x"]))
def test_no_bytes_raise(block, name):
    of(record(block))
    of(record(http(block, Content_Encoding=name, Transfer_Encoding="chunked")))
    of(record(http(PACKED.get(name, bytes)(BODY)[:60] + block, Content_Encoding=name)))
    of(record(block, "conversion"))
    of(arc(block))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (record(b"software: x", "warcinfo"), "warcinfo"),
        (record(b"GET / HTTP/1.1\r\n\r\n", "request"), "request"),
        (record(http(b""), "revisit"), "revisit"),
        (record(b"{}", "metadata"), "metadata"),
        (record(b"rest", "continuation"), "continuation"),
        (record(b"x", "novelty"), "unknown_type"),
        (record(http(BODY, "404 Not Found")), "http_status"),
        (record(http(BODY, "206 Partial Content")), "http_status"),
        (record(http(BODY, "301 Moved", Location="/")), "http_status"),
        (record(http(b"%PDF-1.4", Content_Type="application/pdf")), "not_html"),
        (record(http(BODY, Content_Type="text/plain")), "not_html"),
        (record(http(b"\x89PNG", Content_Type="")), "not_html"),
        (record(http(b"<rss>", Content_Type="text/xml")), "not_html"),
        (record(http(b" \r\n")), "empty"),
        (record(b""), "empty"),
        (record(b"HTTP/1.1 200 OK\r\nContent-Type: text/html"), "empty"),
        (record(b"\x15\x03\x01 TLS"), "no_http"),
        (record(b"1.2.3.4", Content_Type="text/dns", url="dns:a.example"), "not_html"),
        (record(b"\x89PNG", "resource", Content_Type="image/png"), "not_html"),
        (record(b"{}", "conversion", Content_Type="application/json"), "not_html"),
        (record(b"\r\n", "conversion"), "empty"),
        (arc(http(BODY, "500 Oops")), "http_status"),
        (arc(b"\x89PNG", media="image/png"), "not_html"),
    ],
)
def test_records_that_are_not_pages_have_a_reason(data, reason):
    found = of(data)
    assert isinstance(found, Skipped) and (found.offset, found.reason) == (7, reason)


@pytest.mark.parametrize(
    "data",
    [
        record(http(BODY, Content_Type="")),
        record(http(BODY, Content_Type="application/octet-stream")),
        record(http(BODY, Content_Type="TEXT/HTML;charset=x, text/html")),
        record(http(BODY, Content_Type="application/xhtml+xml")),
        record(http(BODY, "200")),
        record(b"HTTP/2 200\r\ncontent-type: text/html\r\n\r\n" + BODY),
        record(b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n" + BODY),
        record(b"HTTP/1.1 200 OK\r\nBad line\r\nX: \xe4\xf6\r\nContent-Type:\r\n text/html\r\n\r\n" + BODY),
        record(BODY),  # a response without an HTTP header
        record(BODY, Content_Type="text/html"),
        record(BODY, "resource", Content_Type="text/html"),
        record(BODY, "Response", Content_Type="text/html"),
        arc(http(BODY)),
        arc(BODY, url="file:///x y.html"),
    ],
)
def test_records_that_are_pages(data):
    assert html_of(data) == BODY


def test_ready_text_keeps_its_lines():
    found = of(record("Überschrift\n\nzwei\n".encode() + b"\xff", "conversion"))
    assert isinstance(found, Page) and (found.text, found.html) == ("Überschrift\n\nzwei\n\ufffd", None)


def test_an_arc_record_has_its_address_and_date():
    found = of(arc(http(BODY), url="http://a.example/?q=two words"))
    assert isinstance(found, Page)
    assert (found.url, found.record) == ("http://a.example/?q=two words", {"date": "2014-02-16T05:02:21Z"})


def test_html_is_known_by_its_beginning():
    for body in (BODY, b"\xef\xbb\xbf \n<HTML>", b"<!-- x -->\n<p>", "\ufeff<html>".encode("utf-16-le")):
        assert looks_like_html(body)
    for body in (b"", b"words", b"<rss>", b"<?xml version='1.0'?><feed>", b"{}", b"<" * 4096, b"<!--" * 1024):
        assert not looks_like_html(body)
