"""Remote files from real local servers."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmkit import cli
from llmkit.crawl.output import parts_of
from llmkit.crawl.page import Outcome, Part
from llmkit.errors import UserError
from llmkit.io import remote
from llmkit.io.jsonl import check_inputs, input_files, open_output, open_packed, read_jsonl
from llmkit.io.manifest import describe_inputs
from llmkit.io.pool import Work
from llmkit.io.remote import matching, open_remote
from llmkit.io.resume import Kept
from llmkit.stages.crawl_filter import CrawlFilterConfig, run
from tests.helpers.file_server import FileServer, file_server
from tests.helpers.object_store import ObjectStore
from tests.helpers.web import Record, html, mixed_pages, prose, write_warc

DATA = random.Random(0).randbytes(3_000_000)
ROWS = [{"text": f"text {number}"} for number in range(2000)]
MODEL = {"config.json": b"{}", "model.safetensors": bytes(100)}
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.fixture
def server(monkeypatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    with file_server() as server:
        server.files["f"] = DATA
        yield server


def read(address: str) -> bytes:
    with open_remote(address) as file:
        return b"".join(iter(lambda: file.read(1 << 18), b""))


@pytest.mark.parametrize("ways", ["", "norange", "cut", "cut norange", "short", "busy", "busy cut"])
def test_every_byte_is_read_once_from_any_server(server: FileServer, ways: str) -> None:
    server.ways = set(ways.split())
    assert read(server.address + "f") == DATA
    if not ways:
        assert server.requests == ["bytes=0-"]  # one request for a complete file


def test_a_file_is_seekable_if_the_server_has_ranges(server: FileServer) -> None:
    with open_remote(server.address + "f") as file:
        assert file.seekable()
        file.seek(-1000, 2)
        assert file.read() == DATA[-1000:]
        file.seek(100)
        assert file.read(100) == DATA[100:200]
    server.ways = {"norange"}
    with open_remote(server.address + "f") as file:
        assert not file.seekable()
    server.files["empty"] = b""
    server.ways = set()
    assert read(server.address + "empty") == b""


@pytest.mark.parametrize(
    ("path", "ways", "message"),
    [
        ("none", "", r"/none: expected a file, found none there \(404\)"),
        ("f", "lie norange", r"/f: cannot be read after 6 attempts \(it ended at byte 3,000,000 of 3,001,000\)"),
    ],
)
def test_an_unreadable_url_is_an_error_in_one_line(server: FileServer, path: str, ways: str, message: str) -> None:
    server.ways = set(ways.split())
    with pytest.raises(UserError, match=message):
        read(server.address + path)


def test_a_file_that_changes_while_it_is_read(server: FileServer) -> None:
    server.ways = {"short"}
    with pytest.raises(UserError, match="/f: changed while it was read"), open_remote(server.address + "f") as file:
        file.read(1 << 18)
        server.version = "2"
        file.read()


def test_no_server_and_no_such_kind_of_address(monkeypatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/f: cannot be read after 6 attempts"):
        check_inputs(["http://127.0.0.1:9/f"])
    for address, told in (
        ("ftp://127.0.0.1:9/a", "expected an address that begins with https:// s3:// gs:// or hf://"),
        ("http://127.0.0.1:99999/a", "invalid address"),
        ("https://[bad/x", "invalid address"),
        ("http://", "invalid address"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(address)}: {told}"):
            check_inputs([address])


def test_records_are_read_from_urls(server: FileServer, tmp_path) -> None:
    """JSONL, compressed or not, and Parquet, from servers with and without ranges."""
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    server.files = {
        "d.jsonl": LINES,
        "d.jsonl.gz": gzip.compress(LINES),
        "d.parquet": (tmp_path / "d.parquet").read_bytes(),
    }
    for server.ways in (set(), {"norange"}):
        for name in server.files:
            address = server.address + name
            check_inputs([address])
            assert [row.value for row in read_jsonl([address])] == ROWS
    assert describe_inputs([server.address + "d.jsonl"]) == [
        {"path": server.address + "d.jsonl", "bytes": len(LINES), "version": "1"}
    ]


def test_a_crawl_is_read_from_urls_and_from_a_list_of_them(server: FileServer, tmp_path, monkeypatch, capsys) -> None:
    """The same documents as from disk; a missing file of the list is counted."""
    write_warc(tmp_path / "c.warc.gz", mixed_pages())
    parquet.write_table(
        pa.Table.from_pylist([{"text": "one page", "url": "http://a.example/"}]), tmp_path / "d.parquet"
    )
    names = ["c.warc.gz", "d.parquet"]
    server.files = {name: (tmp_path / name).read_bytes() for name in names}
    server.files["paths.gz"] = gzip.compress(b"c.warc.gz\nnone.warc.gz\nd.parquet\n")
    server.ways = {"cut"}

    monkeypatch.chdir(tmp_path)

    def documents(*arguments: str) -> list[str]:
        crawl_filter(*arguments, "--only", "extract", "-o", "o.jsonl", "--force")
        assert ("bad_file" in capsys.readouterr().err) == (arguments == tuple(listed))
        lines = (tmp_path / "o.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    listed = ["--list", server.address + "paths.gz", "--base", server.address]
    from_disk = documents(*names)
    assert from_disk[-1] == "one page"
    assert documents(*(server.address + name for name in names)) == from_disk
    assert documents(*listed) == from_disk
    read = json.loads((tmp_path / "o.jsonl.manifest.json").read_text())["inputs"]
    sizes = {item["path"].rpartition("/")[2]: item["bytes"] for item in read}
    assert sizes == {"paths.gz": ANY, **{name: len(server.files[name]) for name in names}, "none.warc.gz": None}
    assert all(item["version"] for item in read if item["bytes"])
    assert documents(*listed, "--take", "1/2") in (from_disk[:-1], from_disk[-1:])
    for wrong, told in (
        (["--take", "1/2"], "--take: needs --list"),
        ([*listed, "--take", "2"], "--take 2: expected a share such as 1/100"),
        ([server.address + "none"], "/none: expected a file, found none there (404)"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            crawl_filter(*wrong, "-o", "x.jsonl")
        assert not (tmp_path / "x.jsonl").exists()


def crawl_filter(*arguments: str) -> None:
    cli.parse(["crawl-filter", "--workers", "1", *arguments])()  # pyright: ignore[reportCallIssue]


def test_a_resumed_crawl_reads_no_address_again_that_it_has_finished(server: FileServer, tmp_path) -> None:
    """Files that could not be opened are retried, even the first; changed files are read again."""
    inputs = []
    for seed in range(3):
        pages = [Record(f"https://{seed}.example/{n}", html("A", prose(20 * seed + n))) for n in range(9)]
        write_warc(tmp_path / "pages.warc.gz", pages)
        server.files[f"{seed}.warc.gz"] = (tmp_path / "pages.warc.gz").read_bytes()
        inputs.append(f"{server.address}{seed}.warc.gz")

    def run(resume: bool = True) -> tuple[list[tuple[str, int]], dict[str, str]]:
        """Return the records and the requests by file; the state stays as after a kill."""
        server.paths.clear(), server.requests.clear()
        state = Kept(tmp_path / "state", {}, resume=resume)
        parts = parts_of(inputs, echo, 1, state=state, on_bad=lambda error: None)
        records = [(outcome.path, outcome.offset) for _, part in parts for outcome in part.outcomes]
        return records, dict(zip(server.paths, server.requests, strict=True))

    whole, _ = run(resume=False)
    assert run() == (whole, dict.fromkeys(("/0.warc.gz", "/1.warc.gz", "/2.warc.gz"), "bytes=0-0"))
    first, last = server.files.pop("0.warc.gz"), server.files.pop("2.warc.gz")
    run(resume=False)
    server.files |= {"0.warc.gz": first, "2.warc.gz": last}
    assert run() == (whole, {"/0.warc.gz": "bytes=0-", "/1.warc.gz": "bytes=0-0", "/2.warc.gz": "bytes=0-"})
    server.version = "2"
    assert run() == (whole, dict.fromkeys(("/0.warc.gz", "/1.warc.gz", "/2.warc.gz"), "bytes=0-"))


def echo() -> Work:
    """A worker that returns the position of each frame."""
    return lambda batch: [Part([Outcome(None, None, frame.path, frame.offset) for frame in batch.frames])]


def test_a_crawl_of_a_file_that_changes_ends_and_is_resumed(server: FileServer, tmp_path, monkeypatch) -> None:
    """A single file ends the run, one of several is counted; no incomplete output appears."""
    monkeypatch.chdir(tmp_path)
    noise = random.Random(0)
    pages = [
        Record(f"https://a.example/{n}", html("A", prose(n), f"<!-- {noise.randbytes(60_000).hex()} -->"))
        for n in range(20)
    ]
    write_warc(tmp_path / "a.warc.gz", pages)
    server.files = {"a.warc.gz": (tmp_path / "a.warc.gz").read_bytes(), "b.jsonl": LINES}
    options = {"only": ("extract",), "workers": 1, "quiet": True, "out": "out.jsonl"}
    archive, lines = server.address + "a.warc.gz", server.address + "b.jsonl"
    run(CrawlFilterConfig(**{**options, "out": "whole.jsonl"}, inputs=("a.warc.gz",)))
    server.ways = {"short", "changes"}
    with pytest.raises(UserError, match=r"a.warc.gz: changed while it was read; .*--resume continues"):
        run(CrawlFilterConfig(**options, inputs=(archive,)))
    assert not list(tmp_path.glob("out.jsonl")) and not list(tmp_path.glob("*.partial"))
    server.ways = {"short"}
    run(CrawlFilterConfig(**options, inputs=(archive,), resume=True))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    server.ways = {"short", "changes"}
    summary = run(CrawlFilterConfig(**options, inputs=(archive, lines), force=True))
    assert summary is not None and summary.dropped["read"] == 2 and summary.documents > len(ROWS)  # warcinfo, this file


def test_the_same_bytes_come_from_disk_from_the_web_and_from_a_bucket(
    server: FileServer, bucket: ObjectStore, tmp_path, monkeypatch
) -> None:
    """Archives (one truncated), JSONL and Parquet; documents, rejects and counts."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"Page {number}. " * 5, "id": number} for number in range(300)]
    write_warc(tmp_path / "a.warc.gz", mixed_pages())
    (tmp_path / "b.warc.gz").write_bytes((tmp_path / "a.warc.gz").read_bytes()[:-300])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    names = sorted(path.name for path in tmp_path.iterdir())
    server.files = {name: (tmp_path / name).read_bytes() for name in names}
    server.ways = {"cut"}
    for name, data in server.files.items():
        bucket.client().put_object(Bucket="bucket", Key=f"crawl/{name}", Body=data)

    def crawled(place: str) -> tuple[bytes, bytes, dict[str, int]]:
        inputs = tuple(place + name for name in names)
        options = {"only": ("extract", "c4", "exact_duplicates"), "workers": 1, "quiet": True, "force": True}
        summary = run(CrawlFilterConfig(inputs=inputs, out="out.jsonl", rejects="rejects.jsonl", **options))
        assert summary is not None and summary.documents > 0
        rejects = Path("rejects.jsonl").read_bytes().replace(place.encode(), b"")  # ids are PLACE:OFFSET
        return Path("out.jsonl").read_bytes(), rejects, summary.dropped

    from_disk = crawled("")
    assert crawled(server.address) == from_disk
    assert crawled("s3://bucket/crawl/") == from_disk


@pytest.fixture(scope="module")
def object_server(object_server: ObjectStore) -> ObjectStore:
    """A server with read.bin, blocks.bin, two tables and a model in its bucket."""
    files = {"read.bin": DATA, "blocks.bin": DATA[: 2 << 20], "t/a.jsonl": LINES, "t/u/b.jsonl": LINES}
    for name, data in (files | {f"model/{name}": data for name, data in MODEL.items()}).items():
        object_server.client().put_object(Bucket="bucket", Key=name, Body=data)
    return object_server


@pytest.fixture
def bucket(bucket: ObjectStore, monkeypatch) -> ObjectStore:
    monkeypatch.setattr(remote, "BLOCK", 1 << 20)
    return bucket


def test_a_bucket_is_read_in_blocks(bucket: ObjectStore) -> None:
    assert read("s3://bucket/read.bin") == DATA
    with open_remote("s3://bucket/read.bin") as file:
        file.seek(1_500_000)
        assert file.read(10) == DATA[1_500_000:1_500_010]
    assert matching("s3://bucket/**/*.jsonl") == ["s3://bucket/t/a.jsonl", "s3://bucket/t/u/b.jsonl"]
    assert [row.value for row in read_jsonl(["s3://bucket/t/a.jsonl"])] == ROWS
    for given in ("s3://bucket/t/", "s3://bucket/t/**/*.jsonl"):
        bucket.requests.clear()
        assert input_files([given]) == ["s3://bucket/t/a.jsonl", "s3://bucket/t/u/b.jsonl"]
        assert not [path for method, path in bucket.requests if path.endswith(".jsonl")]  # no request per object
    with pytest.raises(UserError, match=r"^s3://bucket/none/"):
        input_files(["s3://bucket/none/"])


def test_columns_of_a_table_in_a_bucket_are_fetched_once(bucket: ObjectStore, tmp_path) -> None:
    """Their values are megabytes apart and are read alternately."""
    noise = random.Random(0)
    rows = [{"text": noise.randbytes(1500).hex(), "id": noise.randbytes(1500).hex()} for _ in range(2000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", compression="zstd")
    data = (tmp_path / "t.parquet").read_bytes()
    bucket.client().put_object(Bucket="bucket", Key="t.parquet", Body=data)
    bucket.requests.clear()
    assert [row.value for row in read_jsonl(["s3://bucket/t.parquet"])] == rows
    assert bucket.requests.count(("GET", "/bucket/t.parquet")) == -(-len(data) // remote.BLOCK) >= 5


def test_a_bucket_without_sizes_is_read_to_the_end(bucket: ObjectStore, monkeypatch) -> None:
    from s3fs import S3FileSystem

    info = S3FileSystem._info

    async def without_size(system: S3FileSystem, path: str, **details) -> dict:
        return {**await info(system, path, **details), "size": None}

    monkeypatch.setattr(S3FileSystem, "_info", without_size)
    assert read("s3://bucket/read.bin") == DATA
    assert read("s3://bucket/blocks.bin") == DATA[: 2 << 20]  # its last block is full
    with open_remote("s3://bucket/read.bin") as file:
        assert not file.seekable()  # cannot seek from the end


@pytest.mark.parametrize("name", ["n.jsonl.gz", "n.jsonl.zst", "n.parquet"])
def test_a_file_that_changes_during_reading_is_not_reported_as_damaged(
    bucket: ObjectStore, tmp_path, name: str
) -> None:
    noise = random.Random(0)
    with open_output(str(tmp_path / name)) as write:
        for _ in range(3000):
            write({"text": noise.randbytes(1500).hex()})
    data = (tmp_path / name).read_bytes()
    bucket.client().put_object(Bucket="bucket", Key=name, Body=data)
    with pytest.raises(UserError, match=rf"^s3://bucket/{name}: changed while it was read"):
        for row in read_jsonl([f"s3://bucket/{name}"]):
            if row.line == 1:
                bucket.client().put_object(Bucket="bucket", Key=name, Body=data[::-1])


@pytest.mark.parametrize("size", [3_000_000, 1_500_000])
def test_a_file_in_a_bucket_that_changes_while_it_is_read(bucket: ObjectStore, size: int) -> None:
    bucket.client().put_object(Bucket="bucket", Key="new.bin", Body=DATA)
    with (
        pytest.raises(UserError, match=r"^s3://bucket/new.bin: changed while it was read"),
        open_packed("s3://bucket/new.bin") as file,
    ):
        file.read(1 << 18)
        bucket.client().put_object(Bucket="bucket", Key="new.bin", Body=bytes(size))
        file.read()


def test_a_model_folder_of_a_bucket_is_kept_in_the_cache(bucket: ObjectStore, monkeypatch, tmp_path) -> None:
    from llmkit.io import hub

    monkeypatch.setattr(hub, "_models", {})
    with pytest.raises(UserError, match=r"^s3://bucket/model/: expected --cache DIR"):
        hub.local_folder("s3://bucket/model/")
    monkeypatch.setattr(remote.settings, "cache", str(tmp_path))
    folder = hub.local_folder("s3://bucket/model/")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert hub.local_folder("s3://bucket/model", weights=True) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MODEL
    assert hub.fetched("s3://bucket/model/")["files"][0] == {
        "path": "config.json",
        "bytes": 2,
        "sha256": hub.file_sha256(folder / "config.json"),
    }
    for address in ("s3://bucket/none/", "s3://no-bucket/model", "s3://bucket/model/config.json"):
        with pytest.raises(UserError, match=f"^{address}: expected a model folder, found nothing"):
            hub.local_folder(address)
    with pytest.raises(UserError, match=r"^s3://bucket/t: expected model.safetensors or .*, found a.jsonl"):
        hub.check_weights("s3://bucket/t")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/none", "a file, found none there"),
        ("s3://no-bucket/a", "a bucket, found none there"),
        ("s3://bucket/t", "a file, found a folder"),
    ],
)
def test_missing_objects_of_a_bucket(bucket: ObjectStore, address: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{address}: expected {message}"):
        check_inputs([address])
    with pytest.raises(UserError, match=r"^s3://bucket/none/.*: expected files that match this pattern, found none"):
        matching("s3://bucket/none/*")
    with pytest.raises(UserError, match=r"^https://a.example/\*: a web server does not list its files"):
        matching("https://a.example/*")


def test_a_bucket_without_credentials_is_read_anonymously(bucket: ObjectStore, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"^s3://bucket/read.bin: not allowed .*check the credentials"):
        check_inputs(["s3://bucket/read.bin"])
