"""Extract the main text of an HTML page: with our model over blocks, with resiliparse (`fast`), or with trafilatura.

The model gives each block the probability of being main text. It consists of oblivious trees, which split on the same
feature and border across a level, so that all trees run on all blocks of a page in a few numpy operations.
`examples/train_extractor.py` trains it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file
from selectolax.lexbor import LexborHTMLParser

from llmkit.crawl.extract.blocks import TAG_BITS, BlockTree, cut_blocks
from llmkit.crawl.extract.features import NameWeights, block_features
from llmkit.crawl.extract.markup import PageLimitError, article_body, check_size, plain_html, utf8_html, visible
from llmkit.errors import UserError

MODEL = Path(__file__).with_name("extractor.safetensors")
_AT_ONCE = 4096  # blocks; bounds the memory for a huge page to about 10 MB
# beta of the expected F score that the choice of blocks maximizes; on unseen domains the model slightly overestimates
# the main text: F1 of .8808 at .85, .8794 at 1 and .8801 at .75
FAVOURS = {"balance": 0.85, "precision": 0.5, "recall": 2.0}
# on a page with so few kept blocks the heading is not redundant; most training pages are annotated without headings
_FEW_BLOCKS = 3
_HEADINGS = sum(TAG_BITS[tag] for tag in ("h1", "h2", "h3", "h4"))
# the article in the page's JSON-LD replaces an extracted text shorter than this share of it
ARTICLE_SHARE = 0.5
_BOILERPLATE = "script,style,noscript,template,svg,head,nav,header,footer,aside,form,button,iframe,select,textarea"


@dataclass(frozen=True)
class BlockModel:
    """Oblivious trees over named features, and the weights of tags, class names and ids."""

    feature_names: tuple[str, ...]
    features: np.ndarray  # int16 (trees, depth): the feature of each split
    borders: np.ndarray  # float32 (trees, depth): level d sets bit d of the leaf index if the feature is above it
    leaves: np.ndarray  # float32 (trees, 2**depth), depth at most 8: log-odds
    bias: float
    name_weights: dict[str, float]

    @classmethod
    @cache
    def load(cls, path: Path = MODEL) -> BlockModel:
        """Load a model file, once per process."""
        tensors = load_file(path)

        def strings(name: str) -> list[str]:
            return tensors[name].tobytes().decode().split("\n")

        return cls(
            tuple(strings("feature_names")),
            tensors["features"].astype(np.intp),
            tensors["borders"],
            tensors["leaves"],
            float(tensors["bias"][0]),
            dict(zip(strings("names"), tensors["name_weights"].tolist(), strict=True)),
        )

    @cached_property
    def names(self) -> NameWeights:
        """The weights, with a cache of the names seen so far."""
        return NameWeights(self.name_weights)

    @cached_property
    def _splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features and the borders of the distinct splits, and their index at each level: intp (depth, trees)."""
        pairs = np.stack([self.features.ravel(), self.borders.ravel()])
        (features, borders), which = np.unique(pairs, axis=1, return_inverse=True)
        return features.astype(np.intp), borders.astype(np.float32)[:, None], which.reshape(self.features.shape).T

    def probabilities(self, tree: BlockTree) -> np.ndarray:
        """Return float64 (blocks,): the probability that each block is main text.

        The blocks of a data table share the highest of its rows' mean probabilities, weighted by characters, so that
        the table is kept or dropped as a whole; chosen one by one, cells were lost on 82 of 222 pages with such tables.
        """
        n = len(tree.text)
        if n == 0:
            return np.zeros(0)
        rows = feature_rows(block_features(tree, self.names), self.feature_names, n)
        probabilities = self.of_features(rows)
        if tree.cells is not None and len(members := np.flatnonzero(tree.cells[0] >= 0)):
            chars = np.fromiter(map(len, tree.text), np.int64, n)
            table, row = tree.cells[:2, members]
            first, row = np.unique(row, return_index=True, return_inverse=True)[1:]
            means = np.bincount(row, (probabilities * chars)[members]) / np.bincount(row, chars[members])
            table, of_row = np.unique(table, return_inverse=True)
            highest = np.zeros(len(table))
            np.maximum.at(highest, of_row[first], means)
            probabilities[members] = highest[of_row]
        return probabilities

    def of_features(self, rows_FN: np.ndarray) -> np.ndarray:
        """Return float64 (N,): the probability that each block is main text, from float32 features (F, N)."""
        # 300 trees have 1,300 distinct splits; as uint8, which fits the cache, 300 blocks take .24 ms
        features, borders_Q1, which_DT = self._splits
        first_T1 = np.arange(len(self.features))[:, None] * self.leaves.shape[1]
        scores = []
        for start in range(0, rows_FN.shape[1], _AT_ONCE):
            above_QN = (rows_FN[:, start : start + _AT_ONCE].take(features, axis=0) > borders_Q1).view(np.uint8)
            leaf_TN = np.zeros((len(self.features), above_QN.shape[1]), np.uint8)
            for of_level in which_DT[::-1]:
                leaf_TN += leaf_TN
                leaf_TN |= above_QN.take(of_level, axis=0)
            scores.append(self.leaves.ravel().take(leaf_TN + first_T1).sum(axis=0, dtype=np.float64) + self.bias)
        return 1 / (1 + np.exp(-np.concatenate(scores)))


def feature_rows(columns: dict[str, np.ndarray | float], names: tuple[str, ...], n: int) -> np.ndarray:
    """Return float32 (features, blocks) of the named features; page-level features are repeated for all `n` blocks."""
    rows = np.empty((len(names), n), np.float32)
    for row, name in enumerate(names):
        rows[row] = columns[name]
    return rows


def best_blocks(probabilities: np.ndarray, words: np.ndarray, beta: float) -> np.ndarray:
    """Return bool (blocks,): the blocks to keep for the highest expected F score of the page.

    Blocks are added in descending order of probability until the expected (1 + beta^2) TP / (kept + beta^2 relevant),
    counted in words, is highest. Beta below 1 favours precision, above 1 recall. A page on which the model is unsure,
    such as a list of products, thus gets a lower threshold than an article. On unseen domains the word F1 was .880,
    with the best global threshold .873.
    """
    order = np.argsort(-probabilities, kind="stable")
    expected = np.cumsum((probabilities * words)[order])
    score = expected / (np.cumsum(words[order]) + beta**2 * expected[-1] + 1e-9)
    best = int(np.argmax(score))
    return probabilities >= probabilities[order[best]]


class Extraction(NamedTuple):
    """The result. `reason`: why a page has no text: "empty", "too_large", "too_many_nodes" or "too_deep"."""

    text: str
    title: str | None
    reason: str | None


class Extractor:
    """Extracts the main text of pages. Cheap to create; the model is loaded once per process."""

    def __init__(self, name: str = "model", favour: str = "balance", threshold: float | None = None) -> None:
        """name: "model", "fast" or "trafilatura"; favour: a key of FAVOURS, ignored by `fast`.

        With `threshold`, the model keeps blocks of at least this probability and ignores `favour`; otherwise it
        chooses a threshold per page. Raises UserError if trafilatura is chosen and not installed.
        """
        self.threshold, self.favour = threshold, favour
        finders = {"model": self._by_model, "fast": _by_resiliparse, "trafilatura": self._by_trafilatura}
        # each calls check_size first; `model` does so in cut_blocks
        self._find: Callable[[bytes, str | None], tuple[str, str | None]] = finders[name]
        if name == "trafilatura":
            _trafilatura()

    def extract(self, html: bytes | str, content_type: str | None = None, url: str | None = None) -> Extraction:
        """Extract the main text, blocks separated by newlines, and the title. No page content makes it raise."""
        try:
            text, title = self._find(utf8_html(html, content_type), url)
        except PageLimitError as limit:
            return Extraction("", None, str(limit))
        return Extraction(text, title, None if text else "empty")

    def _by_model(self, page: bytes, url: str | None) -> tuple[str, str | None]:
        tree = cut_blocks(page)
        text = text_of(tree, self.keep(tree, BlockModel.load().probabilities(tree)))
        article = article_body(page)
        return article if len(text) < ARTICLE_SHARE * len(article) else text, tree.title

    def keep(self, tree: BlockTree, probabilities: np.ndarray) -> np.ndarray:
        """Return bool (blocks,): the blocks that are main text, given the model's probabilities.

        On short pages a heading directly above kept text is kept too.
        """
        if self.threshold is not None or len(probabilities) == 0:
            return probabilities >= (self.threshold or 0)
        words = np.array([1 + text.count(" ") for text in tree.text])
        keep = best_blocks(probabilities, words, FAVOURS[self.favour])
        if keep.sum() <= _FEW_BLOCKS:
            heading = tree.elements.tags[tree.leaf] & _HEADINGS > 0
            keep[:-1] |= heading[:-1] & keep[1:] & ~heading[1:]
        return keep

    def _by_trafilatura(self, page: bytes, url: str | None) -> tuple[str, str | None]:
        check_size(page)
        settings = {"favor_precision": self.favour == "precision", "favor_recall": self.favour == "recall"}
        text = _trafilatura()(page.decode("utf-8", "replace"), url=url, include_comments=False, **settings)
        return visible(text or ""), _title_of(LexborHTMLParser(page))


def text_of(tree: BlockTree, keep: np.ndarray) -> str:
    """Join the kept blocks in document order, one line per block or per table row, cells separated by "|".

    Empty cells before another keep their place, so that columns line up: `| Q1 | Q2`, `a | | c`.
    """
    numbers = np.flatnonzero(keep)
    texts = tree.text
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
            pieces.append("| " * column)  # column is -1 outside tables
        else:
            pieces.append(" |" * (column - last_column) + " ")
        pieces.append(text)
        last_row, last_column = row, column
    return "".join(pieces)


def _by_resiliparse(page: bytes, url: str | None) -> tuple[str, str | None]:
    """Extract with resiliparse; if that finds less than 30% of the page without its boilerplate, return the latter."""
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
            "--extractor trafilatura: not installed; pip install trafilatura lxml_html_clean, or use --extractor model"
        ) from None
    return extract
