"""The example that trains a fastText classifier: crawl-filter loads it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

floret = pytest.importorskip("floret")

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "quality" / "train.py"
GOOD, PLAIN = "sort merge query index table lock".split(), "love heart tears smile window evening".split()  # noqa: SIM905


def texts(path: Path, words: list[str], count: int) -> Path:
    chance = random.Random(len(words[0]))
    rows = []
    for _ in range(count):
        lines = [" ".join(chance.choices([*words, "the", "of"], k=9)) for _ in range(4)]
        rows.append({"text": "\n".join(lines)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_a_user_classifier_keeps_texts_like_the_good_ones(llmkit, tmp_path):
    good, plain = (
        texts(tmp_path / "good.jsonl", [*GOOD, "__label__ordinary"], 40),
        texts(tmp_path / "p.jsonl", PLAIN, 90),
    )
    models = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for model in models:
        done = trained(good, plain, "-o", model)
        assert done.returncode == 0, done.stderr
        assert "0.5\t100.0%\t0.0%" in done.stdout
    assert models[0].read_bytes() == models[1].read_bytes()
    pool = tmp_path / "pool.jsonl"
    pool.write_text(
        json.dumps({"text": "lock the table\nand sort"}) + "\n" + json.dumps({"text": "tears of love"}) + "\n"
    )
    steps = ["--only", "classifier", "--classifier", f"{models[0]}:good>=0.5"]
    done = llmkit("crawl-filter", pool, *steps, "-o", tmp_path / "kept.jsonl")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in (tmp_path / "kept.jsonl").open()] == ["lock the table\nand sort"]


def test_the_file_scores_as_the_library_that_trained_it(tmp_path, monkeypatch):
    from llmkit.crawl.filters.classifier import Classifier

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train

    saved = tmp_path / "own.bin"
    monkeypatch.setattr(train, "OWN_OF_FLORET", slice(0, 0))
    train.train([" ".join(GOOD)] * 20, [" ".join(PLAIN)] * 20, str(saved), 0)
    monkeypatch.undo()
    train.train([" ".join(GOOD)] * 20, [" ".join(PLAIN)] * 20, str(tmp_path / "quality.bin"), 0)
    classifier = Classifier(f"{tmp_path / 'quality.bin'}:good>=0.5")
    for text in ("sort the table", "love the table", "of the evening smile"):
        scores = dict(
            (label, score) for score, label in floret.load_model(str(saved)).f.predict(text + "\n", 2, 0.0, "")
        )
        assert classifier.score(text) == pytest.approx(scores["__label__good"], abs=1e-6)


def test_too_few_texts_are_one_line(tmp_path):
    few = texts(tmp_path / "few.jsonl", GOOD, 3)
    done = trained(few, few, "-o", tmp_path / "m.bin")
    assert done.returncode != 0 and done.stderr.strip() == f"train.py: {few}: expected 20 documents or more, found 3"
    assert not (tmp_path / "m.bin").exists()
