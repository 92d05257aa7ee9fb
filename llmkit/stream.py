"""Records in and out: JSONL from plain, gzip, zstd and stdin; output that appears whole or not at all; progress.

with open_output("kept.jsonl") as write:
    for row in read_jsonl(["docs.jsonl.gz", "-"]):
        write(row.value)
"""

from __future__ import annotations

import ctypes
import gzip
import io
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import jsonlines
import orjson

from llmkit.errors import UserError
from llmkit.records import Row, check_document

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PARTIAL = ".partial"


# ---- reading


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """Open a file, or stdin for `-`, as bytes; gzip and zstd are recognised by their first bytes.

    Raises UserError when the file cannot be opened, and turns a damaged or cut archive into one.
    """
    name = "stdin" if path == "-" else path
    try:
        raw = sys.stdin.buffer if path == "-" else open(path, "rb", buffering=1 << 20)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{name}: cannot read: {error.strerror}") from error
    try:
        with nullcontext(raw) if path == "-" else raw:
            magic = raw.peek(4)[:4] if hasattr(raw, "peek") else b""
            try:
                yield _decompressed(raw, magic)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{name}: damaged or cut gzip data: {error}") from error
            except Exception as error:
                if type(error).__name__ == "ZstdError":
                    raise UserError(f"{name}: damaged or cut zstd data: {error}") from error
                raise
    except IsADirectoryError as error:
        raise UserError(f"{name}: expected a file, found a folder") from error


def _decompressed(raw: Any, magic: bytes) -> IO[bytes]:
    if magic.startswith(GZIP_MAGIC):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)  # type: ignore[arg-type]
    if magic == ZSTD_MAGIC:
        import zstandard

        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20
        )  # type: ignore[arg-type]
    return raw


class _NumberedLines:
    """Iterates lines and remembers the number of the last one, for error messages."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle, self.number = handle, 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self.handle:
            self.number += 1
            yield line


def read_jsonl(paths: Sequence[str], limit: int | None = None) -> Iterator[Row]:
    """Yield the objects of JSONL files, blank lines left out, at most `limit` of them in all.

    Raises UserError naming file and line for a line that is not a JSON object, is not UTF-8, or holds a lone
    surrogate.
    """
    remaining = limit
    for path in paths:
        name = "stdin" if path == "-" else path
        with open_input(path) as handle:
            lines = _NumberedLines(handle)
            reader = jsonlines.Reader(lines, loads=orjson.loads)  # type: ignore[arg-type]
            while remaining is None or remaining > 0:
                try:
                    value = reader.read(type=dict, skip_empty=True)
                except EOFError as error:
                    if "Compressed" in str(error):  # gzip's own, not the end of the lines
                        raise
                    break
                except jsonlines.InvalidLineError as error:
                    reason = str(error).split(" (line ")[0].split("\n")[0]
                    raise UserError(
                        f"{name}:{lines.number}: expected one JSON object a line: {reason}; mend or remove the line"
                    ) from None
                yield Row(value, name, lines.number)
                if remaining is not None:
                    remaining -= 1
        if remaining == 0:
            return


def read_documents(paths: Sequence[str], limit: int | None = None) -> Iterator[Row]:
    """Yield documents `{"text", ...}` from JSONL, or from plain text: a `.txt` file is one document.

    Stdin and files of other names are JSONL when their first character is `{`. Raises UserError for a record
    whose `text` is missing or not a string, and for text that is not UTF-8.
    """
    remaining = limit
    for path in paths:
        if remaining is not None and remaining <= 0:
            return
        rows = (
            _read_plain_text(path)
            if not _is_jsonl(path)
            else _checked_documents(read_jsonl([path], remaining))
        )
        for row in rows:
            yield row
            if remaining is not None:
                remaining -= 1


def _checked_documents(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        check_document(row)
        yield row


def _is_jsonl(path: str) -> bool:
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return True
    if name.endswith((".txt", ".md")):
        return False
    if path == "-":
        head = sys.stdin.buffer.peek(1 << 12)  # type: ignore[attr-defined]
        if head.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
            return True
    else:
        with open_input(path) as handle:
            head = handle.read(1 << 12)
    return head.lstrip()[:1] in (b"{", b"")


def _read_plain_text(path: str) -> Iterator[Row]:
    name = "stdin" if path == "-" else path
    with open_input(path) as handle:
        data = handle.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8 at byte {error.start}; convert the file first") from None
    if text:
        yield Row({"text": text, "source": Path(name).name}, name, 1)


# ---- writing


def check_output(path: str, force: bool, resume: bool = False) -> None:
    """Raise UserError when `path` exists and neither `--force` nor `--resume` says what to do with it."""
    if path != "-" and not force and not resume and os.path.exists(path):
        raise UserError(f"{path}: exists already; --force replaces it, or choose another --out")
    parent = os.path.dirname(os.path.abspath(path))
    if path != "-" and not os.path.isdir(parent):
        raise UserError(f"{path}: the folder {parent} does not exist; create it first")


@contextmanager
def open_output(path: str, force: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes one record. A file appears when all is written; `-` is stdout."""
    check_output(path, force)
    target = nullcontext(sys.stdout.buffer) if path == "-" else atomic_file(path)
    with target as handle, jsonlines.Writer(handle, dumps=orjson.dumps) as writer:  # type: ignore[arg-type]
        yield writer.write
        handle.flush()


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` + ".partial" for writing and rename it to `path` at the end; remove it on an error."""
    partial = os.fspath(path) + PARTIAL
    try:
        with open(partial, mode) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield an empty folder `path` + ".partial" that takes the place of `path` at the end, or goes on an error."""
    check_output(os.fspath(path), force)
    partial = Path(os.fspath(path).rstrip("/") + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, Path(path))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of `old` (which may exist), so that `old` is always whole.

    Linux exchanges the two names in one step (renameat2 with RENAME_EXCHANGE); elsewhere there is a moment in
    which the former folder stands under `old` + ".former".
    """
    if not old.exists():
        os.rename(new, old)
        return
    if not _exchange(new, old):
        former = Path(str(old).rstrip("/") + ".former")
        shutil.rmtree(former, ignore_errors=True)
        os.rename(old, former)
        os.rename(new, old)
        new = former
    shutil.rmtree(new, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    at_cwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return (
        renameat2 is not None
        and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0
    )
