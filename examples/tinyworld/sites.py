"""HTML of the pages with the boilerplate of sites: menus, cookie banners, related links, scripts, prices, footers."""

from __future__ import annotations

import html
import random
import re

from pages import TITLES, Page

HOSTS = {
    "article": ("www.harbour-post.example", "weekly-mirror.example", "news.tinyland.example"),
    "wiki": ("tinypedia.example",),
    "forum": ("board.askatown.example", "forum.fireside.example"),
    "faq": ("ask-the-guide.example", "help.tinyland.example"),
    "quiz": ("quiz-night.example",),
    "listing": ("who-is-where.example",),
    "shop": ("goods-from-afar.example",),
    "howto": ("handy-hints.example",),
}
MENU = ("Home", "News", "People", "Places", "Archive", "About us", "Contact", "Log in", "Newsletter", "Search")
COOKIES = (
    "We use cookies to make this site better. By going on you agree to our use of cookies.",
    "This site uses cookies. Read our cookie policy.",
    "Your privacy matters to us. Accept all cookies, or choose which.",
)
FOOTERS = (
    "All rights reserved. Terms of use. Privacy policy.",
    "Imprint | Contact | Privacy policy | Jobs",
    "Made with care in Tiny World. Terms of use apply.",
)
SHARING = ("Share this page", "Send to a friend", "Print", "Follow us", "Subscribe now", "Leave a comment")
SECTIONS = ("In short", "Overview", "Further", "Also", "Notes", "More")
SCRIPTS = (
    "<script>window.dataLayer = window.dataLayer || []; function track(e) { dataLayer.push(e); }</script>",
    '<script async src="/static/app.4f2a.js"></script><noscript>Please enable JavaScript.</noscript>',
    "<style>.menu { display: flex; } .ad { margin: 8px; }</style>",
)
# Text around the main text that must not be extracted.
BOILERPLATE = (*COOKIES, *FOOTERS, *SHARING, "Please enable JavaScript.", "Add to basket")


def html_of(page: Page, rng: random.Random, broken: bool = False) -> str:
    """Return the page as its site sends it; `broken` has unclosed tags and unquoted attributes, as browsers accept."""
    title, body = html.escape(page.title), _bodies[page.kind](page, rng)
    menu = "".join(f'<li><a href="/{word.lower().replace(" ", "-")}">{word}</a></li>' for word in rng.sample(MENU, 6))
    related = "".join(
        f'<li><a href="/p/{rng.randrange(10**6)}">{rng.choice(titles)}</a></li>'
        for titles in rng.sample(list(TITLES.values()), 5)
    )
    whole = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{rng.choice(SCRIPTS)}</head>'
        f'<body><div class="cookie-banner" role="dialog"><p>{rng.choice(COOKIES)}</p><button>Accept</button></div>'
        f'<header><nav class="menu"><ul>{menu}</ul></nav></header>{body}'
        f'<aside class="sidebar"><h3>Related</h3><ul>{related}</ul></aside>'
        f'<div class="share">{"".join(f"<a href=#>{word}</a> " for word in rng.sample(SHARING, 3))}</div>'
        f"<footer><p>{rng.choice(FOOTERS)}</p></footer>{rng.choice(SCRIPTS)}</body></html>"
    )
    if broken:
        for whole_tag in ("</p>", "</li>", "</div>", "</html>", "</body>"):
            whole = whole.replace(whole_tag, "")
        whole = re.sub(r'="([^"\s]+)"', r"=\1", whole).replace("<!doctype html>", "")
    return whole


def _paragraphs(page: Page) -> str:
    return "".join(f"<p>{html.escape(text)}</p>\n" for text in page.paragraphs)


def _article(page: Page, rng: random.Random) -> str:
    day = f"{rng.randint(1, 28)} March"
    return (
        f'<main><article><h1>{html.escape(page.title)}</h1><div class="byline">By our staff | {day}</div>'
        f"{_paragraphs(page)}</article></main>"
    )


def _wiki(page: Page, rng: random.Random) -> str:
    contents = "".join(
        f'<li><a href="#s{i}">{SECTIONS[i % len(SECTIONS)]}</a></li>' for i in range(len(page.paragraphs))
    )
    parts = "".join(
        f'<h2 id="s{i}">{SECTIONS[i % len(SECTIONS)]} <span class="edit">[edit]</span></h2><p>{html.escape(text)}</p>'
        for i, text in enumerate(page.paragraphs)
    )
    return (
        f'<div id="content"><h1>{html.escape(page.title)}</h1><div class="toc"><ul>{contents}</ul></div>{parts}</div>'
    )


def _forum(page: Page, rng: random.Random) -> str:
    posts = "".join(
        f'<div class="post" id="p{i}"><div class="author"><a href="/u/{rng.randrange(9999)}">guest'
        f'{rng.randrange(99)}</a><span>{rng.randrange(2, 900)} posts</span></div><div class="post-body"><p>'
        f'{html.escape(text)}</p></div><div class="actions"><a href="#">Reply</a> <a href="#">Report</a></div></div>'
        for i, text in enumerate(page.paragraphs)
    )
    return f'<div class="thread"><h1>{html.escape(page.title)}</h1>{posts}</div>'


def _quiz(page: Page, rng: random.Random) -> str:
    first, *lines, last = (html.escape(text) for text in page.paragraphs)
    items = "".join(f"<li><p>{line}</p></li>" for line in lines)
    return f"<section><h1>{html.escape(page.title)}</h1><p>{first}</p><ol>{items}</ol><p>{last}</p></section>"


def _listing(page: Page, rng: random.Random) -> str:
    rows = "".join(f'<div class="entry"><p>{html.escape(text)}</p></div>' for text in page.paragraphs)
    pager = "".join(f'<a href="?page={i}">{i}</a> ' for i in range(1, 8))
    return f'<main><h1>{html.escape(page.title)}</h1>{rows}<div class="pager">{pager}</div></main>'


def _shop(page: Page, rng: random.Random) -> str:
    offers = "".join(
        f'<div class="offer"><span class="price">{rng.randint(2, 60)}.{rng.randrange(100):02d}</span>'
        "<button>Add to basket</button></div>"
        for _ in range(3)
    )
    return (
        f'<main><h1>{html.escape(page.title)}</h1><div class="description">{_paragraphs(page)}</div>'
        f'<div class="offers">{offers}</div></main>'
    )


_bodies = {
    "article": _article,
    "wiki": _wiki,
    "forum": _forum,
    "faq": _listing,
    "quiz": _quiz,
    "listing": _listing,
    "shop": _shop,
    "howto": _article,
}
