"""Train a fastText classifier of texts worth training on, from two files: good text, and ordinary text.

    pip install floret                    # for training alone; fasttext cannot be had beside crawl-filter's own
    python examples/quality/train.py good.jsonl ordinary.jsonl -o quality.bin
    llmkit crawl-filter docs.jsonl --only classifier --classifier "quality.bin:good>=0.5" -o kept.jsonl

Good text is what you wish you had more of, ordinary text a sample of what you want to filter, with whatever good is in
it: so DataComp-LM made its filter (arXiv:2406.11794, section 4.4). A few hundred documents of each do. Both count the
same, however many there are. A tenth of each is held out, and the table tells what share of it each score keeps.
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
FEWEST = 20  # documents of a file
SCORES = (0.1, 0.3, 0.5, 0.7, 0.9)
# one thread, so that the same texts make the same model
SETTINGS = {"mode": "fasttext", "dim": 16, "wordNgrams": 2, "minCount": 2, "epoch": 5, "lr": 0.5, "thread": 1}
BUCKETS = 200_000  # of pairs of words, 64 bytes each
# Floret writes two numbers of its own, mode and hashCount, behind the first 11 of the arguments; fastText's format has
# no such numbers (FastText::saveModel and Args::save), and the rest is the same
OWN_OF_FLORET = slice(8 + 11 * 4, 8 + 13 * 4)


def train(good: Sequence[str], ordinary: Sequence[str], out: str, seed: int) -> None:
    """Write a fastText model whose labels are `good` and `ordinary`."""
    import floret

    chance = random.Random(seed)
    size = max(len(good), len(ordinary))
    lines = [
        f"{PREFIX}{label} {' '.join(text.replace(PREFIX, ' ').split())}\n"  # a text may name a label
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
    """Read the texts, train on nine tenths of them, and print what each score keeps of the others."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("good", help="text to have more of: records with `text`, or plain text")
    parser.add_argument("ordinary", help="a sample of what is to be filtered")
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
