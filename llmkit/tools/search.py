"""Search for models: BM25 over passages of the user's documents, or an HTTP search engine.

    with closing(SearchIndex("docs.jsonl")) as index:
        print(index.search("who built the lighthouse"))

The index is an SQLite FTS5 table in a file next to the documents, `docs.jsonl.fts5`. It is rebuilt unless it contains
exactly their passages: it may be outdated, damaged, or from someone else.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import socket
import sqlite3
import ssl
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection, HTTPSConnection
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib import request as urllib_request
from urllib.error import HTTPError

from llmkit.display import redacted
from llmkit.errors import UserError
from llmkit.io.files import PARTIAL
from llmkit.io.jsonl import read_documents
from llmkit.io.progress import counted

SUFFIX = ".fts5"
FORMAT = "CREATE TABLE format (second)"  # version of the index file, as a column name
PASSAGES = "CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize = 'porter unicode61 remove_diacritics 2')"
PASSAGE_CHARACTERS = 800  # a passage ends at the first end of a paragraph or sentence after this
LONGEST_PASSAGE = 1600
LONGEST_QUERY = 64  # words
LARGEST_ANSWER = 1 << 20  # bytes read from an HTTP engine
NOTHING = "nothing found"


class SearchError(Exception):
    """Why a search failed, as a short message to the model."""


class SearchIndex:
    """Passages of documents in an FTS5 table. Thread-safe."""

    def __init__(self, documents: str) -> None:
        """Open the index of a JSONL file; build it unless one with exactly the file's passages exists.

        The index is kept in memory if the folder is not writable. Raises UserError if the documents cannot be read.
        """
        if not os.path.isfile(documents):
            instead = "a folder" if os.path.isdir(documents) else "no such file"
            raise UserError(f"{documents}: expected a file of documents to search, found {instead}")
        self._documents, self._path = documents, Path(documents + SUFFIX)
        self._lock = threading.Lock()
        self._connection = self._open_existing() or self._build()

    def search(self, query: str, passages: int = 3) -> str:
        """Return the best passages for a query, numbered, best first; `nothing found` if none of its words occurs."""
        words = re.findall(r"\w+", query.encode("utf-8", "ignore").decode())[:LONGEST_QUERY]
        if not words:
            return NOTHING
        wanted = " OR ".join(f'"{word}"' for word in words)
        statement = (
            "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages, 2.0, 1.0), rowid LIMIT ?"
        )
        with self._lock:
            try:
                rows = self._connection.execute(statement, (wanted, passages)).fetchall()
            except sqlite3.Error:  # damage that only a search finds
                self._connection.close()
                self._connection = self._filled(":memory:")
                rows = self._connection.execute(statement, (wanted, passages)).fetchall()
        return _listed(rows)

    def close(self) -> None:
        """Close the index file."""
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection

    def _open_existing(self) -> sqlite3.Connection | None:
        """Open the existing index; None if there is none, or if it is damaged, outdated or for other documents.

        It may be from someone else, so its passages are compared with the documents, in a tenth of the time of
        building it.
        """
        if not self._path.is_file():
            return None
        with suppress(sqlite3.Error), ExitStack() as stack:
            connection = stack.enter_context(closing(self._open()))
            schema = "SELECT name, sql FROM sqlite_master WHERE name IN ('passages', 'format')"
            if dict(connection.execute(schema)) == {"passages": PASSAGES, "format": FORMAT}:
                rows = connection.execute("SELECT title, text FROM passages ORDER BY rowid")
                if all(row == passage for row, passage in zip_longest(rows, self._passages())):
                    stack.pop_all()
                    return connection
        return None

    def _build(self) -> sqlite3.Connection:
        """Build the index in its file, or in memory if that fails, and return a connection."""
        try:
            handle, partial = tempfile.mkstemp(prefix=f"{self._path.name}{PARTIAL}.", dir=self._path.parent)
            os.close(handle)
        except OSError:
            return self._filled(":memory:")
        try:
            os.chmod(partial, 0o644)  # readable by others, like the documents
            self._filled(partial).close()
            os.replace(partial, self._path)
            return self._open()
        except (OSError, sqlite3.Error):  # a full disk, a folder in its place
            return self._filled(":memory:")
        finally:
            with suppress(OSError):
                os.unlink(partial)

    def _filled(self, name: str) -> sqlite3.Connection:
        with ExitStack() as stack:
            connection = stack.enter_context(closing(sqlite3.connect(name, check_same_thread=False)))
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute(PASSAGES)
            connection.execute(FORMAT)
            connection.executemany("INSERT INTO passages VALUES (?, ?)", self._passages())
            connection.commit()
            stack.pop_all()
        return connection

    def _passages(self) -> Iterator[tuple[str, str]]:
        passage = None
        for row in read_documents([self._documents]):
            title = row.value.get("title")
            for passage in cut_passages(row.value["text"]):
                yield title if isinstance(title, str) else "", passage
        if passage is None:
            raise UserError(f"{self._documents}: expected documents with text to search, found none")


def _listed(passages: list[tuple[str, str]]) -> str:
    lines = [f"[{number}] {f'{title}: ' if title else ''}{text}" for number, (title, text) in enumerate(passages, 1)]
    return "\n".join(lines) or NOTHING


def cut_passages(text: str) -> Iterator[str]:
    """Split text into passages of about PASSAGE_CHARACTERS, at ends of lines and sentences; normalize white space."""
    passage = ""
    for piece in re.split(r"(?<=[.!?。])\s+|\n+", text):
        piece = " ".join(piece.split())
        while len(piece) > LONGEST_PASSAGE:
            cut = piece.rfind(" ", 1, LONGEST_PASSAGE) + 1 or LONGEST_PASSAGE
            if passage:
                yield passage
                passage = ""
            yield piece[:cut].rstrip()
            piece = piece[cut:]
        passage = f"{passage} {piece}".strip()
        if len(passage) >= PASSAGE_CHARACTERS:
            yield passage
            passage = ""
    if passage:
        yield passage


class SearchEngine:
    """A web search engine with SearXNG's JSON API: GET url?q=...&format=json -> {"results": [...]}.

    User and password in the URL are sent as HTTP basic authentication, only to that host. Requests to this machine
    bypass proxies. `timeout` (seconds) bounds the complete call. Raises UserError for an invalid URL.
    """

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        try:
            address = urllib.parse.urlsplit(url)
            host, _ = address.hostname, address.port  # raises ValueError unless the port is a number
        except ValueError:
            address, host = urllib.parse.urlsplit(""), None
        if not host or not url.isascii() or not url.isprintable() or " " in url:
            raise UserError(f"search:{url}: expected a URL of printable ASCII, such as http://localhost:8888/search")
        self.url = address._replace(netloc=address.netloc.rpartition("@")[2], fragment="").geturl()
        user = urllib.parse.unquote(f"{address.username or ''}:{address.password or ''}")
        self._user = None if user == ":" else base64.b64encode(user.encode()).decode()
        self._timeout, self._is_near = timeout, is_this_machine(host)

    def search(self, query: str, passages: int = 3) -> str:
        """Return the first results, numbered, with title and content. Raises SearchError if the engine fails."""
        call, outcome = _Call(self._is_near), Future[str]()

        def work() -> None:
            try:
                outcome.set_result(self._ask(call, query, passages))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return outcome.result(self._timeout)
        except HTTPError as error:
            reason = f"answered {error.code}"
        except (TimeoutError, FutureTimeout):
            call.cut()  # ends the thread even if data trickles in
            reason = f"cannot be reached: no answer within {counted(self._timeout, 'second')}"
        except OSError as error:
            reason = f"cannot be reached: {redacted(str(getattr(error, 'reason', error)))}"
        except Exception:
            raise SearchError("the search engine's answer is not in SearXNG's JSON form") from None
        raise SearchError(f"the search engine {reason}")

    def _ask(self, call: _Call, query: str, passages: int) -> str:
        words = query.encode("utf-8", "replace")  # a model may write lone surrogates
        separator = "&" if urllib.parse.urlsplit(self.url).query else "?"
        address = f"{self.url}{separator}{urllib.parse.urlencode({'q': words, 'format': 'json'})}"
        request = urllib_request.Request(address, headers={"Accept": "application/json", "User-Agent": "llmkit"})
        if self._user is not None:
            request.add_unredirected_header("Authorization", f"Basic {self._user}")
        with call.opener.open(request, timeout=self._timeout) as answer:
            results = json.loads(answer.read(LARGEST_ANSWER))["results"]
        rows = [
            (str(result.get("title") or ""), " ".join(str(result.get("content") or "").split())) for result in results
        ]
        return _listed(rows[:passages]).encode("utf-8", "replace").decode()  # no file takes lone surrogates


def is_this_machine(host: str) -> bool:
    """Return True if a host is the loopback interface, which a proxy cannot reach."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class _Call:
    """An HTTP request including redirects, which another thread can abort."""

    def __init__(self, is_near: bool) -> None:
        self._sockets: list[socket.socket] = []
        self._is_cut = False

        def tracked(kind: type[HTTPConnection]) -> type[HTTPConnection]:
            def connect(connection: HTTPConnection) -> None:
                kind.connect(connection)
                self._sockets.append(connection.sock)
                if self._is_cut:
                    self.cut()

            return type("Connection", (kind,), {"connect": connect})

        class Plain(urllib_request.HTTPHandler):
            def http_open(self, request: urllib_request.Request) -> Any:
                return self.do_open(tracked(HTTPConnection), request)

        class Secure(urllib_request.HTTPSHandler):
            def https_open(self, request: urllib_request.Request) -> Any:
                return self.do_open(tracked(HTTPSConnection), request, context=ssl.create_default_context())

        # no handlers for ftp:, file: and data:, to which a redirect might lead
        self.opener = urllib_request.OpenerDirector()
        self.opener.add_handler(urllib_request.ProxyHandler({} if is_near else None))
        for kind in (
            *(Plain, Secure, urllib_request.HTTPDefaultErrorHandler, urllib_request.HTTPRedirectHandler),
            *(urllib_request.HTTPErrorProcessor, urllib_request.UnknownHandler),
        ):
            self.opener.add_handler(kind())

    def cut(self) -> None:
        """Abort the request."""
        self._is_cut = True
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
