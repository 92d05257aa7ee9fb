"""Train the model that extracts the main text of web pages, and evaluate it on unseen domains.

    pip install catboost scikit-learn rapidfuzz          # only for training
    python examples/train_extractor.py --truth truth.jsonl.gz crawl/*.warc.gz \
        -o llmkit/crawl/extract/extractor.safetensors

The truth is JSONL with `url`, `main_content` and `page_type`; pages without a `main_content` are skipped. A block's
label is the share of its words in the longest common subsequence of the page's words and the truth's. Two models are
fitted: logistic weights for the words of class names and ids, then oblivious trees over the features, one of which is
those weights. The trees are fitted with weights from other domains than the page's, as at inference. The printed table
is word F1 (multisets of `\\w+`, lower-cased, mean over pages) by type of page, cross-validated by domain; `--compare`
adds the other extractors on the same pages. The written model is fitted on all pages.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import numpy as np
from safetensors.numpy import save_file

from llmkit.crawl.extract.blocks import BlockTree, ElementKey, cut_blocks
from llmkit.crawl.extract.features import NameWeights, block_features, name_words
from llmkit.crawl.extract.main_text import FAVOURS, BlockModel, Extractor, best_blocks, feature_rows, text_of
from llmkit.crawl.extract.markup import PageLimitError, utf8_html
from llmkit.crawl.page import Page
from llmkit.crawl.read.frames import Reader
from llmkit.crawl.read.pages import page_of
from llmkit.errors import UserError
from llmkit.io.jsonl import read_jsonl

WORD = re.compile(r"\w+")
TREES = {"iterations": 100, "depth": 6, "learning_rate": 0.2, "rsm": 0.3, "subsample": 0.5, "l2_leaf_reg": 5}
TREES |= {"loss_function": "CrossEntropy", "bootstrap_type": "Bernoulli", "boosting_type": "Plain", "border_count": 64}
SEEDS = 3  # models in the ensemble: word F1 .879, a single one has .876 to .878


@dataclass
class Sample:
    """A page with its truth; `labels` and `words` are per block."""

    html: bytes | str
    content_type: str | None
    url: str
    page_type: str
    truth: Counter[str]
    tree: BlockTree
    labels: np.ndarray
    words: np.ndarray
    tokens: list[Counter[str]] = field(default_factory=list)

    @property
    def domain(self) -> str:
        labels = (urlsplit(self.url).hostname or "").split(".")
        return ".".join(labels[-3 if len(labels) > 2 and len(labels[-1]) == 2 and len(labels[-2]) <= 3 else -2 :])

    @property
    def weights(self) -> np.ndarray:
        """Weights of the blocks: equal for all pages, and within a page for all words."""
        return self.words / self.words.sum()


# ---- reading


def read_samples(truth_path: str, archives: list[str]) -> list[Sample]:
    """Read the pages that have a truth and at least one block."""
    rows = (row.value for row in read_jsonl([truth_path]))
    truth = {row["url"]: row for row in rows if row.get("main_content")}
    samples = []
    for page in pages_of(archives):
        row = truth.get(page.url or "")
        if row is None or page.html is None:
            continue
        try:
            tree = cut_blocks(utf8_html(page.html, page.content_type))
        except PageLimitError as limit:
            print(f"{page.url}: {limit}", file=sys.stderr)
            continue
        true_words = WORD.findall(row["main_content"].lower())
        block_words = [WORD.findall(text.lower()) for text in tree.text]
        if block_words:
            words = np.array([max(len(block), 1) for block in block_words])
            sample = Sample(
                page.html, page.content_type, row["url"], row["page_type"], Counter(true_words), tree,
                block_labels(block_words, true_words), words, path_tokens(tree),
            )  # fmt: skip
            samples.append(sample)
    return samples


def pages_of(archives: list[str]) -> Iterator[Page]:
    return (page for page in map(page_of, Reader(archives)) if isinstance(page, Page))


def block_labels(blocks: list[list[str]], truth: list[str]) -> np.ndarray:
    """Return the share of each block's words that are in the truth, float (blocks,).

    The subsequence misses words that are in another order in the truth: a block of five words or more is labelled by
    its trigrams if more than 70% of them are in the unmatched rest of the truth.
    """
    from rapidfuzz.distance import LCSseq

    owner = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    matched = np.zeros(len(blocks))
    left: list[str | None] = list(truth)
    for step in LCSseq.opcodes([word for block in blocks for word in block], truth):
        if step.tag == "equal":
            np.add.at(matched, owner[step.src_start : step.src_end], 1)
            left[step.dest_start : step.dest_end] = [None] * (step.dest_end - step.dest_start)
    labels = matched / np.maximum([len(block) for block in blocks], 1)
    unmatched = Counter(gram for gram in zip(left, left[1:], left[2:], strict=False) if None not in gram)
    for number, block in enumerate(blocks):
        if unmatched and len(block) >= 5 and labels[number] < 0.5:
            grams = list(zip(block, block[1:], block[2:], strict=False))
            found = sum(unmatched[gram] > 0 for gram in grams) / len(grams)
            if found > 0.7:
                labels[number] = found
                unmatched.subtract(grams)
    return labels


def key_tokens(key: ElementKey) -> list[str]:
    """Return tokens for or against an element's text: its tag, and the words of its class, id, role and itemprop."""
    return [f"<{key.tag}", *(word for name in key.names.split() for word in name_words(name))]


def path_tokens(tree: BlockTree) -> list[Counter[str]]:
    """Return, per block, the tokens of its element and its ancestors below the body; equal paths share a Counter."""
    of_kind = [Counter(key_tokens(key)) for key in tree.elements.keys]
    bags: list[Counter[str]] = [Counter()]
    known: dict[tuple[int, int], Counter[str]] = {}
    for kind, parent in zip(tree.elements.kind[1:].tolist(), tree.elements.parent[1:].tolist(), strict=True):
        path = (id(bags[parent]), kind)
        if path not in known:
            known[path] = bags[parent] + of_kind[kind]
        bags.append(known[path])
    return [bags[leaf] for leaf in tree.leaf]


# ---- fitting


def split_domains(samples: Sequence[Sample], parts: int, seed: int) -> np.ndarray:
    """Assign each page to a part by its domain, int (samples,)."""
    domains = sorted({sample.domain for sample in samples})
    part_of = dict(zip(domains, np.random.default_rng(seed).permutation(len(domains)) % parts, strict=True))
    return np.array([part_of[sample.domain] for sample in samples])


def fit_name_weights(samples: Sequence[Sample]) -> dict[str, float]:
    """Fit logistic weights of the tokens that occur on at least 8 domains; counts per path are capped at three."""
    from scipy.sparse import csr_matrix
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    domains = defaultdict(set)
    for sample in samples:
        for token in set().union(*{id(bag): bag for bag in sample.tokens}.values()):
            domains[token].add(sample.domain)
    column = {token: at for at, token in enumerate(sorted(t for t, d in domains.items() if len(d) >= 8))}
    bags = [{column[t]: min(n, 3) for t, n in bag.items() if t in column} for s in samples for bag in s.tokens]
    ends = np.cumsum([0, *map(len, bags)])
    columns = np.fromiter((at for bag in bags for at in bag), np.int32, ends[-1])
    counts = np.fromiter((n for bag in bags for n in bag.values()), np.float64, ends[-1])
    matrix = csr_matrix((counts, columns, ends), (len(bags), len(column)))
    labels = np.concatenate([sample.labels for sample in samples]) > 0.5
    weight = np.concatenate([np.sqrt(s.words) / np.sqrt(s.words).sum() for s in samples])
    model = LogisticRegression(C=0.01, max_iter=60, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # more iterations change little
        model.fit(matrix, labels, weight * len(weight) / weight.sum())
    return {token: round(float(model.coef_[0, at]), 3) for token, at in column.items()}


def fit(samples: list[Sample], seed: int) -> BlockModel:
    """Fit name weights and SEEDS tree models, averaged into one."""
    part = split_domains(samples, 4, seed)
    columns: list[dict[str, np.ndarray | float]] = [{}] * len(samples)
    for held_out in range(4):
        weights = NameWeights(fit_name_weights([s for s, p in zip(samples, part, strict=True) if p != held_out]))
        for at in np.flatnonzero(part == held_out).tolist():
            columns[at] = block_features(samples[at].tree, weights)
    names = tuple(columns[0])
    rows = np.concatenate([feature_rows(c, names, len(s.words)) for c, s in zip(columns, samples, strict=True)], axis=1)
    labels = np.concatenate([sample.labels for sample in samples]).clip(0, 1)
    weight = np.concatenate([sample.weights for sample in samples])
    trees = [fit_trees(rows, labels, weight, seed + number) for number in range(SEEDS)]
    features, borders, leaves = (np.concatenate(parts) for parts in list(zip(*trees, strict=True))[:3])
    used = np.unique(features)
    bias = sum(bias for *_, bias in trees) / SEEDS
    features, names = np.searchsorted(used, features), tuple(names[at] for at in used)
    return BlockModel(names, features, borders, leaves / SEEDS, bias, fit_name_weights(samples))


def fit_trees(
    rows_FN: np.ndarray, labels: np.ndarray, weight: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Fit oblivious trees; return their features, borders and leaves as in BlockModel, and the bias."""
    from catboost import CatBoost, Pool

    trees = CatBoost(TREES | {"thread_count": 1, "random_seed": seed, "verbose": False, "allow_writing_files": False})
    trees.fit(Pool(rows_FN.T, label=labels, weight=weight * len(weight) / weight.sum()))
    with TemporaryDirectory() as folder:
        trees.save_model(f"{folder}/trees.json", format="json")
        fitted = json.loads(Path(folder, "trees.json").read_text())
    depth = TREES["depth"]
    shape = (len(fitted["oblivious_trees"]), depth)
    # in trees of less depth the missing levels compare with infinity, which is always false
    features, borders = np.zeros(shape, np.intp), np.full(shape, np.inf, np.float32)
    leaves = np.zeros((shape[0], 1 << depth), np.float32)
    scale, bias = fitted["scale_and_bias"]
    for at, tree in enumerate(fitted["oblivious_trees"]):
        for level, split in enumerate(tree["splits"] or []):
            features[at, level], borders[at, level] = split["float_feature_index"], split["border"]
        leaves[at, : len(tree["leaf_values"])] = np.array(tree["leaf_values"]) * scale
    return features, borders, leaves, float(bias[0])


def save(model: BlockModel, path: Path) -> None:
    """Write the file that `BlockModel.load` reads."""
    names = sorted(model.name_weights)
    tensors = {
        "features": model.features.astype(np.int16),
        "borders": model.borders.astype(np.float32),
        "leaves": model.leaves.astype(np.float32),
        "bias": np.array([model.bias]),
        "feature_names": np.frombuffer("\n".join(model.feature_names).encode(), np.uint8),
        "names": np.frombuffer("\n".join(names).encode(), np.uint8),
        "name_weights": np.array([model.name_weights[name] for name in names], np.float32),
    }
    save_file(tensors, path)


# ---- measuring


def f1(text: str, truth: Counter[str]) -> tuple[float, float, float]:
    """Return F1, precision and recall of words."""
    words = Counter(WORD.findall(text.lower()))
    both = (words & truth).total()
    return 2 * both / max(words.total() + truth.total(), 1), both / max(words.total(), 1), both / max(truth.total(), 1)


def table(samples: Sequence[Sample], results: dict[str, list[tuple[float, float, float]]]) -> None:
    """Print mean F1 by type of page, and precision and recall over all."""
    types = sorted({sample.page_type for sample in samples})
    of_type = {kind: [at for at, s in enumerate(samples) if s.page_type == kind] for kind in types}
    print(f"\n{'':16}{'all':>8}" + "".join(f"{kind[:11]:>13}" for kind in types) + f"{'precision':>11}{'recall':>8}")
    print(f"{'pages':16}{len(samples):8}" + "".join(f"{len(of_type[kind]):13}" for kind in types))
    for name, scores in results.items():
        every = np.array(scores)
        by_type = "".join(f"{every[of_type[kind], 0].mean():13.4f}" for kind in types)
        means = every.mean(axis=0)
        print(f"{name:16}{means[0]:8.4f}{by_type}{means[1]:11.4f}{means[2]:8.4f}")


def cross_validate(samples: list[Sample], folds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Return, for each rule of choosing blocks, the scores of each page by a model fitted without its domain."""
    rules: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        **{f"model {name}": lambda p, words, beta=beta: best_blocks(p, words, beta) for name, beta in FAVOURS.items()},
        **{f"threshold {t:.1f}": lambda p, words, t=t: p >= t for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
    }
    results = {name: [(0.0, 0.0, 0.0)] * len(samples) for name in rules}
    part = split_domains(samples, folds, 0)
    for fold in range(folds):
        start = time.process_time()
        model = fit([s for s, p in zip(samples, part, strict=True) if p != fold], seed=0)
        for at in np.flatnonzero(part == fold).tolist():
            sample = samples[at]
            probabilities = model.probabilities(sample.tree)
            words = np.array([1 + text.count(" ") for text in sample.tree.text])
            for name, rule in rules.items():
                results[name][at] = f1(text_of(sample.tree, rule(probabilities, words)), sample.truth)
        print(f"fold {fold + 1} of {folds}: {time.process_time() - start:.0f} CPU s", file=sys.stderr)
    return results


def by_extractor(samples: list[Sample], name: str) -> list[tuple[float, float, float]]:
    """Return an extractor's scores, and print its speed."""
    extractor = Extractor(name)
    start = time.process_time()
    texts = [extractor.extract(sample.html, sample.content_type, sample.url).text for sample in samples]
    seconds = time.process_time() - start
    print(f"{name}: {len(samples) / seconds:.0f} pages/s, {1000 * seconds / len(samples):.2f} CPU ms a page")
    return [f1(text, sample.truth) for text, sample in zip(texts, samples, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", metavar="WARC")
    parser.add_argument("--truth", required=True, metavar="JSONL")
    parser.add_argument("-o", "--out", type=Path, help="model file to write; without it, only evaluate")
    parser.add_argument("--folds", type=int, default=5, help="folds of cross-validation; 0: none")
    parser.add_argument("--compare", nargs="*", default=[], choices=["model", "fast", "trafilatura"], help="also these")
    options = parser.parse_args()
    samples = read_samples(options.truth, options.archives)
    print(f"{len(samples)} pages of {len({s.domain for s in samples})} domains", file=sys.stderr)
    results = cross_validate(samples, options.folds) if options.folds else {}
    if options.out:
        save(fit(samples, seed=0), options.out)
        print(f"{options.out}: {options.out.stat().st_size:,} bytes", file=sys.stderr)
    for name in options.compare:
        results[name if name != "model" else "model (seen)"] = by_extractor(samples, name)
    table(samples, results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"train_extractor: {error}")
