"""Read Parquet, CSV and TSV as lines of JSON; write lines of JSON as Parquet.

All readers of JSONL read tables this way: a row is a record and a line, numbered from 1. All writers of JSONL can
write Parquet. One core converts 1 GB of text per second, so all formats share one reader.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from decimal import Decimal
from itertools import chain, count, islice
from typing import IO, Any

import orjson

from llmkit.errors import UserError
from llmkit.io.files import LFS_POINTER, file_path
from llmkit.io.progress import counted, say
from llmkit.io.records import choices_of

PARQUET_MAGIC = b"PAR1"
ANY_KEYS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS  # for maps
NOT_UTF8 = b'"\xff"\n'
DELIMITERS = {".csv": ",", ".tsv": "\t"}
READ_ROWS = 256  # rows per batch: with 1 MB each, 256 MB
FIRST_ROWS = 32  # rows that decide whether a column of bytes is text
READ_BYTES = 1 << 20  # per column and read, so that row groups of any size are streamed
GROUP_BYTES = 1 << 26  # JSON bytes per written row group; https://huggingface.co/docs/hub/datasets-streaming
FOLDER_GROUPS = 8  # row groups per file of a folder: 512 MB of JSON, about 200 MB of Parquet
DEEPEST_COLUMN, MOST_LEAVES = 24, 1000  # limits of a column's type; Arrow reads about 60 levels


class Lines(io.RawIOBase):
    """A readable file of the lines of an iterator."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines, self._rest = lines, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            line = next(self._lines, None)
            if line is None:
                return 0
            self._rest = memoryview(line)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def parquet_lines(
    raw: IO[bytes], name: str, columns: Mapping[str, str] = {}, fields: Sequence[str] = ()
) -> Iterator[bytes]:
    """Yield each row of an open Parquet file as a line of JSON; `name` is for errors.

    columns: field name to column (`--columns`); the lines keep the file's names
    fields:  the fields that the reader uses, if not all; if the file has the first, other columns are not read

    Nested lists, structs and maps become arrays and objects, times ISO 8601, decimals numbers, NaN null. Bytes are
    decoded as UTF-8. Columns of mostly other bytes, such as hashes, and bytes inside lists or structs, such as images,
    are skipped with a note, except `text` and those of `columns`. A row that is not UTF-8 becomes NOT_UTF8, an invalid
    line that the reader counts as bad. Raise UserError for a damaged or truncated file, and for a missing column.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not raw.seekable():  # Parquet's index is at the end of the file
        whole = tempfile.TemporaryFile()  # noqa: SIM115
        while block := raw.read(READ_BYTES):
            whole.write(block)
        raw = whole
    number = 0
    try:
        file = parquet.ParquetFile(raw, buffer_size=READ_BYTES, pre_buffer=False)
        names = file.schema_arrow.names
        check_columns(names, columns, name)
        used = [_column_in(names, columns.get(field, field)) or field for field in fields]
        left_out = [field.name for field in file.schema_arrow if _has_inner_bytes(field.type)]
        read = [column for column in names if column not in left_out]
        if used and used[0] in read:
            read, left_out = [column for column in read if column in used], []
        left_out += _without_text(file, [column for column in read if column not in ("text", *columns.values())])
        if left_out:
            say(f"{name}: skipping columns of bytes: {', '.join(left_out)}")
            read = [column for column in read if column not in left_out]
        for batch in file.iter_batches(READ_ROWS, columns=read, use_threads=False):
            for line in _lines_of(batch):
                yield line
                number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name}: damaged or truncated Parquet after row {number} ({reason}); fetch it again"
        ) from error


def check_columns(names: Sequence[str], columns: Mapping[str, str], table: str) -> None:
    """Raise UserError if a table lacks a column of `--columns`."""
    for column in columns.values():
        if _column_in(names, column) is None:
            raise UserError(f"{table}: expected column {column!r} (--columns), found {', '.join(names)}")


def _column_in(names: Collection[str], column: str) -> str | None:
    """Return the top-level column that contains `column`, which may be nested (`chat.turns`); None if there is none."""
    for choice in choices_of(column, names):
        for name in (choice, choice.partition(".")[0]):
            if name in names:
                return name
    return None


def _lines_of(batch: Any, option: int = orjson.OPT_APPEND_NEWLINE) -> list[bytes]:
    """Convert each row of an Arrow batch to a line of JSON; rows that are not UTF-8 become NOT_UTF8."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
        return [orjson.dumps(row, _json_value, option) for row in rows]
    except (TypeError, UnicodeDecodeError):
        if option != ANY_KEYS:
            return _lines_of(batch, ANY_KEYS)
        if batch.num_rows == 1:
            return [NOT_UTF8]
        return [line for row in range(batch.num_rows) for line in _lines_of(batch.slice(row, 1), ANY_KEYS)]
    except (ValueError, OverflowError):  # nanoseconds and years above 9999, which Python's datetime lacks
        import pyarrow as pa

        columns = list(map(_readable, batch.columns))
        if columns == batch.columns:
            raise
        return _lines_of(pa.record_batch(columns, batch.schema.names), option)


def _readable(column: Any) -> Any:
    """Convert times that Python's datetime cannot represent to ISO 8601, and such durations to integers."""
    import pyarrow as pa
    from pyarrow import compute

    try:
        column.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError):
        if pa.types.is_duration(column.type):
            return column.cast(pa.int64())
        if pa.types.is_temporal(column.type):
            text = column.cast(pa.string())
            return compute.replace_substring(text, " ", "T")  # pyright: ignore[reportAttributeAccessIssue]
    return column


def _has_inner_bytes(kind: Any) -> bool:
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return any(map(_is_bytes, inner)) or any(map(_has_inner_bytes, inner))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _without_text(file: Any, columns: Sequence[str]) -> list[str]:
    """Return the columns of bytes of an open Parquet file in which most of the first values are not UTF-8."""
    columns = [column for column in columns if _is_bytes(file.schema_arrow.field(column).type)]
    first = next(file.iter_batches(FIRST_ROWS, columns=columns, use_threads=False), None) if columns else None
    if first is None:
        return []

    def is_text(value: bytes) -> bool:
        with suppress(UnicodeDecodeError):
            return value.decode() is not None
        return False

    values = {column: first.column(column).drop_null().to_pylist() for column in columns}
    return [column for column, some in values.items() if 2 * sum(map(is_text, some)) < len(some)]


def _json_value(value: Any) -> Any:
    """Convert a value that orjson does not support: bytes, a decimal, a duration."""
    if isinstance(value, bytes):
        return value.decode()
    return float(value) if isinstance(value, Decimal) else str(value)


def table_lines(
    raw: io.BufferedReader, name: str, columns: Mapping[str, str] = {}, fields: Sequence[str] = ()
) -> Iterator[bytes] | None:
    """Return the rows of an open table as JSON lines; None if it is not Parquet (by content), CSV or TSV (by name).

    columns, fields: as in `parquet_lines`
    """
    head = raw.peek(64)[:64]
    if head.startswith(PARQUET_MAGIC):
        return parquet_lines(raw, name, columns, fields)
    if head.startswith(LFS_POINTER):
        raise UserError(f"{name}: a Git LFS pointer instead of the file; run git lfs pull in its folder")
    path = file_path(name).lower()
    if path.endswith(".parquet"):
        instead = f"a file that begins with {head[:16]!r}" if head else "an empty file"
        raise UserError(f"{name}: expected Parquet, found {instead}; fetch it again")
    delimiter = DELIMITERS.get(os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1])
    return csv_lines(raw, name, delimiter, columns) if delimiter else None


def csv_lines(raw: IO[bytes], name: str, delimiter: str, columns: Mapping[str, str] = {}) -> Iterator[bytes]:
    """Yield each row of an open CSV or TSV file, whose first line names the columns, as a line of JSON."""
    text = io.TextIOWrapper(raw, "utf-8-sig", newline="")  # type: ignore[type-var]
    csv.field_size_limit((1 << 31) - 1)  # the default is 131,072 characters, too few for documents
    number = 0
    try:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise UserError(f"{name}: expected unique column names on the first line, found {names}")
        check_columns(names, columns, name)
        for number, row in enumerate(rows, 1):
            if len(row) not in (0, len(names)):
                wanted = f"expected {counted(len(names), 'field')} as in the first line, found {len(row)}"
                raise UserError(f"{name}:{number}: {wanted}; quote fields that contain the separator")
            if row:
                yield orjson.dumps(dict(zip(names, row, strict=True)), option=orjson.OPT_APPEND_NEWLINE)
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#x}"
        raise UserError(f"{name}: not UTF-8 after row {number} ({byte}); convert the file first") from error
    except csv.Error as error:
        raise UserError(f"{name}: damaged after row {number} ({error}); look for an unclosed quote") from error


def write_parquet(
    lines: IO[bytes],
    open_file: Callable[[int], AbstractContextManager[IO[bytes]]],
    name: str,
    groups: int | None = None,
) -> None:
    """Write a file of lines of JSON as Parquet: zstd, in row groups of GROUP_BYTES, with a column for each field.

    A field whose values fit no Arrow type (strings and lists, integers above 64 bits) becomes text, with a note:
    strings unchanged, other values as JSON. A field of only empty objects becomes null.

    open_file: opens the file of a number, from 0
    name:      the output, for messages
    groups:    row groups per file; None for all in one file
    """
    import pyarrow as pa
    from pyarrow import parquet

    kinds, texts = _kinds_of(lines)
    if texts:
        fields = ", ".join(map(repr, sorted(texts)))
        say(f"{name}: fields of mixed types, written as text or JSON: {fields}")
    hollow = {field for field, kind in kinds.items() if _filled(kind) != kind}
    # DuckDB rejects a table without columns, `datasets` a row group without rows
    schema = pa.schema([(field, _filled(kind)) for field, kind in kinds.items()] or [("text", pa.string())])

    def column(group: list[dict[str, Any]], field: str) -> Any:
        values = [row.get(field) for row in group]
        if field in texts:
            values = [
                value if value is None or isinstance(value, str) else dump_json(value).decode() for value in values
            ]
        return pa.array(map(_without_empty, values) if field in hollow else values, schema.field(field).type)

    rest = _groups(lines)
    for number in count():
        first = next(rest, None)
        if first is None and number:
            return
        with open_file(number) as handle, parquet.ParquetWriter(handle, schema, compression="zstd") as writer:
            for group in chain([first] if first else [], islice(rest, groups and groups - 1)):
                writer.write_table(pa.table([column(group, field) for field in schema.names], schema=schema))


def _groups(lines: IO[bytes]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a file of JSON lines, in row groups of GROUP_BYTES."""
    lines.seek(0)
    group, size = [], 0
    for line in lines:
        group.append(load_json(line))
        size += len(line)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _kinds_of(lines: IO[bytes]) -> tuple[dict[str, Any], set[str]]:
    """Return the Arrow type of each field of JSON lines, and the fields that become text because no type fits."""
    import pyarrow as pa

    kinds: dict[str, Any] = {}
    texts, widened = set[str](), set[str]()
    for check in (False, True):  # an integer may not fit the floats that its column was widened to
        for group in _groups(lines):
            for field in dict.fromkeys(field for row in group for field in row if field not in texts):
                before = kinds.get(field, pa.null())
                try:
                    if check:
                        pa.array([row.get(field) for row in group], before)
                        continue
                    values = [row.get(field) for row in group]
                    kind = pa.array(values).type
                    if _hides_booleans(kind, values):
                        texts.add(field)
                        continue
                    both = pa.schema([(field, before)]), pa.schema([(field, kind)])
                    kinds[field] = pa.unify_schemas(both, promote_options="permissive").field(0).type
                    if before not in (pa.null(), kinds[field]) or kind not in (pa.null(), kinds[field]):
                        widened.add(field)
                except (pa.ArrowException, OverflowError):
                    texts.add(field)
        texts |= {field for field, kind in kinds.items() if not _fits(kind)}
        if not widened - texts:
            break
    kinds |= dict.fromkeys(texts, pa.string())
    return kinds, texts


def _hides_booleans(kind: Any, values: Iterable[Any]) -> bool:
    """Return True if floats of an Arrow type include booleans, which Arrow converts to 1.0 and 0.0 after a float."""
    import pyarrow as pa

    if pa.types.is_floating(kind):
        return any(isinstance(value, bool) for value in values)
    values = [value for value in values if value is not None] if "double" in str(kind) else []
    if pa.types.is_list(kind):
        return _hides_booleans(kind.value_type, chain.from_iterable(values))
    return any(
        _hides_booleans(kind.field(number).type, [value.get(kind.field(number).name) for value in values])
        for number in range(kind.num_fields if values else 0)
    )


def _fits(kind: Any) -> bool:
    """Return True for a type that other readers accept: at most DEEPEST_COLUMN levels and MOST_LEAVES fields."""
    level, leaves = [kind], 0
    for _ in range(DEEPEST_COLUMN):
        leaves += sum(not inner.num_fields for inner in level)
        level = [inner.field(index).type for inner in level for index in range(inner.num_fields)]
        if leaves + len(level) > MOST_LEAVES:
            return False
    return not level


def _filled(kind: Any) -> Any:
    """Replace structs without fields, which Parquet cannot store, by null."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return pa.list_(_filled(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _filled(field.type)) for field in kind]) if kind.num_fields else pa.null()
    return kind


def _without_empty(value: Any) -> Any:
    """Replace empty objects in a value by None."""
    if isinstance(value, dict):
        return {name: _without_empty(inner) for name, inner in value.items()} or None
    return [_without_empty(inner) for inner in value] if isinstance(value, list) else value


# ---- values


def load_json(data: bytes) -> Any:
    """Parse JSON with exact integers: orjson turns those above 64 bits into floats."""
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
    """Serialize a value by orjson, also with integers above 64 bits. Raise TypeError as orjson does."""
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
