"""Drop pages by URL: blocklists of domains and URLs, and banned words (FineWeb's first step).

A blocklist is loaded into sorted 64-bit hashes, 10 bytes per entry: UT1's list of 4.6 million adult domains takes
46 MB. With a list of a million entries, about one in 10^13 unlisted URLs is dropped by a hash collision.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from ipaddress import ip_address
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from llmkit.errors import UserError
from llmkit.io.jsonl import GZIP_MAGIC, open_packed
from llmkit.io.progress import counted, say

if TYPE_CHECKING:
    import numpy as np

Entries = tuple[str, str, Sequence[str]]  # category, kind, entries
KINDS = ("domain", "url", "word", "soft", "part")
LONGEST_URL = 2000  # characters examined
MOST_PREFIXES = 64  # of a URL, looked up in the lists
_BOUNDARY = re.compile(r"[/?#&=;,.]|$")  # where an entry may end inside a URL
_SCHEME = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.I)
_PLAIN = re.compile(r"[a-z][a-z0-9_-]{0,62}(?:\.[a-z0-9_-]{1,63}){1,8}")
_HOST = re.compile(r"[\w.:-]+")  # not *.example or ||example^ as in other formats
_NO_LETTER = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class UrlRules:
    """The rules other than blocklists."""

    own_blocklist: bool = True  # llmkit's small list of domains and words
    banned_words: tuple[str, ...] = ()  # one of these in a URL drops the page
    soft_banned_words: tuple[str, ...] = ()  # `min_soft_banned_words` distinct ones in a URL drop the page
    min_soft_banned_words: int = 2


class UrlFilter:
    """The compiled lists and rules; compact to pickle."""

    def __init__(self, blocklists: Sequence[str | Path] = (), rules: UrlRules = UrlRules(), quiet: bool = True) -> None:
        """Read UT1 folders (`category/{domains,urls}`, one category or a folder of them) and hosts files.

        Each may be gzipped; an entry in two categories belongs to the first. Lines that match no URL are counted on
        stderr. Raises UserError if a list cannot be read or has no usable lines.
        """
        lists: dict[str, list[tuple[str, int]]] = {kind: [] for kind in KINDS}
        numbers: dict[str, int] = {}
        for category, kind, texts in _entries(blocklists, rules, quiet):
            number = numbers.setdefault(category, len(numbers))
            lists[kind].extend((text, number) for text in texts)
        self.categories, self.fewest_soft = list(numbers), rules.min_soft_banned_words
        self._domains, self._urls = _HashTable(lists["domain"]), _HashTable(lists["url"])
        self._words, self._soft, self._parts = dict(lists["word"]), dict(lists["soft"]), dict(lists["part"])
        self._part = re.compile("|".join(map(re.escape, self._parts)) or "(?!)")

    def reason(self, url: str | None) -> str | None:
        """Return why the page is dropped, such as `blocked_domain:gambling`, or None."""
        if not url:
            return None
        host, path = split_url(url[:LONGEST_URL])
        labels = host.split(".")
        is_address = ":" in host or labels[-1].isdecimal()  # has no parent domains
        starts = [0] if is_address else range(max(0, len(labels) - 16), len(labels))
        if (number := self._domains.find([".".join(labels[start:]) for start in starts])) is not None:
            return f"blocked_domain:{self.categories[number]}"
        ends = [end.start() for end, _ in zip(_BOUNDARY.finditer(path), range(MOST_PREFIXES), strict=False)]
        prefixes = [host + path[:end].rstrip("/") for end in dict.fromkeys([*ends, len(path)])]
        if (number := self._urls.find(prefixes)) is not None:
            return f"blocked_url:{self.categories[number]}"
        words = _NO_LETTER.split(host + path)
        soft: dict[int, set[str]] = {}
        for word in words:
            if word in self._words:
                return f"banned_word:{self.categories[self._words[word]]}"
            if word in self._soft:
                soft.setdefault(self._soft[word], set()).add(word)
        for number, different in soft.items():
            if len(different) >= self.fewest_soft:
                return f"soft_banned_words:{self.categories[number]}"
        if part := self._part.search("".join(words)):
            return f"banned_word:{self.categories[self._parts[part[0]]]}"
        return None


def split_url(url: str) -> tuple[str, str]:
    """Normalize a URL to (host, path): lower case, punycode, without scheme, user, port, `www.` and % escapes.

    >>> split_url("HTTPS://user@WWW.Bücher.example:8080/Neu%20hier/?q=1")
    ('xn--bcher-kva.example', '/neu hier/?q=1')
    """
    url = _SCHEME.sub("", url.strip())
    match = re.match(r"[^/?#\\]*", url)
    host = match[0] if match else ""
    path = unquote(url[len(host) :], errors="replace").lower()
    host = host.rpartition("@")[2].lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    host = host.strip(".").removeprefix("www.")
    with suppress(ValueError):  # UnicodeError among them
        if host.startswith("0x") or host.isdecimal() or ":" in host:  # IP address: 3232235777, [::1]
            host = str(ip_address(host if ":" in host else int(host, 0 if host.startswith("0x") else 10)))
        elif not host.isascii():
            host = host.encode("idna").decode("ascii")
    return host, path


# ---- reading lists


def _entries(blocklists: Sequence[str | Path], rules: UrlRules, quiet: bool) -> Iterator[Entries]:
    if rules.own_blocklist:
        for line in files("llmkit.crawl.filters").joinpath("blocklist.txt").read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                category, kind, *entries = line.split()
                yield category, kind, [entry.removeprefix(".") for entry in entries]
    yield "custom", "word", [word.lower() for word in rules.banned_words]
    yield "custom", "soft", [word.lower() for word in rules.soft_banned_words]
    for path in map(Path, blocklists):
        lists = [path]
        if path.is_dir():
            folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
            names = ("domains", "urls", "domains.gz", "urls.gz")
            lists = [folder / name for folder in folders for name in names if (folder / name).is_file()]
        if not lists:
            raise UserError(
                f"{path}: expected a blocklist, or a folder with `domains` or `urls` or with folders of these, "
                f"found {sorted(child.name for child in path.iterdir())[:5]}; list hosts files one by one"
            )
        entries = [entry for file in lists for entry in _file_entries(file, file != path, quiet)]
        if not any(texts for _, _, texts in entries):
            raise UserError(f"{path}: expected domains or URLs, one per line, found none")
        yield from entries


def _file_entries(path: Path, is_ut1: bool, quiet: bool) -> Iterator[Entries]:
    """Read the entries of a UT1 file, of a hosts file, or of a list with one domain or URL per line."""
    category, kind = path.name.removesuffix(".gz"), None
    if is_ut1:
        category, kind = path.parent.name, "domain" if path.name.startswith("domains") else "url"
    tokens: list[str] = []
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if len(words) == 2 and words[0] == "0.0.0.0" and kind is None:  # nearly every line of a hosts file
            tokens.append(words[1])
            continue
        if kind is None and "#" in line:
            words = line.partition("#")[0].split()
        if not words or words[0].startswith("#"):
            continue
        is_listed = len(words) == 1
        if not is_listed and (kind is not None or not _is_address(words.pop(0))):
            raise UserError(f"{path}:{number}: expected a domain, a URL or a hosts entry, found {line!r}")
        tokens += [word for word in words if is_listed or "." in word or ":" in word]  # not localhost
    is_url = lambda token: kind == "url" or (kind is None and "/" in token)  # noqa: E731
    split = [split_url(token[:LONGEST_URL]) for token in filter(is_url, tokens)]
    urls = [host + path.rstrip("/") for host, path in split if _HOST.fullmatch(host)]
    domains = [domain for domain in map(_plain_domain, filterfalse(is_url, tokens)) if "." in domain or ":" in domain]
    if lost := len(tokens) - len(urls) - len(domains):
        say(f"{path}: ignored {counted(lost, 'line')} without a domain or URL", quiet)
    yield from ((category, "url", urls), (category, "domain", domains))


def _plain_domain(token: str) -> str:
    if _PLAIN.fullmatch(token):  # saves 3 microseconds for nearly every entry
        return token.removeprefix("www.")
    host = split_url(token[:LONGEST_URL])[0]
    return host if _HOST.fullmatch(host) else ""


def _lines(path: Path) -> list[str]:
    with open_packed(str(path)) as handle:
        data = handle.read()
        data = gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
    if b"\0" in data:
        raise UserError(f"{path}: expected text, found binary data")
    return data.decode("utf-8", "replace").splitlines()


@cache
def _is_address(token: str) -> bool:
    try:
        return bool(ip_address(token))
    except ValueError:
        return False


# ---- lookup


class _HashTable:
    """Strings and a small number for each, as sorted hashes; of a repeated string the first number counts."""

    def __init__(self, items: list[tuple[str, int]]) -> None:
        import numpy as np

        self._keys, first = np.unique(_hashes(text for text, _ in items), return_index=True)
        self._numbers = np.array([number for _, number in items], np.uint16)[first]

    def find(self, texts: list[str]) -> int | None:
        """Return the number of the first text that is in the table, or None."""
        if not len(self._keys):
            return None
        hashes = _hashes(texts)
        places = self._keys.searchsorted(hashes).clip(max=len(self._keys) - 1)
        hits = (self._keys[places] == hashes).nonzero()[0]
        return int(self._numbers[places[hits[0]]]) if len(hits) else None


def _hashes(texts: Iterable[str]) -> np.ndarray:
    """Hash texts: uint64 (texts,), 8 bytes of BLAKE2b each."""
    import numpy as np

    digests = (blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)
