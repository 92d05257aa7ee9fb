"""Documents to shards: the tokenizer's ids are on disk, and the cache is invalidated when needed."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmkit.data import shards
from llmkit.data.shards import TokenShards, tokenize_documents
from llmkit.errors import UserError
from tests.helpers.file_server import file_server


class Bytes:
    """An encoder with one token per byte; 256 starts and ends a document."""

    backend = "bytes"
    vocab_size = 257
    unk_id = None

    def __init__(self, sha256: str = "0" * 64) -> None:
        self.sha256, self.calls = sha256, 0

    def encode_batch(self, texts):
        self.calls += 1
        data = [text.encode() for text in texts]
        return np.frombuffer(b"".join(data), np.uint8).astype(np.uint32), np.array([len(d) for d in data])

    def document_bounds(self):
        return 256, 256


TEXTS = ["first one", "", "second — with “quotes”", "third 👍\n"]


@pytest.fixture
def jsonl(tmp_path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS))
    return path


def texts_of(shards: TokenShards) -> list[str]:
    assert all(shards[k][0] == 256 for k in range(len(shards)))
    return [bytes(shards[k][1:].astype(np.uint8)).decode() for k in range(len(shards))]


@pytest.fixture(params=[1, 1 << 22])
def _any_group_size(request, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_CHARACTERS", request.param)


@pytest.mark.usefixtures("_any_group_size")
def test_documents_with_text_become_shards_in_order(jsonl, tmp_path):
    shards = tokenize_documents([str(jsonl)], Bytes(), tmp_path / "cache", quiet=True)
    texts = [text for text in TEXTS if text]
    assert texts_of(shards) == texts
    assert shards.bytes == sum(len(text.encode()) for text in texts)
    assert shards.doc_bytes.tolist() == [len(text.encode()) for text in texts]
    assert shards.info.end == 256


def test_limit_counts_documents_over_all_files(jsonl, tmp_path):
    other = tmp_path / "more.jsonl.gz"
    other.write_bytes(gzip.compress(jsonl.read_bytes()))
    shards = tokenize_documents([str(jsonl), str(other)], Bytes(), tmp_path / "cache", limit=5, quiet=True)
    assert texts_of(shards) == [TEXTS[0], TEXTS[2], TEXTS[3], TEXTS[0]]


def test_the_second_run_encodes_nothing(jsonl, tmp_path):
    cache = tmp_path / "cache"
    tokenize_documents([str(jsonl)], Bytes(), cache, quiet=True)
    again = Bytes()
    shards = tokenize_documents([str(jsonl)], again, cache, quiet=True)
    assert again.calls == 0 and len(shards) == 3
    moved = jsonl.rename(tmp_path / "renamed.jsonl")
    tokenize_documents([str(moved)], again, cache, quiet=True)
    assert again.calls == 0


@pytest.mark.parametrize("change", ["text", "tokenizer", "limit", "order", "damage"])
def test_the_cache_notices_what_changes_the_shards(jsonl, tmp_path, change):
    cache, other = tmp_path / "cache", tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    paths = [str(jsonl), str(other)]
    before = tokenize_documents(paths, Bytes(), cache, quiet=True)
    encoder, limit = Bytes("1" * 64 if change == "tokenizer" else "0" * 64), None
    if change == "text":
        # the same number of bytes
        other.write_text('{"text": "OTHER"}\n')
        os.utime(other, ns=(1, 1))
    elif change == "limit":
        limit = 1
    elif change == "order":
        paths.reverse()
    elif change == "damage":
        shard = before.folder / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    shards = tokenize_documents(paths, encoder, cache, limit=limit, quiet=True)
    assert encoder.calls > 0
    expected = {"text": "OTHER", "limit": TEXTS[0], "order": TEXTS[3]}.get(change, "other")
    assert texts_of(shards)[-1] == expected


def test_stdin_and_pipes_are_read_once_and_not_taken_from_the_cache(jsonl, tmp_path, monkeypatch):
    for text in ("from stdin", "from stdin again"):
        stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(json.dumps({"text": text}).encode())))
        monkeypatch.setattr(sys, "stdin", stdin)
        shards = tokenize_documents(["-"], Bytes(), tmp_path / "cache", name="train", quiet=True)
        assert texts_of(shards) == [text]
    encoder = Bytes()
    left = tokenize_documents(["-"], encoder, tmp_path / "cache", name="train", resume=True, quiet=True)
    assert texts_of(left) == ["from stdin again"] and encoder.calls == 0
    reading, writing = os.pipe()
    os.write(writing, b'{"text": "from a pipe"}\n')
    os.close(writing)
    shards = tokenize_documents([f"/dev/fd/{reading}"], Bytes(), tmp_path / "cache", quiet=True)
    assert texts_of(shards) == ["from a pipe"]


def test_ready_shards_are_taken_as_they_are(jsonl, tmp_path):
    made = tokenize_documents([str(jsonl)], Bytes(), tmp_path / "cache", quiet=True)
    encoder = Bytes()
    assert len(tokenize_documents([str(made.folder)], encoder, tmp_path / "unused", quiet=True)) == 3
    assert encoder.calls == 0 and not (tmp_path / "unused").exists()
    with pytest.raises(UserError, match="made with another tokenizer"):
        tokenize_documents([str(made.folder)], Bytes("f" * 64), tmp_path / "cache", quiet=True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n{"text" 3}\n', r"bad\.jsonl:3"),
        (b'{"text": "a"}\n{"body": "b"}\n', r"bad\.jsonl:2.*'text'"),
        (b'{"text": "a"}\n{"text": 5}\n', r"bad\.jsonl:2"),
        (b'{"text": "a\xff"}\n', r"bad\.jsonl:1"),
        (b'{"text": "a"}\n\n{"text": "\\ud800"}\n', r"bad\.jsonl:3"),
        (b"", r"bad\.jsonl"),
        (b'{"text": ""}\n', r"bad\.jsonl: no document with text"),
    ],
)
def test_a_bad_record_is_named_and_leaves_nothing(tmp_path, content, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        tokenize_documents([str(path)], Bytes(), tmp_path / "cache", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        tokenize_documents([str(tmp_path / "nowhere.jsonl")], Bytes(), tmp_path / "cache", quiet=True)


SLOW_RUN = """
import sys, time
from pathlib import Path
from llmkit.data import shards
from tests.data.test_tokenize import Bytes
shards.GROUP_CHARACTERS = 1
class Slow(Bytes):
    def encode_batch(self, texts):
        print("encoding", flush=True)
        time.sleep(0.05 if self.calls < 1 else 60)
        return super().encode_batch(texts)
shards.tokenize_documents([sys.argv[1]], Slow(), Path(sys.argv[2]), quiet=True)
"""


def test_a_killed_run_leaves_no_half_cache(jsonl, tmp_path):
    root = Path(__file__).parents[2]
    cache = tmp_path / "cache"
    run = [sys.executable, "-c", SLOW_RUN, str(jsonl), str(cache)]
    with subprocess.Popen(run, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not [entry for entry in cache.iterdir() if entry.is_dir() and not entry.name.endswith(".partial")]
    encoder = Bytes()
    assert len(tokenize_documents([str(jsonl)], encoder, cache, quiet=True)) == 3
    assert encoder.calls > 0
    assert not list(cache.glob("*.partial"))


def test_a_full_disk_is_a_user_error_and_leaves_nothing(jsonl, tmp_path):
    # A limit on file sizes simulates a full disk
    code = (
        "import resource, sys; from pathlib import Path; from llmkit.data.shards import tokenize_documents;"
        "from llmkit.errors import UserError; from tests.data.test_tokenize import Bytes\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "try: tokenize_documents([sys.argv[1]], Bytes(), Path(sys.argv[2]), quiet=True)\n"
        "except UserError as error: print(error)"
    )
    run = [sys.executable, "-c", code, str(jsonl), str(tmp_path / "cache")]
    done = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    assert not (tmp_path / "cache").exists()


def test_a_url_is_encoded_once_until_its_file_changes(tmp_path):
    encoder = Bytes()
    with file_server() as server:
        server.files["docs.jsonl"] = b'{"text": "old"}\n'
        paths = [f"{server.address}docs.jsonl"]
        for resume in (False, True):
            shards = tokenize_documents(paths, encoder, tmp_path / "cache", resume=resume)
            assert texts_of(shards) == ["old"] and encoder.calls == 1
        server.files["docs.jsonl"], server.version = b'{"text": "new"}\n', "2"
        assert texts_of(tokenize_documents(paths, encoder, tmp_path / "cache", resume=True)) == ["new"]
