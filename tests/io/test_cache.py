"""The cache of remote files: read from disk, resumed, fetched once, and never stale."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.crawl.filters.classifier import local_spec
from llmkit.errors import UserError
from llmkit.io import remote
from llmkit.io.jsonl import read_jsonl
from llmkit.io.remote import cached_file, open_remote, size_and_version
from tests.helpers.file_server import FileServer, file_server

DATA = random.Random(0).randbytes(3_000_000)
LINES = b'{"text": "a document of some words"}\n' * 500


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[FileServer]:
    """A server of f and d.jsonl, with tmp_path/cache as the cache."""
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "WAIT", 0.01)
    monkeypatch.setattr(remote, "_away", {})
    monkeypatch.setattr(remote.settings, "cache", str(tmp_path / "cache"))
    with file_server() as server:
        server.files |= {"f": DATA, "d.jsonl": LINES}
        yield server


def read(address: str) -> bytes:
    with open_remote(address) as file:
        return b"".join(iter(lambda: file.read(1 << 18), b""))


def kept(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.iterdir() if path.suffix != ".json")


@pytest.mark.parametrize("ways", ["", "norange", "cut", "short", "busy cut"])
def test_a_file_is_fetched_once(server: FileServer, tmp_path, ways: str) -> None:
    server.ways = set(ways.split())
    address = server.address + "f"
    assert read(address) == DATA and kept(tmp_path / "cache") == [DATA]
    server.ways, server.requests = set(), []
    with open_remote(address) as file:
        file.seek(-1000, 2)
        assert file.read() == DATA[-1000:]
        file.seek(0)
        assert file.read() == DATA
    assert server.requests == ["bytes=0-0"]  # checks that it has not changed
    about = next((tmp_path / "cache").glob("*.json"))
    assert json.loads(about.read_text()) == {"address": address, "bytes": len(DATA), "version": "1"}


def test_an_incomplete_file_is_resumed(server: FileServer) -> None:
    whole = cached_file(server.address + "f")
    whole.rename(whole.with_name(whole.name + ".partial")).write_bytes(DATA[:2_000_000])
    server.requests = []
    assert read(server.address + "f") == DATA
    assert server.requests[-1] == "bytes=2000000-"


def test_a_complete_file_that_was_truncated_is_fetched_again(server: FileServer) -> None:
    with cached_file(server.address + "f").open("r+b") as handle:
        handle.truncate(1000)
    assert read(server.address + "f") == DATA


def test_a_changed_file_is_fetched_again(server: FileServer, tmp_path) -> None:
    read(server.address + "f")
    server.files["f"], server.version = DATA[::-1], "2"
    assert read(server.address + "f") == DATA[::-1]
    assert kept(tmp_path / "cache") == sorted([DATA, DATA[::-1]])


def test_a_file_is_read_without_its_server(server: FileServer, monkeypatch, capsys) -> None:
    address = server.address + "f"
    read(address)
    server.ways = {"down"}
    assert size_and_version(address) == (len(DATA), "1")
    assert read(address) == DATA
    told = capsys.readouterr().err
    assert re.fullmatch(rf"llmkit: {address}: cannot be read after 6 attempts .*; using the copy in .*cache\n", told)
    with pytest.raises(UserError, match=r"/d.jsonl: cannot be read"):
        read(server.address + "d.jsonl")


def test_several_readers_fetch_a_file_once(server: FileServer) -> None:
    results: list[bytes] = []
    readers = [threading.Thread(target=lambda: results.append(read(server.address + "f"))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert results == [DATA] * 4
    assert [request for request in server.requests if request != "bytes=0-0"] == ["bytes=0-"]


def test_a_folder_that_cannot_be_written_is_one_line(server: FileServer, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(remote.settings, "cache", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"^--cache {tmp_path}/file: cannot be written: file exists"):
        read(server.address + "f")
    monkeypatch.setattr(remote.settings, "cache", None)
    with pytest.raises(UserError, match="/f: expected --cache DIR"):
        cached_file(server.address + "f")


def test_a_classifier_is_fetched(server: FileServer) -> None:
    spec = server.address + "f:__label__good>=0.5"
    assert local_spec(spec) == f"{cached_file(server.address + 'f')}:__label__good>=0.5"
    for other in ("model.bin:good>=0.5", server.address + "f"):
        assert local_spec(other) == other


def test_a_command_keeps_what_it_reads(server: FileServer, tmp_path, llmkit) -> None:
    command = (
        "train-bpe",
        server.address + "d.jsonl",
        "--vocab-size",
        "320",
        "--cache",
        "kept/",
        "--force",
        "-o",
        "t/",
    )
    for attempt in range(2):
        server.requests = []
        done = llmkit(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("bytes=0-" in server.requests) == (attempt == 0)
    assert kept(tmp_path / "kept") == [LINES]
    inputs = json.loads((tmp_path / "t" / "manifest.json").read_text())["inputs"]
    assert inputs == [{"path": server.address + "d.jsonl", "bytes": len(LINES), "version": "1"}]
    assert len(list(read_jsonl([server.address + "d.jsonl"]))) == 500
