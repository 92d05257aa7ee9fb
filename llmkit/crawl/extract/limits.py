"""Limits on HTML before it is parsed: size, elements, attributes and depth, measured on its bytes.

    check_size(html)    # raises PageLimitError
    LexborHTMLParser(html)

The parser's work grows with the square of some of these, so that all HTML of others is checked before it is parsed,
that which stands in JSON or in scripts, too.
"""

from __future__ import annotations

import re

import numpy as np

MAX_BYTES = 16_000_000  # Common Crawl cuts pages at 5 MiB
MAX_NODES = 500_000
MAX_DEPTH = 1_000  # the parser's work grows with the square of the depth: 100,000 nested <div> take it 20 s
MAX_ATTRIBUTES = 5_000  # of one element; with the square of these too: 40,000 take it 3 s
_MANY_TAGS = 20_000
# browsers close these by themselves or never open them, so they add no depth
_FLAT_TAGS = (
    b"area base body br col colgroup dd dt embed frame head hr html img input li link meta option optgroup p param "
    b"rp rt source tbody td tfoot th thead tr track wbr"
)
_FLAT = frozenset(_FLAT_TAGS.split())
# what has no end runs to the page's, as in browsers; were it no match, 20,000 "<!--" took 10 s
_RAW_TEXT = re.compile(rb"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1|\Z)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(rb"<(/?)([a-zA-Z][^\s/<>]*)")
_QUOTED = re.compile(rb"\"[^\"]*\"|'[^']*'")
_WHOLE_TAG = re.compile(rb"<(?:[^>\"']+|\"[^\"]*\"|'[^']*')*")


class PageLimitError(Exception):
    """The page is beyond a limit; the message is the reason by which it is counted."""


def check_size(html: bytes) -> None:
    """Raise PageLimitError, "too_large", "too_many_nodes" or "too_deep", for a page that would cost too much."""
    if len(html) > MAX_BYTES:
        raise PageLimitError("too_large")
    data = np.frombuffer(html + b" ", np.uint8)
    at = np.flatnonzero(data[:-1] == ord("<"))
    if len(at) > MAX_NODES:
        raise PageLimitError("too_many_nodes")
    following = data[at + 1]
    starts = ((following | 32) >= ord("a")) & ((following | 32) <= ord("z"))
    room = np.diff(at, append=len(html))
    if any(_attributes(html, start) > MAX_ATTRIBUTES for start in at[starts & (room > 2 * MAX_ATTRIBUTES)].tolist()):
        raise PageLimitError("too_many_nodes")
    # the climb of start tags over end tags is no less than the depth, unless some end tags have no start; nested,
    # _MANY_TAGS of that sort take 0.6 s
    level = np.cumsum(starts.astype(np.int64) - (following == ord("/")))
    climb = (level - np.minimum(np.minimum.accumulate(level), 0)).max(initial=0)
    if (climb > MAX_DEPTH or len(at) > _MANY_TAGS) and _nesting(html) > MAX_DEPTH:
        raise PageLimitError("too_deep")


def _attributes(html: bytes, start: int) -> int:
    """At most how many attributes the tag has that starts there."""
    tag = _WHOLE_TAG.match(html, start, start + (1 << 20))
    return len(_QUOTED.sub(b"", tag[0]).split()) if tag else 0


def _nesting(html: bytes) -> int:
    """About how many elements are open at once at the most."""
    stack: list[bytes] = []
    opened: dict[bytes, int] = {}
    deepest = 0
    for closing, name in _TAG.findall(_RAW_TEXT.sub(b"", html)):
        name = name.lower()
        if name in _FLAT:
            continue
        if not closing:
            stack.append(name)
            opened[name] = opened.get(name, 0) + 1
            deepest = max(deepest, len(stack))
        elif opened.get(name):  # browsers ignore an end tag without a start
            while (last := stack.pop()) != name:
                opened[last] -= 1
            opened[name] -= 1
    return deepest
