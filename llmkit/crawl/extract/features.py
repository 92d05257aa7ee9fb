"""Features of each block of a page: its text, its place in the tree, and its surroundings.

No feature depends on the words of a language: characters are classified by Unicode category, and words of scripts
without spaces are estimated from their letters. Class names and ids, mostly English words in any language, have learnt
weights; words not seen in training have weight 0. Page-level features let the trees distinguish an article from a
thread or a list of products.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from llmkit.crawl.extract.blocks import TAG_BITS, BlockTree, ElementKey

Columns = dict[str, np.ndarray | float]  # features by name: (blocks,), or one number for the page
LEVELS = 5  # ancestors used, each with more blocks than the one below
WINDOWS = (1, 2, 4, 8)  # blocks before and after
_CACHED_NAMES = 200_000  # about 20 MB
_WORD_OF_NAME = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")


def name_words(name: str) -> list[str]:
    """Split a class name or an id into words: `postBody-list_item` gives post, body, list, item."""
    if name.islower():  # most are; a fifth of the time of the pattern
        return name.replace("_", "-").split("-")
    return [word.lower() for word in _WORD_OF_NAME.findall(name)]


class NameWeights(dict[str, float]):
    """Learnt log-odds of tags (`<p`) and of class names and ids, the sum over their words; cached."""

    def __init__(self, word_weights: dict[str, float]) -> None:
        super().__init__()
        self.word_weights = word_weights

    def __missing__(self, name: str) -> float:
        if len(self) >= _CACHED_NAMES:
            self.clear()
        words = (name,) if name[0] == "<" else name_words(name)
        self[name] = weight = sum([self.word_weights.get(word, 0) for word in words])
        return weight

    def of(self, keys: list[ElementKey]) -> list[float]:
        """Return the sum over the tag and the names of each key."""
        weights = []
        for tag, names in keys:
            weight = self["<" + tag]
            for name in names.split():
                weight += self[name]
            weights.append(weight)
        return weights


_STOPS = ".!?\u3002\uff01\uff1f\u2026\u061f\u0964"  # including Chinese and Japanese, Arabic, Hindi
_COMMAS = ",;:\uff0c\u3001\uff1b\uff1a\u060c"

# one bit per class of characters
_UPPER, _LOWER, _STOP, _COMMA, _MARK, _SPACE, _WIDE = (1 << bit for bit in range(7))


@cache
def _character_classes() -> np.ndarray:
    """Return uint8 (65536,): the class of each character of the Basic Multilingual Plane, the last for all others."""
    classes = np.zeros(1 << 16, np.uint8)
    of_category = {"Ll": _LOWER, "Lu": _UPPER, "Lt": _UPPER, "Cc": _SPACE}
    of_major = {"P": _MARK, "S": _MARK, "Z": _SPACE}
    for code in range(1 << 16):
        category = unicodedata.category(chr(code))
        classes[code] = of_category.get(category) or of_major.get(category[0], 0)
    for start, stop in ((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x9FFF)):  # Thai and Lao, kana, Han
        classes[start:stop][classes[start:stop] == 0] = _WIDE
    classes[[ord(mark) for mark in _STOPS]] = _STOP
    classes[[ord(mark) for mark in _COMMAS]] = _COMMA
    return classes


class _Text:
    """Counts over the text of each block, float64 (blocks,), from one pass over the joined text."""

    def __init__(self, texts: list[str], link_chars: np.ndarray) -> None:
        codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "replace"), np.uint32)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
        classes = _character_classes()[np.minimum(codes, 0xFFFF)]
        space = classes == _SPACE
        word_starts = ~space
        word_starts[1:] &= space[:-1]

        def count(mask: np.ndarray) -> np.ndarray:
            return np.add.reduceat(mask, starts, dtype=np.int32).astype(np.float64)

        self.upper, self.stops, self.commas, self.marks = (count(classes == c) for c in (_UPPER, _STOP, _COMMA, _MARK))
        self.letters = self.upper + count(classes == _LOWER) + 1
        # a word in Chinese, Japanese or Thai has about two letters
        self.words = np.maximum(count(word_starts) + count(classes == _WIDE) / 2, 1)
        self.chars = np.maximum(lengths, 1).astype(np.float64)
        self.ends_in_stop = classes[starts + lengths - 1] == _STOP
        self.link_chars = np.minimum(link_chars.astype(np.float64), self.chars)
        self.link_share = self.link_chars / self.chars
        self.prose = np.where((self.words >= 12) & (self.link_share < 0.4), self.words, 0.0)
        self.pauses = self.stops + self.commas
        summed = ("words", "prose", "link_chars", "chars", "pauses")
        self.running = {name: np.concatenate([[0.0], np.cumsum(getattr(self, name))]) for name in summed}

    def total(self, name: str) -> float:
        """Return the sum of a count over the page, at least 1e-9."""
        return max(float(self.running[name][-1]), 1e-9)

    def over(self, name: str, start: Any, stop: Any) -> np.ndarray:
        """Return the sums of a count over ranges of blocks."""
        return self.running[name][stop] - self.running[name][start]


def block_features(tree: BlockTree, weights: NameWeights) -> Columns:
    """Compute the features of a page with at least one block, by name: float (blocks,), or one number for the page."""
    text = _Text(tree.text, tree.link_chars)
    return {**_of_text(tree, text), **_of_place(text), **_of_tree(tree, text, weights)}


def _of_text(tree: BlockTree, text: _Text) -> Columns:
    words, chars = text.words, text.chars
    times: dict[str, int] = {}
    again = []
    for block in tree.text:
        again.append(block in times)
        times[block] = times.get(block, 0) + 1
    return {
        "words": np.log1p(words),
        "link_share": text.link_share,
        "links": np.log1p(tree.links),
        "pieces": np.log1p(tree.pieces),
        "breaks": np.log1p(tree.breaks),
        "chars_per_word": chars / words,
        "upper_share": text.upper / text.letters,
        "stops": np.log1p(text.stops),
        "commas": np.log1p(text.commas),
        "mark_share": text.marks / chars,
        "ends_in_stop": text.ends_in_stop,
        "again": np.array(again),
        "times": np.array([times[block] for block in tree.text]),
        "page_blocks": np.log1p(len(words)),
        "page_words": np.log1p(words.sum()),
        "page_prose": np.log1p(text.prose.sum()),
        "page_prose_share": text.prose.sum() / words.sum(),
        "page_link_share": text.link_chars.sum() / chars.sum(),
        "page_longest": np.log1p(words.max()),
    }


def _of_place(text: _Text) -> Columns:
    n = len(text.words)
    index = np.arange(n)
    columns: Columns = {
        "index": np.log1p(index),
        "index_from_end": np.log1p(n - index),
        "place": index / n,
        "words_before": text.running["words"][:-1] / text.total("words"),
        "prose_before": text.running["prose"][:-1] / text.total("prose"),
    }
    width = np.array(WINDOWS)[:, None]
    here = np.broadcast_to(index, (len(WINDOWS), n))
    before, after = (
        ("before", np.maximum(index - width, 0), here),
        ("after", here + 1, np.minimum(index + 1 + width, n)),
    )
    for side, start, stop in (before, after):
        measures = {
            "words": np.log1p(text.over("words", start, stop)),
            "prose": np.log1p(text.over("prose", start, stop)),
            "links": text.over("link_chars", start, stop) / np.maximum(text.over("chars", start, stop), 1),
        }
        for row, blocks in enumerate(WINDOWS):
            columns |= {f"{blocks}_{side}_{name}": values[row] for name, values in measures.items()}
    return columns


def _of_tree(tree: BlockTree, text: _Text, weights: NameWeights) -> Columns:
    elements = tree.elements
    parent, kind, depth = elements.parent, elements.kind, elements.depth
    first, end = elements.first_block, elements.end_block
    leaf = tree.leaf
    holder, tags = elements.holder[leaf], elements.tags[leaf]
    own = np.array(weights.of(elements.keys))[kind]
    # the summed weights of each element and its ancestors except the body, by pointer doubling in log2(depth) steps
    path, above = own.copy(), parent
    path[0] = 0.0
    while above.any():
        path += path[above]
        above = above[above]
    # the nearest ancestor of each element with more blocks than the element; the body if there is none
    size, wider = end - first, parent.copy()
    while len(same := np.flatnonzero((size[wider] == size) & (wider > 0))):
        wider[same] = wider[wider[same]]
    marked = tags & np.fromiter(TAG_BITS.values(), np.int32, len(TAG_BITS))[:, None] > 0
    columns: Columns = {f"in_{tag}": row for tag, row in zip(TAG_BITS, marked, strict=True)}
    columns["path_weight"], columns["leaf_weight"], columns["holder_weight"] = path[leaf], own[leaf], own[holder]
    columns["depth"] = depth[holder]
    columns.update(_of_ancestors(holder, wider, first, end, path, text))
    columns.update(_of_main(first, end, depth, depth[holder], text))
    makes = kind[holder].astype(np.int64) * len(elements.keys) + kind[leaf]
    columns.update(_of_kin("kin", makes, text))
    columns.update(_of_kin("near_kin", makes * len(elements.keys) + kind[parent[holder]], text))
    index, h1 = np.arange(len(tags)), np.flatnonzero(tags & TAG_BITS["h1"])
    headings = (tags & (TAG_BITS["h1"] | TAG_BITS["h2"] | TAG_BITS["h3"] | TAG_BITS["h4"])) > 0
    last = np.maximum.accumulate(np.where(headings, index, -1))
    return columns | {
        "since_h1": np.clip(index - (h1[0] if len(h1) else 0), -60, 200),
        "since_last_h1": np.clip(index - (h1[-1] if len(h1) else 0), -60, 200),
        "since_heading": np.where(last >= 0, np.minimum(index - last, 100), 101),
        "page_h1": float(len(h1)),
        "page_headings": float(np.log1p(headings.sum())),
    }


def _of_ancestors(
    holder: np.ndarray, wider: np.ndarray, first: np.ndarray, end: np.ndarray, path: np.ndarray, text: _Text
) -> Iterable[tuple[str, np.ndarray]]:
    ancestors = [holder]
    for _ in range(LEVELS - 1):
        ancestors.append(wider[ancestors[-1]])
    above = np.stack(ancestors)
    start, stop = first[above], end[above]
    words, blocks = text.over("words", start, stop), np.maximum(stop - start, 1)
    measures = {
        "words": np.log1p(words),
        "share": words / text.total("words"),
        "prose_share": text.over("prose", start, stop) / text.total("prose"),
        "links": text.over("link_chars", start, stop) / np.maximum(text.over("chars", start, stop), 1),
        "blocks": np.log1p(blocks),
        "words_per_block": np.log1p(words / blocks),
        "stops": text.over("pauses", start, stop) / np.maximum(words, 1),
        "weight": path[above],
        "place": (np.arange(len(holder)) - start) / blocks,
    }
    return ((f"up{level}_{name}", values[level]) for name, values in measures.items() for level in range(LEVELS))


def _of_main(first: np.ndarray, end: np.ndarray, depth: np.ndarray, own_depth: np.ndarray, text: _Text) -> Columns:
    """Relate each block to the deepest element with at least half, or four fifths, of the page's prose."""
    index = np.arange(len(own_depth))
    sought = "prose" if text.prose.any() else "words"
    columns: Columns = {}
    for name, portion in (("half", 0.5), ("most", 0.8)):
        holds = np.flatnonzero(text.over(sought, first, end) >= portion * text.total(sought))
        main = holds[np.argmax(depth[holds])] if len(holds) else 0
        start, stop = int(first[main]), int(end[main])
        columns[f"{name}_inside"] = (index >= start) & (index < stop)
        columns[f"{name}_place"] = (index - start) / max(stop - start, 1)
        columns[f"{name}_depth"] = own_depth - depth[main]
        columns[f"{name}_share"] = float(text.over("words", start, stop)) / text.total("words")
    return columns


def _of_kin(name: str, makes: np.ndarray, text: _Text) -> dict[str, np.ndarray]:
    """Measure each group of blocks with the same kinds of elements: paragraphs, menu entries, comments."""
    _, group = np.unique(makes, return_inverse=True)
    members, words = np.bincount(group), np.bincount(group, text.words)
    measures = {
        "blocks": np.log1p(members),
        "share": members / len(makes),
        "words": np.log1p(words / members),
        "word_share": words / text.words.sum(),
        "prose_share": np.bincount(group, text.prose) / max(float(text.prose.sum()), 1),
        "links": np.bincount(group, text.link_chars) / np.bincount(group, text.chars),
    }
    return {f"{name}_{measure}": values[group] for measure, values in measures.items()}
