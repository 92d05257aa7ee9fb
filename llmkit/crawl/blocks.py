"""An HTML page as blocks of text in document order, each with its place in the tree.

A block is what a browser sets apart: the text of a paragraph, a heading, a list item, a table cell, or a bare
stretch between two of them. The walk uses no recursion, and its work is bounded by `MAX_BYTES`, `MAX_NODES` and
`MAX_DEPTH`: what becomes of a page depends on the page alone, never on the clock.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from selectolax.lexbor import LexborHTMLParser, LexborNode

MAX_BYTES = 16_000_000  # Common Crawl cuts pages at 5 MiB
MAX_NODES = 500_000
MAX_DEPTH = 1_000  # the parser's work grows with the square of the depth: 100,000 nested <div> take it 20 s
_MANY_TAGS = 20_000  # nested, so many take it 0.6 s

# what holds no running text; <noscript> stays, as Discourse puts whole threads into it
_DROPPED = "script,style,svg,template,iframe,object,canvas,select,datalist,textarea,audio,video,head,link"
_INLINE_TAGS = (
    "a abbr acronym b bdi bdo big button cite code data del dfn em font i img input ins kbd label mark math mi mn mo "
    "mrow nobr q rp rt ruby s samp small span strike strong sub sup time tt u var wbr picture source"
)
_INLINE = frozenset(_INLINE_TAGS.split())
# browsers close these by themselves or never open them, so they add no depth
_FLAT_TAGS = (
    b"area base body br col colgroup dd dt embed frame head hr html img input li link meta option optgroup p param "
    b"rp rt source tbody td tfoot th thead tr track wbr"
)
_FLAT = frozenset(_FLAT_TAGS.split())
_RAW_TEXT = re.compile(rb"<!--.*?-->|<(script|style)\b.*?</\1", re.DOTALL | re.IGNORECASE)
_MARKED_TAGS = (
    "p div section article main aside header footer nav form ul ol li dl dd tr td pre code blockquote figure "
    "figcaption h1 h2 h3 h4 button noscript (hidden)"
)
TAG_BITS = {tag: 1 << bit for bit, tag in enumerate(_MARKED_TAGS.split())}  # at most 31: they live in an int32
_TAG = re.compile(rb"<(/?)([a-zA-Z][^\s/>]*)[^>]*>")


class PageLimitError(Exception):
    """The page is beyond a limit; the message is the reason by which it is counted."""


class ElementKey(NamedTuple):
    """What tells one kind of element from another: a page has a few hundred kinds."""

    tag: str
    names: str = ""  # the attributes class, id, role and itemprop


def _integers() -> array[int]:
    return array("i")  # numpy takes it over without a copy, which for lists cost a tenth of the page's time


@dataclass(slots=True)
class Elements:
    """The elements of a page in document order, the body first; it is its own `parent`."""

    parent: array[int] = field(default_factory=_integers)
    depth: array[int] = field(default_factory=_integers)
    key: array[int] = field(default_factory=_integers)  # into `BlockTree.keys`
    tags: array[int] = field(default_factory=_integers)  # TAG_BITS of the element and all above it
    holder: array[int] = field(
        default_factory=_integers
    )  # the nearest element laid out as a block; itself if it is one
    first_block: array[int] = field(default_factory=_integers)
    end_block: array[int] = field(default_factory=_integers)  # the blocks within are range(first_block, end_block)


@dataclass(slots=True)
class Blocks:
    """The blocks of a page in document order."""

    text: list[str] = field(default_factory=list)
    leaf: array[int] = field(default_factory=_integers)  # the element that holds the block's first letter
    link_chars: array[int] = field(default_factory=_integers)
    links: array[int] = field(default_factory=_integers)
    pieces: array[int] = field(default_factory=_integers)  # text nodes
    breaks: array[int] = field(default_factory=_integers)  # <br> within


@dataclass(slots=True)
class BlockTree:
    """A page's blocks and elements, the distinct `keys` of its elements, and its title."""

    blocks: Blocks
    elements: Elements
    keys: list[ElementKey]
    title: str | None


def check_size(html: bytes) -> None:
    """Raise PageLimitError, "too_large", "too_many_nodes" or "too_deep", for a page that would cost too much."""
    if len(html) > MAX_BYTES:
        raise PageLimitError("too_large")
    tag_count = html.count(b"<")
    if tag_count > MAX_NODES:
        raise PageLimitError("too_many_nodes")
    suspected = tag_count > _MANY_TAGS or (tag_count > MAX_DEPTH and _climb(html) > MAX_DEPTH)
    if suspected and _nesting(html) > MAX_DEPTH:
        raise PageLimitError("too_deep")


def _climb(html: bytes) -> int:
    """How far the count of "<x" less "</" climbs: at least `_nesting` unless end tags lack a start; 10 times faster."""
    data = np.frombuffer(html + b" ", np.uint8)
    following = data[np.flatnonzero(data[:-1] == ord("<")) + 1]
    letters = ((following | 32) >= ord("a")) & ((following | 32) <= ord("z"))
    level = np.cumsum(letters.astype(np.int64) - (following == ord("/")))
    return int((level - np.minimum(np.minimum.accumulate(level), 0)).max(initial=0))


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


def cut_blocks(html: bytes) -> BlockTree:
    """Parse a page of UTF-8 bytes and cut it into blocks. Raises PageLimitError."""
    check_size(html)
    tree = LexborHTMLParser(html)
    title_node = tree.css_first("title")
    title = " ".join(title_node.text().split()) if title_node is not None else ""
    for node in tree.css(_DROPPED):
        node.decompose()
    blocks, elements, keys = Blocks(), Elements(), []
    if tree.body is not None:  # a <frameset> has none
        keys = _walk(tree.body, blocks, elements)
    return BlockTree(blocks, elements, keys, title or None)


def _walk(body: LexborNode, blocks: Blocks, elements: Elements) -> list[ElementKey]:
    """Fill `blocks` and `elements` in one pass over the nodes; return the kinds of elements.

    Pages have 2,000 nodes and this loop is two thirds of their time, so it is one function: split into methods it took
    twice as long.
    """
    parents, depths, kinds, holders = elements.parent, elements.depth, elements.key, elements.holder
    marks, firsts, ends = elements.tags, elements.first_block, elements.end_block
    texts = blocks.text
    kind_of: dict[object, int] = {}
    keys: list[ElementKey] = []
    stack: list[int] = []  # numbers of the open elements
    addresses: list[int] = []  # where they lie in memory, which is what tells them apart
    parts: list[str] = []  # of the block being read
    leaf = link = pre = -1  # the element of its first letter; the open <a href>; the open <pre>
    link_chars = links = pieces = breaks = 0

    def flush() -> None:
        """End the block being read."""
        nonlocal leaf, link_chars, links, pieces, breaks
        if leaf >= 0:
            text = "".join(parts)
            texts.append(_preformatted(text) if pre >= 0 else _flowing(text))
            blocks.leaf.append(leaf)
            blocks.link_chars.append(link_chars)
            blocks.links.append(links)
            blocks.pieces.append(pieces)
            blocks.breaks.append(breaks)
            leaf = -1
            link_chars = links = pieces = breaks = 0
        parts.clear()

    for node in body.traverse(include_text=True):
        tag = node.tag
        is_text = tag == "-text"
        if is_text:
            text = node.text_content
            if not text or text.isspace():
                if text and leaf >= 0:
                    parts.append(text)
                continue
        elif tag is None or tag == "-comment":
            continue
        if stack:
            above = node.parent.mem_id  # every node under the body has one
            while addresses[-1] != above:
                addresses.pop()
                closed = stack.pop()
                if parts and holders[closed] == closed:
                    flush()
                ends[closed] = len(texts)
                if closed == link:
                    link = -1
                elif closed == pre:
                    pre = -1
        if is_text:
            if leaf < 0:
                leaf = stack[-1]
            parts.append(text)
            pieces += 1
            if link >= 0:
                link_chars += len(text.strip())
        elif tag == "br":
            if leaf >= 0:
                if breaks and _ends_in_break(parts):
                    flush()  # two in a row part paragraphs on pages that know no <p>
                else:
                    parts.append(_BREAK)
                    breaks += 1
        else:
            number = len(parents)
            inline = tag in _INLINE
            if parts and not inline:
                flush()
            parent = stack[-1] if stack else 0
            kind: object = tag
            mark = TAG_BITS.get(tag, 0)
            attributes = node.attributes
            if attributes:
                get = attributes.get
                kind = (tag, get("class"), get("id"), get("role"), get("itemprop"))
                if ("style" in attributes or "hidden" in attributes or "aria-hidden" in attributes) and _is_hidden(
                    attributes
                ):
                    mark |= TAG_BITS["(hidden)"]
                if link < 0 and tag == "a" and "href" in attributes:
                    link = number
                    links += 1
            if pre < 0 and tag == "pre":
                pre = number
            kind_number = kind_of.get(kind)
            if kind_number is None:
                kind_number = kind_of[kind] = len(keys)
                keys.append(ElementKey(tag, " ".join(filter(None, kind[1:])) if attributes else ""))
            kinds.append(kind_number)
            parents.append(parent)
            marks.append(mark | marks[parent] if stack else mark)
            depths.append(len(stack))
            holders.append(holders[parent] if inline else number)
            firsts.append(len(texts))
            ends.append(0)
            stack.append(number)
            addresses.append(node.mem_id)
    if parts:
        flush()
    for number in stack:
        ends[number] = len(texts)
    return keys


_BREAK = "\v"  # <br>; `split` takes it for a space


def _ends_in_break(parts: list[str]) -> bool:
    for part in reversed(parts):
        if part == _BREAK:
            return True
        if not part.isspace():
            return False
    return False


def _is_hidden(attributes: dict[str, str | None]) -> bool:
    style = (attributes.get("style") or "").replace(" ", "")
    return "hidden" in attributes or attributes.get("aria-hidden") == "true" or "display:none" in style


def _flowing(text: str) -> str:
    if _BREAK not in text:
        return " ".join(text.split())
    return "\n".join(line for part in text.split(_BREAK) if (line := " ".join(part.split())))


def _preformatted(text: str) -> str:
    lines = [line.rstrip() for line in text.replace(_BREAK, "\n").expandtabs().splitlines()]
    return "\n".join(lines).strip("\n")
