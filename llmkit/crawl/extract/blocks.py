"""Cut an HTML page into blocks of text in document order, each with its place in the tree.

A block is what a browser displays separately: the text of a paragraph, a heading, a list item, a table cell, or loose
text between two of them. The traversal is not recursive, and its work is bounded by `MAX_BYTES`, `MAX_NODES` and
`MAX_DEPTH`: the blocks depend on the page only, never on time.

`table_cells` finds the blocks in data tables, which are kept or dropped as a whole. Cells of layout tables, which many
pages use for columns, are ordinary blocks.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from selectolax.lexbor import LexborHTMLParser, LexborNode

from llmkit.crawl.extract.markup import check_size, inline_formulas, plain_html, visible

_BREAK = "\v"  # <br>; white space for `split` and `isspace`
MAX_CELL_BLOCKS = 3  # a cell with more belongs to a layout table
FOLDED_CHARS = 200  # hidden text this long is a tab or accordion: dropping all hidden text costs F1 .013 on dev pages

# ruff: noqa: SIM905 -- lists of words

# elements without running text; not <noscript>: Discourse puts complete threads into it
_DROPPED = frozenset(
    "script style svg template iframe object canvas select datalist textarea audio video head link".split()
)
# ids of cookie consent dialogs, whose text is on every page of a site, shown or hidden
_CONSENT = frozenset(
    "onetrust-consent-sdk qc-cmp2-container CybotCookiebotDialog didomi-host usercentrics-root truste-consent-track "
    "cmplz-cookiebanner-container".split()
)
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big button cite code data del dfn em font i img input ins kbd label mark math mi mn mo "
    "mrow nobr q rp rt ruby s samp small span strike strong sub sup time tt u var wbr picture source".split()
)
_MARKED_TAGS = (
    "p div section article main aside header footer nav form ul ol li dl dd tr td pre code blockquote figure "
    "figcaption h1 h2 h3 h4 button noscript (hidden)"
)
TAG_BITS = {tag: 1 << bit for bit, tag in enumerate(_MARKED_TAGS.split())}  # at most 31: int32


def table_cells(tags: np.ndarray, parent: np.ndarray, leaf: np.ndarray) -> np.ndarray | None:
    """Return int32 (3, blocks): the table element, the row element, and the column of each block; -1 outside tables.

    tags: strings (elements,); parent: the parent of each element; leaf: the element of each block. Only data rows
    count: text in at least two cells, at most MAX_CELL_BLOCKS blocks per cell, and no nested table. None if the page
    has no cells.
    """
    is_cell = ((tags == "td") | (tags == "th")) & (tags == "tr")[parent]
    cells = np.flatnonzero(is_cell)
    if len(cells) == 0 or len(leaf) == 0:
        return None
    nearest = _nearest(is_cell, parent)
    rows = parent[cells]
    holds_table = np.zeros(len(parent), bool)
    holds_table[parent[nearest[rows]]] = nearest[rows] > 0
    # a cell's column is its position in the row
    order = np.argsort(rows, kind="stable")
    _, first, members = np.unique(rows[order], return_index=True, return_counts=True)
    column = np.zeros(len(parent), np.int32)
    column[cells[order]] = np.arange(len(cells)) - np.repeat(first, members)

    cell = nearest[leaf]
    row = np.where(cell > 0, parent[cell], 0)
    blocks_of = np.bincount(cell, minlength=len(parent))
    filled = np.bincount(rows, blocks_of[cells] > 0, minlength=len(parent))
    crowded = np.bincount(rows, blocks_of[cells] > MAX_CELL_BLOCKS, minlength=len(parent))
    of_data = (row > 0) & ~holds_table[row] & (filled[row] >= 2) & (crowded[row] == 0)
    table = _nearest(tags == "table", parent)[row]
    return np.where(of_data, np.stack([table, row, column[cell]]), -1).astype(np.int32)


def _nearest(wanted: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """Return the nearest wanted ancestor or self of each element, or 0, by pointer doubling."""
    nearest = np.where(wanted, np.arange(len(parent)), parent)
    while not np.array_equal(further := nearest[nearest], nearest):
        nearest = further
    return nearest


class ElementKey(NamedTuple):
    """The kind of an element; a page has a few hundred kinds."""

    tag: str
    names: str = ""  # the attributes class, id, role and itemprop


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of a page in document order, the body first: int32 arrays (elements,), except `keys`."""

    keys: list[ElementKey]  # the kinds of elements
    kind: np.ndarray  # index into `keys`
    parent: np.ndarray  # the body's is 0
    depth: np.ndarray  # the body's is 0
    tags: np.ndarray  # TAG_BITS of the element and its ancestors
    holder: np.ndarray  # the nearest block-level ancestor or self
    first_block: np.ndarray
    end_block: np.ndarray  # contains the blocks range(first_block, end_block)


@dataclass(frozen=True, slots=True)
class BlockTree:
    """The blocks of a page in document order, as int32 arrays (blocks,) except `text`, and its elements."""

    text: list[str]
    leaf: np.ndarray  # the element of the block's first character
    link_chars: np.ndarray
    links: np.ndarray
    pieces: np.ndarray  # text nodes
    breaks: np.ndarray  # <br> elements
    cells: np.ndarray | None  # (3, blocks), see `table_cells`
    elements: Elements
    title: str | None


def cut_blocks(html: bytes) -> BlockTree:
    """Parse a page (UTF-8) and cut it into blocks. Raises PageLimitError."""
    check_size(html)
    html = plain_html(html)
    tree = LexborHTMLParser(html)
    title_node = tree.css_first("title")
    title = " ".join(visible(title_node.text()).split()) if title_node is not None else ""
    inline_formulas(tree, html)
    walk = _Walk()
    if tree.body is not None:  # a <frameset> has none
        walk.run(tree.body)
    leaf, link_chars, links, pieces, breaks = np.frombuffer(walk.counts, np.int32).reshape(-1, 5).T.copy()
    elements = walk.elements()
    tags = [key.tag for key in elements.keys]
    has_cells = "td" in tags or "th" in tags
    cells = table_cells(np.array(tags)[elements.kind], elements.parent, leaf) if has_cells else None
    return BlockTree(walk.texts, leaf, link_chars, links, pieces, breaks, cells, elements, title or None)


class _Walk:
    """One pass over the nodes of the body. Records the minimum; numpy derives the rest."""

    def __init__(self) -> None:
        self.keys: list[ElementKey] = []
        self.bits: list[int] = []  # by kind
        self.kinds, self.parents, self.firsts, self.ends = (array("i") for _ in range(4))
        self.inlines: list[bool] = []  # by kind
        self.texts: list[str] = []
        self.counts = array("i")  # leaf, link_chars, links, pieces and breaks of each block

    def run(self, body: LexborNode) -> None:
        """Traverse the body. A single function: with a method per kind of node, 2,000 nodes took 1.5 times as long."""
        kinds, parents, firsts, ends, inlines = self.kinds, self.parents, self.firsts, self.ends, self.inlines
        texts = self.texts
        kind_of: dict[object, int] = {}
        open_elements: list[int] = []
        addresses: list[int] = []  # memory addresses of the open elements, their identity in lexbor
        strings: list[str] = []  # of the block being read
        leaf = link = pre = -1  # the element of its first character; the open <a href>; the open <pre>
        unseen = folded = -1  # the open hidden elements: an inline one, and a block-level one
        link_chars = links = pieces = breaks = 0
        text = ""
        resume = 0  # address of the node after a dropped element

        def end_block() -> None:
            nonlocal leaf, link_chars, links, pieces, breaks
            if leaf >= 0:
                whole = "".join(strings)
                if pre >= 0:
                    lines = [line.rstrip() for line in whole.replace(_BREAK, "\n").expandtabs().splitlines()]
                    texts.append("\n".join(lines).strip("\n"))
                elif breaks:
                    lines = [" ".join(line.split()) for line in whole.split(_BREAK)]
                    texts.append("\n".join(filter(None, lines)))
                else:
                    texts.append(" ".join(whole.split()))
                self.counts.extend((leaf, link_chars, links, pieces, breaks))
                leaf = -1
                link_chars = links = pieces = breaks = 0
            strings.clear()

        for node in body.traverse(include_text=True):
            if resume:
                if node.mem_id != resume:
                    continue
                resume = 0
            tag = node.tag
            if tag == "-text":
                text = node.text_content or ""
                if not text.isascii():
                    text = visible(text)
                if text.isspace() or not text:
                    if leaf >= 0:
                        strings.append(text)
                    continue
            elif tag is None or tag == "-comment":
                continue
            elif tag in _DROPPED:  # finding them first with a selector takes 5% of the time
                resume = _following(node)
                continue
            if open_elements:
                above = node.parent.mem_id  # pyright: ignore[reportOptionalMemberAccess]  # only the body has none
                while addresses[-1] != above:
                    addresses.pop()
                    closed = open_elements.pop()
                    if strings and not inlines[kinds[closed]]:
                        end_block()
                    ends[closed] = len(texts)
                    if closed == link:
                        link = -1
                    elif closed == pre:
                        pre = -1
                    if closed == unseen:
                        unseen = -1
                    elif closed == folded:
                        folded = -1
                        self._drop_if_short(closed)
            if unseen >= 0 and (tag == "-text" or tag == "br"):
                continue
            if tag == "-text":
                if leaf < 0:
                    leaf = open_elements[-1]
                strings.append(text)
                pieces += 1
                if link >= 0:
                    link_chars += len(text.strip())
                continue
            if tag == "br":
                if leaf >= 0:
                    if breaks and _BREAK in takewhile(str.isspace, reversed(strings)):
                        end_block()  # two in a row separate paragraphs on pages without <p>
                    else:
                        strings.append(_BREAK)
                        breaks += 1
                continue
            inline = tag in _INLINE
            if strings and not inline:
                end_block()
            kind: object = tag
            attributes = node.attributes
            if attributes:
                get = attributes.get
                if get("id") in _CONSENT:
                    resume = _following(node)
                    continue
                kind = (tag, get("class"), get("id"), get("role"), get("itemprop"), get("aria-hidden") == "true")
                if unseen < 0 and parents:
                    style = (get("style") or "").replace(" ", "").lower()
                    if "display:none" in style or get("hidden", "until-found") != "until-found":
                        if inline:
                            unseen = len(parents)
                        elif folded < 0:
                            folded = len(parents)
                if tag == "a" and link < 0 and "href" in attributes:
                    link = len(parents)
                    links += 1
            if tag == "pre" and pre < 0:
                pre = len(parents)
            number = kind_of.get(kind)
            if number is None:
                number = kind_of[kind] = len(kind_of)
                names, bits = "", TAG_BITS.get(tag, 0)
                if isinstance(kind, tuple):
                    names = " ".join(filter(None, kind[1:5]))
                    bits |= TAG_BITS["(hidden)"] if kind[5] else 0
                self.keys.append(ElementKey(tag, names))
                self.bits.append(bits)
                inlines.append(inline)
            kinds.append(number)
            parents.append(open_elements[-1] if open_elements else 0)
            open_elements.append(len(firsts))
            firsts.append(len(texts))
            ends.append(0)
            addresses.append(node.mem_id)
        if strings:
            end_block()
        for number in open_elements:
            ends[number] = len(texts)

    def _drop_if_short(self, element: int) -> None:
        """Drop the blocks of a hidden element, the last ones, unless they are long enough for a tab or an accordion."""
        first = self.firsts[element]
        if sum(map(len, self.texts[first:])) >= FOLDED_CHARS:
            return
        del self.texts[first:], self.counts[5 * first :]
        for number in range(element, len(self.firsts)):
            self.firsts[number] = first
            self.ends[number] = min(self.ends[number], first)

    def elements(self) -> Elements:
        """Build `Elements`: pointer doubling propagates along all ancestors in log2(depth) steps."""
        kind, parent = np.frombuffer(self.kinds, np.int32), np.frombuffer(self.parents, np.int32)
        tags = np.array(self.bits, np.int32)[kind]
        numbers = np.arange(len(kind), dtype=np.int32)
        holder = np.where(np.array(self.inlines, bool)[kind], parent, numbers)
        depth = (numbers > 0).astype(np.int32)
        above = parent
        while above.any():
            tags |= tags[above]
            depth += depth[above]
            holder = holder[holder]
            above = above[above]
        first, end = np.frombuffer(self.firsts, np.int32), np.frombuffer(self.ends, np.int32)
        return Elements(self.keys, kind, parent, depth, tags, holder, first, end)


def _following(node: LexborNode) -> int:
    """Return the address of the next node outside this one, or -1."""
    above: LexborNode | None = node
    while above is not None:
        if above.next is not None:
            return above.next.mem_id
        above = above.parent
    return -1
