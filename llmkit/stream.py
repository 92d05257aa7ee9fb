"""Records in and out: JSONL from plain, gzip, zstd and stdin; output that appears whole or not at all.

    with open_output("kept.jsonl") as write:
        for row in read_jsonl(["docs.jsonl.gz", "-"]):
            write(row.value)

Every input is opened once and read forward, so that a pipe or a shell's `<(command)` will do for a file.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import io
import os
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import jsonlines
import orjson

from llmkit.errors import UserError
from llmkit.records import Row, check_document, kind_of

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
PARTIAL = ".partial"
BLOCK = 1 << 20
OURS = ("manifest.json", "tokenizer.json")  # one of them stands in every folder that a stage writes
_stdin_taken: Any = None


# ---- reading


@contextmanager
def open_input(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, or stdin for `-`, as bytes; gzip and zstd are recognised by their first bytes.

    Raises UserError when it cannot be opened, when stdin is asked for a second time, and when the reading
    meets a damaged or cut archive.
    """
    with open_packed(path) as raw:
        yield unpacked(raw, "stdin" if path == "-" else path)


@contextmanager
def open_packed(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, or stdin for `-`, as the bytes that it holds; errors are those of `open_input`."""
    name = "stdin" if path == "-" else path
    try:
        with ExitStack() as stack:
            raw: Any = _take_stdin() if path == "-" else stack.enter_context(open(path, "rb", buffering=BLOCK))
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name}: damaged or cut gzip data: {str(error).lower()}") from error
    except OSError as error:
        if error.filename != path:
            raise
        found = "found a folder" if error.errno == errno.EISDIR else str(error.strerror).lower()
        raise UserError(f"{name}: expected a file that can be read: {found}") from error


def _take_stdin() -> io.BufferedReader:
    global _stdin_taken
    if sys.stdin is None:
        raise UserError("stdin: closed; name a file instead of '-'")
    if sys.stdin is _stdin_taken:
        raise UserError("stdin: '-' can be read only once; save one of the inputs to a file")
    _stdin_taken = sys.stdin
    raw: Any = sys.stdin.buffer
    return raw if hasattr(raw, "peek") else io.BufferedReader(raw)


def unpacked(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    """The bytes of an open gzip or zstd archive, or of any other file as they are; `name` is for errors."""
    magic = raw.peek(4)[:4]
    if magic.startswith(GZIP_MAGIC):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK)  # type: ignore[arg-type]
    if magic == ZSTD_MAGIC:
        return io.BufferedReader(_ZstdFrames(raw, name), BLOCK)
    return raw


class _ZstdFrames(io.RawIOBase):
    """The bytes of zstd frames, one after another; a cut frame is an error.

    zstandard's own stream_reader takes a cut file for a whole one and ends early without a word (0.25).
    """

    def __init__(self, raw: IO[bytes], name: str) -> None:
        import zstandard

        self._zstandard, self._raw, self._name = zstandard, raw, name
        self._frame: Any = None  # the frame being read; None between two
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(1 << 16)
            if not self._input:
                if self._frame is None:
                    return 0
                raise UserError(f"{self._name}: damaged or cut zstd data: it ends inside a frame")
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstandard.ZstdError as error:
                raise UserError(f"{self._name}: damaged or cut zstd data: {error}") from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def read_jsonl(paths: Sequence[str], limit: int | None = None) -> Iterator[Row]:
    """Yield the objects of JSONL files, blank lines left out, at most `limit` of them in all.

    Raises UserError naming file and line for a line that is not a JSON object, is not UTF-8, or holds a lone
    surrogate.
    """

    def rows(path: str) -> Iterator[Row]:
        with open_input(path) as handle:
            yield from _json_rows(handle, path)

    yield from islice(chain.from_iterable(map(rows, paths)), limit)


def read_documents(paths: Sequence[str], limit: int | None = None) -> Iterator[Row]:
    """Yield documents `{"text", ...}` from JSONL, or from plain text: a file of plain text is one document.

    `.jsonl`, `.json` and `.ndjson` are JSONL, `.txt` and `.md` are text; stdin and files of other names are
    JSONL when their first character is `{`. Raises UserError for a record whose `text` is missing or not a
    string, and for text that is not UTF-8.
    """

    def rows(path: str) -> Iterator[Row]:
        with open_input(path) as handle:
            yield from (json_documents if is_jsonl(handle, path) else _plain_document)(handle, path)

    yield from islice(chain.from_iterable(map(rows, paths)), limit)


def _json_rows(handle: IO[bytes], path: str) -> Iterator[Row]:
    name = "stdin" if path == "-" else path
    for number, line in enumerate(handle, 1):
        row = json_row(line, name, number)
        if row is not None:
            yield row


def json_row(line: bytes, name: str, number: int) -> Row | None:
    """The object on one line of JSONL, None for a blank line; errors are those of `read_jsonl`."""
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    if line.isspace() or not line:
        return None
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        found = "not UTF-8" if "UTF-8" in str(error) else str(error).split(": line ")[0]
    else:
        if isinstance(value, dict):
            return Row(value, name, number)
        found = f"found {kind_of(value)}"
    raise UserError(f"{name}:{number}: expected one JSON object a line: {found}; mend or remove the line")


def json_documents(handle: IO[bytes], path: str) -> Iterator[Row]:
    """The documents of an open JSONL file, checked; `path` is named in errors."""
    for row in _json_rows(handle, path):
        check_document(row)
        yield row


def _plain_document(handle: IO[bytes], path: str) -> Iterator[Row]:
    name = "stdin" if path == "-" else path
    try:
        text = handle.read().removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8 at byte {error.start}; convert the file first") from None
    if text:
        yield Row({"text": text, "source": Path(name).name}, name, 1)


def is_jsonl(handle: io.BufferedReader, path: str) -> bool:
    """Whether an open file is JSONL, by its name or, where that says nothing, by its first character."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return True
    if name.endswith((".txt", ".md")):
        return False
    return handle.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"")


# ---- writing


def check_output(path: str, force: bool, resume: bool = False) -> None:
    """Raise UserError when `path` cannot become the output: call it before the work, not after.

    It exists and neither `--force` nor `--resume` says what to do with it; or `--force` would delete a folder
    that no stage has written; or its parent folder is missing.
    """
    if path == "-" or _is_special(path):
        return
    if os.path.basename(os.path.normpath(path)) in ("", ".", ".."):
        raise UserError(f"{path}: the result needs a name of its own; choose another --out")
    if os.path.exists(path) and not resume:
        if not force:
            raise UserError(f"{path}: exists already; --force replaces it, or choose another --out")
        if os.path.isdir(path) and os.listdir(path) and not any(os.path.exists(f"{path}/{name}") for name in OURS):
            raise UserError(f"{path}: not a folder that llmkit wrote, so --force leaves it alone; choose another --out")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise UserError(f"{path}: the folder {parent} does not exist; create it first")


def check_is_folder(path: Path, name: str) -> None:
    """Raise UserError when a folder is to stand where a file stands, which --force does not allow either."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{name}: expected a folder, found a file; choose another --out")


def _is_special(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a pipe or a device, to be written in place: /dev/null, >(command)."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def open_output(path: str, force: bool = False) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Yield a function that writes one record. A file appears when all is written; `-` is stdout, at once."""
    check_output(path, force)
    if path == "-" and sys.stdout is None:
        raise UserError("stdout: closed; name a file instead of '-'")
    target = nullcontext(sys.stdout.buffer) if path == "-" else atomic_file(path)
    # flushed, so that the reader of a pipe sees each record as it comes
    with target as handle, jsonlines.Writer(handle, dumps=_dumps, flush=path == "-") as writer:  # type: ignore
        yield writer.write


def _dumps(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY)


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` + ".partial" for writing and rename it to `path` at the end; remove it on an error.

    A link is followed; a device or pipe is written in place; text is UTF-8.
    """
    encoding = None if "b" in mode else "utf-8"
    if _is_special(path):
        with _full_disk_is_named(path), open(path, mode, encoding=encoding) as handle:
            yield handle
        return
    if os.path.isdir(path):
        raise UserError(f"{os.fspath(path)}: expected a file, found a folder; choose another --out")
    final = os.path.realpath(path)
    partial = final + PARTIAL
    try:
        with _full_disk_is_named(path), open(partial, mode, encoding=encoding) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, final)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield an empty folder `path` + ".partial"; at the end it replaces `path`, on an error it is removed."""
    if not force:
        check_output(os.fspath(path), force)
    final = Path(os.path.realpath(path))
    check_is_folder(final, os.fspath(path))
    partial = final.with_name(final.name + PARTIAL)
    remove(partial)  # left by a run that was killed
    try:
        with _full_disk_is_named(path):
            partial.mkdir()
            yield partial
        replace_folder(partial, final)
    except BaseException:
        remove(partial)
        raise


@contextmanager
def _full_disk_is_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn "no space left" into a UserError naming the output; safetensors wraps the OSError in its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_full_disk(error):
            raise
        raise UserError(f"{os.fspath(path)}: no space left there for the output; nothing was changed") from error


def is_full_disk(error: Exception) -> bool:
    """Whether a write failed for want of space, of quota, or at a limit on the size of files."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def replace_folder(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of `old` (which may exist), so that `old` is always whole.

    Linux and macOS exchange the two names in one step; on a file system that cannot, there is a moment in
    which the former folder stands under `old` + ".former".
    """
    if not old.exists():
        os.rename(new, old)
        return
    if not _exchange(new, old):
        former = old.with_name(old.name + ".former")
        remove(former)
        os.rename(old, former)
        os.rename(new, old)
        new = former
    remove(new)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _exchange(first: Path, second: Path) -> bool:
    at_cwd, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP
    names = os.fsencode(first), os.fsencode(second)
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "renameat2"):  # Linux with glibc or a recent musl
        return libc.renameat2(at_cwd, names[0], at_cwd, names[1], swap) == 0
    if hasattr(libc, "renamex_np"):  # macOS
        return libc.renamex_np(*names, swap) == 0
    return False
