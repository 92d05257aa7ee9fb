"""Every kind of input becomes pages: files, folders, pipes; anything else is an error in one line."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import orjson
import pytest
import zstandard
from archives import ARC_HEAD, HTML, arc, http, members, page, record

from llmkit.crawl.page import Page, Skipped
from llmkit.crawl.read.frames import Reader, batches
from llmkit.crawl.read.pages import page_of
from llmkit.errors import UserError

TEXTS = [b"one", b"two" * 400, b"three"]


def read(*paths: Path | str, page_bytes: int = 1 << 30, **options) -> list[Page | Skipped]:
    """Return all records of some inputs, read by a worker, so that batches are pickled."""
    work = [pickle.loads(pickle.dumps(batch)) for batch in batches(Reader(map(str, paths), **options))]
    return [page_of(frame, page_bytes) for batch in work for frame in batch.frames]


def from_stdin(monkeypatch, data: bytes, **options) -> list[Page | Skipped]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return read("-", **options)


def bodies(records: list[Page | Skipped]) -> list:
    return [one.html or one.text for one in records if isinstance(one, Page)]


def reasons(records: list[Page | Skipped]) -> list[str]:
    return [one.reason for one in records if isinstance(one, Skipped)]


RECORDS = [record(b"software: x", "warcinfo"), *map(page, TEXTS)]
ARC = ARC_HEAD + b"".join(arc(http(HTML % text)) for text in TEXTS)
ARCHIVES = {
    "x.warc": b"".join(RECORDS),
    "x.warc.gz": members(RECORDS),
    "one.warc.gz": gzip.compress(b"".join(RECORDS)),
    "x.warc.zst": zstandard.compress(b"".join(RECORDS)),
    "x.arc": ARC,
    "x.arc.gz": gzip.compress(ARC),
    "nameless": members(RECORDS),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_the_same_from_a_file_a_pipe_and_stdin(monkeypatch, tmp_path, name):
    (tmp_path / name).write_bytes(ARCHIVES[name])
    from_file = read(tmp_path / name)
    assert bodies(from_file) == [HTML % text for text in TEXTS]
    assert reasons(from_file) == ["warcinfo"]
    piped = from_stdin(monkeypatch, ARCHIVES[name])
    assert [(one.offset, one.url) for one in piped] == [(one.offset, one.url) for one in from_file]
    assert bodies(piped) == bodies(from_file)
    assert {one.path for one in piped} == {"stdin"}


def test_wet_is_ready_text(tmp_path):
    texts = ["Eins.\nZwei.", "Drei"]
    records = [record(b"x", "warcinfo"), *(record(text.encode(), "conversion") for text in texts)]
    (tmp_path / "x.warc.wet.gz").write_bytes(members(records))
    assert [one.text for one in read(tmp_path / "x.warc.wet.gz") if isinstance(one, Page)] == texts


LINES = [
    {"html": "<p>ä", "url": "http://a.example/", "id": 7, "mine": {"x": [1]}},
    {"text": "words", "lang": "en"},
    {"html": None, "text": "more"},
    {"html": "<p>both", "text": "dropped", "url": None},
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.ndjson", "nameless"])
def test_lines_of_json_keep_what_is_unknown_and_their_numbers(tmp_path, name):
    data = b"\xef\xbb\xbf" + b"\n".join([*map(orjson.dumps, LINES[:2]), b"", b"  ", *map(orjson.dumps, LINES[2:])])
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(data))
    path = str(tmp_path / name)
    assert read(path) == [
        Page(path, 1, "http://a.example/", "<p>ä", None, None, {"id": 7, "mine": {"x": [1]}}),
        Page(path, 2, None, None, None, "words", {"lang": "en"}),
        Page(path, 5, None, None, None, "more", {}),
        Page(path, 6, None, "<p>both", None, None, {"url": None}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"url": "x"}', "no_text"),
        (b'{"text": 5}', "no_text"),
        (b'{"text": null}', "no_text"),
        (b'{"html": ["x"]}', "no_text"),
        (b"[1]", "bad_json"),
        (b'{"text": "x', "bad_json"),
        (b'{"text": "\xff"}', "bad_json"),
        (b'{"text": "\\ud800"}', "bad_json"),
        (b'{"text": "x", "score": NaN}', "bad_json"),
    ],
)
def test_a_bad_line_is_skipped_with_its_place(tmp_path, line, reason):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    first, bad, last = read(tmp_path / "x.jsonl")
    assert (first.text, last.text) == ("fine", "fine too")
    assert (bad.offset, bad.reason) == (2, reason)


@pytest.mark.parametrize(("name", "pack"), [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)])
def test_a_cut_file_of_lines_gives_the_whole_ones(tmp_path, name, pack):
    lines = [b'{"text": "%s"}\n' % os.urandom(50).hex().encode() for _ in range(5000)]
    packed = pack(b"".join(lines))
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    *pages, last = read(tmp_path / name)
    assert last.reason == "truncated" and last.offset == len(pages) + 1
    assert 1000 < len(pages) < 4000
    assert [page.text for page in pages] == [orjson.loads(line)["text"] for line in lines[: len(pages)]]


def test_a_cut_zstd_archive_gives_its_whole_records(tmp_path):
    packed = b"".join(map(zstandard.compress, RECORDS))
    (tmp_path / "x.warc.zst").write_bytes(packed[:-10])
    records = read(tmp_path / "x.warc.zst")
    assert bodies(records) == [HTML % text for text in TEXTS[:-1]]
    assert reasons(records) == ["warcinfo", "truncated"]


@pytest.mark.parametrize("pack", [bytes, zstandard.compress])
def test_a_zstd_archive_may_bring_its_dictionary(tmp_path, pack):
    dictionary = zstandard.train_dictionary(4096, [page(b"word %d" % number * 9) for number in range(400)])
    held = pack(dictionary.as_bytes())
    packer = zstandard.ZstdCompressor(dict_data=dictionary)
    frames = b"".join(map(packer.compress, RECORDS))
    (tmp_path / "x.warc.zst").write_bytes(b"\x5d\x2a\x4d\x18" + len(held).to_bytes(4, "little") + held + frames)
    assert bodies(read(tmp_path / "x.warc.zst")) == [HTML % text for text in TEXTS]


def test_a_zstd_bomb_comes_out_in_steps(tmp_path):
    block = ((131072 << 3) | 2).to_bytes(3, "little") + b"a"  # 128 kB of one byte in 4
    last = ((131072 << 3) | 3).to_bytes(3, "little") + b"a"
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\x88" + block * 3000 + last)
    tracemalloc.start()
    assert reasons(read(tmp_path / "x.jsonl.zst")) == ["too_large"]
    assert tracemalloc.get_traced_memory()[1] < 300_000_000
    tracemalloc.stop()


def test_a_folder_is_walked_in_order_and_nothing_in_it_is_lost(tmp_path):
    for name, data in {
        "b.htm": b"<p>b",
        "a/z.HTML": b"z",
        "a/index.html?x=1": b"<!doctype html>i",
        "a/style.css": b"p {}",
        "a/package.json": b"{}",
        "c.warc.gz": members(RECORDS[1:2]),
        "d.jsonl": b'{"text": "d"}',
        "e.xhtml": b"<html>e",
        "empty.html": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "gone.html").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    records = read(tmp_path)
    told = [(os.path.relpath(one.path, tmp_path), getattr(one, "reason", "page")) for one in records]
    assert told == [
        ("a/index.html?x=1", "page"),
        ("a/package.json", "not_html"),
        ("a/style.css", "not_html"),
        ("a/z.HTML", "page"),
        ("b.htm", "page"),
        ("c.warc.gz", "page"),
        ("d.jsonl", "page"),
        ("e.xhtml", "page"),
        ("empty.html", "empty"),
        ("gone.html", "unreadable"),
        ("pipe", "unreadable"),
    ]


def test_a_single_page_may_be_the_input(monkeypatch, tmp_path):
    (tmp_path / "x.html").write_bytes(b"just words")
    assert bodies(read(tmp_path / "x.html")) == [b"just words"]
    assert bodies(from_stdin(monkeypatch, b"\n <p>hi")) == [b"\n <p>hi"]
    (tmp_path / "x.html.gz").write_bytes(gzip.compress(b"<p>packed"))
    assert bodies(read(tmp_path / "x.html.gz")) == [b"<p>packed"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.warc.gz", b"", "no WARC records: the file is empty"),
        ("x.warc", b"words, not records", "no WARC records: it begins with b'words, not recor'"),
        ("x.warc.gz", gzip.compress(b"words"), "no WARC records: it begins with b'words'"),
        ("x.warc.gz", members(RECORDS[:1])[:60], "no WARC records: it ends inside the first one"),
        ("x.arc", b"words, lines\n", "no ARC records: it begins with b'words, lines"),
        (
            "x.pdf",
            b"%PDF-1.4",
            "expected WARC, ARC, WET, HTML, JSONL, Parquet or CSV, found a file that begins with b'%PDF-1.4'",
        ),
        ("x", b"", "expected WARC, ARC, WET, HTML, JSONL, Parquet or CSV, found an empty file"),
        ("x.jsonl", b"\n\n", "no JSON lines: it begins with"),
    ],
    ids=["empty", "words", "packed words", "cut", "arc", "pdf", "nothing", "lines"],  # compressed: with the time
)
def test_a_file_without_records_is_a_user_error(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as raised:
        read(tmp_path / name)
    assert f"{name}: {message}" in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_and_an_empty_folder_are_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"gone\.warc\.gz: expected a readable file"):
        read(tmp_path / "gone.warc.gz")
    with pytest.raises(UserError, match=r"gone\.html: expected a readable file"):
        read(tmp_path / "gone.html")
    with pytest.raises(UserError, match="expected files in this folder, found none"):
        read(tmp_path)
    with pytest.raises(UserError, match="stdin: expected WARC"):
        from_stdin(monkeypatch, b"")


def test_too_large_records_are_skipped_in_every_format(tmp_path):
    large = b"<p>" + b"x" * 5000
    (tmp_path / "a.html").write_bytes(large)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + large + b'"}\n{"text": "small"}\n')
    (tmp_path / "c.warc.gz").write_bytes(members([page(large), page(b"small")]))
    (tmp_path / "d.warc").write_bytes(page(large) + page(b"small"))
    records = read(tmp_path, max_page_bytes=1000)
    assert reasons(records) == ["too_large"] * 4
    assert bodies(records) == ["small", HTML % b"small", HTML % b"small"]


def test_batches_grow_and_end_with_what_was_read_before_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%d"}\n' % number for number in range(200)))
    reader, sizes = Reader([str(tmp_path / "a.jsonl"), str(tmp_path / "gone.jsonl")]), []
    with pytest.raises(UserError, match=r"gone\.jsonl: expected a readable file"):
        for batch in batches(reader):
            sizes.append(len(batch.frames))
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 64, 9]
    assert reader.position == (tmp_path / "a.jsonl").stat().st_size


def test_the_first_records_of_a_pipe_are_there_before_the_last(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from llmkit.crawl.read.frames import Reader, batches\n"
        "print(next(batches(Reader(['-']))).frames[0].data.decode(), end='', flush=True)\n"
        "sys.stdin.buffer.read()"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[3])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b'{"text": "first"}\n' + b'{"text": "more and more words"}\n' * 12_000)
        process.stdin.flush()
        assert process.stdout.readline() == b'{"text": "first"}\n'  # while stdin is still open
        process.stdin.close()


ODD = {
    "cc.warc.gz": (1, {}),
    "example-bad-non-chunked.warc.gz": (1, {"warcinfo": 2, "request": 2, "revisit": 1}),
    "example-digest.warc": (0, {"request": 4}),
    "example-iana.org-chunked.warc": (1, {"warcinfo": 1, "request": 1}),
    "example-resource.warc.gz": (1, {"warcinfo": 2}),
    "example-space-in-target-uri.warc.gz": (0, {"warcinfo": 1, "not_html": 1}),
    "example-space-in-url.arc": (0, {"warcinfo": 1, "truncated": 1}),  # 13 bytes shorter than the stated length
    "example.arc": (1, {"warcinfo": 1}),
    "example.arc.gz": (1, {"warcinfo": 1}),
    "example.warc": (1, {"warcinfo": 2, "request": 2, "revisit": 1}),
    "example.warc.gz": (1, {"warcinfo": 2, "request": 2, "revisit": 1}),
    "post-test.warc.gz": (0, {"not_html": 3, "request": 3}),
    "whirlwind.warc": (1, {"warcinfo": 1, "request": 1, "metadata": 1}),
    "whirlwind.warc.gz": (1, {"warcinfo": 1, "request": 1, "metadata": 1}),
    "whirlwind.warc.wat.gz": (0, {"warcinfo": 1, "metadata": 1}),
    "whirlwind.warc.wet": (1, {"warcinfo": 1}),
    "whirlwind.warc.wet.gz": (1, {"warcinfo": 1}),
}


def test_each_odd_archive_ends_in_records_or_in_counted_skips(shared_data):
    folder = shared_data / "web" / "odd"
    found = {}
    for path in sorted(folder.iterdir()):
        records = read(path)
        why = reasons(records)
        found[path.name] = (len(bodies(records)), {reason: why.count(reason) for reason in why})
        assert all(one.path == str(path) and one.offset >= 0 for one in records)
    assert found == ODD
