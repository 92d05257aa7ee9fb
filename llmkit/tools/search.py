"""Search for models: passages of the user's own documents by BM25, or an HTTP engine that the user names.

    with SearchIndex.open("docs.jsonl") as index:
        print(index.search("who built the lighthouse"))

The index is an SQLite FTS5 table in one file beside the documents, `docs.jsonl.fts5`, made again where it does not hold
their passages, word for word: it may be old, damaged, or another's.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import re
import socket
import sqlite3
import ssl
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import zip_longest
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from llmkit.display import redacted
from llmkit.errors import UserError
from llmkit.io.files import PARTIAL
from llmkit.io.jsonl import read_documents
from llmkit.io.progress import counted

SUFFIX = ".fts5"
FORMAT = "CREATE TABLE format (second)"  # of the index file: its number is a name
PASSAGES = "CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize = 'porter unicode61 remove_diacritics 2')"
PASSAGE_CHARACTERS = 800  # a passage ends at the first paragraph's or sentence's end after that many
LONGEST_PASSAGE = 1600
LONGEST_QUERY = 64  # words
LARGEST_ANSWER = 1 << 20  # bytes read from an HTTP engine
NOTHING = "nothing found"


class SearchError(Exception):
    """Why a search gave no answer, in a few words that the model can read."""


class SearchIndex:
    """Passages of documents in an FTS5 table. Safe to use from several threads."""

    def __init__(self, documents: str, connection: sqlite3.Connection) -> None:
        self._documents, self._connection, self._lock = documents, connection, Lock()

    @classmethod
    def open(cls, documents: str) -> SearchIndex:
        """The index of a JSONL file, made now where there is none that holds the file's passages, word for word.

        Where the folder cannot be written the index is held in memory. Raises UserError for documents that cannot
        be read.
        """
        if not os.path.isfile(documents):
            instead = "a folder" if os.path.isdir(documents) else "no such file"
            raise UserError(f"{documents}: expected a file of documents to search, found {instead}")
        index = Path(documents + SUFFIX)
        return cls(documents, _kept(documents, index) or _build(documents, index))

    def search(self, query: str, passages: int = 3) -> str:
        """The best passages for a query, best first, numbered; `nothing found` where no word of it occurs."""
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
            except sqlite3.Error:  # the file is damaged where only a search looks
                self._connection.close()
                self._connection = _in_memory(self._documents)
                rows = self._connection.execute(statement, (wanted, passages)).fetchall()
        return _listed(rows)

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    def __enter__(self) -> SearchIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _listed(passages: list[tuple[str, str]]) -> str:
    lines = [f"[{number}] {f'{title}: ' if title else ''}{text}" for number, (title, text) in enumerate(passages, 1)]
    return "\n".join(lines) or NOTHING


def _open_read_only(index: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{index.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _kept(documents: str, index: Path) -> sqlite3.Connection | None:
    """The index that stands there; None where there is none, or where it is damaged, old or not of these documents.

    Others may have put it there: what a search can return is compared with the documents. That takes a tenth of the
    time of making it.
    """
    if not index.is_file():
        return None
    connection = None
    try:
        connection = _open_read_only(index)
        tables = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE name IN ('passages', 'format')"))
        if tables == {"passages": PASSAGES, "format": FORMAT}:
            stands = connection.execute("SELECT title, text FROM passages ORDER BY rowid")
            if all(kept_passage == other for kept_passage, other in zip_longest(stands, _passages(documents))):
                return connection
    except sqlite3.Error:
        pass
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    if connection is not None:
        connection.close()
    return None


def _in_memory(documents: str) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    _fill(connection, documents)
    return connection


def _build(documents: str, index: Path) -> sqlite3.Connection:
    """Make the index at `place`, or in memory where that cannot be written, and return a connection to it."""
    try:
        handle, partial = tempfile.mkstemp(prefix=f"{index.name}{PARTIAL}.", dir=index.parent)
        os.close(handle)
    except OSError:
        return _in_memory(documents)
    try:
        os.chmod(partial, 0o644)  # as any other file, for those who share the documents
        with closing(sqlite3.connect(partial)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            _fill(connection, documents)
        os.replace(partial, index)
        return _open_read_only(index)
    except (OSError, sqlite3.Error):  # a full disk, a folder in its place
        return _in_memory(documents)
    finally:
        with suppress(OSError):
            os.unlink(partial)


def _fill(connection: sqlite3.Connection, documents: str) -> None:
    connection.execute(PASSAGES)
    connection.execute(FORMAT)
    connection.executemany("INSERT INTO passages VALUES (?, ?)", _passages(documents))
    connection.commit()


def _passages(documents: str) -> Iterator[tuple[str, str]]:
    for row in read_documents([documents]):
        title = row.value.get("title")
        for passage in cut_passages(row.value["text"]):
            yield title if isinstance(title, str) else "", passage


def cut_passages(text: str) -> Iterator[str]:
    """The text in pieces of about PASSAGE_CHARACTERS, cut at the ends of lines and sentences, white space evened."""
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
    """An engine on the web that answers in SearXNG's JSON form: GET url?q=...&format=json -> {"results": [...]}.

    A user and password in the URL are sent as HTTP's basic authentication, to that host alone; a host of this machine
    is asked past any proxy. `timeout` seconds bound the whole call. Raises UserError for a URL that is none.
    """

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        try:
            address = urllib.parse.urlsplit(url)
            port = f":{address.port}" if address.port is not None else ""
        except ValueError:
            address, port = urllib.parse.urlsplit(""), ""
        if not address.hostname or not url.isascii() or not url.isprintable() or " " in url:
            raise UserError(f"search:{url}: expected a URL of printable ASCII, such as http://localhost:8888/search")
        host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
        self._url = urllib.parse.urlunsplit((address.scheme, host + port, address.path, address.query, ""))
        user = urllib.parse.unquote(f"{address.username or ''}:{address.password or ''}")
        self._user = None if user == ":" else base64.b64encode(user.encode()).decode()
        self._timeout, self._is_near = timeout, is_this_machine(address.hostname)

    def search(self, query: str, passages: int = 3) -> str:
        """The first results, numbered, with title and content. Raises SearchError when the engine does not answer."""
        call = _Call(self._is_near)
        outcome: SimpleQueue[str | BaseException] = SimpleQueue()

        def work() -> None:
            try:
                outcome.put(self._ask(call, query, passages))
            except BaseException as error:
                outcome.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            answer = outcome.get(timeout=self._timeout)
        except Empty:
            call.cut()  # ends the thread, however slowly the engine drips
            answer = TimeoutError(f"no answer within {counted(self._timeout, 'second')}")
        if isinstance(answer, str):
            return answer
        if isinstance(answer, urllib.error.HTTPError):
            raise SearchError(f"the search engine answered {answer.code}") from None
        if isinstance(answer, OSError):
            reason = redacted(str(getattr(answer, "reason", answer)))
            raise SearchError(f"the search engine cannot be reached: {reason}") from None
        if isinstance(answer, Exception):
            raise SearchError("the search engine's answer is not in SearXNG's JSON form") from None
        raise answer

    def _ask(self, call: _Call, query: str, passages: int) -> str:
        words = query.encode("utf-8", "replace")  # a model may write half a character
        separator = "&" if urllib.parse.urlsplit(self._url).query else "?"
        address = f"{self._url}{separator}{urllib.parse.urlencode({'q': words, 'format': 'json'})}"
        request = urllib.request.Request(address, headers={"Accept": "application/json", "User-Agent": "llmkit"})
        if self._user is not None:
            request.add_unredirected_header("Authorization", f"Basic {self._user}")
        with call.opener.open(request, timeout=self._timeout) as answer:
            results = json.loads(answer.read(LARGEST_ANSWER))["results"]
        passages_found = [
            (_whole(str(result.get("title") or "")), _whole(" ".join(str(result.get("content") or "").split())))
            for result in results
        ]
        return _listed(passages_found[:passages])


def _whole(text: str) -> str:
    """A text without halves of characters, which no file takes."""
    return text.encode("utf-8", "replace").decode()


def is_this_machine(host: str) -> bool:
    """True if a host name is that of the loopback interface, which no proxy reaches."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class _Call:
    """One request over HTTP with its redirects, which another thread may cut."""

    def __init__(self, is_near: bool) -> None:
        self._sockets: list[socket.socket] = []
        self._is_cut = False
        call = self

        def noted(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
            class Connection(kind):  # type: ignore[misc, valid-type]
                def connect(self) -> None:
                    super().connect()
                    call._sockets.append(self.sock)
                    if call._is_cut:
                        call.cut()

            return Connection

        class Plain(urllib.request.HTTPHandler):
            def http_open(self, request: urllib.request.Request) -> Any:
                return self.do_open(noted(http.client.HTTPConnection), request)

        class Secure(urllib.request.HTTPSHandler):
            def https_open(self, request: urllib.request.Request) -> Any:
                return self.do_open(noted(http.client.HTTPSConnection), request, context=ssl.create_default_context())

        # neither ftp: nor file: nor data:, to which a redirect might lead
        self.opener = urllib.request.OpenerDirector()
        kinds = (urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler)
        for handler in (
            urllib.request.ProxyHandler({} if is_near else None),
            Plain(),
            Secure(),
            urllib.request.HTTPDefaultErrorHandler(),
            *(kind() for kind in kinds),
        ):
            self.opener.add_handler(handler)

    def cut(self) -> None:
        """End the request now."""
        self._is_cut = True
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
