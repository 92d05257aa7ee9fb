"""JSON in and out: JSONL or a table, from plain files, gzip, zstd and stdin, to a file or stdout; files of one value.

    with open_output("kept.jsonl") as write:
        for row in read_jsonl(["docs.jsonl.gz", "-"]):
            write(row.value)

Every input is opened once and read forward, so that a pipe or a shell's `<(command)` will do for a file.
"""

from __future__ import annotations

import errno
import glob
import gzip
import io
import json
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import orjson

from llmkit.display import stdout_bytes
from llmkit.errors import UserError
from llmkit.io.files import atomic_file, atomic_folder, check_output, create, file_path, read_file
from llmkit.io.progress import counted
from llmkit.io.records import BadRecords, Row, check_document, good_records, kind_of, with_columns
from llmkit.io.remote import is_remote, matching, open_remote, size_and_version
from llmkit.io.tables import FOLDER_GROUPS, Lines, dump_json, load_json, table_lines, write_parquet

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTD_DICTIONARY_MAGIC = b"\x5d\x2a\x4d\x18"  # https://iipc.github.io/warc-specifications/ : WARC with zstd
LARGEST_DICTIONARY = 1 << 25
ZSTD_STEP = 1 << 11  # compressed bytes at once: at most 64 MB come out, of which a frame of 4 bytes may hold 128 kB
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 1 << 20
PACKED = (".gz", ".zst", ".parquet")  # ends of names of outputs that are not JSONL as it stands
NOT_READ = (".arrow", ".feather", ".xlsx")
RECORDS, TEXTS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"), (".txt", ".md")
# Ends of names: what describes data and stands beside them
DESCRIPTIONS = ("manifest.json", "contamination.json", "dataset_infos.json", "dataset_dict.json")
PARTS = "part-{:05d}.parquet"  # of a folder of Parquet
MOST_NAMED = 6  # files in a message
STDIN_ONCE = "stdin: '-' can be read only once; save one of the inputs to a file"
JSON_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
DEEPEST = 200  # levels of a JSON value: orjson writes 254
_stdin_taken: Any = None

T = TypeVar("T")


# ---- files of any content


def name_of(path: str) -> str:
    """Name an input for messages: its path, or stdin for `-`."""
    return "stdin" if path == "-" else path


def names_of(paths: Sequence[str]) -> str:
    """Name several inputs for messages, of many the first."""
    few = len(paths) <= MOST_NAMED
    return " ".join(map(name_of, paths)) if few else f"{name_of(paths[0])} and {counted(len(paths) - 1, 'other file')}"


def expanded(path: str) -> list[str]:
    """The files that a pattern such as `data/**/*.parquet` names, sorted, also at addresses; other paths as they are.

    Raises UserError where a pattern names none.
    """
    if is_remote(path):
        return matching(path) if "*" in path else [path]
    if path == "-" or not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    files = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    if not files:
        raise UserError(f"{path}: expected files of such names, found none")
    return files


def input_files(paths: Sequence[str], text: bool = False) -> list[str]:
    """The files of records that paths, patterns and folders name, in this order, those of each sorted by name.

    In a folder, also at an address that ends in a slash, these are files whose names end in RECORDS, and of `text` in
    TEXTS; not what begins with a dot, nor models, nor descriptions of data sets. Raises UserError as `check_inputs`
    does, and for a folder without such files.
    """
    files: list[str] = []
    for path in paths:
        if is_remote(path) and path.endswith("/") and not path.startswith("http"):
            listed = matching(path + "**")
        elif path != "-" and os.path.isdir(path):
            listed = sorted(_files_in(path))
        else:
            files += expanded(path)
            continue
        records = [name for name in listed if _ends(name, RECORDS) and not name.endswith(DESCRIPTIONS)]
        texts = [name for name in listed if text and _ends(name, TEXTS)]
        if records:  # among which a readme describes them
            texts = [name for name in texts if not os.path.basename(name).lower().startswith(("readme", "license"))]
        if not records and not texts:
            wanted = " ".join(RECORDS + TEXTS * text)
            more = "; llmkit crawl-filter reads web pages and archives" if text else ""
            raise UserError(f"{path}: expected files in this folder that end in {wanted}, found none{more}")
        files += sorted(records + texts)
    check_inputs([file for file in files if file in paths or not is_remote(file)])  # a listing has the others
    return files


def _files_in(folder: str) -> Iterator[str]:
    """The files of a folder and those below it that may be data."""
    for parent, folders, names in os.walk(folder):
        if any(name in ("config.json", "tokenizer.json") or name.endswith(".safetensors") for name in names):
            folders.clear()  # of a model, a tokenizer or token shards
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _ends(name: str, kinds: tuple[str, ...]) -> bool:
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(kinds)


def check_inputs(paths: Sequence[str]) -> None:
    """Raise the UserError that reading these files would raise at its start; nothing is opened, be it a pipe.

    An address is asked for, so that a wrong one ends the work before it begins.
    """
    if paths.count("-") > 1:
        raise UserError(STDIN_ONCE)
    for path in paths:
        if is_remote(path):
            size_and_version(path)
            continue
        if path != "-" and not os.path.exists(path):
            is_name = path.count("/") == 1 and "." not in path and path[0] != "/" != path[-1]
            of_hub = f"; a data set of the hub: hf://datasets/{path}/" if is_name else ""
            raise UserError(f"{_unreadable(path, errno.ENOENT)}{of_hub}")
        if path != "-" and (os.path.isdir(path) or not os.access(path, os.R_OK)):
            raise _unreadable(path, errno.EISDIR if os.path.isdir(path) else errno.EACCES)


def _unreadable(path: str, number: int | None) -> UserError:
    reason = "found a folder" if number == errno.EISDIR else os.strerror(number or 0).lower()
    return UserError(f"{name_of(path)}: expected a file that can be read: {reason}")


@contextmanager
def open_input(path: str, columns: Mapping[str, str] = {}, fields: Sequence[str] = ()) -> Iterator[io.BufferedReader]:
    """Open a file, an address, or stdin for `-`: what gzip and zstd hold, and the rows of a table as lines of JSON.

    columns: the column of each field that has another name in the file (`--columns`); a table without it is refused,
             and `json_rows` renames the fields
    fields:  those that the reader uses, if it is not all: others are not read from Parquet

    Compression and Parquet are known by the first bytes, CSV and TSV by the name.
    Raises UserError when it cannot be opened, when stdin is asked for a second time, and when the reading
    meets a damaged or cut archive.
    """
    with open_packed(path) as packed:
        raw: Any = packed
        magic = raw.peek(4)[:4]
        if magic.startswith(GZIP_MAGIC):
            raw = io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK)
        elif is_zstd(magic):
            raw = io.BufferedReader(Lines(zstd_frames(raw, name_of(path))), BLOCK)
        rows = table_lines(raw, name_of(path), columns, fields)
        yield raw if rows is None else io.BufferedReader(Lines(rows), BLOCK)


@contextmanager
def open_packed(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, or stdin for `-`, as the bytes that it holds; errors are those of `open_input`."""
    global _stdin_taken
    try:
        if path == "-":
            if sys.stdin is None:
                raise UserError("stdin: closed; name a file instead of '-'")
            if sys.stdin is _stdin_taken:
                raise UserError(STDIN_ONCE)
            _stdin_taken = sys.stdin
            stdin: Any = sys.stdin.buffer
            yield stdin if hasattr(stdin, "peek") else io.BufferedReader(stdin)
        elif is_remote(path):
            with open_remote(path) as remote:
                file = cast(Any, remote.raw)
                try:
                    yield remote
                except (EOFError, zlib.error, gzip.BadGzipFile, UserError):
                    file.check()  # which may be why it looks damaged
                    raise
                file.check()
        else:
            with open(path, "rb", buffering=BLOCK) as handle:
                number, raw = os.dup(handle.fileno()), cast(Any, handle)  # readers of tables close it
                try:
                    before = os.fstat(number)
                    yield raw
                    after = os.fstat(number)
                finally:
                    os.close(number)
                changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
                if changed and stat.S_ISREG(before.st_mode):
                    raise UserError(f"{path}: changed while it was read; start again when it is whole")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).lower()
        raise UserError(f"{name_of(path)}: damaged or cut gzip data: {reason}; fetch or write it again") from error
    except OSError as error:
        if error.filename != path:
            raise
        raise _unreadable(path, error.errno) from error


def check_no_archive(handle: io.BufferedReader, path: str) -> None:
    """Raise UserError for a web archive or a table of another kind, which may be text by its bytes and is none."""
    if file_path(path).lower().endswith(NOT_READ):
        kind = os.path.splitext(file_path(path))[1].lower()
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


# ---- zstd


def is_zstd(magic: bytes | bytearray) -> bool:
    """True if a file that begins so is zstd, with its dictionary in front of it or not."""
    return magic.startswith((ZSTD_MAGIC, ZSTD_DICTIONARY_MAGIC))


class DamagedData(UserError):
    """A compressed stream ends early, or holds what it cannot."""


def zstd_frames(raw: IO[bytes], name: str) -> Iterator[bytes]:
    """The content of zstd frames, one after another; a cut frame is DamagedData, after all that it gives.

    A first frame that is skippable and holds a dictionary, as ArchiveTeam writes it, serves for all others.
    zstandard's own stream_reader takes a cut file for a whole one and ends early without a word (0.25).
    """
    import zstandard

    damaged = lambda reason: DamagedData(f"{name}: damaged or cut zstd data: {reason}")  # noqa: E731
    packed = memoryview(raw.read(1 << 16))
    dictionary = None
    if packed[:4] == ZSTD_DICTIONARY_MAGIC:
        size, content = int.from_bytes(packed[4:8], "little"), bytes(packed[8:])
        while len(content) < size <= LARGEST_DICTIONARY and (more := raw.read(size - len(content))):
            content += more
        if size > LARGEST_DICTIONARY or len(content) < size:
            raise damaged("its dictionary is not whole")
        content, packed = content[:size], memoryview(content[size:])
        if content.startswith(ZSTD_MAGIC):
            content = zstandard.ZstdDecompressor().stream_reader(content).read(LARGEST_DICTIONARY)
        dictionary = zstandard.ZstdCompressionDict(content)
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
    frame: Any = None  # the one being read; None between two
    while packed or (packed := memoryview(raw.read(1 << 16))):
        frame = frame or decompressor.decompressobj()
        try:
            yield frame.decompress(packed[:ZSTD_STEP])
        except zstandard.ZstdError as error:
            raise damaged(error) from error
        packed = packed[ZSTD_STEP:]
        if frame.eof:
            packed = memoryview(frame.unused_data + packed) if frame.unused_data else packed
            frame = None
    if frame is not None:
        raise damaged("it ends inside a frame")


# ---- records


def read_jsonl(
    paths: Sequence[str],
    limit: int | None = None,
    read: Callable[[Row], T] = lambda row: row,  # type: ignore[assignment,return-value]
    bad: BadRecords | None = None,
    columns: Mapping[str, str] = {},
) -> Iterator[T]:
    """Yield what `read` makes of the objects of JSONL files, blank lines left out, at most `limit` in all.

    `columns` names the column of each field that has another name in the files (`--columns`).

    A bad record is one that `read` refuses by a UserError, or a line that is not a JSON object, is not UTF-8, or holds
    a lone surrogate. It is skipped as `bad` has it; without that, the first raises UserError naming file and line.
    """
    yield from records_of(paths, json_rows, read, limit, bad, columns)


def read_documents(
    paths: Sequence[str],
    limit: int | None = None,
    bad: BadRecords | None = None,
    columns: Mapping[str, str] = {},
    fields: Sequence[str] = (),
    read: Callable[[Row], Row] | None = None,
) -> Iterator[Row]:
    """Yield documents `{"text", ...}` from JSONL, or from plain text: a file of plain text is one document.

    `.jsonl`, `.json` and `.ndjson` are JSONL, `.txt` and `.md` are text; stdin and files of other names are
    JSONL when their first character is `{`. A record whose `text` is missing or no string is bad, as in `read_jsonl`,
    unless `read` takes it.
    `columns` and `fields` are those of `open_input`. Raises UserError for plain text that is not UTF-8.
    """

    def rows(handle: io.BufferedReader, path: str, columns: Mapping[str, str]) -> Iterator[Row | UserError]:
        if is_jsonl(handle, path):
            yield from json_rows(handle, path, columns)
            return
        check_no_archive(handle, path)
        if text := read_text(handle, path):
            yield Row({"text": text, "source": Path(file_path(name_of(path))).name}, name_of(path), 1)

    yield from records_of(paths, rows, read or check_document, limit, bad, columns, fields)


def records_of(
    paths: Sequence[str],
    rows_of: Callable[[io.BufferedReader, str, Mapping[str, str]], Iterator[Row | UserError]],
    read: Callable[[Row], T],
    limit: int | None,
    bad: BadRecords | None,
    columns: Mapping[str, str] = {},
    fields: Sequence[str] = (),
) -> Iterator[T]:
    """Yield what `read` makes of the rows of files, at most `limit` in all; bad ones are skipped as `bad` has it."""
    left = limit
    for path in paths:
        if left == 0:
            return
        with open_input(path, columns, fields) as handle:
            for record in good_records(rows_of(handle, path, columns), read, name_of(path), bad, left):
                yield record
                left = None if left is None else left - 1


def is_jsonl(handle: io.BufferedReader, path: str) -> bool:
    """True if an open file is JSONL, by its name or, where that says nothing, by its first character."""
    name = file_path(path).removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return True
    if name.endswith((".txt", ".md")):
        return False
    head = handle.peek(64)[:64].removeprefix(BYTE_ORDER_MARK).lstrip()
    return head[:1] in (b"{", b"") or (head[:1] == b"[" and head[1:].lstrip()[:1] == b"{")


def json_rows(handle: io.BufferedReader, path: str, columns: Mapping[str, str] = {}) -> Iterator[Row | UserError]:
    """The objects of an open file of JSONL, or of one that is one JSON array, with the fields that `columns` names.

    In the place of a record that cannot be read stands a UserError; for a file that is none of these it is raised.
    """
    for row in _rows(handle, path):
        if columns and isinstance(row, Row):
            try:
                row = with_columns(row, columns)
            except UserError as error:
                row = error
        yield row


def _rows(handle: io.BufferedReader, path: str) -> Iterator[Row | UserError]:
    """The objects of an open file of JSONL, or of one that is one JSON array (numbered from 1 as lines are).

    The array may stand under `examples` or `data` of an object that begins on a line of its own.
    """
    if handle.peek(1)[:1] not in (b"{", b"["):
        check_no_archive(handle, path)
    name = name_of(path)
    head = handle.peek(64).removeprefix(BYTE_ORDER_MARK).lstrip()
    if head[:1] != b"[" and head.split(b"\n")[0].rstrip() != b"{":
        for number, line in enumerate(handle, 1):
            try:
                row = json_row(line, name, number)
            except UserError as error:
                yield error
                continue
            if row is not None:
                yield row
        return
    for number, value in enumerate(_array(handle.read().removeprefix(BYTE_ORDER_MARK), name), 1):
        if not isinstance(value, dict):
            yield UserError(f"{name}:{number}: expected an object in the array, found {kind_of(value)}")
            continue
        try:
            dump_json(value)
        except TypeError:
            yield UserError(f"{name}:{number}: a lone surrogate, NaN or Infinity, which no JSON has; mend the record")
            continue
        yield Row(value, name, number)


def _array(data: bytes, name: str) -> list[Any]:
    """The array of a file. Lone surrogates are read, and for NaN one stands: `json_rows` says in which record."""
    try:
        values = load_json(data)
    except orjson.JSONDecodeError as error:
        try:
            values = json.loads(data, parse_constant=lambda name: "\ud800")
        except (ValueError, RecursionError):
            if data.lstrip()[:1] == b"{":
                raise UserError(f"{name}:1: expected one JSON object a line, found {{ alone ({error})") from None
            wanted = "expected JSONL or one JSON array"
            raise UserError(f"{name}:{error.lineno}: {wanted}, {_found(error)}; mend or replace the file") from None
    if isinstance(values, dict):
        arrays = [values[key] for key in ("examples", "data") if isinstance(values.get(key), list)]
        if not arrays:
            raise UserError(f"{name}: expected JSONL or one JSON array, found an object over several lines")
        return arrays[0]
    return values


def json_row(line: bytes, name: str, number: int) -> Row | None:
    """The object on one line of JSONL, None for a blank line; errors are those of `read_jsonl`."""
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    if line.isspace() or not line:
        return None
    try:
        value = load_json(line)
    except orjson.JSONDecodeError as error:
        instead = _found(error)
    else:
        if isinstance(value, dict):
            return Row(value, name, number)
        instead = f"found {kind_of(value)}"
    raise UserError(f"{name}:{number}: expected one JSON object a line, {instead}; mend or remove the line")


@contextmanager
def open_output(path: str, force: bool = False) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Yield a function that writes one record. A file appears when all is written; `-` is stdout, at once."""
    import jsonlines  # with what it needs .03 s of the start, for those alone who write by it

    check_output(path, force, is_file=True)
    dumps: Any = lambda record: dump_json(record, orjson.OPT_SERIALIZE_NUMPY)  # noqa: E731
    # flushed, so that the reader of a pipe sees each record as it comes
    with open_bytes(path) as handle, jsonlines.Writer(handle, dumps=dumps, flush=path == "-") as writer:  # type: ignore
        yield writer.write


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file that appears when all is written, packed as its name says (.gz .zst .parquet); stdout for `-`.

    A name that ends in a slash is that of a folder, in which lines of JSON become Parquet files.
    """
    if path == "-":
        yield stdout_bytes()
        return
    if path.endswith("/"):
        with atomic_folder(path, force=True) as folder, tempfile.TemporaryFile(dir=folder.parent) as lines:
            yield lines
            write_parquet(lines, lambda number: create(folder / PARTS.format(number)), path, FOLDER_GROUPS)
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
                write_parquet(lines, lambda number: nullcontext(handle), path)
        else:
            yield handle


# ---- values


def _found(error: json.JSONDecodeError) -> str:
    """Describe where JSON fails, for a message: `found '}' at column 15 (trailing comma is not allowed)`."""
    if "UTF-8" in error.msg:
        return "found bytes that are not UTF-8"
    if "end of data" in error.msg or not error.doc.strip():
        return "found the end of the text before that of the JSON"
    return f"found {error.doc[error.pos :][:12]!r} at column {error.colno} ({error.msg})"


def read_object(path: Path, largest: int = 16 << 20) -> dict[str, Any]:
    """The JSON object that is the content of a file of at most `largest` bytes; errors are those of `object_of`."""
    return object_of(read_file(path, largest), path)


def object_of(content: bytes, path: str | Path) -> dict[str, Any]:
    """The JSON object that is a file's content. Raises UserError where it is none, or has more than DEEPEST levels."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: expected JSON, {_found(error)}; mend or replace the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {kind_of(value)}")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for many in inner for value in many if isinstance(value, dict | list)]
        if not level:
            return value
    raise UserError(f"{path}: expected at most {DEEPEST} levels of lists and objects, found more")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Make a JSON value the content of a file, whole or not at all; NaN becomes null, as JSON wants it."""
    with atomic_file(path) as handle:
        handle.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | JSON_LINE))
