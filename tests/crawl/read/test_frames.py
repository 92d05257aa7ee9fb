"""Complete records are found in archives that are truncated, damaged or mixed with garbage."""

from __future__ import annotations

import gzip
import io
import random
import zlib
from pathlib import Path

import pytest
from archives import ARC_HEAD, HTML, arc, http, members, page, record
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.crawl.page import Skipped
from llmkit.crawl.read.frames import Reader, Records, Window
from llmkit.crawl.read.pages import page_of
from llmkit.errors import UserError


def read(path: Path | str, **options) -> list[tuple]:
    """Return all records: (offset, reason), or (offset, html, url, text) for a page."""
    found = [page_of(frame) for frame in Reader([str(path)], **options)]
    return [(p.offset, p.reason) if isinstance(p, Skipped) else (p.offset, p.html, p.url, p.text) for p in found]


def htmls(records: list[tuple]) -> list[bytes]:
    return [html for _, html, *_ in records if isinstance(html, bytes)]


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


GARBAGE = [
    b"garbage",
    b"\x1f\x8b\x08\x00",
    b"WARC/1.0\r\nnothing\r\n\r\n",
    b"\r\n\r\n\0\0",
    noise(5, 3000),
    b"WARC/1.0\r\n",
]
RECORDS = st.lists(
    st.one_of(
        st.builds(lambda seed, size: page(noise(seed, size)), st.integers(0, 99), st.integers(0, 9000)),
        st.builds(lambda size: page(b"word " * size), st.integers(0, 2000)),
        st.just(record(b"", "metadata")),
        st.sampled_from([page(b"as in WARC/1.0\r\nWARC-Type: response\r\n\r\n"), page(members([page(b"inner")], 0))]),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("packed", [True, False])
@settings(max_examples=60, deadline=None)
@given(records=RECORDS, where=st.randoms(use_true_random=False))
def test_garbage_between_records_is_one_skip_and_costs_no_record(tmp_path_factory, packed, records, where):
    pieces = [gzip.compress(one) for one in records] if packed else records
    mixed, strange = pieces[:1], 0
    for piece in pieces[1:]:
        if where.random() < 0.4:
            mixed.append(where.choice(GARBAGE[:1] + GARBAGE[4:5] if packed else GARBAGE[:1]))
            strange += 1
        mixed.append(piece)
    path = tmp_path_factory.mktemp("a") / ("x.warc.gz" if packed else "x.warc")
    path.write_bytes(b"".join(mixed))
    found = read(path)
    assert len(found) == len(records) + strange
    assert [reason for _, reason, *_ in found].count("garbage") == strange


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_any_garbage_is_passed_over(tmp_path, name, garbage):
    records = [page(b"one"), page(b"two")]
    first, second = map(gzip.compress, records) if name.endswith("gz") else records
    (tmp_path / name).write_bytes(first + garbage + second + garbage)
    assert htmls(read(tmp_path / name)) == [HTML % b"one", HTML % b"two"]


KINDS = ["x.warc.gz", "x.warc", "one.warc.gz", "x.arc", "x.arc.gz"]


def archive(name: str, texts: list[bytes]) -> bytes:
    """Return an archive of pages, in the format of its name."""
    if ".arc" in name:
        records = [ARC_HEAD, *(arc(http(HTML % text)) for text in texts)]
    else:
        records = [record(b"software: x", "warcinfo"), *map(page, texts)]
    if name.startswith("one"):
        return gzip.compress(b"".join(records))
    return members(records) if name.endswith(".gz") else b"".join(records)


TEXTS = [noise(1, 3000), b"words " * 500, b"<p>", noise(2, 70_000), b"last"]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_anywhere_gives_what_came_before_and_one_skip(tmp_path, name):
    whole = archive(name, TEXTS)
    chance = random.Random(3)
    for end in [
        *range(1, 400, 7),
        *(chance.randrange(len(whole)) for _ in range(60)),
        *range(len(whole) - 12, len(whole)),
    ]:
        (tmp_path / name).write_bytes(whole[:end])
        try:
            records = read(tmp_path / name)
        except UserError as error:
            assert "no " in str(error) and end < 500  # truncated inside the first record
            continue
        found = htmls(records)
        assert found == [HTML % text for text in TEXTS][: len(found)]
        reasons = [reason for _, reason, *_ in records if isinstance(reason, str)]
        assert reasons.count("truncated") <= 1 and set(reasons) <= {"warcinfo", "truncated"}
        assert len(records) >= 1
        if len(found) < len(TEXTS) and "truncated" not in reasons:  # truncated exactly between two records
            rest = whole[end:]
            assert rest.startswith((b"\x1f\x8b", b"WARC", b"\r\n", b"\n", b"http:"))


def test_a_flipped_bit_costs_one_record_and_damages_none(tmp_path):
    records = [page(text) for text in TEXTS]
    whole = members(records)
    chance = random.Random(4)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(gzip.compress(records[0])), len(whole))] ^= 1 << chance.randrange(8)
        (tmp_path / "x.warc.gz").write_bytes(damaged)
        found = htmls(read(tmp_path / "x.warc.gz"))
        assert len(found) >= len(TEXTS) - 1
        assert set(found) <= {HTML % text for text in TEXTS}


def test_an_archive_within_an_archive_is_not_taken_apart(tmp_path):
    inner = members([page(noise(number, 900)) for number in range(40)], level=0)  # stored: its members are visible
    outer = members([page(b"one"), record(inner, "resource", Content_Type="application/warc"), page(b"two")], level=0)
    (tmp_path / "x.warc.gz").write_bytes(outer)
    assert [one[1] for one in read(tmp_path / "x.warc.gz")] == [HTML % b"one", "not_html", HTML % b"two"]


@pytest.mark.parametrize("length", [200, 2_000, 10**6, 10**18 - 1])
@pytest.mark.parametrize("name", ["x.warc", "x.arc"])
def test_a_length_beyond_all_that_follows_costs_its_own_record_alone(tmp_path, name, length):
    def right(text):
        return page(text) if name == "x.warc" else arc(http(HTML % text))

    def wrong(text):
        if name == "x.warc":
            return page(text, Content_Length=str(length))
        line, _, block = right(text).partition(b"\n")
        return line[: line.rindex(b" ")] + f" {length}\n".encode() + block

    begin = b"" if name == "x.warc" else ARC_HEAD
    parts = [right(b"one"), wrong(b"wrong"), right(b"two"), right(b"three"), wrong(b"last")]
    (tmp_path / name).write_bytes(begin + b"".join(parts))
    found = read(tmp_path / name, max_page_bytes=100_000)
    assert htmls(found) == [HTML % b"one", HTML % b"two", HTML % b"three"]
    reasons = [reason for _, reason, *_ in found if isinstance(reason, str) and reason != "warcinfo"]
    assert len(reasons) == 2 and set(reasons) <= {"damaged", "truncated"}


def test_a_length_that_ends_anywhere_in_the_next_record_costs_its_own_record_alone(tmp_path):
    """Some of the lengths end at the end of a line."""
    block, after = http(HTML % b"wrong"), page(b"two")
    for more in range(5, len(after) - 1):
        wrong = record(block, Content_Length=str(len(block) + more))
        (tmp_path / "x.warc").write_bytes(page(b"one") + wrong + after * 3)
        assert htmls(read(tmp_path / "x.warc")) == [HTML % b"one"] + [HTML % b"two"] * 3, more


@pytest.mark.parametrize(
    "text",
    [b"WARC/1.0\r\nA:\r\n", b"WARC/1.0\r\nContent-Length: 5\r\n", b"WARC/1.0\r\nA:\r\n" * 4000 + b"\r\n"],
)
def test_text_with_endless_beginnings_of_records_is_read_in_one_pass(tmp_path, text):
    """Regression: each was searched for the end of its header: 5 to 10 seconds per megabyte."""
    (tmp_path / "x.warc").write_bytes(page(b"one") + text * (8_000_000 // len(text)) + b"\r\n\r\n" + page(b"two"))
    assert htmls(read(tmp_path / "x.warc")) == [HTML % b"one", HTML % b"two"]


def test_a_length_that_is_too_short_costs_no_other_record(tmp_path):
    block = http(HTML % b"short")
    wrong = record(block, Content_Length=str(len(block) - 20))
    (tmp_path / "x.warc").write_bytes(page(b"one") + wrong + page(b"two"))
    found = read(tmp_path / "x.warc")
    assert htmls(found) == [HTML % b"one", (HTML % b"short")[:-20], HTML % b"two"]
    assert [reason for _, reason, *_ in found].count("garbage") == 1


def test_memory_does_not_grow_with_a_record_that_is_too_large(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    size = 200_000_000
    packer = gzip.GzipFile(tmp_path / "x.warc.gz", "wb", compresslevel=1)
    with packer:
        packer.write(record(b"", "response", Content_Length=str(size))[:-4])
        for _ in range(size // 1_000_000):
            packer.write(b"a" * 1_000_000)
        packer.write(b"\r\n\r\n")
    with open(tmp_path / "x.warc.gz", "ab") as handle:
        handle.write(gzip.compress(page(b"next")))
    tracemalloc.start()
    records = read(tmp_path / "x.warc.gz", max_page_bytes=1_000_000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one[1] for one in records] == ["too_large", HTML % b"next"]
    assert most < 80_000_000


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_lines_may_end_without_carriage_return(tmp_path, name):
    blocks = [http(HTML % text).replace(b"\r\n", b"\n") for text in (b"one", b"two")]
    records = [record(block).replace(b"\r\n", b"\n") for block in blocks]
    (tmp_path / name).write_bytes(members(records) if name.endswith("gz") else b"".join(records))
    assert htmls(read(tmp_path / name)) == [HTML % b"one", HTML % b"two"]


def test_real_pages_are_those_that_fastwarc_reads(shared_data):
    fastwarc = pytest.importorskip("fastwarc")
    path = shared_data / "web" / "dev-03.warc.gz"
    expected = []
    for one in fastwarc.ArchiveIterator(str(path), parse_http=True):
        if str(one.record_type) == "response":
            expected.append((one.stream_pos, one.reader.read(), one.headers["WARC-Target-URI"], None))
        else:
            expected.append((one.stream_pos, str(one.record_type)))
    assert read(path) == expected


@pytest.mark.parametrize(
    "piece",
    [
        b"\x1f\x8b\x08\x00",
        b"\x1f\x8b\x08\x08" + bytes(6) + b"name",
        b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff",
        # a stored block of 65,535 bytes whose end is the header of the next one, and so on to the end of the file
        b"\x1f\x8b\x08\x00" + bytes(6) + b"\x00\xff\xff\x00\x00WARC/1.0\r\nWARC-Type: a\r\n".ljust(43, b"x"),
    ],
)
def test_a_million_false_beginnings_of_members_are_skipped(piece: bytes) -> None:
    """Regression: each was decompressed as far as possible: 3 s per megabyte, and quadratic time for the last kind."""
    member = gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 4\r\n\r\nabcd\r\n\r\n")
    hostile = piece * (3_000_000 // len(piece))
    found = [data for _, data in Records(Window(io.BytesIO(member + hostile + member * 50)), "warc.gz")]
    assert sum(isinstance(data, bytes) for data in found) > 45 and "unsearched" in found  # skipped bytes are reported


def damaged_member(unpacked: int) -> bytes:
    """Return a page of this size, compressed to a thousandth, with a wrong checksum."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    begin = packer.compress(record(b"", Content_Length=str(unpacked))[:-4])
    whole = begin + b"".join(packer.compress(bytes(1_000_000)) for _ in range(unpacked // 1_000_000)) + packer.flush()
    return whole[:-8] + bytes(8)


@pytest.mark.parametrize("sizes", [[200_000_000], [60_000_000, 40_000_000]])
def test_damaged_members_with_a_large_decompressed_size_hide_no_later_records(tmp_path: Path, sizes: list[int]) -> None:
    """Regression: a sixteenth of their decompressed size was skipped in the file without a search for records.

    One damaged megabyte that decompresses to a thousand silently hid 20,000 records.
    """
    pieces = [damaged_member(size) + members([page(noise(size, 300))] * 300) for size in sizes]
    (tmp_path / "x.warc.gz").write_bytes(members([page(b"first")]) + b"".join(pieces))
    found = read(tmp_path / "x.warc.gz")
    assert len(htmls(found)) == 1 + 300 * len(sizes)
    assert [one[1] for one in found if len(one) == 2] == ["damaged"] * len(sizes)
