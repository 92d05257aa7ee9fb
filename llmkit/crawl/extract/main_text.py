"""The main text of an HTML page: by our model over its blocks, by resiliparse (`fast`), or by trafilatura."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from selectolax.lexbor import LexborHTMLParser

from llmkit.crawl.extract.block_model import best_blocks, shipped_model
from llmkit.crawl.extract.blocks import TAG_BITS, BlockTree, cut_blocks
from llmkit.crawl.extract.charset import decode_html, utf8_html
from llmkit.crawl.extract.features import NameWeights
from llmkit.crawl.extract.limits import PageLimitError, check_size
from llmkit.crawl.extract.markup import article_body, plain_html, visible
from llmkit.errors import UserError

__all__ = ["EXTRACTORS", "FAVOURS", "Extraction", "Extractor", "decode_html"]

EXTRACTORS = ("model", "fast", "trafilatura")
# the beta of the F score that the model's choice of blocks aims at; on domains that it has not seen there is a little
# less main text than it expects: F1 of .8808 at .85, .8794 at 1 and .8801 at .75
FAVOURS = {"balance": 0.85, "precision": 0.5, "recall": 2.0}
# a page of so few blocks does not say again what its heading says; what the model learnt from mostly has none
_FEW_BLOCKS = 3
_HEADINGS = sum(TAG_BITS[tag] for tag in ("h1", "h2", "h3", "h4"))
# the page's text gives way to its JSON-LD's where it is shorter than this part of it
ARTICLE_SHARE = 0.5
_BOILERPLATE = "script,style,noscript,template,svg,head,nav,header,footer,aside,form,button,iframe,select,textarea"


class Extraction(NamedTuple):
    """What was found; `reason` says why a page has no text: "empty", "too_large", "too_many_nodes" or "too_deep"."""

    text: str
    title: str | None
    reason: str | None


class Extractor:
    """Finds the main text of pages. Cheap to make; the model is read once a process."""

    def __init__(self, name: str = "model", favour: str = "balance", threshold: float | None = None) -> None:
        """name: of EXTRACTORS; favour: of FAVOURS, which `fast` does not heed.

        With a `threshold` the model keeps the blocks that it gives at least this probability, whatever is favoured;
        without, it chooses one for each page.

        Raises UserError for an unknown name, and for trafilatura where it is not installed.
        """
        if name not in EXTRACTORS:
            raise UserError(f"--extractor: expected {', '.join(EXTRACTORS)}, found {name!r}")
        if favour not in FAVOURS:
            raise UserError(f"extract.favour: expected {', '.join(FAVOURS)}, found {favour!r}")
        self.threshold, self.favour = threshold, favour
        # each begins with check_size, as cut_blocks does
        self._find: Callable[[bytes, str | None], tuple[str, str | None]]
        if name == "model":
            self.model = shipped_model()
            self.names = NameWeights(self.model.name_weights)
            self._find = self._by_model
        elif name == "fast":
            self._find = _by_resiliparse
        else:
            _trafilatura()
            self._find = self._by_trafilatura

    def extract(self, html: bytes | str, content_type: str | None = None, url: str | None = None) -> Extraction:
        """The main text and the title of a page, blocks parted by newlines. Never raises for what a page holds."""
        try:
            text, title = self._find(utf8_html(html, content_type), url)
        except PageLimitError as limit:
            return Extraction("", None, str(limit))
        return Extraction(text, title, None if text else "empty")

    def _by_model(self, page: bytes, url: str | None) -> tuple[str, str | None]:
        tree = cut_blocks(page)
        text = text_of(tree, self.keep(tree, self.model.probabilities(tree, self.names)))
        article = article_body(page)
        return article if len(text) < ARTICLE_SHARE * len(article) else text, tree.title

    def keep(self, tree: BlockTree, probabilities: np.ndarray) -> np.ndarray:
        """bool (blocks,): which blocks of a page are its main text, given the model's probabilities.

        A heading right above the text of a short page is kept with it.
        """
        if self.threshold is not None or len(probabilities) == 0:
            return probabilities >= (self.threshold or 0)
        words = np.array([1 + text.count(" ") for text in tree.blocks.text])
        keep = best_blocks(probabilities, words, FAVOURS[self.favour])
        if keep.sum() <= _FEW_BLOCKS:
            heading = tree.elements.tags[tree.blocks.leaf] & _HEADINGS > 0
            keep[:-1] |= heading[:-1] & keep[1:] & ~heading[1:]
        return keep

    def _by_trafilatura(self, page: bytes, url: str | None) -> tuple[str, str | None]:
        check_size(page)
        settings = {"favor_precision": self.favour == "precision", "favor_recall": self.favour == "recall"}
        text = _trafilatura()(page.decode("utf-8", "replace"), url=url, include_comments=False, **settings)
        return visible(text or ""), _title_of(LexborHTMLParser(page))


def text_of(tree: BlockTree, keep: np.ndarray) -> str:
    """The kept blocks' text in document order: a line each, and a line for a row of a table, its cells parted by "|".

    An empty cell before another leaves its place, so that what stands below it can be told: `| Q1 | Q2`, `a | | c`.
    """
    numbers = np.flatnonzero(keep)
    texts = tree.blocks.text
    if tree.cells is None:
        return "\n".join([texts[number] for number in numbers.tolist()])
    pieces: list[str] = []
    last_row, last_column = -1, 0
    for number, row, column in zip(numbers.tolist(), *tree.cells[1:, numbers].tolist(), strict=True):
        text = texts[number]
        if row >= 0:
            text = text.replace("\n", " ")
        if row < 0 or row != last_row:
            pieces.append("\n" if pieces else "")
            pieces.append("| " * column)  # -1 outside of tables
        else:
            pieces.append(" |" * (column - last_column) + " ")
        pieces.append(text)
        last_row, last_column = row, column
    return "".join(pieces)


def _by_resiliparse(page: bytes, url: str | None) -> tuple[str, str | None]:
    """resiliparse's main text, or the page without its navigation where that is less than 30% of it."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    check_size(page)
    page = plain_html(page)
    text = extract_plain_text(HTMLTree.parse_from_bytes(page, "utf-8"), main_content=True, alt_texts=False)
    tree = LexborHTMLParser(page)
    title = _title_of(tree)
    for node in tree.css(_BOILERPLATE):
        node.decompose()
    pruned = tree.body.text(separator="\n", strip=True) if tree.body is not None else ""
    return visible(pruned if len(text) < 0.3 * len(pruned) else text).strip(), title


def _title_of(tree: LexborHTMLParser) -> str | None:
    node = tree.css_first("title")
    return " ".join(node.text().split()) or None if node is not None else None


def _trafilatura() -> Callable[..., str | None]:
    try:
        from trafilatura import extract  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--extractor trafilatura: it is not installed; pip install trafilatura lxml_html_clean, "
            "or use --extractor model"
        ) from None
    return extract
