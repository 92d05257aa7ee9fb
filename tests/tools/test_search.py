"""Search: the index is built once, rebuilt when its file changes, and accepts any query of a model."""

import gzip
import json
import os
import random
import socket
import sqlite3
import tempfile
import threading
import time
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llmkit.errors import UserError
from llmkit.tools.search import LONGEST_PASSAGE, NOTHING, SearchEngine, SearchError, SearchIndex, cut_passages

DOCUMENTS = [
    {"text": "The lighthouse of Morvane was built by Ana Teld in 1871.\n\nIt is painted green.", "title": "Morvane"},
    {"text": "Bees are kept on the roofs of Orlinsk, where the lime trees flower late."},
    {"text": "Ana Teld also drew the bridge at Orlinsk."},
]


def found(documents, query, passages=3):
    with closing(SearchIndex(str(documents))) as index:
        return index.search(query, passages)


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    return path


def test_finds_the_passage_and_its_title(documents):
    first = "[1] Morvane: The lighthouse of Morvane was built by Ana Teld in 1871. It is painted green."
    assert found(documents, "Who built the lighthouse?", passages=1) == first
    assert "Bees" in found(documents, "bee flowering")  # word forms
    assert "Orlinsk" in found(documents, "Órlinsk")  # accents
    packed = documents.with_name("docs.jsonl.gz")
    packed.write_bytes(gzip.compress(documents.read_bytes()))
    assert found(packed, "lighthouse", passages=1) == first


def test_index_is_used_again_until_the_file_changes(documents):
    found(documents, "x")
    place = documents.with_name("docs.jsonl.fts5")
    before, written = place.stat().st_ino, documents.stat()
    found(documents, "x")
    assert place.stat().st_ino == before
    documents.write_bytes(documents.read_bytes().replace(b"lighthouse", b"powerhouse"))
    os.utime(documents, ns=(written.st_atime_ns, written.st_mtime_ns))  # a change with the same size and time
    assert found(documents, "lighthouse") == NOTHING
    assert "powerhouse" in found(documents, "powerhouse")
    assert sorted(path.name for path in documents.parent.iterdir()) == ["docs.jsonl", "docs.jsonl.fts5"]


@pytest.mark.parametrize(
    "query", ["", "?!", '"', "\ud800", "a AND OR NOT (", "NEAR(a b, 3)", "title:x", "*", "'; DROP TABLE passages"]
)
def test_any_text_of_a_model_is_a_query(documents, query):
    with closing(SearchIndex(str(documents))) as index:
        assert isinstance(index.search(query), str)
        assert "lighthouse" in index.search("lighthouse")


def test_an_index_with_any_bits_flipped_is_made_again_or_right(documents):
    place = documents.with_name("docs.jsonl.fts5")
    right = found(documents, "lighthouse Ana Orlinsk")
    good, chance = place.read_bytes(), random.Random(3)
    for trial in range(60):
        bad = bytearray(good if trial else good[: len(good) // 2])
        for _ in range(20):
            bad[chance.randrange(100, len(bad))] ^= 1 << chance.randrange(8)
        place.write_bytes(bad)
        lines = found(documents, "lighthouse Ana Orlinsk").splitlines()
        assert all(line[4:] in right for line in lines) or lines == [NOTHING], trial
    place.write_bytes(b"not a database" * 100)
    assert found(documents, "lighthouse Ana Orlinsk") == right


@pytest.mark.parametrize("schema", ["same", "table", "view"])
def test_a_planted_index_is_not_believed(documents, schema):
    place = documents.with_name("docs.jsonl.fts5")
    SearchIndex(str(documents)).close()
    with closing(sqlite3.connect(place)) as connection:
        if schema != "same":
            connection.execute("DROP TABLE passages")
            connection.execute(
                "CREATE TABLE passages (title, text)"
                if schema == "table"
                else "CREATE VIEW passages AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) "
                "SELECT '' AS title, 'lighthouse POISONED' AS text FROM n"
            )
        if schema != "view":
            connection.execute("INSERT INTO passages VALUES ('', 'lighthouse POISONED')")
        connection.commit()
    assert "lighthouse of Morvane" in found(documents, "lighthouse")
    assert "POISONED" not in found(documents, "lighthouse")


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_search_works_with_something_else_in_place_of_the_index(documents, kind):
    place = documents.with_name("docs.jsonl.fts5")
    place.mkdir() if kind == "folder" else place.symlink_to(documents.parent / "elsewhere")
    assert "lighthouse" in found(documents, "lighthouse")
    assert sorted(os.listdir(documents.parent)) == ["docs.jsonl", "docs.jsonl.fts5"]


def test_the_index_is_in_memory_if_the_folder_is_read_only(documents, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError("read-only")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert "lighthouse" in found(documents, "lighthouse")
    assert not documents.with_name("docs.jsonl.fts5").exists()


def test_bad_documents_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SearchIndex(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="found a folder"):
        SearchIndex(str(tmp_path))
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(UserError, match=r"docs.jsonl:2: expected field 'text'"):
        SearchIndex(str(path))
    for nothing in ("", '{"text": " "}\n'):
        path.write_text(nothing)
        with pytest.raises(UserError, match=r"docs.jsonl: expected documents with text to search, found none"):
            SearchIndex(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["docs.jsonl"]


def test_passages_are_bounded_and_lose_no_word():
    text = "One short line.\n" + "word " * 3000 + "\n" + "x" * 5000 + "\n" + "A sentence here. " * 200
    passages = list(cut_passages(text))
    assert max(map(len, passages)) <= LONGEST_PASSAGE + 800
    assert "".join("".join(passages).split()) == "".join(text.split())


# ---- search engines by URL


class Answers(BaseHTTPRequestHandler):
    reply: tuple[int, bytes] = (200, b"")
    asked, authorization = "", None

    def do_GET(self):
        Answers.asked, Answers.authorization = self.path, self.headers["Authorization"]
        self.send_response(self.reply[0])
        self.end_headers()
        self.wfile.write(self.reply[1])

    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def engine():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield SearchEngine(f"http://127.0.0.1:{server.server_port}/search", timeout=5)
    server.shutdown()


def test_an_engine_is_queried_in_searxng_format_without_a_proxy(engine, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    results = [
        {"title": "Comets", "content": "Ice\n and dust.", "url": "http://x"},
        {"title": None, "content": "a\ud800b"},
    ]
    Answers.reply = 200, json.dumps({"results": results}).encode()
    assert engine.search("what are comets & stars?") == "[1] Comets: Ice and dust.\n[2] a?b"
    assert (Answers.asked, Answers.authorization) == ("/search?q=what+are+comets+%26+stars%3F&format=json", None)
    assert SearchEngine(engine.url.replace("//", "//ada:p%40w@")).search("\ud800", passages=0) == NOTHING
    assert (Answers.asked, Answers.authorization) == ("/search?q=%3F&format=json", "Basic YWRhOnBAdw==")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [((429, b""), "answered 429"), ((200, b"<html>"), "not in SearXNG"), ((200, b'{"results": 3}'), "not in SearXNG")],
)
def test_a_failing_engine_reports_why(engine, reply, reason):
    Answers.reply = reply
    with pytest.raises(SearchError, match=reason):
        engine.search("comets")
    with pytest.raises(SearchError, match="cannot be reached"):
        SearchEngine("http://127.0.0.1:9/", timeout=2).search("comets")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def body(content: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(content) + content


def redirect(to: bytes) -> bytes:
    return b"HTTP/1.1 302 Found\r\nLocation: " + to + b"\r\nContent-Length: 0\r\n\r\n"


def drip(first: bytes, piece: bytes):
    def send(connection):
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(0.1)

    return send


BROKEN = {
    "redirect to a file": redirect(b"file:///etc/passwd"),
    "redirect to ftp": redirect(b"ftp://127.0.0.1:9/x"),
    "redirect to data": redirect(b"data:application/json,{}"),
    "redirect that is none": redirect(b"http://[::1"),
    "redirect to nowhere": redirect(b""),
    "redirect with a blank": redirect(b"http://127.0.0.1:9/a b"),
    "no reply": b"",
    "cut": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "no HTTP": b"garbage\r\n\r\n",
    "HTTP 9.9": b"HTTP/9.9 200 OK\r\n\r\n",
    "status 999": b"HTTP/1.1 999 X\r\n\r\n",
    "status abc": b"HTTP/1.1 abc X\r\n\r\n",
    "long status": b"HTTP/1.1 200 " + b"x" * 70000 + b"\r\n\r\n",
    "long header": HEAD + b"X: " + b"y" * 70000 + b"\r\n\r\n{}",
    "many headers": HEAD + b"A: b\r\n" * 200 + b"\r\n{}",
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    "huge chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "cut chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}",
    "negative length": HEAD + b"Content-Length: -5\r\n\r\n{}",
    "deep JSON": body(b'{"results":' + b"[" * 200000 + b"]" * 200000 + b"}"),
    "deep content": body(b'{"results":[{"content":' + b"[" * 50000 + b"]" * 50000 + b"}]}"),
    "large number": body(b'{"results":[{"content":' + b"9" * 10000 + b"}]}"),
    "null": body(b"null"),
    "list": body(b"[]"),
    "results of text": body(b'{"results":"abc"}'),
    "list of null": body(b'{"results":[null]}'),
    "latin-1": body('{"results":[{"content":"é"}]}'.encode("latin-1")),
    "gzip": body(b"\x1f\x8b123", b"Content-Encoding: gzip\r\n"),
    "dripping body": drip(HEAD + b"Content-Length: 100000\r\n\r\n", b" "),
    "dripping headers": drip(HEAD, b"X: a\r\n"),
    "dripping status": drip(b"", b"HTTP"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_engine_is_a_failed_search_and_in_time(kind):
    answer = BROKEN[kind]
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        connection.recv(65536)
                        answer(connection) if callable(answer) else connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        before = threading.active_count()
        engine = SearchEngine(f"http://127.0.0.1:{server.getsockname()[1]}/s", timeout=1.0)
        started = time.monotonic()
        with pytest.raises(SearchError):
            engine.search("comets")
        assert time.monotonic() - started < 8
        while threading.active_count() > before:  # no waiting threads are left
            assert time.monotonic() - started < 30
            time.sleep(0.05)


@pytest.mark.parametrize("url", ["http://[::1", "http:///x", "http://h:port/", "http://h/a b", "http://é/"])
def test_an_invalid_url_is_named_at_the_start(url):
    with pytest.raises(UserError, match="expected a URL"):
        SearchEngine(url)
