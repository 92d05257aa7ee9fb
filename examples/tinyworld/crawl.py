"""The crawl: good and bad pages with URLs, in random order, as WARC members; and its ledger."""

from __future__ import annotations

import random
from collections.abc import Sequence

from archive import damaged, http, member_of, record
from ledger import Entry
from pages import Page
from sites import HOSTS, html_of
from spam import BAD, SPAM_HOSTS, nearly, personal

Crawled = tuple[Entry, bytes]  # ledger entry and gzip member of a record

BROKEN_SHARE = 0.08  # of the good pages: unclosed tags
PERSONAL_SHARE = 0.05  # of the good pages
REPEATED = 2  # exact copies, and near copies, per bad page of each other kind
NO_PAGES = {  # status, media type, body
    "missing": ("404 Not Found", "text/html", b"<html><body><p>There is nothing here.</p></body></html>"),
    "picture": ("200 OK", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "empty": ("200 OK", "text/html", b""),
}


def crawl(pages: Sequence[Page], bad: int, rng: random.Random) -> list[Crawled]:
    """Return all records in order, `bad` of each kind that should be dropped; copies come after their originals."""
    originals = [_good(page, f"http://{rng.choice(HOSTS[page.kind])}/p/{n}", rng) for n, page in enumerate(pages)]
    found: list[tuple[float, Entry, bytes]] = [(rng.random(), entry, _packed(entry, body)) for entry, body in originals]
    places = {entry.url: place for place, entry, _ in found}
    copied = rng.sample([n for n, (entry, _) in enumerate(originals) if not entry.personal], 2 * REPEATED * bad)
    for number, at in enumerate(copied):
        original, page = originals[at][0], pages[at]
        exact = number < REPEATED * bad
        kind, step = ("exact copy", "exact_duplicates") if exact else ("near copy", "near_duplicates")
        url = f"http://mirror{number % 3}.example/c/{number}"
        body = html_of(page if exact else nearly(page, rng), rng)
        steps = (step, "near_duplicates") if exact else (step,)
        entry = Entry(url, kind, False, f"repeats {original.url}", steps, repeats=original.url)
        place = places[original.url]
        found.append((place + (1 - place) * rng.random(), entry, _packed(entry, body)))
    found += [(rng.random(), *one) for one in _bad(bad, rng)]
    found.sort(key=lambda one: one[0])
    return [(entry, member) for _, entry, member in found]


def _good(page: Page, url: str, rng: random.Random) -> tuple[Entry, str]:
    """Return the ledger entry and the HTML of a good page."""
    if rng.random() < PERSONAL_SHARE:
        page, hidden = personal(page, rng)
        kind, why = f"{page.kind} with personal data", "a good page whose personal data must be replaced"
    else:
        hidden, kind, why = [], page.kind, "a good page"
    broken = rng.random() < BROKEN_SHARE
    entry = Entry(
        url,
        kind,
        True,
        why + ", in broken HTML" * broken,
        text=page.text,
        personal=tuple(hidden),
        facts=tuple(page.facts),
    )
    return entry, html_of(page, rng, broken)


def _bad(count: int, rng: random.Random) -> list[Crawled]:
    """Return the pages that should be dropped for their content, and the records that are not pages."""
    made = []
    for kind, (write, steps, why) in BAD.items():
        for number in range(count):
            host = (
                rng.choice(SPAM_HOSTS) if kind == "blocked host" else f"site{number}.{kind.replace(' ', '-')}.example"
            )
            host = f"www.{host}" if rng.random() < 0.3 else host
            entry = Entry(f"http://{host}/s/{number}", kind, False, why, steps)
            made.append((entry, _packed(entry, write(rng))))
    for kind, (status, media, body) in NO_PAGES.items():
        for number in range(count):
            entry = Entry(f"http://lost.example/{kind}/{number}", kind, False, f"no page: {kind}", ("read",))
            made.append((entry, member_of(record(entry.url, http(body, status, media), _number(entry.url)))))
    for number in range(count):
        entry = Entry(f"http://lost.example/damaged/{number}", "damaged", False, "its bytes are damaged", ("read",))
        body = " ".join(rng.choices("abcdefgh", k=2000))
        made.append((entry, damaged(_packed(entry, f"<html><body><p>{body}</p></body></html>"))))
    return made


def _packed(entry: Entry, body: str) -> bytes:
    return member_of(record(entry.url, http(body.encode()), _number(entry.url)))


def _number(url: str) -> int:
    """Return a number for the record's id that depends only on the URL."""
    return int.from_bytes(url.encode()[-16:], "big")
