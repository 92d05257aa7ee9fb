"""A stub of the Hugging Face Hub for huggingface_hub and its file system, selected with HF_ENDPOINT.

It implements https://huggingface.co/docs/hub/api and its headers: a commit for each revision, LFS files after a
redirect, paginated listings, and the error codes for missing repositories, revisions and files.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".parquet", ".gz")
PAGE = 3  # entries per page of a listing; 1000 on the hub


@dataclass
class Repo:
    """The files of each revision. Without the token, `terms` must be accepted first, and `private` repos are hidden."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    terms: bool = False
    private: bool = False

    @property
    def main(self) -> dict[str, bytes]:
        return self.revisions["main"]

    def add(self, folder: Path) -> Repo:
        """Add the files of a folder to main."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.main[path.relative_to(folder).as_posix()] = path.read_bytes()
        return self

    def commit(self, revision: str) -> str | None:
        """Return the commit hash of a branch, a tag or a hash."""
        for name, files in self.revisions.items():
            listing = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
            sha = hashlib.sha1(listing.encode()).hexdigest()
            if revision in (name, sha):
                return sha
        return None

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


class HubServer(ThreadingHTTPServer):
    """Serves `repos`, by names such as `models/org/name`, at `address`; `requests` has method, path and range of each.

    busy   the first two requests of each file or listing get a 503
    cut    every other file ends after two thirds
    down   every request gets a 503
    stall  a file stops after two thirds until the server ends
    """

    daemon_threads = True
    token = "hf_token"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, Repo] = {}
        self.ways: set[str] = set()
        self.requests: list[str] = []
        self.asked = Counter[str]()
        self.ended = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore connections that are cut on purpose."""


def entry(path: str, data: bytes) -> dict[str, object]:
    """Return a file's entry in a listing."""
    values: dict[str, object] = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
    if path.endswith(LFS):
        values["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return values


def listing(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Return the entries of a folder ("" for the complete repository)."""
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path, data in sorted(files.items()):
        if path.startswith(start):
            steps = path[len(start) :].split("/")
            for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                name = start + "/".join(steps[:depth])
                entries[name] = {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
                entries[name]["path"] = name
            if recursive or len(steps) == 1:
                entries[path] = entry(path, data)
    return list(entries.values())


class _Answer(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append(f"{self.command} {parts.path} {self.headers.get('Range', '')}".strip())
        server.asked[self.path] += 1
        if "down" in server.ways or ("busy" in server.ways and server.asked[self.path] < 3):
            return self._send(503, b"busy")
        match = re.fullmatch(
            r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", parts.path
        )
        if match:
            repo, kind = server.repos.get(match[1]), match[2] or "revision"
            commit = self._commit(repo, unquote(match[3] or "main"))
            if repo is None or commit is None:
                return None
            files = repo.files(commit)
            if kind == "revision":
                siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
                values = {"id": match[1].split("/", 1)[1], "sha": commit, "siblings": siblings, "private": repo.private}
                return self._send_json({**values, "gated": "manual" if repo.terms else False})
            if kind == "paths-info":
                return self._send_json(
                    [entry(path, files[path]) for path in parse_qs(body.decode())["paths"] if path in files]
                )
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            entries = listing(files, unquote(match[4]), query.get("recursive", "").lower() == "true")
            if not entries and match[4]:
                return self._refuse(404, "EntryNotFound")
            start = int(query.get("cursor", 0))
            more = {}
            if start + PAGE < len(entries):
                rest = "&".join(f"{name}={value}" for name, value in query.items() if name != "cursor")
                more = {"Link": f'<{server.address}{parts.path}?{rest}&cursor={start + PAGE}>; rel="next"'}
            return self._send_json(entries[start : start + PAGE], more)
        match = re.fullmatch(
            r"/(cdn/)?(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)",
            unquote(parts.path) if "%2F" not in parts.path else parts.path,
        )
        if match is None:
            return self._refuse(404, "RepoNotFound")
        repo = server.repos.get((match[2] or "models/") + match[3])
        commit = self._commit(repo, unquote(match[4]))
        if repo is None or commit is None:
            return None
        if repo.terms and not self._has_token and not match[1]:
            return self._refuse(403, "GatedRepo")
        path = unquote(match[5])
        data = repo.files(commit).get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        about = entry(path, data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{about["oid"]}"', "Accept-Ranges": "bytes"}
        lfs = about.get("lfs")
        if isinstance(lfs, dict) and not match[1]:
            linked = {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(len(data))}
            return self._send(
                302, b"", {**headers, **linked, "Location": f"http://localhost:{server.server_port}/cdn{parts.path}"}
            )
        return self._send_file(data, headers)

    do_GET = do_HEAD = do_POST = _answer

    @property
    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _commit(self, repo: Repo | None, revision: str) -> str | None:
        """Return the commit of a revision, or answer with the error and return None."""
        if repo is None or (repo.private and not self._has_token):
            self._refuse(401 if not self._has_token else 404, "RepoNotFound")
            return None
        if (commit := repo.commit(revision)) is None:
            self._refuse(404, "RevisionNotFound")
        return commit

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, code.encode(), {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send_json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        size, span = len(data), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is not None:
            start, end = int(span[1]), min(int(span[2] or size - 1), size - 1)
            data = data[start : end + 1]
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        is_cut = "cut" in self.server.ways and len(self.server.requests) % 2 == 1
        is_cut = self.command == "GET" and (is_cut or "stall" in self.server.ways)
        self._send(206 if span else 200, data, headers, is_cut)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, is_cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) * 2 // 3] if is_cut else data)
            if is_cut and "stall" in self.server.ways:
                self.server.ended.wait()
        if is_cut:
            self.close_connection = True


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a hub in a thread."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()
