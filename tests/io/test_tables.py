"""Parquet, CSV and TSV instead of JSONL, in and out."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import random
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmkit.config import parse_columns
from llmkit.errors import UserError
from llmkit.io.jsonl import open_bytes, open_output, read_documents, read_jsonl
from llmkit.io.records import OF_DOCUMENT, BadRecords
from tests.helpers.file_server import file_server

ROWS = [{"text": "one", "n": 1, "messages": [{"role": "user", "content": "a"}]}, {"text": "zwei ß", "n": None}]


def write(path: Path, **columns) -> str:
    parquet.write_table(pa.table(columns), path)
    return str(path)


def values(path: str | Path, **details) -> list[dict]:
    return [row.value for row in read_jsonl([str(path)], **details)]


def test_written_parquet_is_read_by_us_and_by_pyarrow(tmp_path: Path) -> None:
    out = tmp_path / "d.parquet"
    with open_output(str(out)) as write_record:
        for row in ROWS:
            write_record(row)
        assert not out.exists()
    whole = [ROWS[0], {**ROWS[1], "messages": None}]
    assert values(out) == whole == parquet.read_table(out).to_pylist()
    assert [(row.value, row.where) for row in read_documents([str(out)])] == list(
        zip(whole, [f"{out}:1", f"{out}:2"], strict=True)
    )
    assert parquet.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"
    with open_output(str(tmp_path / "none.parquet")):
        pass
    assert values(tmp_path / "none.parquet") == []


def test_a_field_that_only_later_records_have_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llmkit.io.tables.GROUP_BYTES", 40)
    rows = [{"a": 1}, {"a": 2, "b": "x"}, {"c": {"d": 1}}, {"c": {"e": [2.5]}}, {"a": 3.5}]
    with open_output(str(tmp_path / "d.parquet")) as write_record:
        for row in rows:
            write_record(row)
    assert parquet.ParquetFile(tmp_path / "d.parquet").num_row_groups > 1
    found = values(tmp_path / "d.parquet")
    assert [row["a"] for row in found] == [1, 2, None, None, 3.5]
    assert [row["b"] for row in found] == [None, "x", None, None, None]
    assert found[2]["c"] == {"d": 1, "e": None} and found[3]["c"] == {"d": None, "e": [2.5]}


def test_the_types_of_columns_become_json(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.parquet",
        when=[datetime.datetime(2020, 1, 31)],
        price=[Decimal("1.5")],
        raw=["é".encode()],
        score=[float("nan")],
        map=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        kind=pa.array(["x"]).dictionary_encode(),
        counts=pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64())),
        nanoseconds=pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
        duration=pa.array([1_500_000_001], pa.duration("ns")),
        large=pa.array(["l"], pa.large_string()),
    )
    assert values(path) == [
        {
            "when": "2020-01-31T00:00:00",
            "price": 1.5,
            "raw": "é",
            "score": None,
            "map": {"k": 1},
            "kind": "x",
            "counts": {"1": 2},
            "nanoseconds": "2023-11-14T22:13:20.123456789Z",
            "duration": 1500000001,
            "large": "l",
        }
    ]


def test_bytes_that_are_not_text(tmp_path: Path, capsys) -> None:
    """A row with some is a bad record; a column of images is dropped with a note."""
    path = write(tmp_path / "d.parquet", text=[b"one", b"\xff", b"three"], image=[{"bytes": b"\x89PNG\xff"}] * 3)
    assert values(path, bad=BadRecords("1")) == [{"text": "one"}, {"text": "three"}]
    printed = capsys.readouterr().err
    assert "skipping columns of bytes: image" in printed and f"{path}:2" in printed


def test_a_column_of_hashes_costs_no_record(tmp_path: Path, capsys) -> None:
    """A binary column is dropped; in `--columns`, its values are bad records."""
    hashes = [bytes([200 + number] * 20) for number in range(50)]
    columns = {"text": ["a good row"] * 50, "sha": hashes, "id": [b"%d" % number for number in range(50)]}
    kind = pa.schema([("text", pa.string()), ("sha", pa.binary(20)), ("id", pa.binary())])
    parquet.write_table(pa.table(columns, schema=kind), tmp_path / "d.parquet")
    assert values(tmp_path / "d.parquet") == [{"text": "a good row", "id": f"{number}"} for number in range(50)]
    assert "d.parquet: skipping columns of bytes: sha" in capsys.readouterr().err
    with pytest.raises(UserError, match="not UTF-8"):
        values(tmp_path / "d.parquet", columns={"text": "sha"})


def test_a_parquet_from_a_pipe_and_under_any_name(tmp_path: Path, monkeypatch) -> None:
    data = Path(write(tmp_path / "d.parquet", text=["one", "two"])).read_bytes()
    (tmp_path / "nameless").write_bytes(data)
    assert values(tmp_path / "nameless") == [{"text": "one"}, {"text": "two"}]
    pipe = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
    pipe.seekable = lambda: False  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
    assert values("-") == [{"text": "one"}, {"text": "two"}]


def test_a_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    data = Path(write(tmp_path / "d.parquet", text=[f"text {number}" for number in range(500)])).read_bytes()
    chance = random.Random(0)
    failed = 0
    for trial in range(200):
        damaged = bytearray(data[: len(data) - trial * 7])
        for _ in range(3):
            damaged[chance.randrange(4, len(damaged))] = chance.randrange(256)
        (tmp_path / "x.parquet").write_bytes(damaged)
        try:
            values(tmp_path / "x.parquet", bad=BadRecords("1000"))
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'x.parquet'}: damaged or truncated Parquet") and "\n" not in str(
                error
            )
            failed += 1
    assert failed > 150


def test_a_row_group_of_any_size_is_streamed(tmp_path: Path) -> None:
    """Memory does not grow with the row group, because pages are read one at a time."""
    path = tmp_path / "large.parquet"
    texts = [random.Random(number).randbytes(2000).hex() for number in range(10_000)]
    parquet.write_table(pa.table({"text": texts}), path, row_group_size=10_000, use_dictionary=False)
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    for row in read_jsonl([str(path)]):
        assert len(row.value["text"]) == 4000
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert most < 20e6 < path.stat().st_size / 1.2


def deep(levels: int) -> dict:
    return {"a": deep(levels - 1)} if levels else {}


OF_SEVERAL_KINDS = [
    (["a", ["b"], None], ["a", '["b"]', None]),
    ([{"k": 1}, 2, True], ['{"k":1}', "2", "true"]),
    ([2**64, -1], ["18446744073709551616", "-1"]),
    ([{"n": 10**30}], ['{"n":1000000000000000000000000000000}']),
    ([2**60 + 1, 0.5], ["1152921504606846977", "0.5"]),  # no double has this value
    ([{str(n): n for n in range(2000)}], None),  # a column per word
    ([deep(100)], None),
]


@pytest.mark.parametrize(("given", "expected"), OF_SEVERAL_KINDS)
def test_values_that_no_column_holds_are_text(tmp_path: Path, monkeypatch, capsys, given: list, expected: list) -> None:
    """Nothing is lost or rounded, and no run fails at its end, with one or several row groups."""
    expected = expected or [json.dumps(value, separators=(",", ":")) for value in given]
    for size in (1 << 26, 10):
        monkeypatch.setattr("llmkit.io.tables.GROUP_BYTES", size)
        out = tmp_path / f"{size}.parquet"
        with open_output(str(out)) as write_record:
            for value in given:
                write_record({"field": value, "id": 7})
        assert parquet.read_table(out).to_pylist() == [{"field": value, "id": 7} for value in expected]
        assert "fields of mixed types, written as text or JSON: 'field'" in capsys.readouterr().err


def test_empty_objects_and_columns_of_nothing(tmp_path: Path) -> None:
    out = tmp_path / "d.parquet"
    rows = [{"a": {}, "b": [{"c": {}, "d": 1}], "e": None, "f": [], "g": "\0é"}, {"a": None, "b": [], "h": {"i": {}}}]
    with open_output(str(out)) as write_record:
        for row in rows:
            write_record(row)
    expected = [
        {"a": None, "b": [{"c": None, "d": 1}], "e": None, "f": [], "g": "\0é", "h": None},
        {"a": None, "b": [], "e": None, "f": None, "g": None, "h": {"i": None}},
    ]
    assert parquet.read_table(out).to_pylist() == values(out) == expected


def test_a_folder_of_parquet_appears_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llmkit.io.tables.GROUP_BYTES", 100)
    rows = [{"text": f"text {number}", "only": 1} if number else {"text": "text 0"} for number in range(100)]
    with open_bytes(f"{tmp_path}/docs/") as handle:
        handle.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        assert not (tmp_path / "docs").exists()
    files = sorted((tmp_path / "docs").iterdir())
    assert [path.name for path in files] == [f"part-0000{number}.parquet" for number in range(len(files))]
    schemas = [parquet.read_schema(path) for path in files]
    assert len(files) > 3 and all(schema == schemas[0] for schema in schemas)
    assert [row["text"] for path in files for row in values(path)] == [row["text"] for row in rows]
    with pytest.raises(RuntimeError), open_bytes(f"{tmp_path}/new/"):
        raise RuntimeError
    with pytest.raises(UserError, match=r"new/: expected a file name"), open_output(f"{tmp_path}/new/"):
        pass
    assert os.listdir(tmp_path) == ["docs"]


@pytest.mark.parametrize("count", [0, 3])
def test_other_programs_read_what_is_written(tmp_path: Path, count: int) -> None:
    duckdb, datasets = pytest.importorskip("duckdb"), pytest.importorskip("datasets")
    out = tmp_path / "d.parquet"
    turns = [{"role": "user", "content": "Hi", "tool_calls": []}, {"role": "assistant", "content": "Hello", "n": {}}]
    with open_output(str(out)) as write_record:
        for number in range(count):
            write_record({"messages": turns, "text": f"ß {number}", "none": None, "big": 2**70, "empty": {}})
    found = duckdb.sql(f"select text from '{out}'").fetchall()
    assert found == [(f"ß {number}",) for number in range(count)]
    if count:  # datasets cannot read an empty table
        read = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
        assert found == [(row["text"],) for row in read]
        assert read[2]["messages"][1]["content"] == "Hello" and read[0]["big"] == str(2**70)


@pytest.mark.parametrize(("name", "separator"), [("d.csv", ","), ("d.tsv", "\t"), ("D.CSV", ",")])
def test_csv_and_tsv(tmp_path: Path, name: str, separator: str) -> None:
    path = tmp_path / name
    path.write_text('\ufefftext,n\n"one, or\ntwo",1\n\n"say ""so""",\n'.replace(",", separator), encoding="utf-8")
    assert values(path) == [{"text": f"one{separator} or\ntwo", "n": "1"}, {"text": 'say "so"', "n": ""}]
    assert [row.where for row in read_documents([str(path)])] == [f"{path}:1", f"{path}:2"]
    path.write_text(f"text{separator}n\na{separator}1\nb{separator}2{separator}3\n")
    with pytest.raises(UserError, match=rf"{name}:2: expected 2 fields"):
        values(path)
    path.write_text(f"text{separator}text\na{separator}b\n")
    with pytest.raises(UserError, match=rf"{name}: expected unique column names on the first line"):
        values(path)
    path.write_text("text\n" + "a" * 1_000_000 + "\n")
    assert len(values(path)[0]["text"]) == 1_000_000
    path.write_bytes(b"text\n\xff\n")
    with pytest.raises(UserError, match=rf"{name}: not UTF-8 after row 0 \(byte 0xff\)"):
        values(path)
    path.write_text('text\n"a\n')
    with pytest.raises(UserError, match=rf"{name}: damaged after row 0 .* an unclosed quote"):
        values(path)


# ---- --columns


def named(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"d.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        names = list(rows[0])
        path.write_text("\n".join([",".join(names), *(",".join(row[name] for name in names) for row in rows)]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json"])
def test_columns_give_the_fields_their_names(tmp_path: Path, kind: str) -> None:
    path = named(tmp_path, kind, [{"content": "one", "text": "old", "id": "7"}])
    columns = parse_columns(["text=content"])
    assert values(path, columns=columns) == [{"text": "one", "id": "7"}]
    assert values(path, columns=parse_columns(["text=id, id=text"])) == [{"text": "7", "id": "old", "content": "one"}]
    assert values(path, columns={"a": "id", "b": "id"})[0] == {"a": "7", "b": "7", "content": "one", "text": "old"}
    assert values(path, columns={"text": "body|content|text"}) == [{"text": "one", "id": "7"}]
    assert values(path, columns={"text": "body|text"}) == values(path)  # one of several files may need it
    with pytest.raises(
        UserError, match=rf"^{path}[:1]*: expected (column|field) 'body' \(--columns\), found .*content"
    ):
        values(path, columns={"text": "body"})
    assert [row.value["text"] for row in read_documents([str(path)], columns=columns, fields=OF_DOCUMENT)] == ["one"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_within_a_column(tmp_path: Path, kind: str) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    path = named(tmp_path, kind, [{"chat": {"turns": turns, "n": 1}, "a.b": "x"}, {"chat": None, "a.b": "y"}])
    assert values(path, columns={"messages": "chat.turns", "id": "a.b"}) == [
        {"messages": turns, "id": "x", "chat": {"turns": turns, "n": 1}},
        {"messages": None, "id": "y", "chat": None},
    ]
    with pytest.raises(UserError, match=r"expected field 'chat.said' \(--columns\)"):
        values(path, columns={"messages": "chat.said"})


def test_only_the_columns_of_a_document_are_read(tmp_path: Path, monkeypatch) -> None:
    """Other columns are neither decompressed nor converted; an error about a missing text lists all columns."""
    path = tmp_path / "d.parquet"
    parquet.write_table(pa.Table.from_pylist([{"content": "one", "prompt": "p", "junk": "j", "source": "s"}]), path)
    read = lambda columns: next(read_documents([str(path)], None, None, columns, OF_DOCUMENT))  # noqa: E731
    assert read({"text": "content"}).value == {"text": "one", "prompt": "p", "source": "s"}
    with pytest.raises(UserError, match=r"expected field 'text' .* found \['content', 'junk', 'prompt', 'source'\]"):
        read({})


@pytest.mark.parametrize("text", ["text", "=content", "text=", "text=a,text=b", ""])
def test_columns_that_name_nothing(text: str) -> None:
    with pytest.raises(UserError, match="--columns: expected"):
        parse_columns([text])


# ---- unreadable files


def grow(path: Path) -> None:
    with open(path, "ab") as handle:
        handle.write(b'{"text": "late"}\n')


def replace_content(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("change", [grow, replace_content])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, kind: str, change) -> None:
    path = named(tmp_path, kind.removesuffix(".gz"), [{"text": f"text {number}"} for number in range(50)])
    if kind.endswith(".gz"):
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes()))
    rows = read_jsonl([str(path)])
    next(rows)
    change(path)
    with pytest.raises(UserError, match=rf"{kind}.*: (changed while it was read|damaged)"):
        list(rows)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": [{"en": "one"}]}, "expected 'text' to be a string, found an object"),
        ({"text": [["one", "two"]]}, "expected 'text' to be a string, found a list"),
        ({"text": [1.5]}, "expected 'text' to be a string, found a number"),
        ({"text": [[b"one"]], "id": [1]}, r"expected field 'text' \(a document\), found \['id'\]"),
        ({"body": ["one"], "id": [1]}, r"expected field 'text' \(a document\), found \['body', 'id'\]"),
    ],
)
def test_a_column_that_is_not_text(tmp_path: Path, table: dict, message: str) -> None:
    path = write(tmp_path / "d.parquet", **table)
    with pytest.raises(UserError, match=rf"^{path}:1: {message}"):
        list(read_documents([path], None, BadRecords("1%"), {}, OF_DOCUMENT))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected Parquet, found an empty file"),
        (b"<html>404", r"expected Parquet, found a file that begins with b'<html>404'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer .* git lfs pull"),
        (b"PAR1", "damaged or truncated Parquet"),
    ],
)
def test_an_invalid_parquet_file_is_not_read_as_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.parquet").write_bytes(content)
    with pytest.raises(UserError, match=rf"d\.parquet: {message}"):
        list(read_documents([str(tmp_path / "d.parquet")]))


@pytest.mark.parametrize("name", ["d.csv?version=1", "d.csv.gz?a=b/c.txt#part"])
def test_a_query_is_not_part_of_a_name(name: str) -> None:
    """Regression: a CSV file at such a URL was read as one document of plain text."""
    with file_server() as server:
        data = b"text\none\ntwo\n"
        server.files[name.partition("#")[0]] = gzip.compress(data) if ".gz" in name else data
        documents = [row.value for row in read_documents([server.address + name])]
    assert documents == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("some", "other"), [(2.5, True), ([2.5], [True]), ([2.5, False], None), ({"b": [1.5]}, {"b": [2.5, True]})]
)
def test_booleans_among_floats_are_written_as_they_are(tmp_path: Path, some: object, other: object) -> None:
    """Regression: they became 1.0 and 0.0 after a float."""
    for rows in ([some, other], [other, some]):
        with open_output(str(tmp_path / "d.parquet"), force=True) as write:
            for value in rows:
                write({"a": value})
        read = [row["a"] and json.loads(row["a"]) for row in values(tmp_path / "d.parquet")]
        assert json.dumps(read) == json.dumps(rows)
