"""Train a fastText quality classifier on good text and ordinary text.

    pip install floret                    # only for training; fasttext conflicts with crawl-filter's dependency
    python examples/quality/train.py good.jsonl ordinary.jsonl -o quality.bin
    llmkit crawl-filter docs.jsonl --only classifier --classifier "quality.bin:good>=0.5" -o kept.jsonl

Good text is text that you want more of; ordinary text is an unfiltered sample of what you want to filter, as in
DataComp-LM (arXiv:2406.11794, section 4.4). A few hundred documents of each are enough. Both classes have the same
weight. A tenth of each is held out, and the table shows the share of it that each threshold keeps.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llmkit.crawl.filters.classifier import PREFIX, Classifier
from llmkit.errors import LlmkitError, UserError
from llmkit.io.files import atomic_file
from llmkit.io.jsonl import read_documents

LABELS = ("good", "ordinary")
FEWEST = 20  # documents per file
SCORES = (0.1, 0.3, 0.5, 0.7, 0.9)
# one thread makes training deterministic
SETTINGS = {"mode": "fasttext", "dim": 16, "wordNgrams": 2, "minCount": 2, "epoch": 5, "lr": 0.5, "thread": 1}
BUCKETS = 200_000  # for word bigrams, 64 bytes each
# Floret writes two additional numbers, mode and hashCount, after the first 11 arguments; otherwise its format is
# fastText's (FastText::saveModel and Args::save)
OWN_OF_FLORET = slice(8 + 11 * 4, 8 + 13 * 4)


def train(good: Sequence[str], ordinary: Sequence[str], out: str, seed: int) -> None:
    """Train a fastText model with the labels `good` and `ordinary`, and write it."""
    import floret

    chance = random.Random(seed)
    size = max(len(good), len(ordinary))
    lines = [
        f"{PREFIX}{label} {' '.join(text.replace(PREFIX, ' ').split())}\n"  # a text may contain a label
        for label, texts in zip(LABELS, (good, ordinary), strict=True)
        for text in [*texts] * (size // len(texts)) + chance.sample(texts, size % len(texts))
    ]
    chance.shuffle(lines)
    with TemporaryDirectory() as folder:
        Path(folder, "lines.txt").write_text("".join(lines), encoding="utf-8", errors="replace")
        model = floret.train_supervised(f"{folder}/lines.txt", bucket=BUCKETS, seed=seed, verbose=0, **SETTINGS)
        model.save_model(f"{folder}/model.bin")
        data = Path(folder, "model.bin").read_bytes()
    with atomic_file(out) as handle:
        handle.write(data[: OWN_OF_FLORET.start] + data[OWN_OF_FLORET.stop :])


def main() -> None:
    """Read the texts, train on nine tenths of them, and print the share of the rest that each threshold keeps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("good", help="good text: records with `text`, or plain text")
    parser.add_argument("ordinary", help="a sample of the text to filter")
    parser.add_argument("-o", "--out", required=True, help="the model, for crawl-filter --classifier")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    learnt, held_out = [], []
    for path in (options.good, options.ordinary):
        texts = [str(row.value["text"]) for row in read_documents([path])]
        if len(texts) < FEWEST:
            raise UserError(f"{path}: expected {FEWEST} documents or more, found {len(texts)}")
        random.Random(options.seed).shuffle(texts)
        cut = len(texts) // 10
        learnt.append(texts[cut:])
        held_out.append(texts[:cut])
    train(*learnt, options.out, options.seed)
    classifier = Classifier(f"{options.out}:{LABELS[0]}>=0")
    scores = [[classifier.score(text) for text in texts] for texts in held_out]
    print("score\t" + "\t".join(f"{label} kept" for label in LABELS))
    for least in SCORES:
        shares = [sum(score >= least for score in some) / len(some) for some in scores]
        print(f"{least}\t" + "\t".join(f"{share:.1%}" for share in shares))


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"train.py: {error}; pip install floret")
    except LlmkitError as error:
        sys.exit(f"train.py: {error}")
