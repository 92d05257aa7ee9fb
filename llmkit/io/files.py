"""Atomic output files and folders, and checks of output paths.

    check_output("model/", force=False)  # before the work
    with atomic_folder("model/") as folder:
        (folder / "README.md").write_text("Mine")

Output is written to `path` + ".partial", synced to disk, and renamed; only then is the old content deleted. A power
cut at any moment leaves either the old or the new content intact. `sole_writer` keeps two processes from writing the
same output.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llmkit.errors import UserError
from llmkit.io.remote import is_remote

PARTIAL = ".partial"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BLOCK = 1 << 16  # bytes read at a time
OURS = ("manifest.json", "tokenizer.json")  # every folder that a stage writes contains one of them
# extensions of formats that no stage writes
NOT_WRITTEN = (".arrow", ".feather", ".csv", ".tsv", ".xlsx", ".bz2", ".xz", ".lz4", ".br", ".zip", ".7z")


def file_path(path: str) -> str:
    """Strip query and fragment from a web address; return other paths unchanged.

    >>> file_path("https://host/docs.csv?version=1"), file_path("what?.csv")
    ('https://host/docs.csv', 'what?.csv')
    """
    return re.split("[?#]", path)[0] if path.startswith(("http://", "https://")) else path


def check_output(path: str, force: bool, resume: bool = False, is_file: bool = False) -> None:
    """Raise UserError if `path` cannot become the output. Call it before the work starts.

    It must not be an existing file or non-empty folder without `--force` or `--resume`; a folder that no stage wrote,
    even with `--force`; a mount point, a dangling link or in a folder without write permission, because a rename would
    fail; or, with `is_file`, the name of a folder or of a format that no stage writes. A missing parent folder is
    created later.
    """
    if path == "-" or _is_special(path):
        return
    if re.match(r"[A-Za-z][\w+.-]+:/", path):  # also S3:// and s3:/, which would become local folders
        where = "to s3:// and gs:// addresses (docs/own-data.md)"
        raise UserError(f"{path}: only records are written {where}; write a local file and copy it there")
    if is_file and path.endswith("/"):
        raise UserError(f"{path}: expected a file name, such as {path.rstrip('/')}.jsonl or .parquet")
    if is_file:
        check_format(path)
    if os.path.basename(os.path.normpath(path)) in ("", ".", ".."):
        raise UserError(f"{path}: expected the name of a new file or folder; choose another place")
    final = os.path.realpath(path)
    parent = os.path.dirname(final)
    if os.path.islink(path) and not os.path.isdir(parent):
        raise UserError(f"{path}: a link to {final}, whose folder does not exist; choose another place")
    mounts = set[str]()
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
        mounts = {line.split()[4] for line in lines}
    if os.path.ismount(final) or final.replace(" ", "\\040") in mounts:
        raise UserError(f"{path}: a mount point cannot be replaced; choose a place inside it: --out {path}/result")
    if os.path.exists(path) and not resume and not is_empty_folder(path):
        if not force:
            raise UserError(f"{path}: already exists; --force replaces it, or choose another place")
        ours = [*(f"{path}/{name}" for name in OURS), f"{path.rstrip('/')}.manifest.json"]
        if os.path.isdir(path) and os.listdir(path) and not any(map(os.path.exists, ours)):
            raise UserError(f"{path}: not a folder that llmkit wrote, so --force leaves it alone; choose another place")
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UserError(f"{path}: expected a folder at {parent}, found a file; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: permission denied for {parent}; choose another place")


def check_format(path: str) -> None:
    """Raise UserError if the file name has the extension of a format that no stage writes."""
    if path.lower().endswith(NOT_WRITTEN):
        kind = os.path.splitext(path)[1]
        raise UserError(f"{path}: {kind} is not supported; choose .jsonl, .jsonl.gz, .jsonl.zst or .parquet")


def is_empty_folder(path: str | os.PathLike[str]) -> bool:
    """Return True if `path` is an empty folder, which an output may replace."""
    return os.path.isdir(path) and not os.listdir(path)


def check_unfinished(force: bool, resume: bool, *left: str | Path) -> None:
    """Raise UserError if a killed run left one of these paths, and neither `--force` nor `--resume` is given."""
    leftover = next(filter(os.path.exists, left), None)
    if leftover is not None and not (force or resume):
        raise UserError(f"{leftover}: an unfinished run; --resume continues it, --force starts over")


def output_folder(out: str | None, example: str) -> Path:
    """Return the output folder of a stage. Raise UserError if `out` is missing, `-`, an address or a file."""
    if out is None:
        raise UserError(f"--out is required: the output folder, such as -o {example}")
    if out == "-":
        raise UserError(f"--out: expected a folder, such as -o {example}, found -")
    if is_remote(out):
        raise UserError(f"{out}: only records are written to addresses; write a local folder and copy it there")
    folder = Path(out.rstrip("/") or "/")
    if folder.exists() and not folder.is_dir():  # refused even with --force
        raise UserError(f"{folder}: expected a folder, found a file; choose another place")
    return folder


def _is_special(path: str | os.PathLike[str]) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


# ---- one writer at a time


@contextmanager
def sole_writer(path: str) -> Iterator[None]:
    """Hold a lock on `path` + ".partial.lock" so that no other process writes the output `path`.

    The kernel releases the lock when the process ends, even by kill -9. A file system without locks gets none.
    Raise UserError if another process holds the lock.
    """
    lock = f"{os.path.realpath(path)}{PARTIAL}.lock"
    new_folders = [] if _is_special(path) or os.path.islink(path) else _make_parents(lock)
    handle = None if _is_special(path) else _lock(path, lock)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                os.unlink(lock)
            handle.close()
        for folder in new_folders:  # a run that failed leaves no empty folders
            with suppress(OSError):
                os.rmdir(folder)


def _make_parents(path: str | os.PathLike[str]) -> list[str]:
    """Create the missing parent folders of `path` and return them, the deepest first."""
    missing, parent = [], os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    with suppress(OSError):  # the write that follows reports it
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return missing


def create(path: str | os.PathLike[str], mode: str = "wb") -> IO[Any]:
    """Open a new file for writing after deleting any existing file or link; never follow a planted link."""
    with suppress(OSError):
        os.unlink(path)
    return open(path, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")


def _lock(path: str, lock: str) -> IO[bytes] | None:
    no_link = lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)  # noqa: E731
    try:
        handle = open(lock, "a+b", buffering=0, opener=no_link)  # noqa: SIM115
    except OSError as error:  # a missing or read-only folder, which writing the output reports
        if error.errno == errno.ELOOP:
            raise UserError(f"{lock}: a link that no run has made; remove it, or choose another place") from None
        return None
    status = os.fstat(handle.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise UserError(f"{lock}: not a file that a run has made; remove it, or choose another place")
    try:
        # lockf, not flock: forked workers would inherit flock's lock and may outlive this process
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(lock) and os.path.samestat(os.stat(lock), status):
            handle.truncate(0)
            handle.write(b"%d" % os.getpid())
            return handle
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return handle  # a file system without locks, or a full one
        handle.seek(0)
        number = handle.read().decode() or "unknown"
        raise UserError(
            f"{path}: another run is writing it (process {number}); wait for it, or choose another place"
        ) from None
    handle.close()
    return _lock(path, lock)  # the previous holder has just deleted the lock file


# ---- a file, a folder


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open `path` + ".partial" for writing and rename it to `path` at the end; delete it on an error.

    Links are followed, devices and pipes are written in place, and text is UTF-8.
    """
    encoding = None if "b" in mode else "utf-8"
    if _is_special(path):
        with errors_name(path, path), open(path, mode, encoding=encoding) as handle:
            yield handle
        return
    if os.path.isdir(path):
        raise UserError(f"{os.fspath(path)}: expected a file, found a folder; choose another place")
    final = os.path.realpath(path)
    partial = final + PARTIAL
    _make_parents(final)
    try:
        with errors_name(path, partial), create(partial, mode) as handle:
            yield handle
            handle.flush()
            usual = os.fstat(handle.fileno()).st_mode & 0o777
            if not os.path.samestat(os.stat(partial), os.fstat(handle.fileno())):
                os.chmod(partial, usual)  # a library replaced the file: safetensors by one with mode 0600
            replace_file(partial, final)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield an empty folder `path` + ".partial"; it replaces `path` at the end and is deleted on an error."""
    if not force:
        check_output(os.fspath(path), force)
    final = Path(os.path.realpath(output_folder(os.fspath(path), "")))
    partial = final.with_name(final.name + PARTIAL)
    remove(partial)  # left by a run that was killed
    try:
        with errors_name(path, partial):
            partial.mkdir(parents=True)
            yield partial
        replace_folder(partial, final)
    except BaseException:
        remove(partial)
        raise


@contextmanager
def errors_name(path: str | os.PathLike[str], partial: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of writing `partial` into a UserError that names `path`, also a full disk wrapped by safetensors."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and is_full_disk(error):
            raise UserError(f"{os.fspath(path)}: no space left on disk; free some and run it again") from error
        if isinstance(error, OSError) and error.filename in (partial, os.fspath(partial)):
            reason = str(error.strerror).lower()
            raise UserError(f"{os.fspath(path)}: cannot be written: {reason}; choose another place") from error
        raise


def is_full_disk(error: Exception) -> bool:
    """Return True if a write failed because of a full disk, a quota or a limit on file sizes."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network and FUSE file systems cannot sync folders
        if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def replace_file(new: str | os.PathLike[str], old: str | os.PathLike[str]) -> None:
    """Rename `new` to `old`, which may exist; a power cut leaves one of them intact."""
    sync(new)
    os.replace(new, old)
    sync(os.path.dirname(os.path.abspath(old)))


def replace_folder(new: Path, old: Path) -> None:
    """Replace the folder `old`, which may not exist, by `new`; a power cut leaves one of them intact.

    Linux and macOS swap the two names atomically. On file systems that cannot, the old folder is moved to
    `old` + ".former" first. It is deleted once the new one is on disk.
    """
    for parent, _, names in os.walk(new, topdown=False):
        for name in names:
            if stat.S_ISREG(os.lstat(os.path.join(parent, name)).st_mode):
                sync(os.path.join(parent, name))
        sync(parent)
    former = None
    if not old.exists():
        os.rename(new, old)
    elif _exchange(new, old):
        former = new
    else:
        former = old.with_name(old.name + ".former")
        remove(former)
        os.rename(old, former)
        os.rename(new, old)
    sync(old.absolute().parent)
    if former is not None:
        remove(former)


def remove(path: Path) -> None:
    """Delete a file or folder if it exists, but no pipe or device: root may delete /dev/null."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif not _is_special(path):
        with suppress(OSError):
            path.unlink()


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; return False if the system cannot."""
    at_cwd, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP
    names = os.fsencode(first), os.fsencode(second)
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "renameat2"):  # Linux with glibc or a recent musl
        return libc.renameat2(at_cwd, names[0], at_cwd, names[1], swap) == 0
    if hasattr(libc, "renamex_np"):  # macOS
        return libc.renamex_np(*names, swap) == 0
    return False


def cut_torn_line(handle: IO[bytes]) -> None:
    """Remove an incomplete last line, left by a kill, from a file open for reading and writing; seek to the end."""
    end = handle.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK)
        handle.seek(start)
        if whole_lines := handle.read(end - start).rfind(b"\n") + 1:
            end = start + whole_lines
            break
        end = start
    handle.truncate(end)
    handle.seek(end)


# ---- files that llmkit did not write


def check_file(path: str | os.PathLike[str], largest: int | None = None) -> None:
    """Raise UserError for a folder, a pipe, a Git LFS pointer or a file above `largest` bytes; OSError if missing."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise UserError(f"{path}: expected a file, found {kind}; put the file itself there")
    if largest is not None and status.st_size > largest:
        raise UserError(f"{path}: expected at most {largest >> 20} MB, found {status.st_size >> 20} MB")
    with open(path, "rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path}: a Git LFS pointer to a file that was not downloaded; run git lfs pull in its folder"
            )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_file(path: Path, largest: int = 16 << 20) -> bytes:
    """Return the content of a file of at most `largest` bytes. Raise UserError as `check_file` does."""
    check_file(path, largest)
    return path.read_bytes()
