"""Read and write JSONL, tables and JSON files, compressed or not, also on stdin and stdout.

    with open_output("kept.jsonl") as write:
        for row in read_jsonl(["docs.jsonl.gz", "-"]):
            write(row.value)

Inputs are opened once and read forward, so that a pipe or a shell's `<(command)` works as a file.
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
ZSTD_STEP = 1 << 11  # compressed bytes at once: they decompress to at most 64 MB (4 bytes to at most 128 kB)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 1 << 20
PACKED = (".gz", ".zst", ".parquet")  # extensions of outputs that are not plain JSONL
NOT_READ = (".arrow", ".feather", ".xlsx")
RECORDS, TEXTS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"), (".txt", ".md")
# files that describe a data set and are stored with it
DESCRIPTIONS = ("manifest.json", "contamination.json", "dataset_infos.json", "dataset_dict.json")
PARTS = "part-{:05d}.parquet"  # files of a Parquet folder
MOST_NAMED = 6  # files listed in a message
STDIN_ONCE = "stdin: '-' can be read only once; save one of the inputs to a file"
JSON_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
DEEPEST = 200  # levels of nesting in a JSON value; orjson writes at most 254
_stdin_taken: Any = None

T = TypeVar("T")


# ---- files of any content


def name_of(path: str) -> str:
    """Name an input for messages: its path, or stdin for `-`."""
    return "stdin" if path == "-" else path


def names_of(paths: Sequence[str]) -> str:
    """Name several inputs for messages; of more than MOST_NAMED only the first."""
    few = len(paths) <= MOST_NAMED
    return " ".join(map(name_of, paths)) if few else f"{name_of(paths[0])} and {counted(len(paths) - 1, 'other file')}"


def expanded(path: str) -> list[str]:
    """Expand a pattern such as `data/**/*.parquet`, also at an address, to sorted files; return other paths unchanged.

    Raise UserError if a pattern matches no file.
    """
    if is_remote(path):
        return matching(path) if "*" in path else [path]
    if path == "-" or not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    files = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
    if not files:
        raise UserError(f"{path}: expected files that match this pattern, found none")
    return files


def input_files(paths: Sequence[str], text: bool = False) -> list[str]:
    """Return the record files that paths, patterns and folders name, in the given order, sorted by name within each.

    From a folder, or an address that ends in a slash, files with an extension in RECORDS are taken, with `text` also
    those in TEXTS; hidden files, models and descriptions of data sets are left out. Raise UserError as `check_inputs`
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
        if records:  # then a readme describes them
            texts = [name for name in texts if not os.path.basename(name).lower().startswith(("readme", "license"))]
        if not records and not texts:
            wanted = " ".join(RECORDS + TEXTS * text)
            more = "; llmkit crawl-filter reads web pages and archives" if text else ""
            raise UserError(f"{path}: expected files in this folder that end in {wanted}, found none{more}")
        files += sorted(records + texts)
    check_inputs([file for file in files if file in paths or not is_remote(file)])  # listed addresses exist
    return files


def _files_in(folder: str) -> Iterator[str]:
    """Yield the possible data files of a folder and its subfolders."""
    for parent, folders, names in os.walk(folder):
        if any(name in ("config.json", "tokenizer.json") or name.endswith(".safetensors") for name in names):
            folders.clear()  # a folder of a model, a tokenizer or token shards
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _ends(name: str, kinds: tuple[str, ...]) -> bool:
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(kinds)


def check_inputs(paths: Sequence[str]) -> None:
    """Raise the UserError that opening these files would raise, without opening them: they may be pipes.

    Addresses are requested, so that a wrong one is an error before the work begins.
    """
    if paths.count("-") > 1:
        raise UserError(STDIN_ONCE)
    for path in paths:
        if is_remote(path):
            size_and_version(path)
            continue
        if path != "-" and not os.path.exists(path):
            is_name = path.count("/") == 1 and "." not in path and path[0] != "/" != path[-1]
            of_hub = f"; for the data set on the hub: hf://datasets/{path}/" if is_name else ""
            raise UserError(f"{_unreadable(path, errno.ENOENT)}{of_hub}")
        if path != "-" and (os.path.isdir(path) or not os.access(path, os.R_OK)):
            raise _unreadable(path, errno.EISDIR if os.path.isdir(path) else errno.EACCES)


def _unreadable(path: str, number: int | None) -> UserError:
    reason = "found a folder" if number == errno.EISDIR else os.strerror(number or 0).lower()
    return UserError(f"{name_of(path)}: expected a readable file: {reason}")


@contextmanager
def open_input(path: str, columns: Mapping[str, str] = {}, fields: Sequence[str] = ()) -> Iterator[io.BufferedReader]:
    """Open a file, an address, or stdin for `-`; decompress gzip and zstd, and turn rows of tables into JSON lines.

    columns: field name to the column it is read from (`--columns`); a table without the column is an error, and
             `json_rows` renames the fields
    fields:  the fields that the reader uses, if not all; others are not read from Parquet

    Compression and Parquet are recognized by their first bytes, CSV and TSV by the file name.
    Raise UserError if the input cannot be opened, if stdin is opened twice, and, while reading, for damaged or
    truncated data.
    """
    with open_packed(path) as packed:
        raw: Any = packed
        if (magic := raw.peek(4)[:4]).startswith(GZIP_MAGIC):
            file = gzip.GzipFile(fileobj=raw)  # its `closed` is Python: per line, and Ctrl-C in it became ValueError
            raw = io.BufferedReader(Lines(iter(lambda: file.read1(BLOCK), b"")), BLOCK)
        elif is_zstd(magic):
            raw = io.BufferedReader(Lines(zstd_frames(raw, name_of(path))), BLOCK)
        rows = table_lines(raw, name_of(path), columns, fields)
        yield raw if rows is None else io.BufferedReader(Lines(rows), BLOCK)


@contextmanager
def open_packed(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, an address, or stdin for `-` without decompression; errors are those of `open_input`."""
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
                    file.check()  # a file that changed meanwhile looks damaged
                    raise
                file.check()
        else:
            with open(path, "rb", buffering=BLOCK) as handle:
                number, raw = os.dup(handle.fileno()), cast(Any, handle)  # table readers close the handle
                try:
                    before = os.fstat(number)
                    yield raw
                    after = os.fstat(number)
                finally:
                    os.close(number)
                changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
                if changed and stat.S_ISREG(before.st_mode):
                    raise UserError(f"{path}: changed while it was read; start again when it is complete")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).lower()
        raise UserError(f"{name_of(path)}: damaged or truncated gzip data: {reason}; fetch it again") from error
    except OSError as error:
        if error.filename != path:
            raise
        raise _unreadable(path, error.errno) from error


def check_no_archive(handle: io.BufferedReader, path: str) -> None:
    """Raise UserError for a web archive or an unsupported table format, which might otherwise pass as text."""
    if file_path(path).lower().endswith(NOT_READ):
        kind = os.path.splitext(file_path(path))[1].lower()
        raise UserError(f"{name_of(path)}: expected JSONL, a table or text, found {kind}; convert it to Parquet first")
    if handle.peek(5)[:5] == b"WARC/":
        raise UserError(f"{name_of(path)}: expected text, found a web archive; run llmkit crawl-filter on it first")


def read_text(handle: IO[bytes], path: str) -> str:
    """Read an open text file. Raise UserError naming line and byte if it is not UTF-8."""
    try:
        return handle.read().removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name_of(path)}:{line}: not UTF-8 at byte {error.start}; convert the text first") from None


# ---- zstd


def is_zstd(magic: bytes | bytearray) -> bool:
    """Return True if these are the first bytes of zstd data, with or without a leading dictionary."""
    return magic.startswith((ZSTD_MAGIC, ZSTD_DICTIONARY_MAGIC))


class DamagedData(UserError):
    """A compressed stream is truncated or invalid."""


def zstd_frames(raw: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of consecutive zstd frames; raise DamagedData after the content of a truncated one.

    A leading skippable frame may contain the dictionary of the others, as ArchiveTeam writes it.
    zstandard's own stream_reader ends at a truncated frame without an error (0.25).
    """
    import zstandard

    damaged = lambda reason: DamagedData(f"{name}: damaged or truncated zstd data: {reason}; fetch it again")  # noqa: E731
    packed = memoryview(raw.read(1 << 16))
    dictionary = None
    if packed[:4] == ZSTD_DICTIONARY_MAGIC:
        size, content = int.from_bytes(packed[4:8], "little"), bytes(packed[8:])
        while len(content) < size <= LARGEST_DICTIONARY and (more := raw.read(size - len(content))):
            content += more
        if size > LARGEST_DICTIONARY or len(content) < size:
            raise damaged("its dictionary is incomplete")
        content, packed = content[:size], memoryview(content[size:])
        if content.startswith(ZSTD_MAGIC):
            content = zstandard.ZstdDecompressor().stream_reader(content).read(LARGEST_DICTIONARY)
        dictionary = zstandard.ZstdCompressionDict(content)
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
    frame: Any = None  # the current one; None between two
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
    """Yield `read(row)` for the objects of JSONL files, at most `limit` in total; blank lines are ignored.

    columns: field name to the column it is read from (`--columns`)

    A record is bad if `read` raises UserError, or if its line is not a JSON object, is not UTF-8, or contains a lone
    surrogate. `bad` skips and counts it; without `bad`, raise UserError naming file and line.
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
    """Yield documents `{"text", ...}` from JSONL, or from plain text files, each of which is one document.

    `.jsonl`, `.json` and `.ndjson` are JSONL, `.txt` and `.md` are text; stdin and other files are JSONL if their
    first character is `{`. A record whose `text` is missing or not a string is bad, as in `read_jsonl`, unless `read`
    accepts it. `columns` and `fields` are those of `open_input`. Raise UserError for text that is not UTF-8.
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
    """Yield `read(row)` for the rows of files, at most `limit` in total; `bad` skips and counts bad ones."""
    left = limit
    for path in paths:
        if left == 0:
            return
        with open_input(path, columns, fields) as handle:
            for record in good_records(rows_of(handle, path, columns), read, name_of(path), bad, left):
                yield record
                left = None if left is None else left - 1


def is_jsonl(handle: io.BufferedReader, path: str) -> bool:
    """Return True if an open file is JSONL, by its extension or else by its first character."""
    name = file_path(path).removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return True
    if name.endswith((".txt", ".md")):
        return False
    head = handle.peek(64)[:64].removeprefix(BYTE_ORDER_MARK).lstrip()
    return head[:1] in (b"{", b"") or (head[:1] == b"[" and head[1:].lstrip()[:1] == b"{")


def json_rows(handle: io.BufferedReader, path: str, columns: Mapping[str, str] = {}) -> Iterator[Row | UserError]:
    """Yield the objects of an open JSONL file or JSON array, with fields renamed by `columns`.

    Yield a UserError in place of an unreadable record; raise it if the file is neither JSONL nor an array.
    """
    for row in _rows(handle, path):
        if columns and isinstance(row, Row):
            try:
                row = with_columns(row, columns)
            except UserError as error:
                row = error
        yield row


def _rows(handle: io.BufferedReader, path: str) -> Iterator[Row | UserError]:
    """Yield the objects of an open JSONL file, or of a JSON array, numbered from 1 like lines.

    The array may be the value of `examples` or `data` in an object whose `{` is alone on its line.
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
            yield UserError(f"{name}:{number}: a lone surrogate, NaN or Infinity, invalid in JSON; fix the record")
            continue
        yield Row(value, name, number)


def _array(data: bytes, name: str) -> list[Any]:
    """Parse the array of a file; lone surrogates are kept and replace NaN, so that `_rows` can name the record."""
    try:
        values = load_json(data)
    except orjson.JSONDecodeError as error:
        try:
            values = json.loads(data, parse_constant=lambda name: "\ud800")
        except (ValueError, RecursionError):
            if data.lstrip()[:1] == b"{":
                raise UserError(f"{name}:1: expected one JSON object per line, found only {{ ({error})") from None
            wanted = "expected JSONL or one JSON array"
            raise UserError(f"{name}:{error.lineno}: {wanted}, {_found(error)}; fix or replace the file") from None
    if isinstance(values, dict):
        arrays = [values[key] for key in ("examples", "data") if isinstance(values.get(key), list)]
        if not arrays:
            raise UserError(f"{name}: expected JSONL or one JSON array, found an object on several lines")
        return arrays[0]
    return values


def json_row(line: bytes, name: str, number: int) -> Row | None:
    """Parse one line of JSONL; return None for a blank line. Errors are those of `read_jsonl`."""
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
    raise UserError(f"{name}:{number}: expected one JSON object per line, {instead}; fix or remove the line")


@contextmanager
def open_output(path: str, force: bool = False) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Yield a function that writes one record. A file appears when it is complete; stdout (`-`) is written at once."""
    import jsonlines  # imported here: .03 s of startup

    check_output(path, force, is_file=True)
    dumps: Any = lambda record: dump_json(record, orjson.OPT_SERIALIZE_NUMPY)  # noqa: E731
    # flushed, so that the reader of a pipe sees each record at once
    with open_bytes(path) as handle, jsonlines.Writer(handle, dumps=dumps, flush=path == "-") as writer:  # type: ignore
        yield writer.write


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file that appears when it is complete, in the format of its name (.gz .zst .parquet); stdout for `-`.

    With a trailing slash, write the JSON lines as Parquet files in a folder.
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
            with gzip.GzipFile("", "wb", 6, handle, mtime=0) as packed:  # no time: equal content gives equal bytes
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
    """Describe a JSON error, for a message: `found '}' at column 15 (trailing comma is not allowed)`."""
    if "UTF-8" in error.msg:
        return "found bytes that are not UTF-8"
    if "end of data" in error.msg or not error.doc.strip():
        return "found incomplete JSON"
    return f"found {error.doc[error.pos :][:12]!r} at column {error.colno} ({error.msg})"


def read_object(path: Path, largest: int = 16 << 20) -> dict[str, Any]:
    """Read a JSON object from a file of at most `largest` bytes; errors are those of `object_of`."""
    return object_of(read_file(path, largest), path)


def object_of(content: bytes, path: str | Path) -> dict[str, Any]:
    """Parse a file's content as a JSON object. Raise UserError if it is not one, or has more than DEEPEST levels."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: expected JSON, {_found(error)}; fix or replace the file") from None
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
    """Write a JSON value to a file atomically; NaN becomes null."""
    with atomic_file(path) as handle:
        handle.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | JSON_LINE))
