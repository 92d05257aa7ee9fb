"""Read files at `https:// s3:// gs:// hf://` addresses, sequentially or with seeks; upload files to buckets.

    with open_remote("s3://commoncrawl/crawl-data/.../CC-MAIN-...warc.gz") as file:
        file.read(1 << 20)

Credentials are found by the client libraries; without any, buckets are read anonymously. If a connection breaks or
a server is busy, the missing bytes are requested again, with growing pauses. With `settings.cache` a file is fetched
as a whole before its first byte is read, and read from the cache the next time.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from llmkit import __version__
from llmkit.display import redacted
from llmkit.errors import UserError
from llmkit.io.progress import Progress, counted, say

BUCKETS = ("s3", "s3a", "gs", "gcs", "hf")  # protocols with an fsspec file system
WRITABLE = ("s3", "s3a", "gs", "gcs")  # protocols with atomic uploads
BLOCK, KEPT_BLOCKS = 4 << 20, 8  # bytes per request to a bucket; blocks kept in memory
TRIES = 6  # in a row, with pauses of 1/4 s to 4 s between them
PAUSE, LONGEST_PAUSE, TIMEOUT = 0.25, 30.0, 60.0  # s; LONGEST_PAUSE caps the Retry-After of a server
DESCRIPTION, WAIT = ".json", 0.2  # extension in the cache; s between checks of a file that another run fetches
LASTING = {400, 401, 403, 404, 405, 410, 416, 451}  # HTTP errors that a retry does not change
_ADDRESS, _STARS = re.compile(r"[a-z][a-z0-9+.-]+://"), re.compile(r"(\*+)")

# exception class name to advice
HUB_ERRORS = {
    "GatedRepoError": "its terms must be accepted: open its page on the hub, then log in (hf auth login, or HF_TOKEN)",
    "RepositoryNotFoundError": "no such repository on the hub, or a private one: log in (hf auth login, or HF_TOKEN)",
    "RevisionNotFoundError": "no such revision on the hub",
    "HFValidationError": "no such repository on the hub; expected ORG/NAME",
}
_away: dict[str, tuple[int | None, str]] = {}  # size and last known version of unreachable addresses
_commits: dict[tuple[str, str, str], str] = {}  # (kind of repository, name, revision) to commit

T = TypeVar("T")


class Unreachable(UserError):
    """A server does not answer, or answers with errors that may pass."""


@dataclass
class Settings:
    """Options of a command for reading addresses; `cache` is a folder for fetched files."""

    cache: str | None = None
    quiet: bool = False


settings = Settings()


def is_remote(path: str) -> bool:
    """Return True for an address, whether or not it exists."""
    return _ADDRESS.match(path) is not None


def open_remote(address: str) -> io.BufferedReader:
    """Open the file at an address; it is seekable unless its server ignores range requests.

    Raise UserError, also while reading, if the file does not exist, cannot be read, or changes.
    """
    return io.BufferedReader(RemoteFile(address, _source(address)), 1 << 20)


def _source(address: str, last: str = "") -> _Http | _Bucket | _Cached:
    return _server(address, last) if settings.cache is None else _Cached(address, Path(settings.cache))


def _server(address: str, last: str = "") -> _Http | _Bucket:
    return _Http(address, last) if address.startswith(("http://", "https://")) else _Bucket(address)


def cached_file(address: str) -> Path:
    """Return the cached copy of the file at an address, after fetching it if necessary.

    Raise UserError as `open_remote` does, and without `settings.cache`.
    """
    if settings.cache is None:
        raise UserError(f"{address}: expected --cache DIR, a folder to fetch it into")
    with closing(_Cached(address, Path(settings.cache))) as cached:
        retried(address, cached.describe)
        return cached.fetch()


def size_and_version(address: str) -> tuple[int | None, str]:
    """Return size in bytes and version (ETag or time) of the file at an address, as far as its server sends them.

    Raise UserError if it does not exist or cannot be read.
    """
    with closing(_source(address, last="0")) as source:
        retried(address, source.describe)
    return source.now


def is_named(address: str, pattern: str) -> bool:
    """Return True if `pattern`, which may also be a file or a folder, matches an address.

    >>> is_named("s3://bucket/a/b.jsonl", "s3://bucket/*.jsonl"), is_named("s3://bucket/a/b.jsonl", "s3://bucket/a/")
    (False, True)
    """
    pattern = f"{pattern}**" if pattern.endswith("/") else pattern
    pieces = [{"**": ".*", "*": "[^/]*"}.get(piece, re.escape(piece)) for piece in _STARS.split(pattern)]
    return is_remote(address) and re.fullmatch("".join(pieces), address) is not None


def matching(pattern: str) -> list[str]:
    """Return the sorted addresses of the files that match a pattern such as `hf://datasets/org/name/**/*.parquet`.

    Raise UserError if there are none.
    """
    if pattern.startswith(("http://", "https://")):
        raise UserError(f"{pattern}: a web server does not list its files; name each file")
    system, path = _file_system(pattern)
    entries = retried(pattern, lambda: system.glob(path, detail=True))
    files = sorted(system.unstrip_protocol(name) for name, entry in entries.items() if entry.get("type") == "file")
    if not files:
        _check_bucket(pattern)
        raise UserError(f"{pattern}: expected files that match this pattern, found none")
    return files


def listing(folder: str) -> dict[str, tuple[int, str]]:
    """Return size and version of each file in a folder of a bucket, by name; none if there is no such folder."""
    system, path = _file_system(folder)

    def entries() -> list[dict[str, Any]]:
        system.invalidate_cache()
        with suppress(FileNotFoundError, NotADirectoryError):
            return system.ls(path.rstrip("/"), detail=True)
        return []

    files = [entry for entry in retried(folder, entries) if entry.get("type") == "file" and entry["name"] != path]
    return {entry["name"].rpartition("/")[2]: (entry.get("size") or 0, _version(entry)) for entry in files}


def _check_bucket(address: str) -> None:
    """Raise UserError if the bucket does not exist; ignore other errors, as readers may lack the right to ask."""
    if address.startswith(WRITABLE):
        system, path = _file_system(address)
        try:
            system.info(path.partition("/")[0])
        except Exception as error:  # each library has its own errors
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{address}: expected a bucket, found none there") from None


def _version(entry: dict[str, Any]) -> str:
    """Return the ETag, hash or time of a file, which changes with its content."""
    names = ("ETag", "etag", "blob_id", "LastModified", "last_commit")
    return next((str(entry[name]) for name in names if entry.get(name)), "").strip('"')


def check_upload(address: str, replaces: bool) -> None:
    """Raise UserError if no file can be uploaded to an address, or one exists that `replaces` does not allow."""
    if address.partition("://")[0] not in WRITABLE:
        raise UserError(f"{address}: records are written only to s3:// and gs://; write a local file and copy it there")
    system, path = _file_system(address)
    bucket, _, key = path.partition("/")
    if not bucket or not key or address.endswith(("/", "/.", "/..")):
        raise UserError(f"{address}: expected a file name in a bucket, such as s3://bucket/docs.jsonl.gz")
    if getattr(system, "anon", False):
        raise UserError(f"{address}: no credentials for writing; set AWS_ACCESS_KEY_ID, or run aws configure")

    def there() -> str | None:
        system.invalidate_cache()
        with suppress(FileNotFoundError, PermissionError):  # write permission does not imply list permission
            return system.info(path)["type"]

    def begin() -> None:
        if address.startswith("s3"):  # begin and abort an upload, which leaves no trace
            upload = system.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
            system.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload["UploadId"])
        else:
            _check_bucket(address)

    kind = retried(address, there, "written")
    if kind == "directory":
        raise UserError(f"{address}: expected a file, found a folder; choose another place")
    if kind is not None and not replaces:
        raise UserError(f"{address}: already exists; --force replaces it, or choose another place")
    retried(address, begin, "written")


def upload(path: str, address: str, quiet: bool = False) -> None:
    """Upload a file to an address atomically, replacing an existing one. Raise UserError if it fails."""
    system, remote_path = _file_system(address)
    from fsspec.callbacks import Callback

    # 4 parts of 16 MB at a time; s3fs's default is 10 of 50 MB in memory
    details: dict[str, Any] = {"chunksize": 16 << 20, **({"max_concurrency": 4} if address.startswith("s3") else {})}

    def put() -> None:
        with Progress(f"upload {address}", total=os.path.getsize(path), unit="B", quiet=quiet) as progress:
            advance = lambda size, value, **_: progress.advance(value - progress.done)  # noqa: E731
            system.put_file(path, remote_path, callback=Callback(hooks={"progress": advance}), **details)

    retried(address, put, "written")


class RemoteFile(io.RawIOBase):
    """A file at an address; `size` in bytes and `version` (ETag or time), as far as its server sends them."""

    def __init__(self, address: str, source: _Http | _Bucket | _Cached) -> None:
        self.address, self._source, self._position = address, source, 0
        self.size, self.version, self._can_seek = retried(address, source.describe)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._can_seek and self.size is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size or 0}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = retried(self.address, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        try:
            data = self._source.read(self._position, count)
        finally:
            self._check_version()  # a changed file may fail to be read
        if not data and self.size is not None and self._position < self.size:
            raise ConnectionError(f"it ended at byte {self._position:,} of {self.size:,}")
        return data

    def check(self) -> None:
        """Raise UserError if the file has changed since it was opened."""
        if isinstance(self._source, _Bucket):  # web servers send the version with each response
            retried(self.address, self._source.describe)
        self._check_version()

    def _check_version(self) -> None:
        if self._source.now != (self.size, self.version):
            raise UserError(f"{self.address}: changed while it was read; start again")

    def close(self) -> None:
        self._source.close()
        super().close()


class _Http:
    """A file on a web server, read as the stream of one request from a position to the end or to byte `last`."""

    def __init__(self, address: str, last: str = "") -> None:
        import urllib.parse
        import urllib.request  # imported here: .03 s of startup

        try:
            pieces = urllib.parse.urlsplit(address)
            if not pieces.hostname or pieces.port == 0:
                raise ValueError("no host")
        except ValueError as error:  # also a port above 65,535
            raise UserError(f"{address}: invalid address ({error})") from None
        if page := re.match(r"https://(?:huggingface|hf)\.co/(.+?)/(?:blob|tree)/([^/]+)/?(.*)", address):
            raise UserError(f"{address}: expected a file, found its web page; write hf://{page[1]}@{page[2]}/{page[3]}")
        self._request = urllib.request
        self._address, self._last = address, last
        self._response: Any = None
        self._position = 0  # position of the next byte of the response
        self.now: tuple[int | None, str] = (None, "")

    def describe(self) -> tuple[int | None, str, bool]:
        self._ask(0)
        return *self.now, self._response.status == 206

    def read(self, position: int, count: int) -> bytes:
        if self.now[0] == position:
            return b""
        if self._response is None or self._position != position:
            self._ask(position)
        response: Any = self._response
        try:
            while self._position < position and (passed := response.read(min(position - self._position, 1 << 20))):
                self._position += len(passed)
            data = response.read(count)
        except Exception:
            self.close()
            raise
        if not data:
            self.close()
        self._position += len(data)
        return data

    def _ask(self, position: int) -> None:
        self.close()
        headers = {
            "Range": f"bytes={position}-{self._last}",
            "User-Agent": f"llmkit/{__version__}",
            "Accept-Encoding": "identity",
        }
        request = self._request.Request(self._address, headers=headers)
        try:
            self._response = self._request.urlopen(request, timeout=TIMEOUT)  # follows redirects
        except self._request.HTTPError as error:
            if error.code != 416 or position:  # 416 at position 0: an empty file
                raise
            self._response = error
        headers = self._response.headers
        total = (headers.get("Content-Range") or "").rpartition("/")[2] or headers.get("Content-Length") or ""
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        self.now = int(total) if total.isdigit() else None, version.strip('"')
        self._position = 0 if self._response.status == 200 else position

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None


class _Bucket:
    """A file on an fsspec file system, read in blocks; the next block is prefetched.

    The last KEPT_BLOCKS blocks stay in memory, because a Parquet reader alternates between columns that are far apart.
    """

    def __init__(self, address: str) -> None:
        from concurrent.futures import Future, ThreadPoolExecutor

        self._system, self._path = _file_system(address)
        if address.startswith("hf://"):
            self._path = retried(address, lambda: _at_commit(self._system, self._path))
        self._threads = ThreadPoolExecutor(2)
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()  # by number, the most recently used last
        self.now: tuple[int | None, str] = (None, "")

    def describe(self) -> tuple[int | None, str, bool]:
        if "hf" not in self._system.protocol:  # a commit's listing never changes: one request per folder
            self._system.invalidate_cache()
        info = self._system.info(self._path)
        if info.get("type") == "directory":
            raise IsADirectoryError("a folder")
        if info.get("lfs"):
            info = {"etag": info["lfs"]["sha256"], **info}
        self.now = info.get("size"), _version(info)
        return *self.now, True

    def read(self, position: int, count: int) -> bytes:
        number, first = divmod(position, BLOCK)
        self._ask(number)
        try:
            data = self._blocks[number].result()
        except BaseException:
            del self._blocks[number]  # so that it is requested again
            raise
        if len(data) == BLOCK and (number == 0 or number - 1 in self._blocks):
            self._ask(number + 1)
        return data[first : first + count]

    def _ask(self, number: int) -> None:
        if number not in self._blocks:
            self._blocks[number] = self._threads.submit(self._block, number * BLOCK)
        self._blocks.move_to_end(number)
        if len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)[1].cancel()

    def _block(self, start: int) -> bytes:
        """Read BLOCK bytes from `start`, fewer only at the end of the file."""
        size = self.now[0]
        end = start + BLOCK if size is None else min(start + BLOCK, size)
        if end <= start:
            return b""
        try:
            data = self._system.cat_file(self._path, start=start, end=end)
        except Exception as error:
            if size is None and ("range" in str(error).lower() or _status(error) == 416):  # beyond the end
                return b""
            self.describe()
            raise
        if size is not None and len(data) != end - start:
            self.describe()
            raise ConnectionError(f"it ended at byte {start + len(data):,} of {size:,}")
        return data

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Cached:
    """A file in a local cache of remote files.

    Names contain hashes of address, size and version, so an outdated copy is never read. A description next to each
    file serves to find the last version without a network. Interrupted fetches are resumed, and files appear
    atomically. If several runs need the same file, one fetches it and the others wait.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self._address, self._folder = address, folder
        self._open: _Http | _Bucket | IO[bytes] | None = None
        self.now: tuple[int | None, str] = (None, "")

    @property
    def path(self) -> Path:
        """Path of this version in the cache."""
        digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]  # noqa: E731
        name = re.sub(r"[^\w.-]", "_", self._address.partition("?")[0].rstrip("/").rpartition("/")[2])[-100:]
        return self._folder / f"{digest(self._address)}-{digest(repr(self.now))}-{name}"

    def describe(self) -> tuple[int | None, str, bool]:
        can_seek = True
        if self._address in _away:
            self.now = _away[self._address]
        else:
            try:
                with closing(_server(self._address, last="0")) as server:
                    *_, can_seek = retried(self._address, server.describe)
                    self.now = server.now
            except Unreachable as error:
                known = self._folder.glob(f"{self.path.name[:12]}-*{DESCRIPTION}")
                last = max(known, key=lambda path: path.stat().st_mtime, default=None)
                if last is None:
                    raise
                values = json.loads(last.read_text())
                self.now = _away[self._address] = values["bytes"], values["version"]
                say(f"{error}; using the copy in {self._folder}", settings.quiet)
        return *self.now, can_seek or self.now != (None, "")

    def read(self, position: int, count: int) -> bytes:
        if self._open is None:  # without size and version a later change would go unnoticed: do not cache
            self._open = _server(self._address) if self.now == (None, "") else self.fetch().open("rb")
        if isinstance(self._open, _Http | _Bucket):
            return self._open.read(position, count)
        self._open.seek(position)
        return self._open.read(count)

    def fetch(self) -> Path:
        """Fetch the file if it is not cached, and return its path."""
        path, size = self.path, self.now[0]
        if path.exists() and size not in (None, path.stat().st_size):
            path.unlink()  # truncated later
        if path.exists():
            return path
        from filelock import FileLock

        partial = path.with_name(path.name + ".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{partial}.lock", poll_interval=WAIT):
                if not path.exists():  # another run may have fetched it meanwhile
                    with open(partial, "ab") as handle:
                        self._copy(handle)
                    size, version = self.now
                    text = json.dumps({"address": redacted(self._address), "bytes": size, "version": version})
                    path.with_name(path.name + DESCRIPTION).write_text(text + "\n")
                    os.replace(partial, path)
                Path(f"{partial}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--cache {self._folder}: cannot be written: {str(error.strerror).lower()}") from None
        return path

    def _copy(self, handle: IO[bytes]) -> None:
        with RemoteFile(self._address, _server(self._address)) as remote:
            if (remote.size, remote.version) != self.now:
                raise UserError(f"{self._address}: changed while it was read; start again")
            start = handle.seek(0, io.SEEK_END)
            remote.seek(start)
            name = self._address.rpartition("/")[2]
            total = None if remote.size is None else remote.size - start
            with Progress(f"fetch {name}", total=total, unit="B", quiet=settings.quiet) as progress:
                while data := remote.read(1 << 20):
                    handle.write(data)
                    progress.advance(len(data))
            remote.check()
        handle.flush()
        os.fsync(handle.fileno())

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


def _file_system(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it."""
    for name in ("asyncio", "huggingface_hub"):  # they log every broken connection
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address.partition("://")[0] not in BUCKETS:
        raise UserError(f"{address}: expected an address that begins with https:// s3:// gs:// or hf://")
    try:
        import fsspec

        options: dict[str, Any] = {}
        if address.startswith("s3"):
            import botocore.session

            options["anon"] = botocore.session.get_session().get_credentials() is None
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}  # s3fs tries 5 times already, and we too
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise UserError(f'{address}: {error}; pip install "llmkit[remote]"') from None
    except ValueError as error:
        raise UserError(f"{address}: invalid address ({error})") from None


def _at_commit(system: Any, path: str) -> str:
    """Pin a hub path to the current commit of its revision, which is resolved once per process."""
    try:
        resolved = system.resolve_path(path)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"hf://{path}: invalid address ({str(error).splitlines()[0]})") from None
    if not hasattr(resolved, "repo_id"):  # the hub's buckets have no commits
        return path
    key = resolved.repo_type, resolved.repo_id, resolved.revision
    if key not in _commits:
        from huggingface_hub import HfApi

        kind, name, revision = key
        _commits[key] = HfApi().repo_info(name, repo_type=kind, revision=revision).sha or revision
    kind = "" if resolved.repo_type == "model" else f"{resolved.repo_type}s/"
    return f"{kind}{resolved.repo_id}@{_commits[key]}/{resolved.path_in_repo}".rstrip("/")


def retried(address: str, ask: Callable[[], T], action: str = "read") -> T:
    """Return `ask()`, retried after errors that may pass, such as a busy server. Raise UserError if it fails."""
    wanted = "a file" if action == "read" else "a bucket"
    for attempt in range(TRIES):
        try:
            return ask()
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f'{address}: {error}; pip install "llmkit[remote]"') from None
        except Exception as error:  # each library has its own errors
            for cause in (error, error.__cause__):
                if hint := HUB_ERRORS.get(type(cause).__name__):
                    raise UserError(f"{address}: {hint}") from None
            if isinstance(error, FileNotFoundError | IsADirectoryError):
                _check_bucket(address)
                what = "a folder; add a trailing / to read its files"
                what = what if isinstance(error, IsADirectoryError) else "none there"
                raise UserError(f"{address}: expected {wanted}, found {what}") from None
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            status, response = _status(error), getattr(error, "response", None)
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            if status == 404:
                raise UserError(f"{address}: expected {wanted}, found none there (404)") from None
            if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise UserError(f"{address}: not allowed ({reason}); check the credentials") from None
            if status in LASTING or attempt + 1 == TRIES:
                failure = f"{address}: cannot be {action} after {counted(attempt + 1, 'attempt')} ({reason})"
                raise (UserError if status in LASTING else Unreachable)(failure) from None
            wait = (getattr(error, "headers", getattr(response, "headers", None)) or {}).get("Retry-After") or ""
            time.sleep(min(int(wait), LONGEST_PAUSE) if wait.isdigit() else PAUSE * 2**attempt)
    raise AssertionError


def _status(error: Exception) -> Any:
    """Return the HTTP status of a library's error, if it has one."""
    response = getattr(error, "response", None)  # an object in the hub's errors, a dictionary in others
    return getattr(error, "code", getattr(error, "status", getattr(response, "status_code", None)))
