"""`llmkit train-reward` as a user runs it: a judge that transformers loads, scores in a pipe, bad input."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tiny import save_folder

from tests.helpers.jsonl import write

SPEED = ["--batch-size", "16", "--learning-rate", "0.003", "--warmup-steps", "2"]


def pairs(count: int, seed: int) -> list[dict]:
    """Return preferences for answers about the sea, of any length."""
    rng = random.Random(seed)
    words = ["sun", "hill", "road", "tree", "moon", "wall"]

    def answer(*more: str) -> str:
        said = [rng.choice(words) for _ in range(rng.randrange(1, 5))] + list(more)
        rng.shuffle(said)
        return " ".join(said)

    return [
        {"prompt": f"Tell {rng.randrange(10)}", "chosen": answer("sea"), "rejected": answer()} for _ in range(count)
    ]


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "prefs.jsonl", *pairs(600, seed=0))


@pytest.fixture(scope="module")
def trained(base, data, llmkit, tmp_path_factory) -> tuple[Path, dict, str]:
    """A judge with three heads, its summary and stderr."""
    out = tmp_path_factory.mktemp("judge") / "judge"
    done = llmkit("train-reward", base, "--data", data, "--ensemble", "3", "--epochs", "3", *SPEED, "-o", out)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def judge(trained) -> Path:
    return trained[0]


# ---- output


def test_it_learns_the_taste_and_not_the_length(trained):
    folder, summary, said = trained
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert summary["val_accuracy"] > 0.9 and summary["val_comparisons"] + summary["comparisons"] == 600
    assert 30 < summary["val_comparisons"] < 100  # one in ten prompts
    low, high = summary["val_accuracy_95"]
    assert low < summary["val_accuracy"] <= high
    assert evaluation["baseline_length"]["accuracy"] < summary["val_accuracy"]  # chosen ones are longer
    assert set(evaluation["biases"]) == {"length", "formatting"}
    assert "baseline, length" in said and "correlation with length" in said


def test_transformers_gives_the_same_scores(judge, llmkit, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)
    rows = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in pairs(12, seed=5)]
    asked = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    batch = tokenizer.apply_chat_template(asked, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    scored = llmkit("train-reward", "--score", judge, "-", stdin="".join(json.dumps(row) + "\n" for row in rows))
    assert scored.returncode == 0, scored.stderr
    found = lines(scored.stdout)
    assert logits.shape == (12, 3)
    assert [row["reward"] for row in found] == pytest.approx(logits.mean(1).tolist(), abs=1e-4)
    assert [row["reward_std"] for row in found] == pytest.approx(logits.std(1, correction=0).tolist(), abs=1e-4)


def test_scores_do_not_depend_on_the_batch(judge, llmkit):
    rows = [{"prompt": "Tell 1", "completion": text, "id": i} for i, text in enumerate(("sea", "hill sun", "a wall"))]
    rows.insert(1, {"messages": [{"role": "user", "content": "Tell 2"}], "completion": "tree " * 30, "id": 9})
    together = llmkit("train-reward", "--score", judge, stdin="".join(json.dumps(row) + "\n" for row in rows))
    assert [row["id"] for row in lines(together.stdout)] == [0, 9, 1, 2]
    for row, found in list(zip(rows, lines(together.stdout), strict=True))[:2]:
        alone = llmkit("train-reward", "--score", judge, stdin=json.dumps(row) + "\n")
        assert lines(alone.stdout)[0]["reward"] == pytest.approx(found["reward"], abs=1e-5)
        assert {**found, "reward": 0, "reward_std": 0} == {**row, "reward": 0, "reward_std": 0}


def test_ranks_of_samples_and_of_lists(judge, llmkit):
    rows = [{"prompt": "Tell 3", "completion": text} for text in ("hill", "the sea", "wall road")]
    other = {"prompt": "Tell 4", "completions": ["tree", "sea moon"]}
    done = llmkit(
        "train-reward", "--score", judge, "--rank", stdin="".join(json.dumps(row) + "\n" for row in [*rows, other])
    )
    *samples, ranked = lines(done.stdout)
    assert [row["rank"] for row in samples] == [1, 2, 3] and samples[0]["completion"] == "the sea"
    assert [row["reward"] for row in samples] == sorted((row["reward"] for row in samples), reverse=True)
    assert ranked["ranking"] == [2, 1] and ranked["rewards"][1] > ranked["rewards"][0]


def test_every_prompt_has_one_best_however_many_there_are(judge, llmkit):
    rows = [
        {"prompt": f"Tell {n}", "completion": text} for n in range(110) for text in ("hill", "the sea", "wall road")
    ]
    rows[3:3] = [{"prompt": "Tell 0", "completions": ["a tree", "sea"]}]  # the same prompt in another format
    done = llmkit("train-reward", "--score", judge, "--rank", stdin="".join(json.dumps(row) + "\n" for row in rows))
    assert done.returncode == 0, done.stderr
    found = lines(done.stdout)
    assert len(found) == 331 and found[3]["ranking"] == [2, 1]
    assert [row["rank"] for row in found if "rank" in row] == [1, 2, 3] * 110


def test_a_too_long_answer_has_no_reward_and_is_counted(judge, llmkit):
    rows = [{"prompt": "Tell", "completion": "sea " * 300}, {"prompt": "long " * 200, "completion": "sea"}]
    done = llmkit("train-reward", "--score", judge, stdin="".join(json.dumps(row) + "\n" for row in rows))
    assert done.returncode == 0
    first, second = lines(done.stdout)
    assert first["reward"] is None and isinstance(second["reward"], float)
    assert "dropped: too long 1" in done.stderr and "prompt cut at its beginning 1" in done.stderr


def test_a_judge_is_evaluated_alone_and_checked_by_a_gate(judge, llmkit, tmp_path):
    held_out = write(tmp_path / "val.jsonl", *pairs(80, seed=9))
    done = llmkit("train-reward", "--score", judge, "--val", held_out, "--fail-under", "0.6")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"]["overall"]["accuracy"] > 0.9
    turned = [{**one, "chosen": one["rejected"], "rejected": one["chosen"]} for one in pairs(80, seed=9)]
    other_taste = write(tmp_path / "turned.jsonl", *turned)
    done = llmkit("train-reward", "--score", judge, "--val", other_taste, "--fail-under", "0.6")
    assert done.returncode == 3 and "is under --fail-under 0.6" in done.stderr


def test_rankings_margins_weights_and_adapters(base, data, llmkit, tmp_path):
    ranked = write(
        tmp_path / "ranked.jsonl",
        *({"prompt": f"{i}?", "completions": ["sea", "hill", "wall"], "ranking": [1, 2, 2]} for i in range(20)),
        *({"prompt": f"{i}!", "chosen": f"sea {i}", "rejected": "sun", "margin": 0.5} for i in range(20)),
    )
    out = tmp_path / "judge"
    done = llmkit(
        "train-reward", base, "--data", f"{data}:1", "--data", f"{ranked}:3", "--lora-rank", "4",
        "--quantize", "nf4", "--max-steps", "3", *SPEED, "-o", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(json.loads((out / "evaluation.json").read_text())["by_source"]) == {str(data), str(ranked)}
    untouched = (base / "model.safetensors").read_bytes()
    assert untouched != (out / "model.safetensors").read_bytes()
    assert llmkit("train-reward", "--score", out, stdin='{"prompt": "?", "completion": "sea"}\n').returncode == 0


def test_a_dry_run_tells_memory_and_time_and_trains_nothing(base, data, llmkit, tmp_path):
    for more in ([], ["--lora-rank", "2"]):
        done = llmkit("train-reward", base, "--data", data, *more, "--dry-run", "-o", tmp_path / "judge")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        found = re.search(r"about ([\d.]+) GB of memory, ([\d.e+]+) FLOPs, \d+m?\d*s to train", done.stderr)
        assert found and float(found[1]) > 0 and float(found[2]) > 1e6, done.stderr
    assert not (tmp_path / "judge").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "nothing to learn from in 0 records (it is empty)"),
        (
            [{"prompt": "?", "chosen": "a", "rejected": "b"}, {"prompt": "?", "chosen": "a"}],
            ":2: expected 'chosen' and",
        ),
        ([{"prompt": "?", "chosen": "a", "rejected": "a"}] * 3, "skipped: chosen equals rejected 3"),
        (['{"prompt": '], ":1: expected one JSON object per line"),
        ([{"prompt": "?", "completions": ["a", "b"], "ranking": [1, 2, 3]}], ":1: expected 'ranking' to be 2 ranks"),
        ([{"prompt": "?", "chosen": "a", "rejected": "b"}], "comparisons of one prompt cannot be split"),
        (
            [{"prompt": f"{n}", "completions": ["a", "b"], "ranking": [1, 1]} for n in range(4)],
            "nothing to evaluate on",
        ),
    ],
)
def test_bad_preferences(base, llmkit, tmp_path, rows, expected):
    path = write(tmp_path / "bad.jsonl", *rows)
    options = ["--data", path, "--max-steps", "1", "--max-bad", "0"]
    done = llmkit("train-reward", base, *options, "-o", tmp_path / "judge")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("llmkit: error: "), done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["BASE"], "--out"),
        (["-o", "judge"], "MODEL: expected one model folder"),
        (["BASE", "-o", "judge", "--rank"], "--rank: needs --score"),
        (["--score", "BASE"], "expected a reward model, as llmkit train-reward makes it, found no tensor score.weight"),
        (["--score", "nowhere"], "nowhere: expected a reward model's folder, found nothing"),
        (["--score", "JUDGE", "--data", "x"], "--data: cannot be combined with --score"),
        (["--score", "JUDGE", "--fail-under", "0.5"], "--fail-under: needs --val with --score"),
        (["--score", "JUDGE", "--val", "x", "-o", "y"], "--val: evaluates the model of --score"),
        (["BASE", "--data", "-", "--val", "nowhere", "-o", "y"], "nowhere: expected a readable file"),
        (["nowhere", "--data", "x", "-o", "judge"], "nowhere: expected a model folder, found nothing"),
        (["BASE", "--data", "-", "--sample-every", "9", "-o", "y"], "no such option: --sample-every"),
    ],
)
def test_bad_options(base, judge, llmkit, tmp_path, arguments, expected):
    known = {"BASE": str(base), "JUDGE": str(judge)}
    stdin = '{"prompt": "?", "chosen": "a", "rejected": "b"}\n'
    done = llmkit("train-reward", *(known.get(word, word) for word in arguments), stdin=stdin, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_record_that_cannot_be_scored_is_named(judge, llmkit, tmp_path):
    rows = '{"prompt": "?", "completion": "a"}\n{"prompt": "?"}\n'
    done = llmkit("train-reward", "--score", judge, "--max-bad", "0", stdin=rows)
    assert done.returncode == 2 and "stdin:2: expected field 'completion'" in done.stderr


@pytest.mark.parametrize("size", ["200", "1e13"])
def test_a_batch_larger_than_the_data_becomes_the_data(base, data, llmkit, tmp_path, size):
    """Regression: it was filled with repeats: one step of 201 comparisons out of 18, or endless rows."""
    words = ["--data", data, "--limit", "20", "--batch-size", size, "-o", tmp_path / "judge"]
    done = llmkit("train-reward", base, *words)
    assert done.returncode == 0, done.stderr
    comparisons = json.loads(done.stdout)["comparisons"]
    assert f" becomes {comparisons}, the number of comparisons" in done.stderr
    said = re.search(r", (\d+) comparisons each, approximately", done.stderr)
    assert said is not None and int(said[1]) <= 1.5 * comparisons, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "sample JUDGE -p Hello",
        "sample JUDGE -p Hello --dry-run",
        "serve JUDGE --dry-run",
        "evaluate JUDGE --tasks q.jsonl --dry-run",
        "probe-knowledge JUDGE --questions q.jsonl --dry-run",
        "pretrain q.jsonl --from JUDGE -o out --dry-run",
        "write-chats --guide q.jsonl --topics q.jsonl --writer JUDGE --dry-run",
    ],
)
def test_a_judge_in_the_place_of_a_model_that_writes_says_what_it_is(judge, llmkit, tmp_path, command):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answer": "Ada", "text": "Ada"}\n')
    done = llmkit(*(judge if word == "JUDGE" else word for word in command.split()), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"found a reward model; score texts with llmkit train-reward --score {judge}" in done.stderr
    assert done.stderr.count("\n") == 1
