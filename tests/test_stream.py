"""Records in from every kind of file and pipe; output whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from llmkit.errors import UserError
from llmkit.stream import (
    atomic_file,
    atomic_folder,
    check_output,
    open_input,
    open_output,
    read_documents,
    read_jsonl,
    replace_folder,
)

LINES = b'{"text":"one"}\n{"text":"two","id":2}\n'
ROWS = [{"text": "one"}, {"text": "two", "id": 2}]


def write(folder: Path, data: bytes, name: str = "d.jsonl") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def values(path: str, **details) -> list[dict]:
    return [row.value for row in read_jsonl([path], **details)]


def fails(path: str, read=read_jsonl) -> str:
    with pytest.raises(UserError) as caught:
        list(read([path]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading


@pytest.mark.parametrize(
    "data",
    [
        LINES,
        LINES.rstrip(),
        LINES.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + LINES,
        b"\n \n" + LINES.replace(b"\n", b"\n\n\t\n"),
        gzip.compress(LINES),
        gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
        gzip.compress(LINES) + b"\0" * 512,
        zstandard.compress(LINES),
        zstandard.compress(LINES[:20]) + zstandard.compress(b"") + zstandard.compress(LINES[20:]),
        zstandard.compress(LINES[:20]) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(LINES[20:]),
    ],
    ids=["plain", "no-last-newline", "crlf", "bom", "blank-lines", "gzip", "gzip-members", "gzip-padded", "zstd",
         "zstd-frames", "zstd-skippable-frame"],
)  # fmt: skip
def test_the_same_records_from_every_form(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data, "no-telling-name")
    assert values(path) == ROWS
    assert [row.value for row in read_documents([path])] == ROWS


def test_every_row_knows_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, b'\n{"a":1}\n\n{"a":2}\n')
    assert [row.where for row in read_jsonl([path])] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    "data", [b"", b"\n\n", b"\xef\xbb\xbf", gzip.compress(b""), zstandard.compress(b"")], ids=range(5)
)
def test_an_empty_file_has_no_records(tmp_path: Path, data: bytes) -> None:
    assert values(write(tmp_path, data)) == []
    assert list(read_documents([write(tmp_path, data, "other")])) == []


def test_the_limit_counts_across_files_and_reads_no_further(tmp_path: Path) -> None:
    good = write(tmp_path, LINES)
    bad = write(tmp_path, b'{"text":"three"}\nnot json\n', "bad.jsonl")
    for read in (read_jsonl, read_documents):
        assert len(list(read([good, bad], limit=3))) == 3
        assert len(list(read([good, good], limit=None))) == 4
        assert list(read([good, str(tmp_path / "never opened")], limit=2)) != []


def test_a_huge_line_and_unicode_pass(tmp_path: Path) -> None:
    text = "ü\u2028\U0001f600" * 1_000_000
    path = write(tmp_path, gzip.compress(json.dumps({"text": text}, ensure_ascii=False).encode(), 1))
    assert values(path)[0]["text"] == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "expected one JSON object a line"),
        (b'{"text": ', "unexpected end of data"),
        (b'["a"]', "found a list"),
        (b'"a"', "found a string"),
        (b"null", "found null"),
        (b'{"text": NaN}', "expected one JSON object a line"),
        (b'{"text":"\xff\xfe"}', "not UTF-8"),
        (b'{"text":"\\ud800"}', "surrogate"),
        (b'{"text":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":1} {"a":2}', "expected one JSON object a line"),
        (b"[" * 5000, "expected one JSON object a line"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, LINES + line + b"\n" + LINES)
    for read in (read_jsonl, read_documents):
        found = fails(path, read)
        assert found.startswith(f"{path}:3: ")
        assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body":"x","id":1}', "expected field 'text' (a document), found ['body', 'id']"),
        (b'{"text":null}', "expected 'text' to be a string, found null"),
        (b'{"text":["x"]}', "expected 'text' to be a string, found a list"),
        (b'{"text":5}', "expected 'text' to be a string, found a number"),
    ],
)
def test_a_record_that_is_no_document_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, LINES + line + b"\n")
    assert fails(path, read_documents) == f"{path}:3: {message}"


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
def test_a_cut_or_damaged_archive_is_an_error(tmp_path: Path, compress) -> None:
    noise = random.Random(0).randbytes(200_000).hex().encode()
    data = compress(b'{"text":"' + noise + b'"}\n' + LINES)
    for cut in (12, len(data) // 2, len(data) - 5):
        path = write(tmp_path, data[:cut])
        assert fails(path).startswith(f"{path}: damaged or cut ")
    path = write(tmp_path, data[:5000] + bytes(100) + data[5100:])
    assert fails(path).startswith(f"{path}: damaged or cut ")


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.jsonl")
    assert fails(missing) == f"{missing}: expected a file that can be read: no such file or directory"
    assert fails(str(tmp_path)) == f"{tmp_path}: expected a file that can be read: found a folder"


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    text = "Es war\nkälter. {x}\n"
    for name, data in (("a.txt", text), ("b", text), ("c.md", '{"text": 1}'), ("d.txt.gz", text)):
        raw = data.encode()
        path = write(tmp_path, gzip.compress(raw) if name.endswith("gz") else raw, name)
        assert [row.value for row in read_documents([path])] == [{"text": data, "source": name}]
    path = write(tmp_path, b"one\ntwo \xff\n", "e.txt")
    assert fails(path, read_documents) == f"{path}:2: not UTF-8 at byte 8; convert the file first"


# ---- stdin and pipes


@pytest.mark.parametrize(
    "data", [LINES, gzip.compress(LINES), zstandard.compress(LINES)], ids=["plain", "gzip", "zstd"]
)
def test_stdin_is_read_in_every_form_and_once(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    rows = list(read_documents(["-"]))
    assert [row.value for row in rows] == ROWS
    assert rows[1].where == "stdin:2"
    assert "read only once" in fails("-")


def test_stdin_may_be_plain_text_or_closed(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(b"some text"))))
    assert [row.value for row in read_documents(["-"])] == [{"text": "some text", "source": "stdin"}]
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in fails("-")


@pytest.mark.parametrize("data", [LINES, gzip.compress(LINES), b"plain text"], ids=["plain", "gzip", "text"])
def test_a_named_pipe_is_opened_once(tmp_path: Path, data: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    rows = [row.value for row in read_documents([str(pipe)])]
    writer.join()
    assert rows == ([{"text": "plain text", "source": "pipe"}] if data == b"plain text" else ROWS)


def test_the_caller_s_own_errors_pass_through_open_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_input(write(tmp_path, LINES)):
        open(tmp_path / "other")  # noqa: SIM115


# ---- writing


def test_a_file_appears_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_output(str(path)) as put:
        put(ROWS[0])
        put({"text": "ü"})
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == '{"text":"one"}\n{"text":"ü"}\n'
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_an_error_leaves_the_former_output_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), open_output(str(tmp_path / "out.jsonl"), force=True) as put:
        put({"a": 1})
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "manifest.json").write_text("new")
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["out", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}")
    for name in ("file", "mine", "model"):
        with pytest.raises(UserError, match="exists already; --force replaces it"):
            check_output(str(tmp_path / name), force=False)
        check_output(str(tmp_path / name), force=False, resume=True)
    check_output(str(tmp_path / "model"), force=True)
    check_output(str(tmp_path / "file"), force=True)
    with pytest.raises(UserError, match="not a folder that llmkit wrote"):
        check_output(str(tmp_path / "mine"), force=True)
    with pytest.raises(UserError, match="does not exist; create it first"):
        check_output(str(tmp_path / "no" / "such"), force=True)
    with pytest.raises(UserError, match="expected a file, found a folder"), open_output(str(tmp_path / "model"), True):
        pass
    with pytest.raises(UserError, match="expected a folder, found a file"), atomic_folder(tmp_path / "file", True):
        pass


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real").mkdir()
    os.symlink("real.txt", tmp_path / "link.txt")
    os.symlink("real", tmp_path / "link")
    with atomic_file(tmp_path / "link.txt", "w") as handle:
        handle.write("new")
    with atomic_folder(f"{tmp_path}/link/", force=True) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "real.txt").read_text() == (tmp_path / "real" / "x").read_text() == "new"
    assert os.path.islink(tmp_path / "link.txt") and os.path.islink(tmp_path / "link")
    assert len(os.listdir(tmp_path)) == 4


def test_a_device_or_pipe_is_written_in_place(tmp_path: Path) -> None:
    with open_output(os.devnull, force=True) as put:
        put({"a": 1})
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    with open_output(str(pipe)) as put:
        put({"a": 1})
    reader.join()
    assert got == [b'{"a":1}\n']


def test_the_leftover_of_a_killed_run_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old shard").write_text("half")
    (tmp_path / "two.partial").write_text("half")
    for name in ("out", "two"):
        with atomic_folder(tmp_path / name) as folder:
            (folder / "new").write_text("")
        assert os.listdir(tmp_path / name) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["out", "two"]


def test_without_an_exchange_of_names_the_folder_is_still_replaced(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llmkit.stream._exchange", lambda first, second: False)
    for name in ("new", "old", "old.former"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == ["new"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_names_the_output() -> None:
    with pytest.raises(UserError, match=r"^/dev/full: no space left there"), open_output("/dev/full") as put:
        put({"a": 1})


SAVE_UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from llmkit.errors import UserError
from llmkit.stream import atomic_folder, open_output
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # what a full disk does, without one
try:
    if sys.argv[1] == "file":
        with open_output(sys.argv[2], force=True) as put:
            for _ in range(10_000):
                put({"text": "x" * 100})
    elif sys.argv[1] == "folder":
        with atomic_folder(sys.argv[2], force=True) as folder:
            (folder / "big").write_bytes(bytes(100_000))
    else:
        from safetensors.numpy import save_file
        import numpy
        with atomic_folder(sys.argv[2], force=True) as folder:
            save_file({"a": numpy.zeros(100_000)}, folder / "big.safetensors")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["file", "folder", "safetensors"])
def test_no_space_leaves_the_former_output_whole(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.write_text("old") if kind == "file" else out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNDER_A_LIMIT, kind, str(out)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{out}: no space left there for the output; nothing was changed\n", done.stderr
    assert os.listdir(tmp_path) == ["out"]
    assert out.read_text() == "old" if kind == "file" else os.listdir(out) == []


SAVE_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from llmkit.stream import atomic_folder, open_output
out = Path(sys.argv[1])
print("ready", flush=True)
for turn in range(10**9):
    with atomic_folder(out / "model", force=True) as folder:
        for part in range(4):
            (folder / f"part-{part}").write_text(f"{turn} " * 5000)
    with open_output(str(out / "records.jsonl"), force=True) as put:
        for _ in range(200):
            put({"turn": turn})
"""


def test_kill_9_while_saving_leaves_the_output_whole(tmp_path: Path) -> None:
    rng = random.Random(1)
    command = [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(tmp_path)]
    seen = set()
    for _ in range(12):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "model").exists():
            parts = [(tmp_path / "model" / f"part-{part}").read_text() for part in range(4)]
            turn = parts[0].split()[0]
            assert parts == [f"{turn} " * 5000] * 4
            seen.add(turn)
        if (tmp_path / "records.jsonl").exists():
            turns = values(str(tmp_path / "records.jsonl"))
            assert len(turns) == 200
            assert all(row == turns[0] for row in turns)
    assert len(seen) > 1  # it was killed at different moments
