"""Search for models: passages of the user's own documents by BM25, or an HTTP engine that the user names.

    with SearchIndex.open("docs.jsonl") as index:
        print(index.search("who built the lighthouse"))

The index is an SQLite FTS5 table in one file beside the documents, `docs.jsonl.fts5`, made again when they change.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from threading import Lock

from llmkit.errors import UserError
from llmkit.files import PARTIAL
from llmkit.stream import read_documents

SUFFIX = ".fts5"
FORMAT = 1  # of the index file
PASSAGE_CHARACTERS = 800  # a passage ends at the first paragraph's or sentence's end after that many
LONGEST_PASSAGE = 1600
LONGEST_QUERY = 64  # words
LARGEST_ANSWER = 1 << 20  # bytes read from an HTTP engine
NOTHING = "nothing found"


class SearchError(Exception):
    """Why a search gave no answer, in a few words that the model can read."""


class SearchIndex:
    """Passages of documents in an FTS5 table. Safe to use from several threads."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection, self._lock = connection, Lock()

    @classmethod
    def open(cls, documents: str) -> SearchIndex:
        """The index of a JSONL file, made now where there is none, or one of an older state of the file.

        Where the folder cannot be written the index is held in memory. Raises UserError for documents that cannot
        be read.
        """
        if not os.path.isfile(documents):
            raise UserError(f"{documents}: expected a file of documents to search, found no such file")
        state = os.stat(documents)
        stamp = json.dumps([FORMAT, state.st_size, state.st_mtime_ns])
        place = Path(documents + SUFFIX)
        if _stamp_of(place) != stamp:
            return cls(_build(documents, place, stamp))
        return cls(sqlite3.connect(_read_only(place), uri=True, check_same_thread=False))

    def search(self, query: str, passages: int = 3) -> str:
        """The best passages for a query, best first, numbered; `nothing found` where no word of it occurs."""
        words = re.findall(r"\w+", query)[:LONGEST_QUERY]
        if not words:
            return NOTHING
        wanted = " OR ".join(f'"{word}"' for word in words)
        statement = (
            "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages, 2.0, 1.0), rowid LIMIT ?"
        )
        with self._lock:
            found = self._connection.execute(statement, (wanted, passages)).fetchall()
        return _listed(found)

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    def __enter__(self) -> SearchIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _listed(found: list[tuple[str, str]]) -> str:
    lines = [f"[{number}] {f'{title}: ' if title else ''}{text}" for number, (title, text) in enumerate(found, 1)]
    return "\n".join(lines) or NOTHING


def _read_only(place: Path) -> str:
    return f"{place.resolve().as_uri()}?mode=ro"


def _stamp_of(place: Path) -> str | None:
    """What an index says of the documents that it was made from; None where there is no index."""
    if not place.is_file():
        return None
    try:
        with closing(sqlite3.connect(_read_only(place), uri=True)) as connection:
            return connection.execute("SELECT stamp FROM made_from").fetchone()[0]
    except (sqlite3.Error, TypeError):
        return None


def _build(documents: str, place: Path, stamp: str) -> sqlite3.Connection:
    """Make the index at `place`, or in memory where that cannot be written, and return a connection to it."""
    partial = place.with_name(f"{place.name}{PARTIAL}.{os.getpid()}")
    try:
        partial.touch()
    except OSError:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        _fill(connection, documents, stamp)
        return connection
    try:
        with closing(sqlite3.connect(partial)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            _fill(connection, documents, stamp)
        os.replace(partial, place)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    return sqlite3.connect(_read_only(place), uri=True, check_same_thread=False)


def _fill(connection: sqlite3.Connection, documents: str, stamp: str) -> None:
    columns = "title, text, tokenize = 'porter unicode61 remove_diacritics 2'"
    connection.execute(f"CREATE VIRTUAL TABLE passages USING fts5({columns})")
    connection.execute("CREATE TABLE made_from (stamp TEXT)")
    connection.executemany("INSERT INTO passages VALUES (?, ?)", _passages(documents))
    connection.execute("INSERT INTO made_from VALUES (?)", (stamp,))
    connection.commit()


def _passages(documents: str) -> Iterator[tuple[str, str]]:
    for row in read_documents([documents]):
        title = row.value.get("title")
        for passage in cut_passages(row.value["text"]):
            yield title if isinstance(title, str) else "", passage


def cut_passages(text: str) -> Iterator[str]:
    """The text in pieces of about PASSAGE_CHARACTERS, cut at the ends of lines and sentences, white space evened."""
    held = ""
    for piece in re.split(r"(?<=[.!?。])\s+|\n+", text):
        piece = " ".join(piece.split())
        while len(piece) > LONGEST_PASSAGE:
            cut = piece.rfind(" ", 1, LONGEST_PASSAGE) + 1 or LONGEST_PASSAGE
            if held:
                yield held
                held = ""
            yield piece[:cut].rstrip()
            piece = piece[cut:]
        held = f"{held} {piece}".strip()
        if len(held) >= PASSAGE_CHARACTERS:
            yield held
            held = ""
    if held:
        yield held


class SearchEngine:
    """An engine on the web that answers in SearXNG's JSON form: GET url?q=...&format=json -> {"results": [...]}."""

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        self._url, self._timeout = url, timeout

    def search(self, query: str, passages: int = 3) -> str:
        """The first results, numbered, with title and content. Raises SearchError when the engine does not answer."""
        separator = "&" if urllib.parse.urlsplit(self._url).query else "?"
        asked = f"{self._url}{separator}{urllib.parse.urlencode({'q': query, 'format': 'json'})}"
        request = urllib.request.Request(asked, headers={"Accept": "application/json", "User-Agent": "llmkit"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                results = json.loads(answer.read(LARGEST_ANSWER))["results"]
            found = [(str(one.get("title", "")), " ".join(str(one.get("content", "")).split())) for one in results]
        except urllib.error.HTTPError as error:
            raise SearchError(f"the search engine answered {error.code}") from None
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            raise SearchError(f"the search engine cannot be reached: {getattr(error, 'reason', error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SearchError("the search engine's answer is not in SearXNG's JSON form") from None
        return _listed(found[:passages])
