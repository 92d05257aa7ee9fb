"""Records in and out: JSONL or a table, from plain files, gzip, zstd and stdin, to a file or stdout.

    with open_output("kept.jsonl") as write:
        for row in read_jsonl(["docs.jsonl.gz", "-"]):
            write(row.value)

Every input is opened once and read forward, so that a pipe or a shell's `<(command)` will do for a file.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from llmkit.display import stdout_bytes
from llmkit.errors import UserError
from llmkit.io.files import atomic_file, check_output, found_instead
from llmkit.io.records import BadRecords, Row, check_document, good_records, kind_of
from llmkit.io.tables import DELIMITERS, PARQUET_MAGIC, Lines, csv_lines, parquet_lines, write_parquet

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTD_DICTIONARY_MAGIC = b"\x5d\x2a\x4d\x18"  # https://iipc.github.io/warc-specifications/ : WARC with zstd
LARGEST_DICTIONARY = 1 << 25
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 1 << 20
NOT_READ = (".arrow", ".feather", ".xlsx")
STDIN_ONCE = "stdin: '-' can be read only once; save one of the inputs to a file"
_stdin_taken: Any = None

T = TypeVar("T")


def name_of(path: str) -> str:
    """Name an input for messages: its path, or stdin for `-`."""
    return "stdin" if path == "-" else path


def names_of(paths: Sequence[str]) -> str:
    """Name several inputs for messages."""
    return " ".join(map(name_of, paths))


def check_inputs(paths: Sequence[str]) -> None:
    """Raise the UserError that reading these files would raise at its start, so that it comes before the work.

    Nothing is opened, so that a pipe can still be read.
    """
    if paths.count("-") > 1:
        raise UserError(STDIN_ONCE)
    for path in paths:
        if path != "-" and not os.path.exists(path):
            raise _unreadable(path, os.strerror(errno.ENOENT))
        if path != "-" and (os.path.isdir(path) or not os.access(path, os.R_OK)):
            raise _unreadable(path, "found a folder" if os.path.isdir(path) else os.strerror(errno.EACCES))


def _unreadable(path: str, reason: str) -> UserError:
    return UserError(f"{name_of(path)}: expected a file that can be read: {reason.lower()}")


@contextmanager
def open_input(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, or stdin for `-`, as bytes; gzip and zstd are recognised by their first bytes.

    Raises UserError when it cannot be opened, when stdin is asked for a second time, and when the reading
    meets a damaged or cut archive.
    """
    with open_packed(path) as raw:
        yield unpacked(raw, name_of(path))


@contextmanager
def open_packed(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, or stdin for `-`, as the bytes that it holds; errors are those of `open_input`."""
    try:
        with ExitStack() as stack:
            raw: Any = _take_stdin() if path == "-" else stack.enter_context(open(path, "rb", buffering=BLOCK))
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).lower()
        raise UserError(f"{name_of(path)}: damaged or cut gzip data: {reason}; fetch or write it again") from error
    except OSError as error:
        if error.filename != path:
            raise
        raise _unreadable(path, "found a folder" if error.errno == errno.EISDIR else str(error.strerror)) from error


def _take_stdin() -> io.BufferedReader:
    global _stdin_taken
    if sys.stdin is None:
        raise UserError("stdin: closed; name a file instead of '-'")
    if sys.stdin is _stdin_taken:
        raise UserError(STDIN_ONCE)
    _stdin_taken = sys.stdin
    raw: Any = sys.stdin.buffer
    return raw if hasattr(raw, "peek") else io.BufferedReader(raw)


def unpacked(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    """The bytes of an open file, of a gzip or zstd archive what it holds, of a table its rows as lines of JSON.

    Parquet is known by its first bytes, CSV and TSV by the name, which is also for errors.
    """
    magic = raw.peek(4)[:4]
    if magic == PARQUET_MAGIC:
        return io.BufferedReader(Lines(parquet_lines(raw, name)), BLOCK)
    if magic.startswith(GZIP_MAGIC):
        raw = io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK)  # type: ignore[arg-type]
    elif is_zstd(magic):
        raw = io.BufferedReader(ZstdFrames(raw, name), BLOCK)
    if delimiter := DELIMITERS.get(os.path.splitext(name.lower().removesuffix(".gz").removesuffix(".zst"))[1]):
        return io.BufferedReader(Lines(csv_lines(raw, name, delimiter)), BLOCK)
    return raw


def is_zstd(magic: bytes | bytearray) -> bool:
    """True if a file that begins so is zstd, with its dictionary in front of it or not."""
    return magic.startswith((ZSTD_MAGIC, ZSTD_DICTIONARY_MAGIC))


class DamagedData(UserError):
    """A compressed stream ends early, or holds what it cannot."""


class ZstdFrames(io.RawIOBase):
    """The bytes of zstd frames, one after another; a cut frame is DamagedData, after all that it gives.

    A first frame that is skippable and holds a dictionary, as ArchiveTeam writes it, serves for all others.
    zstandard's own stream_reader takes a cut file for a whole one and ends early without a word (0.25).
    """

    STEP = 1 << 11  # of compressed bytes at once: at most 64 MB come out, of which a frame of 4 bytes may hold 128 kB

    def __init__(self, raw: IO[bytes], name: str) -> None:
        import zstandard

        self._zstandard, self._raw, self._name = zstandard, raw, name
        self._frame: Any = None  # the frame being read; None between two
        self._input, self._output = memoryview(b""), memoryview(b"")
        self._decompressor: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._decompressor is None:
            self._decompressor = self._begin()
        while not self._output:
            if not self._input:
                self._input = memoryview(self._raw.read(1 << 16))
            if not self._input:
                if self._frame is None:
                    return 0
                raise DamagedData(f"{self._name}: damaged or cut zstd data: it ends inside a frame")
            self._frame = self._frame or self._decompressor.decompressobj()
            step, self._input = self._input[: self.STEP], self._input[self.STEP :]
            try:
                self._output = memoryview(self._frame.decompress(step))
            except self._zstandard.ZstdError as error:
                raise DamagedData(f"{self._name}: damaged or cut zstd data: {error}") from error
            if self._frame.eof:
                rest = self._frame.unused_data
                self._input = memoryview(rest + self._input) if rest else self._input
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _begin(self) -> Any:
        """The decompressor, with the dictionary that the first frame may hold."""
        self._input = memoryview(self._raw.read(1 << 16))
        if bytes(self._input[:4]) != ZSTD_DICTIONARY_MAGIC:
            return self._zstandard.ZstdDecompressor()
        size = int.from_bytes(self._input[4:8], "little")
        dictionary_bytes = bytearray(self._input[8:])
        while len(dictionary_bytes) < min(size, LARGEST_DICTIONARY) and (more := self._raw.read(1 << 16)):
            dictionary_bytes += more
        if size > LARGEST_DICTIONARY or len(dictionary_bytes) < size:
            raise DamagedData(f"{self._name}: damaged or cut zstd data: its dictionary is not whole")
        dictionary, self._input = bytes(dictionary_bytes[:size]), memoryview(bytes(dictionary_bytes[size:]))
        if dictionary.startswith(ZSTD_MAGIC):
            packed = self._zstandard.ZstdDecompressor().stream_reader(dictionary)
            dictionary = packed.read(LARGEST_DICTIONARY)
        return self._zstandard.ZstdDecompressor(dict_data=self._zstandard.ZstdCompressionDict(dictionary))


def read_jsonl(
    paths: Sequence[str],
    limit: int | None = None,
    read: Callable[[Row], T] = lambda row: row,  # type: ignore[assignment,return-value]
    bad: BadRecords | None = None,
) -> Iterator[T]:
    """Yield what `read` makes of the objects of JSONL files, blank lines left out, at most `limit` in all.

    A bad record is one that `read` refuses by a UserError, or a line that is not a JSON object, is not UTF-8, or holds
    a lone surrogate. It is skipped as `bad` has it; without that, the first raises UserError naming file and line.
    """
    yield from records_of(paths, json_rows, read, limit, bad)


def read_documents(paths: Sequence[str], limit: int | None = None, bad: BadRecords | None = None) -> Iterator[Row]:
    """Yield documents `{"text", ...}` from JSONL, or from plain text: a file of plain text is one document.

    `.jsonl`, `.json` and `.ndjson` are JSONL, `.txt` and `.md` are text; stdin and files of other names are
    JSONL when their first character is `{`. A record whose `text` is missing or no string is bad, as in `read_jsonl`.
    Raises UserError for plain text that is not UTF-8.
    """

    def rows(handle: io.BufferedReader, path: str) -> Iterator[Row | UserError]:
        return (json_rows if is_jsonl(handle, path) else _plain_document)(handle, path)

    yield from records_of(paths, rows, check_document, limit, bad)


def records_of(
    paths: Sequence[str],
    rows_of: Callable[[io.BufferedReader, str], Iterator[Row | UserError]],
    read: Callable[[Row], T],
    limit: int | None,
    bad: BadRecords | None,
) -> Iterator[T]:
    left = limit
    for path in paths:
        if left == 0:
            return
        with open_input(path) as handle:
            for record in good_records(rows_of(handle, path), read, name_of(path), bad, left):
                yield record
                left = None if left is None else left - 1


def json_rows(handle: io.BufferedReader, path: str) -> Iterator[Row | UserError]:
    """The objects of an open file of JSONL, or of one that is one JSON array (numbered from 1 as lines are).

    The array may stand under `examples` or `data` of an object that begins on a line of its own. In the place of a
    record that cannot be read stands a UserError; for a file that is none of these it is raised.
    """
    if handle.peek(1)[:1] not in (b"{", b"["):
        check_no_archive(handle, path)
    name = name_of(path)
    head = handle.peek(64).removeprefix(BYTE_ORDER_MARK).lstrip()
    if head[:1] != b"[" and head.split(b"\n")[0].rstrip() != b"{":
        yield from line_rows(handle, name)
        return
    try:
        values = whole_json(handle.read().removeprefix(BYTE_ORDER_MARK))
    except ValueError as error:
        if head[:1] == b"{":
            raise UserError(f"{name}:1: expected one JSON object a line, found {{ alone ({error})") from None
        broken = isinstance(error, json.JSONDecodeError)
        where, instead = (f"{name}:{error.lineno}", found_instead(error)) if broken else (name, f"found {error}")
        raise UserError(f"{where}: expected JSONL or one JSON array, {instead}; mend or replace the file") from None
    if isinstance(values, dict):
        array = next((values[key] for key in ("examples", "data") if isinstance(values.get(key), list)), None)
        if array is None:
            raise UserError(f"{name}: expected JSONL or one JSON array, found an object over several lines")
        values = array
    yield from array_rows(values, name)


def line_rows(lines: Iterable[bytes], name: str) -> Iterator[Row | UserError]:
    """The records of lines of JSON, numbered from 1; in the place of what is none, a UserError."""
    for number, line in enumerate(lines, 1):
        try:
            row = json_row(line, name, number)
        except UserError as error:
            yield error
            continue
        if row is not None:
            yield row


def array_rows(values: Iterable[Any], name: str) -> Iterator[Row | UserError]:
    """The records of an array, numbered from 1; in the place of what is none, a UserError."""
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            yield UserError(f"{name}:{number}: expected an object in the array, found {kind_of(value)}")
            continue
        try:
            dump_json(value)
        except TypeError:
            yield UserError(f"{name}:{number}: a lone surrogate, NaN or Infinity, which no JSON has; mend the record")
            continue
        yield Row(value, name, number)


def whole_json(data: bytes) -> Any:
    """The value of a file of JSON. Raises ValueError for what is none.

    Lone surrogates are read, and for NaN one stands, so that `array_rows` can tell in which record they are.
    """
    try:
        return load_json(data)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(data, parse_constant=lambda name: "\ud800")  # NaN becomes what no JSON holds
        except (ValueError, RecursionError):
            raise error from None


def load_json(data: bytes) -> Any:
    """The value of JSON, its integers exact: orjson makes floats of those beyond 64 bits."""
    value = orjson.loads(data)
    waiting = [value]
    for item in waiting:
        if type(item) is float and abs(item) >= 2**63:
            with suppress(RecursionError):
                return json.loads(data)
        inner = item.values() if type(item) is dict else item if type(item) is list else ()
        waiting += [another for another in inner if type(another) in (dict, list, float)]
    return value


def dump_json(value: Any, option: int = 0, default: Callable[[Any], Any] | None = None) -> bytes:
    """A value as JSON by orjson, also where an integer is beyond its 64 bits. Raises TypeError as orjson does."""
    try:
        return orjson.dumps(value, default, option)
    except TypeError as error:
        if "64-bit" not in str(error):
            raise
        return orjson.dumps(_exact(value), default, option)


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    large = type(value) is int and not -(2**63) <= value < 2**64
    return orjson.Fragment(str(value)) if large else value


def json_row(line: bytes, name: str, number: int) -> Row | None:
    """The object on one line of JSONL, None for a blank line; errors are those of `read_jsonl`."""
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    if line.isspace() or not line:
        return None
    try:
        value = load_json(line)
    except orjson.JSONDecodeError as error:
        instead = found_instead(error)
    else:
        if isinstance(value, dict):
            return Row(value, name, number)
        instead = f"found {kind_of(value)}"
    raise UserError(f"{name}:{number}: expected one JSON object a line, {instead}; mend or remove the line")


def _plain_document(handle: io.BufferedReader, path: str) -> Iterator[Row]:
    check_no_archive(handle, path)
    if text := read_text(handle, path):
        yield Row({"text": text, "source": Path(name_of(path)).name}, name_of(path), 1)


def check_no_archive(handle: io.BufferedReader, path: str) -> None:
    """Raise UserError for a web archive or a table of another kind, which may be text by its bytes and is none."""
    if path.lower().endswith(NOT_READ):
        kind = os.path.splitext(path)[1].lower()
        raise UserError(f"{name_of(path)}: expected JSONL, a table or text, found {kind}; convert it to Parquet first")
    if handle.peek(5)[:5] == b"WARC/":
        raise UserError(f"{name_of(path)}: expected text, found a web archive; run llmkit crawl-filter on it first")


def read_text(handle: IO[bytes], path: str) -> str:
    """All of an open file of text. Raises UserError naming line and byte of what is not UTF-8."""
    try:
        return handle.read().removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name_of(path)}:{line}: not UTF-8 at byte {error.start}; convert the text first") from None


def is_jsonl(handle: io.BufferedReader, path: str) -> bool:
    """True if an open file is JSONL, by its name or, where that says nothing, by its first character."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return True
    if name.endswith((".txt", ".md")):
        return False
    head = handle.peek(64)[:64].removeprefix(BYTE_ORDER_MARK).lstrip()
    return head[:1] in (b"{", b"") or (head[:1] == b"[" and head[1:].lstrip()[:1] == b"{")


# ---- writing


@contextmanager
def open_output(path: str, force: bool = False) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Yield a function that writes one record. A file appears when all is written; `-` is stdout, at once."""
    import jsonlines  # with what it needs .03 s of the start, for those alone who write by it

    check_output(path, force)
    # flushed, so that the reader of a pipe sees each record as it comes
    dumps: Any = lambda record: dump_json(record, orjson.OPT_SERIALIZE_NUMPY)  # noqa: E731
    with open_bytes(path) as handle, jsonlines.Writer(handle, dumps=dumps, flush=path == "-") as writer:  # type: ignore
        yield writer.write


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file that appears when all is written, packed as its name says (.gz .zst .parquet); stdout for `-`."""
    if path == "-":
        yield stdout_bytes()
        return
    with atomic_file(path) as handle:
        if path.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", 6, handle, mtime=0) as packed:  # no time, so that the bytes are the same again
                yield packed  # type: ignore[misc]
        elif path.lower().endswith(".zst"):
            import zstandard

            with zstandard.ZstdCompressor(write_checksum=True).stream_writer(handle, closefd=False) as packed:
                yield packed  # type: ignore[misc]
        elif path.lower().endswith(".parquet"):
            with tempfile.TemporaryFile(dir=os.path.dirname(path) or ".") as lines:
                yield lines
                write_parquet(lines, handle, path)
        else:
            yield handle
