"""Search: the index is built once, follows its file, and takes anything that a model may write."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.tools.search import LONGEST_PASSAGE, NOTHING, SearchEngine, SearchError, SearchIndex, cut_passages

DOCUMENTS = [
    {"text": "The lighthouse of Morvane was built by Ana Teld in 1871.\n\nIt is painted green.", "title": "Morvane"},
    {"text": "Bees are kept on the roofs of Orlinsk, where the lime trees flower late."},
    {"text": "Ana Teld also drew the bridge at Orlinsk."},
]


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    return path


def test_finds_the_passage_and_its_title(documents):
    with SearchIndex.open(str(documents)) as index:
        first = index.search("Who built the lighthouse?", passages=1)
    assert first == "[1] Morvane: The lighthouse of Morvane was built by Ana Teld in 1871. It is painted green."


def test_forms_of_a_word_and_accents_are_found(documents):
    with SearchIndex.open(str(documents)) as index:
        assert "Bees" in index.search("bee flowering")
        assert "Orlinsk" in index.search("Órlinsk")


def test_index_is_used_again_until_the_file_changes(documents):
    SearchIndex.open(str(documents)).close()
    place = documents.with_name("docs.jsonl.fts5")
    before = place.stat().st_ino
    SearchIndex.open(str(documents)).close()
    assert place.stat().st_ino == before
    documents.write_text(json.dumps({"text": "Now about comets."}) + "\n")
    with SearchIndex.open(str(documents)) as index:
        assert index.search("lighthouse") == NOTHING
        assert "comets" in index.search("comet")
    assert sorted(path.name for path in documents.parent.iterdir()) == ["docs.jsonl", "docs.jsonl.fts5"]


@pytest.mark.parametrize(
    "query", ["", "?!", '"', "a AND OR NOT (", "NEAR(a b, 3)", "title:x", "*", "'; DROP TABLE passages"]
)
def test_whatever_a_model_writes_is_a_query(documents, query):
    with SearchIndex.open(str(documents)) as index:
        assert isinstance(index.search(query), str)
        assert "lighthouse" in index.search("lighthouse")


def test_damaged_index_is_made_again(documents):
    documents.with_name("docs.jsonl.fts5").write_bytes(b"not a database" * 100)
    with SearchIndex.open(str(documents)) as index:
        assert "lighthouse" in index.search("lighthouse")


def test_compressed_documents(tmp_path):
    path = tmp_path / "docs.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(DOCUMENTS[0]).encode()))
    with SearchIndex.open(str(path)) as index:
        assert "Morvane" in index.search("lighthouse")


def test_where_the_folder_cannot_be_written_the_index_is_in_memory(documents, monkeypatch):
    def refuse(self, *arguments, **named):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "touch", refuse)
    with SearchIndex.open(str(documents)) as index:
        assert "lighthouse" in index.search("lighthouse")
    assert not documents.with_name("docs.jsonl.fts5").exists()


def test_bad_documents_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SearchIndex.open(str(tmp_path / "none.jsonl"))
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(UserError, match=r"docs.jsonl:2: expected field 'text'"):
        SearchIndex.open(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["docs.jsonl"]


def test_passages_are_bounded_and_lose_no_word():
    text = "One short line.\n" + "word " * 3000 + "\n" + "x" * 5000 + "\n" + "A sentence here. " * 200
    passages = list(cut_passages(text))
    assert max(map(len, passages)) <= LONGEST_PASSAGE + 800
    assert "".join("".join(passages).split()) == "".join(text.split())


# ---- an engine by URL


class Answers(BaseHTTPRequestHandler):
    reply: tuple[int, bytes] = (200, b"")
    asked = ""

    def do_GET(self):
        Answers.asked = self.path
        self.send_response(self.reply[0])
        self.end_headers()
        self.wfile.write(self.reply[1])

    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def engine():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SearchEngine(f"http://127.0.0.1:{server.server_port}/search", timeout=5)
    server.shutdown()


def test_engine_is_asked_in_searxng_form(engine):
    results = [{"title": "Comets", "content": "Ice\n and dust.", "url": "http://x"}, {"title": "Two"}]
    Answers.reply = 200, json.dumps({"results": results}).encode()
    assert engine.search("what are comets & stars?") == "[1] Comets: Ice and dust.\n[2] Two: "
    assert Answers.asked == "/search?q=what+are+comets+%26+stars%3F&format=json"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [((429, b""), "answered 429"), ((200, b"<html>"), "not in SearXNG"), ((200, b'{"results": 3}'), "not in SearXNG")],
)
def test_engine_that_fails_says_why(engine, reply, reason):
    Answers.reply = reply
    with pytest.raises(SearchError, match=reason):
        engine.search("comets")


def test_engine_that_is_down():
    with pytest.raises(SearchError, match="cannot be reached"):
        SearchEngine("http://127.0.0.1:9/", timeout=2).search("comets")
