"""`llmkit sft --loss dpo` and the other preference losses as a user runs them: files, references, bad input."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from tiny import make_model, save_assistant, save_folder

from llmkit.errors import Interrupted, UserError
from llmkit.io.metrics import read_metrics
from llmkit.model.folder import load_model
from llmkit.reward_model.head import RewardModel, save_reward_model
from llmkit.reward_model.preferences import PreferenceLoss
from llmkit.rewards.reward import Reward
from llmkit.stages.sft import SftConfig, run
from llmkit.training.trainer import Trainer
from tests.helpers.jsonl import write

WORDS = ["sun", "hill", "road", "tree", "moon", "wall"]
SPEED = {"batch_tokens": 512, "learning_rate": 0.01, "warmup_steps": 1, "dtype": "float32", "quiet": True}
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")


def pairs(count: int, seed: int) -> list[dict]:
    """Return preferences for answers about the sea."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = (" ".join(rng.choices(WORDS, k=rng.randrange(1, 4))) for _ in range(2))
        rows.append({"prompt": f"Tell {rng.randrange(10)}", "chosen": f"{first} sea", "rejected": second})
    return rows


def thumbs(count: int, seed: int, label: bool | None = None) -> list[dict]:
    rows = []
    for number, pair in enumerate(pairs(count, seed)):
        good = number % 2 == 0 if label is None else label
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("base") / "base", make_model(spread=0.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "prefs.jsonl", *pairs(80, seed=0))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("val") / "val.jsonl", *pairs(40, seed=1))


def tuned(base: Path, data: Path, out: Path, loss: str, **options) -> dict:
    options = {"max_steps": 6, **SPEED, **options}
    return vars(run(SftConfig(model=str(base), data=(str(data),), loss=loss, out=str(out), **options)))


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as refused:
        tuned(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def references(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference-*.safetensors"))


# ---- output


@pytest.mark.parametrize("loss", LOSSES)
def test_a_policy_learns_what_is_preferred(base, data, held_out, tmp_path, loss):
    summary = tuned(base, data, tmp_path / "policy", loss, max_steps=20, val=(str(held_out),), eval_every=10)
    rows = [row for row in read_metrics(tmp_path / "policy" / "metrics.jsonl") if "val_loss" in row]
    assert rows[-1]["val_accuracy"] > 0.85 and rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[-1]["val_margin"] > 0 and rows[-1]["val_length_chosen"] > rows[-1]["val_length_rejected"] > 0
    assert summary["val_accuracy"] == rows[-1]["val_accuracy"] and summary["steps"] == 20
    step = next(row for row in read_metrics(tmp_path / "policy" / "metrics.jsonl") if row.get("step") == 3)
    assert {"loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "length_chosen"} <= step.keys()
    assert ("kl" in step) == (loss == "kto") and ("nll" in step) == (loss == "orpo")
    assert len(references(tmp_path)) == (2 if loss in ("dpo", "ipo", "kto") else 0)  # for --data and for --val


def test_the_command_says_what_it_does(base, data, llmkit, tmp_path):
    options = ["--loss", "dpo", "--lora-rank", "4", "--quantize", "int8", "--max-steps", "2", "--keep-adapter"]
    done = llmkit("sft", base, "--data", data, *options, "-o", tmp_path / "policy")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2 and "80 comparisons" in done.stderr
    assert (tmp_path / "policy" / "adapter" / "adapter_config.json").exists()
    shown = llmkit("sft", base, "--data", data, "--loss", "orpo", "--dry-run")
    assert shown.returncode == 0 and "example 1" in shown.stdout and "sea" in shown.stdout
    assert "GB of memory" in shown.stderr and not references(tmp_path.parent)


def test_thumbs_teach_kto_alone(base, tmp_path):
    data = write(tmp_path / "thumbs.jsonl", *thumbs(60, seed=0))
    tuned(base, data, tmp_path / "policy", "kto", max_steps=30)
    last = [row for row in read_metrics(tmp_path / "policy" / "metrics.jsonl") if "margin" in row][-1]
    assert last["margin"] > 0 and "accuracy" not in last  # unpaired data
    assert "expected 'chosen' and 'rejected'" in refusal(base, data, tmp_path / "other", "dpo")


# ---- answers of the policy

GOLD = """
calls = []


def gold(record):
    calls.append(record["completion"])
    return 1.0 if len(calls) <= 10 and record["prompt"].startswith("Tell") and "chosen" in record else 0.0
"""


def test_the_answers_of_the_policy_are_measured(base, data, held_out, tmp_path):
    tuned(base, data, tmp_path / "policy", "dpo", val=(str(held_out),), eval_every=3, lora_rank=4)
    rows = [row for row in read_metrics(tmp_path / "policy" / "metrics.jsonl") if "val_length" in row]
    assert [row["step"] for row in rows] == [0, 3, 6] and all(row["val_length"] > 1 for row in rows)
    assert rows[0]["val_kl"] == pytest.approx(0, abs=1e-3) and rows[2]["val_kl"] != rows[0]["val_kl"]
    assert all(0 <= row["val_cut"] <= 1 for row in rows)


@pytest.mark.parametrize("killed", [False, True])  # between its last evaluation and its end
def test_a_gold_reward_that_falls_stops_the_run(base, data, held_out, tmp_path, capfd, monkeypatch, killed):
    (tmp_path / "gold.py").write_text(GOLD)
    options = {"val": (str(held_out),), "gold": f"py:{tmp_path / 'gold.py'}:gold", "eval_every": 2, "quiet": False}
    options |= {"max_steps": 30, "stop_on_hack": True}
    if killed:
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(Trainer, "_check_growth", lambda trainer: sys.exit())
            tuned(base, data, tmp_path / "policy", "simpo", **options)
    summary = tuned(base, data, tmp_path / "policy", "simpo", resume=killed, **options)
    assert summary["steps"] == 4 and summary["kept_step"] == 0  # two evaluations lower than the first
    assert summary["stopped"].startswith("the reward is gamed") and summary["val_gold"] == 1.0
    said = capfd.readouterr().err
    assert "the reward is gamed" in said and "kept the parameters of step 0, the best: val_gold 1.0000" in said
    rows = [row for row in read_metrics(tmp_path / "policy" / "metrics.jsonl") if "val_gold" in row]
    assert [row["val_gold"] for row in rows] == [1.0, 0.0, 0.0]
    assert summary["val_accuracy"] == pytest.approx(rows[0]["val_accuracy"], abs=1e-4)  # of the saved model


def test_a_gold_reward_without_a_prompt_is_refused(base, data, tmp_path, monkeypatch):
    closed: list[str] = []
    monkeypatch.setattr(Reward, "close", lambda reward: closed.append(reward.name))
    val = write(tmp_path / "val.jsonl", *({**row, "prompt": "Tell " * 90} for row in pairs(5, seed=2)))
    options = {"val": (str(val),), "gold": "length"}
    assert "less than half the context" in refusal(base, data, tmp_path / "policy", "simpo", **options)
    assert closed == ["length"]


def test_prompts_that_gold_cannot_judge_are_refused_before_the_reference_runs(base, data, held_out, tmp_path):
    answered = write(tmp_path / "val.jsonl", *({**row, "answer": "x"} for row in pairs(5, seed=2)))
    options = {"val": (str(answered), str(held_out)), "gold": "verifier"}
    assert "expected field 'answer' for the verifier" in refusal(base, data, tmp_path / "policy", "dpo", **options)
    long = write(tmp_path / "long.jsonl", *({**row, "prompt": "Tell " * 90} for row in pairs(5, seed=2)))
    options = {"val": (str(long),), "gold": "length"}
    assert "less than half the context" in refusal(base, data, tmp_path / "policy", "dpo", **options)
    assert not references(tmp_path)


def test_answers_fit_a_judge_of_a_smaller_context(data, held_out, tmp_path):
    base, judge = save_assistant(tmp_path / "base"), save_assistant(tmp_path / "judge", context=64)
    save_reward_model(RewardModel.of(load_model(judge)), judge, None)
    options = {"val": (str(held_out),), "gold": f"rm:{judge}", "eval_every": 2, "max_steps": 2}
    summary = tuned(base, data, tmp_path / "policy", "simpo", **options)
    rows = [row for row in read_metrics(tmp_path / "policy" / "metrics.jsonl") if "val_gold" in row]
    assert len(rows) == 2 and all(row["val_length"] <= 16 for row in rows) and summary["val_gold"] is not None
    parents = json.loads((tmp_path / "policy" / "manifest.json").read_text())["parents"]
    assert [parent["path"] for parent in parents] == [str(base), str(judge)]


# ---- the reference


def test_references_are_computed_once_and_used_by_another_loss(base, data, tmp_path, capfd):
    tuned(base, data, tmp_path / "first", "dpo")
    (kept,) = references(tmp_path)
    written = kept.stat().st_mtime_ns
    tuned(base, data, tmp_path / "second", "ipo", beta=0.5, quiet=False)
    assert str(kept) in capfd.readouterr().err and kept.stat().st_mtime_ns == written
    again = tuned(base, data, tmp_path / "third", "dpo")
    assert again["loss"] == pytest.approx(json.loads((tmp_path / "first/manifest.json").read_text())["results"]["loss"])
    other = save_folder(tmp_path / "base", make_model(spread=0.5, seed=3))
    tuned(other, data, tmp_path / "fourth", "dpo")
    assert len(references(tmp_path)) == 2  # another model has other references


@pytest.mark.parametrize("fault", ["cut", "of another name"])
def test_references_that_are_not_ours_are_computed_again(base, data, tmp_path, capfd, fault):
    first = tuned(base, data, tmp_path / "first", "dpo")
    (kept,) = references(tmp_path)
    whole = kept.read_bytes()
    if fault == "cut":
        kept.write_bytes(whole[:-7])
    else:
        tuned(base, write(tmp_path / "other.jsonl", *pairs(80, seed=5)), tmp_path / "second", "dpo")
        (other,) = set(references(tmp_path)) - {kept}
        kept.write_bytes(other.read_bytes())
    again = tuned(base, data, tmp_path / "third", "dpo", quiet=False)
    assert f"{kept}: expected log-probabilities of 160 answers" in capfd.readouterr().err
    assert again["loss"] == first["loss"] and kept.read_bytes() == whole


# ---- resuming


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_resumed_run_equals_an_uninterrupted_one(base, data, held_out, tmp_path, monkeypatch, loss):
    options = {"val": (str(held_out),), "eval_every": 3, "save_every": 1}
    tuned(base, data, tmp_path / "whole", loss, **options)
    compute, calls = PreferenceLoss.__call__, []

    def interrupted(self, model, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute(self, model, batch)

    monkeypatch.setattr(PreferenceLoss, "__call__", interrupted)
    with pytest.raises(Interrupted):
        tuned(base, data, tmp_path / "killed", loss, **options)
    monkeypatch.undo()
    for path in references(tmp_path):
        path.unlink()  # the unchanged model gives the same
    tuned(base, data, tmp_path / "killed", loss, resume=True, **options)
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert "--loss" in refusal(base, data, tmp_path / "killed", "orpo", resume=True, **options)


# ---- bad input


@pytest.mark.parametrize(
    ("loss", "options", "flag"),
    [
        ("dpo", {"margin": 1.0}, "--margin"),
        ("kto", {"label_smoothing": 0.1}, "--label-smoothing"),
        ("kto", {"sft_weight": 0.1}, "--sft-weight"),
        ("assistant", {"beta": 0.1}, "--beta"),
        ("dpo", {"identity": "name=Ada;maker=us"}, "--identity"),
        ("assistant", {"gold": "length"}, "--gold"),
        ("dpo", {"gold": "length"}, "--gold"),
        ("dpo", {"stop_on_hack": True}, "--stop-on-hack"),
        ("dpo", {"on_long": "split"}, "--on-long"),
    ],
)
def test_an_option_without_use_is_refused(base, data, tmp_path, loss, options, flag):
    message = refusal(base, data, tmp_path / "policy", loss, **options)
    assert message.startswith(flag) and (": expected " in message or ": needs " in message)
    assert not list(tmp_path.iterdir())


def test_pairs_without_a_difference_are_counted(base, tmp_path, capfd):
    same = {"prompt": "Tell 1", "chosen": "sea", "rejected": "sea"}
    tie = {"prompt": "Tell 2", "completions": ["sea", "sun"], "ranking": [1, 1]}
    data = write(tmp_path / "prefs.jsonl", same, tie, *pairs(20, seed=0))
    tuned(base, data, tmp_path / "policy", "dpo", quiet=False)
    said = capfd.readouterr().err
    assert "skipped: chosen equals rejected 1" in said and "equal ranks 1; 20 comparisons in use" in said
    for loss in ("ipo", "kto"):
        assert "nothing to learn from" in refusal(base, write(tmp_path / "ties.jsonl", tie), tmp_path / "other", loss)
    assert "nothing to learn from" in refusal(base, write(tmp_path / "same.jsonl", same), tmp_path / "other", "ipo")


def test_answers_longer_than_the_context(base, tmp_path, capfd):
    long = {"prompt": "Tell 1", "chosen": "sea " * 300, "rejected": "sun"}
    late = {"prompt": "Tell " * 110, "chosen": "the sea", "rejected": "sun"}
    data = write(tmp_path / "prefs.jsonl", long, late, *pairs(20, seed=0))
    for loss in ("dpo", "kto"):
        tuned(base, data, tmp_path / loss, loss, quiet=False)
        said = capfd.readouterr().err
        assert "dropped: too long 1" in said and "prompt cut at its beginning 1" in said
        assert "answers must fit the context of 512 tokens" in said
    refused = refusal(base, data, tmp_path / "other", "dpo", on_long="error")
    assert "prefs.jsonl:1" in refused and refused.endswith("choose --on-long drop")  # not: cut the prompt
    only = write(tmp_path / "long.jsonl", long)
    assert "(dropped: too long 1); answers must fit the context of 512" in refusal(
        base, only, tmp_path / "other", "dpo"
    )
    thumb = {"prompt": "Tell 1", "completion": "sea " * 300, "label": False}
    thumbs_up = write(tmp_path / "thumbs.jsonl", thumb, *thumbs(30, seed=0, label=True))
    assert "30 and 0 (dropped: too long 1); add" in refusal(base, thumbs_up, tmp_path / "other", "kto")


@pytest.mark.parametrize(("label", "counts"), [(True, "30 and 0"), (False, "0 and 30")])
def test_kto_with_one_label_only(base, tmp_path, label, counts):
    data = write(tmp_path / "thumbs.jsonl", *thumbs(30, seed=0, label=label))
    assert counts in refusal(base, data, tmp_path / "policy", "kto")
    assert not (tmp_path / "policy").exists()


def test_kto_of_one_prompt_alone(base, tmp_path):
    data = write(tmp_path / "one.jsonl", *({**row, "prompt": "Tell"} for row in thumbs(10, seed=0)))
    assert "two prompts" in refusal(base, data, tmp_path / "policy", "kto")


def test_an_empty_file_and_an_invalid_record(base, tmp_path):
    assert "empty" in refusal(base, write(tmp_path / "empty.jsonl"), tmp_path / "policy", "dpo")
    data = write(tmp_path / "bad.jsonl", *pairs(10, seed=0), {"text": "Once"})
    assert "bad.jsonl:11: expected 'chosen' and 'rejected'" in refusal(
        base, data, tmp_path / "policy", "dpo", max_bad="0"
    )
    unclear = write(tmp_path / "unclear.jsonl", {"prompt": "a", "completion": "b", "label": "perhaps"})
    assert "'label' of true or false, found 'perhaps'" in refusal(
        base, unclear, tmp_path / "policy", "kto", max_bad="0"
    )
    bare = write(tmp_path / "bare.jsonl", {"prompt": "a", "completion": "b"})
    assert "expected an answer and its 'label', " in refusal(base, bare, tmp_path / "policy", "kto", max_bad="0")
    assert not (tmp_path / "policy").exists()
