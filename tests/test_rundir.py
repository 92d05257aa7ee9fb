"""The files beside a model: manifest with ancestry, metrics, loss curve, model card."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from llmkit.config import TrainingConfig, as_options
from llmkit.errors import UserError
from llmkit.model_card import write_model_card
from llmkit.rundir import (
    RunFolder,
    describe_inputs,
    read_manifest,
    write_manifest,
)

CONFIG = TrainingConfig()


def make(folder: Path, stage: str, *parents: Path, command: str | None = None, **details) -> dict:
    folder.mkdir()
    import sys

    old, sys.argv = sys.argv, ["llmkit", *(command or f"{stage} in.jsonl").split()]
    try:
        return write_manifest(folder, stage, {"seed": 1}, parents=[str(p) for p in parents], **details)
    finally:
        sys.argv = old


# ---- manifest


def test_a_manifest_tells_how_the_folder_was_made(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b'{"text":"x"}\n')
    os.mkfifo(tmp_path / "pipe")
    inputs = describe_inputs([str(data), "-", str(tmp_path / "pipe")])
    results = {"loss": np.float32(1.5), "worst": math.nan, "steps": 7}
    make(tmp_path / "m", "pretrain", inputs=inputs, results=results, command="pretrain 'a b' -o m/")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest == read_manifest(tmp_path / "m")
    assert manifest["stage"] == "pretrain" and manifest["options"] == {"seed": 1}
    assert manifest["command"].startswith("llmkit pretrain ")
    assert manifest["inputs"] == [
        {"path": str(data), "bytes": 13, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        {"path": "-"},
        {"path": str(tmp_path / "pipe")},
    ]
    assert manifest["results"] == {"loss": 1.5, "worst": None, "steps": 7}
    assert {"python", "llmkit", "torch", "numpy"} <= set(manifest["versions"])


def test_the_ancestry_goes_back_to_the_first_generation(tmp_path: Path) -> None:
    make(tmp_path / "tok", "train-bpe")
    make(tmp_path / "base", "pretrain", tmp_path / "tok")
    (tmp_path / "foreign").mkdir()
    make(tmp_path / "chat", "sft", tmp_path / "base", tmp_path / "tok", tmp_path / "foreign")
    chat = read_manifest(tmp_path / "chat") or {}
    base, tok, foreign = chat["parents"]
    assert foreign == {"path": str(tmp_path / "foreign"), "manifest": None}
    assert base["manifest"]["parents"][0]["manifest"] == tok["manifest"] == read_manifest(tmp_path / "tok")

    write_model_card(tmp_path / "chat", chat)
    card = (tmp_path / "chat" / "README.md").read_text()
    places = [card.index(f"`llmkit {stage} in.jsonl`") for stage in ("train-bpe", "pretrain", "sft")]
    assert places == sorted(places)
    assert card.count("`llmkit train-bpe") == 1


def test_a_folder_without_a_manifest_or_with_a_broken_one(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"manifest\.json: not JSON, at line 1: .*; mend or replace the file"):
        read_manifest(tmp_path)


def test_a_model_card_names_the_folder_and_its_results(tmp_path: Path) -> None:
    make(
        tmp_path / "base.partial", "pretrain", results={"val_bits_per_byte": 1.7, "curve": [1]}, inputs=[{"path": "-"}]
    )
    write_model_card(tmp_path / "base.partial", read_manifest(tmp_path / "base.partial") or {})
    card = (tmp_path / "base.partial" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| val_bits_per_byte | 1.7 |" in card and "curve" not in card
    assert "# base\n" in card and ".partial" not in card and 'from_pretrained("base")' in card


def test_a_model_card_tells_how_to_use_what_it_is(tmp_path: Path) -> None:
    make(tmp_path / "base", "pretrain")
    make(tmp_path / "chat", "sft", tmp_path / "base")
    make(tmp_path / "policy", "rl", tmp_path / "chat")
    make(tmp_path / "judge", "train-reward", tmp_path / "chat")
    make(tmp_path / "small", "export", tmp_path / "judge")
    expected = {
        "base": ('sample base/ -p "Once', "AutoModelForCausalLM", "pipeline_tag: text-generation"),
        "chat": ("sample chat/ -p", "--chat", "apply_chat_template", "AutoModelForCausalLM"),
        "policy": ("sample policy/ -p", "--chat"),
        "judge": ("--score judge/", "AutoModelForSequenceClassification", "pipeline_tag: text-classification"),
        "small": ("--score small/", "AutoModelForSequenceClassification"),
    }
    for name, words in expected.items():
        write_model_card(tmp_path / name, read_manifest(tmp_path / name) or {})
        card = (tmp_path / name / "README.md").read_text()
        assert all(word in card for word in words), card


# ---- a run in the making


def folder_of(out: Path, resume: bool = False, force: bool = False, dry_run: bool = False) -> RunFolder:
    return RunFolder(str(out), "base/", resume=resume, force=force, dry_run=dry_run)


def test_a_run_is_made_beside_its_place_and_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "base"
    with pytest.raises(UserError, match="nothing to resume"):
        folder_of(out, resume=True)
    run = folder_of(out)
    run.begin({})
    (run.work / "metrics.jsonl").write_text('{"step":1,"loss":2.0}\n')
    with pytest.raises(UserError, match=r"base\.partial: an unfinished run; --resume goes on with it"):
        folder_of(out)
    folder_of(out, dry_run=True)
    resumed = folder_of(out, resume=True)
    assert not resumed.is_finished
    resumed.begin({})
    assert (run.work / "metrics.jsonl").exists() and not out.exists()
    resumed.document("pretrain", {}, inputs=[], parents=[], results={"steps": 1})
    resumed.finish()
    assert os.listdir(tmp_path) == ["base"]
    assert set(os.listdir(out)) == {"README.md", "loss.svg", "manifest.json", "metrics.jsonl", "state"}
    with pytest.raises(UserError, match="exists already"):
        folder_of(out)
    again = folder_of(out, force=True)
    again.begin({})
    assert os.listdir(again.work) == ["state"]
    assert (out / "manifest.json").exists()  # until the new one is finished


def test_a_finished_run_has_results_and_another_folder_has_not(tmp_path: Path) -> None:
    run = folder_of(tmp_path / "base")
    run.begin({})
    run.document("pretrain", as_options(CONFIG), inputs=[], parents=[], results={"steps": 7})
    run.finish()
    finished = folder_of(tmp_path / "base", resume=True)
    assert finished.is_finished and finished.results("pretrain", CONFIG) == {"steps": 7}
    other = TrainingConfig(max_grad_norm=None, quiet=True)
    with pytest.raises(UserError, match=r"base: another run: --max-grad-norm was 1\.0 and is now none; resume with"):
        finished.results("pretrain", other)
    with pytest.raises(UserError, match="not a finished sft run"):
        finished.results("sft", CONFIG)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not a finished pretrain run"):
        folder_of(tmp_path / "mine", resume=True).results("pretrain", CONFIG)


def test_a_resumption_finds_the_notes_and_must_be_the_same_run(tmp_path: Path) -> None:
    out, identity = tmp_path / "base", {"--depth": 4, "INPUT...": ["a", "b"], "--flops": 1e-7, "the tokenizer": "abc"}
    assert folder_of(out).notes(identity) is None
    folder_of(out).begin(identity, {"plan": [0.1, None]})
    assert folder_of(out, resume=True).notes(identity) == {"plan": [0.1, None]}
    with pytest.raises(UserError, match="--depth was 4 and is now 5; resume with the same options"):
        folder_of(out, resume=True).notes({**identity, "--depth": 5})
    with pytest.raises(UserError, match="the tokenizer was abc and is now xyz"):
        folder_of(out, resume=True).notes({**identity, "the tokenizer": "xyz"})
    assert folder_of(out, force=True).notes({"--depth": 5}) is None


def test_a_run_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for details in ({"force": True}, {"resume": True}):
        with pytest.raises(UserError, match="expected a folder, found a file"):
            folder_of(tmp_path / "notes", **details)
    assert (tmp_path / "notes").read_text() == "mine"
