"""Tables as lines of JSON, and back: Parquet, CSV and TSV.

Every reader of JSONL reads a table so, a row being a record and a line (the first row is line 1), and every writer of
JSONL writes Parquet. A second of a core turns 1 GB of text into lines, so that one reader serves for all formats.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import IO, Any

import orjson

from llmkit.errors import UserError
from llmkit.io.progress import counted, say

PARQUET_MAGIC = b"PAR1"
NOT_UTF8 = b'"\xff"\n'
DELIMITERS = {".csv": ",", ".tsv": "\t"}
READ_ROWS = 256  # at once: of 1 MB each they are 256 MB
READ_BYTES = 1 << 20  # of a column at once, so that a row group of any size is streamed
GROUP_BYTES = 1 << 26  # of JSON in a row group that is written; https://huggingface.co/docs/hub/datasets-streaming


class Lines(io.RawIOBase):
    """Lines from an iterator, as a file to be read."""

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

    columns: of fields, as `--columns` names them; the lines have the names of the file
    fields:  those that the reader uses, if it is not all; other columns are not read where the file has the first field

    Nested lists, structs and maps become arrays and objects, times ISO 8601, decimals numbers, NaN null. Bytes are read
    as UTF-8; columns with bytes inside lists or structs, as of images, are left out, which is told. A row that is not
    UTF-8 is a line that is none, which its reader counts. Raises UserError for a damaged or cut file, and where it has
    neither a field nor its column.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not raw.seekable():  # its index stands at the end
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
        read = [column for column in names if column in used] if used and used[0] in names else names
        inner_bytes = [column for column in read if _has_inner_bytes(file.schema_arrow.field(column).type)]
        if inner_bytes:
            say(f"{name}: left out what holds bytes, the columns {', '.join(inner_bytes)}")
        read = [column for column in read if column not in inner_bytes]
        for batch in file.iter_batches(READ_ROWS, columns=read, use_threads=False):
            for line in _lines_of(batch):
                yield line
                number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{name}: damaged or cut Parquet after row {number} ({reason}); fetch it again") from error


def check_columns(names: Sequence[str], columns: Mapping[str, str], table: str) -> None:
    """Raise UserError where a table has neither a field of `--columns` nor its column."""
    for field, column in columns.items():
        if field not in names and _column_in(names, column) is None:
            raise UserError(f"{table}: expected column {column!r} (--columns), found {', '.join(names)}")


def _column_in(names: Collection[str], column: str) -> str | None:
    """The column of a table in which a column or a field within one, `chat.turns`, lies."""
    outer = column.partition(".")[0]
    return column if column in names else outer if outer in names else None


def _lines_of(batch: Any) -> list[bytes]:
    """Each row of an Arrow batch as a line of JSON, one that is not UTF-8 as NOT_UTF8."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
        return [orjson.dumps(row, _json_value, orjson.OPT_APPEND_NEWLINE) for row in rows]
    except (TypeError, UnicodeDecodeError):
        if batch.num_rows == 1:
            return [NOT_UTF8]
        return [line for row in range(batch.num_rows) for line in _lines_of(batch.slice(row, 1))]


def _has_inner_bytes(kind: Any, inner: bool = False) -> bool:
    import pyarrow as pa

    if pa.types.is_nested(kind):
        return any(_has_inner_bytes(kind.field(index).type, True) for index in range(kind.num_fields))
    return inner and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _json_value(value: Any) -> Any:
    """A value for JSON in place of one that orjson does not know: bytes, a decimal, a duration."""
    if isinstance(value, bytes):
        return value.decode()
    return float(value) if isinstance(value, Decimal) else str(value)


def table_lines(
    raw: io.BufferedReader, name: str, columns: Mapping[str, str] = {}, fields: Sequence[str] = ()
) -> Iterator[bytes] | None:
    """The rows of an open table as lines of JSON: of Parquet by its first bytes, of CSV and TSV by the name.

    columns, fields: as in `parquet_lines`
    """
    if raw.peek(4)[:4] == PARQUET_MAGIC:
        return parquet_lines(raw, name, columns, fields)
    delimiter = DELIMITERS.get(os.path.splitext(name.lower().removesuffix(".gz").removesuffix(".zst"))[1])
    return csv_lines(raw, name, delimiter, columns) if delimiter else None


def csv_lines(raw: IO[bytes], name: str, delimiter: str, columns: Mapping[str, str] = {}) -> Iterator[bytes]:
    """Yield each row of an open CSV or TSV file, the first of which names the columns, as a line of JSON."""
    text = io.TextIOWrapper(raw, "utf-8-sig", newline="")  # type: ignore[type-var]
    csv.field_size_limit((1 << 31) - 1)  # of 131,072 characters otherwise, which a document may exceed
    number = 0
    try:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise UserError(f"{name}: expected names of columns on the first line, each once, found {names}")
        check_columns(names, columns, name)
        for number, row in enumerate(rows, 1):
            if len(row) not in (0, len(names)):
                wanted = f"expected {counted(len(names), 'field')}, as the first line has, found {len(row)}"
                raise UserError(f"{name}:{number}: {wanted}; quote fields that hold the separator")
            if row:
                yield orjson.dumps(dict(zip(names, row, strict=True)), option=orjson.OPT_APPEND_NEWLINE)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}: damaged after row {number} ({error}); write it again as UTF-8") from error


def write_parquet(lines: IO[bytes], out: IO[bytes], name: str) -> None:
    """Write a file of lines of JSON as Parquet: zstd, in row groups of GROUP_BYTES, a column for each field.

    The lines are read twice: first for the columns of all. Raises UserError where a field has values that no column
    holds together, as a string and a list.
    """
    import pyarrow as pa
    from pyarrow import parquet

    def groups() -> Iterator[list[dict[str, Any]]]:
        lines.seek(0)
        group, size = [], 0
        for line in lines:
            group.append(orjson.loads(line))
            size += len(line)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        yield group

    schema = pa.schema([])
    try:
        for group in groups():
            names = dict.fromkeys(name for row in group for name in row)  # from_pylist: the first row
            table = pa.table({name: [row.get(name) for row in group] for name in names})
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        with parquet.ParquetWriter(out, schema, compression="zstd") as writer:
            for group in groups():
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    except (pa.ArrowException, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: values of one field that no column holds ({reason}); write .jsonl") from error
