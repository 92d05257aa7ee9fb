"""The model that says of each block of a page how surely it is main text: oblivious trees, run by numpy alone.

A tree asks the same question of all blocks at each of its levels, so that a page goes through all trees in a few array
operations. `examples/train_extractor.py` trains it and writes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llmkit.crawl.extract.blocks import BlockTree
from llmkit.crawl.extract.features import NameWeights, block_features

_FILE = Path(__file__).with_name("extractor.safetensors")
_AT_ONCE = 4096  # blocks: bounds the memory of a huge page to about 10 MB


@dataclass(frozen=True)
class BlockModel:
    """Oblivious trees over named features, and the weights of the names that elements bear."""

    feature_names: tuple[str, ...]
    features: np.ndarray  # int16 (trees, depth): which feature a level asks about
    borders: np.ndarray  # float32 (trees, depth): level d sets bit d of the leaf where the feature is above it
    leaves: np.ndarray  # float32 (trees, 2**depth), depth at most 8: log-odds
    bias: float
    name_weights: dict[str, float]

    def probabilities(self, tree: BlockTree, names: NameWeights) -> np.ndarray:
        """float64 (blocks,): how surely each block is main text; `names` are `NameWeights(self.name_weights)`.

        The blocks of a table of data share the highest mean of its rows, so that it is kept or dropped whole; chosen
        for themselves, cells went missing in 82 of 222 pages with such tables.
        """
        n = len(tree.blocks.text)
        if n == 0:
            return np.zeros(0)
        probabilities = self.of_features(feature_rows(block_features(tree, names), self.feature_names, n))
        if tree.cells is not None:
            _even_tables(probabilities, tree.cells, np.fromiter(map(len, tree.blocks.text), np.int64, n))
        return probabilities

    def of_features(self, rows_FN: np.ndarray) -> np.ndarray:
        """float64 (N,) for float32 features (F, N)."""
        scores = [self._scores(rows_FN[:, at : at + _AT_ONCE]) for at in range(0, rows_FN.shape[1], _AT_ONCE)]
        return 1 / (1 + np.exp(-np.concatenate(scores)))

    @cached_property
    def _splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features and the borders of the distinct questions, and intp (depth, trees): which a level asks."""
        pairs = np.stack([self.features.ravel(), self.borders.ravel()])
        (features, borders), which = np.unique(pairs, axis=1, return_inverse=True)
        return features.astype(np.intp), borders.astype(np.float32)[:, None], which.reshape(self.features.shape).T

    def _scores(self, rows_FN: np.ndarray) -> np.ndarray:
        # 300 trees ask 1,300 questions; in numbers of a byte, which stay in the cache, 300 blocks take .24 ms
        features, borders_Q1, which_DT = self._splits
        above_QN = (rows_FN.take(features, axis=0) > borders_Q1).view(np.uint8)
        leaf_TN = np.zeros((len(self.features), rows_FN.shape[1]), np.uint8)
        for of_level in which_DT[::-1]:
            leaf_TN += leaf_TN
            leaf_TN |= above_QN.take(of_level, axis=0)
        first_T1 = np.arange(len(self.features))[:, None] * self.leaves.shape[1]
        return self.leaves.ravel().take(leaf_TN + first_T1).sum(axis=0, dtype=np.float64) + self.bias

    def save(self, path: Path) -> None:
        """Write the model as one safetensors file."""
        names = sorted(self.name_weights)
        tensors = {
            "features": self.features.astype(np.int16),
            "borders": self.borders.astype(np.float32),
            "leaves": self.leaves.astype(np.float32),
            "bias": np.array([self.bias]),
            "feature_names": _packed(self.feature_names),
            "names": _packed(names),
            "name_weights": np.array([self.name_weights[name] for name in names], np.float32),
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path = _FILE) -> BlockModel:
        """Read what `save` wrote; without a path, the model that comes with the package."""
        tensors = load_file(path)
        weights = tensors["name_weights"].tolist()
        return cls(
            tuple(_unpacked(tensors["feature_names"])),
            tensors["features"].astype(np.intp),
            tensors["borders"],
            tensors["leaves"],
            float(tensors["bias"][0]),
            dict(zip(_unpacked(tensors["names"]), weights, strict=True)),
        )


def feature_rows(columns: dict[str, np.ndarray | float], names: tuple[str, ...], n: int) -> np.ndarray:
    """float32 (features, blocks) of the named features, one number for the page repeated for its `n` blocks."""
    rows = np.empty((len(names), n), np.float32)
    for row, name in enumerate(names):
        rows[row] = columns[name]
    return rows


@cache
def shipped_model() -> BlockModel:
    """The model that comes with the package, read once a process."""
    return BlockModel.load()


def best_blocks(probabilities: np.ndarray, words: np.ndarray, beta: float) -> np.ndarray:
    """bool (blocks,): the blocks to keep for the highest F score that is to be expected of the page.

    Blocks are taken from the surest down, `words` of each, to where (1 + beta^2) TP / (kept + beta^2 relevant) is
    highest with the sums that the probabilities lead to expect. Beta below 1 weighs precision more, above 1 recall.
    A page of which the model is unsure, such as a list of products, so gets a lower threshold than an article. On pages
    of unseen domains that gave word F1 .880, and the best threshold for all pages .873.
    """
    order = np.argsort(-probabilities, kind="stable")
    expected = np.cumsum((probabilities * words)[order])
    score = expected / (np.cumsum(words[order]) + beta**2 * expected[-1] + 1e-9)
    best = int(np.argmax(score))
    return probabilities >= probabilities[order[best]]


def _even_tables(probabilities: np.ndarray, cells: np.ndarray, chars: np.ndarray) -> None:
    """Give all blocks of a table the highest mean over the characters of a row, in place."""
    members = np.flatnonzero(cells[0] >= 0)
    if len(members) == 0:
        return
    table, row = cells[:2, members]
    first, row = np.unique(row, return_index=True, return_inverse=True)[1:]
    means = np.bincount(row, (probabilities * chars)[members]) / np.bincount(row, chars[members])
    table, of_row = np.unique(table, return_inverse=True)
    highest = np.zeros(len(table))
    np.maximum.at(highest, of_row[first], means)
    probabilities[members] = highest[of_row]


def _packed(strings: tuple[str, ...] | list[str]) -> np.ndarray:
    return np.frombuffer("\n".join(strings).encode(), np.uint8)


def _unpacked(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode().split("\n")
