"""Records from every kind of file and pipe."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from llmkit.errors import UserError
from llmkit.io.jsonl import check_inputs, open_input, open_output, read_documents, read_jsonl
from llmkit.io.records import BadRecords

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
        json.dumps(ROWS, indent=1).encode(),
    ],
    ids=["plain", "no-last-newline", "crlf", "bom", "blank-lines", "gzip", "gzip-members", "gzip-padded", "zstd",
         "zstd-frames", "zstd-skippable-frame", "array"],
)  # fmt: skip
def test_the_same_records_from_every_form(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data, "no-telling-name")
    assert values(path) == ROWS
    assert [row.value for row in read_documents([path])] == ROWS


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "expected one JSON object per line"),
        (b'{"text": ', "found incomplete JSON"),
        (b'["a"]', "found a list"),
        (b"null", "found null"),
        (b'{"text": NaN}', "expected one JSON object per line"),
        (b'{"text":"\xff\xfe"}', "not UTF-8"),
        (b'{"text":"\\ud800"}', "surrogate"),
        (b'{"text":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":1} {"a":2}', "expected one JSON object per line"),
        (b"[" * 5000, "expected one JSON object per line"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, LINES + line + b"\n" + LINES)
    for read in (read_jsonl, read_documents):
        found = fails(path, read)
        assert found.startswith(f"{path}:3: ")
        assert message in found


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
def test_a_cut_or_damaged_archive_is_an_error(tmp_path: Path, compress) -> None:
    noise = random.Random(0).randbytes(200_000).hex().encode()
    data = compress(b'{"text":"' + noise + b'"}\n' + LINES)
    for cut in (12, len(data) // 2, len(data) - 5):
        path = write(tmp_path, data[:cut])
        assert fails(path).startswith(f"{path}: damaged or truncated ")
    path = write(tmp_path, data[:5000] + bytes(100) + data[5100:])
    assert fails(path).startswith(f"{path}: damaged or truncated ")


def test_inputs_are_checked_before_anything_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    check_inputs([write(tmp_path, LINES), str(tmp_path / "pipe"), "-"])
    for paths, message in (
        ([str(tmp_path)], "found a folder"),
        ([str(tmp_path / "nowhere")], "no such file"),
        (["openai/gsm8k"], "no such file or directory; for the data set on the hub: hf://datasets/openai/gsm8k/"),
        (["-", "-"], "stdin: '-' can be read only once"),
    ):
        with pytest.raises(UserError, match=message):
            check_inputs(paths)
        assert len(set(paths)) < len(paths) or message.partition(";")[0] in fails(paths[0])


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    text = "Es war\nkälter. {x}\n"
    for name, data in (("a.txt", text), ("b", text), ("c.md", '{"text": 1}'), ("d.txt.gz", text)):
        raw = data.encode()
        path = write(tmp_path, gzip.compress(raw) if name.endswith("gz") else raw, name)
        assert [row.value for row in read_documents([path])] == [{"text": data, "source": name}]
    assert "found .xlsx; convert it to Parquet first" in fails(write(tmp_path, b"PK", "d.xlsx"), read_documents)
    path = write(tmp_path, b"one\ntwo \xff\n", "e.txt")
    assert fails(path, read_documents) == f"{path}:2: not UTF-8 at byte 8; convert the text first"


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


def unpack_zstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_an_interrupt_while_lines_are_read_stays_one(tmp_path: Path, pack) -> None:
    """Of gzip every fourth became `ValueError: readline of closed file`, and so a bug of ours."""
    (tmp_path / "lines.jsonl").write_bytes(pack(b"\n" * 20_000_000))

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(40):
            with pytest.raises(KeyboardInterrupt), open_input(str(tmp_path / "lines.jsonl")) as handle:
                signal.setitimer(signal.ITIMER_REAL, 0.005 + turn / 10_000)
                for _ in handle:
                    pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_cut_file_is_refused_with_what_to_do(tmp_path: Path, pack) -> None:
    (tmp_path / "cut.jsonl").write_bytes(pack(LINES)[:-5])
    with pytest.raises(UserError, match=r"cut.jsonl: damaged or truncated .* data: .*; fetch it again$"):
        values(str(tmp_path / "cut.jsonl"))


@pytest.mark.parametrize(("name", "unpack"), [("o.jsonl.gz", gzip.decompress), ("o.JSONL.ZST", unpack_zstd)])
def test_an_output_is_packed_as_its_name_says(tmp_path: Path, name: str, unpack) -> None:
    out = str(tmp_path / name)
    for _ in range(2):
        with open_output(out, force=True) as write:
            for row in ROWS:
                write(row)
        packed = Path(out).read_bytes()
    assert packed != LINES
    assert unpack(packed).count(b"\n") == 2
    assert values(out) == ROWS


@pytest.mark.parametrize("name", ["o.arrow", "o.csv", "o.jsonl.bz2", "o.XLSX"])
def test_a_format_that_is_not_written_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not supported; choose"), open_output(str(tmp_path / name)):
        pass
    assert not list(tmp_path.iterdir())


# ---- bad records


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{}", "expected field 'text' (a document), found []"),
        ('{"text": {}}', "expected 'text' to be a string, found an object"),
        ('{"text": "x", "source": 3}', "expected 'source' to be a string, found a number"),
    ],
)
def test_an_invalid_document_is_named(tmp_path: Path, record: str, message: str) -> None:
    path = write(tmp_path, record.encode())
    assert fails(path, read_documents) == f"{path}:1: {message}"


def test_a_share_of_bad_records_bears_one_in_a_small_file_and_is_judged_while_reading(tmp_path: Path, capsys) -> None:
    lines = [b'{"n":1}\n'] * 5000

    def read(*bad: int, most: str = "1%") -> int:
        data = b"".join(b"no\n" if number in bad else line for number, line in enumerate(lines[:size], 1))
        return len(list(read_jsonl([write(tmp_path, data)], bad=BadRecords(most))))

    size = 20
    assert read(7) == 19
    assert "skipped:" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"d\.jsonl:7: .*; 2 of 20 records of .* are bad, more than --max-bad 1%"):
        read(7, 9)
    size = 300
    assert read(1, 2, 3) == 297
    with pytest.raises(UserError, match="4 of 300 records"):
        read(1, 2, 3, 4)
    size = 5000
    assert read(*range(1, 11), 2000) == 4989
    with pytest.raises(UserError, match="11 of 1,000 records"):  # early, not at the end
        read(*range(1, 11), 1000)
    with pytest.raises(UserError, match="3 of 3 records"):  # at once for an absolute count
        read(1, 2, 3, 4, most="2")


def test_bad_records_in_an_array_are_separated_from_good_ones(tmp_path: Path, capsys) -> None:
    data = b'[{"n": 1}, {"n": NaN}, 3, {"n": "\\ud800"}, {"n": 2}]'
    bad = BadRecords("3")
    assert [row.value for row in read_jsonl([write(tmp_path, data)], bad=bad)] == [{"n": 1}, {"n": 2}]
    said = capsys.readouterr().err
    assert "d.jsonl:2: a lone surrogate, NaN" in said and "d.jsonl:3: expected an object in the array" in said
    assert bad.results == {"bad_records": 3}


def test_the_limit_counts_good_records_and_judges_what_was_read(tmp_path: Path) -> None:
    path = write(tmp_path, b"no\n" * 2 + LINES * 3)
    with pytest.raises(UserError, match="2 of 4 records"):
        list(read_jsonl([path], 2, bad=BadRecords("1%")))
    assert len(list(read_jsonl([path], 2, bad=BadRecords("2")))) == 2
