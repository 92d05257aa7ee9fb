"""The files next to a model: manifest with ancestors, metrics, loss curve, model card."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmkit.config import TrainingConfig, as_options
from llmkit.errors import Interrupted, UserError
from llmkit.io.manifest import (
    describe_inputs,
    flattened,
    manifest_digest,
    read_manifest,
    sources,
    write_manifest,
    write_model_card,
)
from llmkit.io.run_folder import RunFolder, finished_results

CONFIG = TrainingConfig()


def make(folder: Path, stage: str, *parents: Path, command: str | None = None, **details) -> dict:
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llmkit", *(command or f"{stage} in.jsonl").split()])
        return write_manifest(folder, stage, {"seed": 1}, parents=[str(p) for p in parents], **details)


# ---- manifest


def test_a_manifest_tells_how_the_folder_was_made(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b'{"text":"x"}\n')
    os.mkfifo(tmp_path / "pipe")
    inputs = [str(data), "-", str(tmp_path / "pipe")]
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
    assert foreign == {"path": str(tmp_path / "foreign")}
    known = {name: read_manifest(tmp_path / name) or {} for name in ("base", "tok")}
    assert base["manifest_sha256"] == manifest_digest(known["base"])
    assert list(chat["ancestors"]) == [manifest_digest(known[name]) for name in ("base", "tok")]
    (told,) = chat["ancestors"][base["manifest_sha256"]]["parents"]
    assert told == tok and chat["ancestors"][tok["manifest_sha256"]]["command"] == known["tok"]["command"]

    write_model_card(tmp_path / "chat", chat)
    card = (tmp_path / "chat" / "README.md").read_text()
    places = [card.index(f"`llmkit {stage} in.jsonl`") for stage in ("train-bpe", "pretrain", "sft")]
    assert places == sorted(places)
    assert card.count("`llmkit train-bpe") == 1


def make_file(path: Path, stage: str, *inputs: Path, parents: tuple[Path, ...] = ()) -> Path:
    path.write_text(f'{{"text": "{path.name}"}}\n')
    given, above = [str(one) for one in inputs], [str(one) for one in parents]
    write_manifest(str(path), stage, {}, inputs=given, parents=above, results={})
    return path


def test_the_ancestry_goes_through_the_files_that_stages_wrote(tmp_path: Path) -> None:
    crawl = tmp_path / "c.warc.gz"
    crawl.write_bytes(b"WARC")
    docs = make_file(tmp_path / "docs.jsonl", "crawl-filter", crawl)
    make(tmp_path / "base", "pretrain", inputs=[str(docs)])
    (item,) = (read_manifest(tmp_path / "base") or {})["inputs"]
    assert item["sha256"] == hashlib.sha256(docs.read_bytes()).hexdigest()
    (told,) = (read_manifest(tmp_path / "base") or {})["ancestors"].values()
    assert told["output"]["sha256"] == item["sha256"] and told["inputs"][0]["path"] == str(crawl)

    lessons = make_file(tmp_path / "refusals.jsonl", "probe-knowledge", docs, parents=(tmp_path / "base",))
    make(tmp_path / "chat", "sft", tmp_path / "base", inputs=[str(lessons)], command="sft base -o chat")
    chat = read_manifest(tmp_path / "chat") or {}
    told = chat["ancestors"]
    assert [told[one["manifest_sha256"]]["stage"] for one in sources(chat)] == ["pretrain", "probe-knowledge"]
    assert sorted(one["stage"] for one in told.values()) == ["crawl-filter", "pretrain", "probe-knowledge"]
    # a run's identity does not depend on earlier notes in its descendant's manifest
    assert chat["parents"][0]["manifest_sha256"] == manifest_digest(read_manifest(tmp_path / "base") or {})
    assert chat["inputs"][0]["manifest_sha256"] == manifest_digest(read_manifest(lessons) or {})


def test_forty_generations_tell_each_ancestor_once(tmp_path: Path) -> None:
    """Each run has two inputs, its predecessor and a file that this one wrote: 2^40 paths in all."""
    make(tmp_path / "m0", "sft")
    sizes = []
    for number in range(40):
        before = tmp_path / f"m{number}"
        lessons = make_file(tmp_path / f"r{number}.jsonl", "probe-knowledge", parents=(before,))
        make(tmp_path / f"m{number + 1}", "sft", before, inputs=[str(lessons)], command=f"sft m{number}")
        sizes.append((tmp_path / f"m{number + 1}" / "manifest.json").stat().st_size)
    last = read_manifest(tmp_path / "m40") or {}
    assert len(last["ancestors"]) == 80
    assert sizes[39] < 2.1 * sizes[19]
    write_model_card(tmp_path / "m40", last)
    card = (tmp_path / "m40" / "README.md").read_text()
    assert [card.count(f"`llmkit sft m{number}`") for number in range(40)] == [1] * 40


def nested(name: str, *parents: dict) -> dict:
    """Return a manifest in the old format, before the list of ancestors."""
    items = [{"path": one["command"], "manifest": one} for one in parents]
    return {"manifest_version": 1, "stage": "sft", "command": name, "inputs": [], "parents": items, "results": {}}


def test_nested_manifests_are_read_and_flattened_in_descendants(tmp_path: Path) -> None:
    made = [nested("m0")]
    for number in range(1, 60):
        made.append(nested(f"m{number}", made[-1]))
    (tmp_path / "m59").mkdir()
    (tmp_path / "m59" / "manifest.json").write_text(json.dumps(made[-1]))
    own, ancestors = flattened(read_manifest(tmp_path / "m59") or {})
    assert own["command"] == "m59"
    assert [one["command"] for one in ancestors.values()] == [f"m{number}" for number in reversed(range(59))]
    assert list(ancestors) == [manifest_digest(one) for one in reversed(made[:-1])]

    make(tmp_path / "next", "rl", tmp_path / "m59", command="rl m59")
    manifest = read_manifest(tmp_path / "next") or {}
    assert manifest["parents"] == [{"path": str(tmp_path / "m59"), "manifest_sha256": manifest_digest(made[-1])}]
    assert len(manifest["ancestors"]) == 60 and '"manifest":' not in json.dumps(manifest)
    write_model_card(tmp_path / "next", manifest)
    card = (tmp_path / "next" / "README.md").read_text()
    assert card.index("`m0`") < card.index("`m59`") < card.index("`llmkit rl m59`")
    assert "apply_chat_template" in card  # for assistants


def test_nested_manifests_of_listed_ancestors_and_their_digests_stay():
    def within(digest: str | None, name: str, **more) -> dict:
        item = {"path": name, "manifest": {"command": name, **more}}
        return item if digest is None else {**item, "manifest_sha256": digest}

    listed = {"b" * 64: {"command": "base", "parents": [within("t" * 64, "tok")]}}
    own, ancestors = flattened({"command": "chat", "parents": [within("c" * 64, "other")], "ancestors": listed})
    assert own["parents"] == [{"path": "other", "manifest_sha256": "c" * 64}]
    assert {digest[0]: one["command"] for digest, one in ancestors.items()} == {"c": "other", "b": "base", "t": "tok"}


def test_ancestors_that_are_missing_damaged_or_go_in_a_circle_end_no_run(tmp_path: Path, capsys) -> None:
    make(tmp_path / "tok", "train-bpe")
    make(tmp_path / "base", "pretrain", tmp_path / "tok")
    content = json.loads((tmp_path / "base" / "manifest.json").read_text())
    (digest,) = content["ancestors"]
    circle = {**content["ancestors"][digest], "parents": [{"path": "tok", "manifest_sha256": digest}]}
    odd = ({}, [], None, {digest: None}, {digest: {}}, {digest: {"parents": 7, "command": []}}, {digest: circle})
    for number, ancestors in enumerate(odd):
        (tmp_path / "base" / "manifest.json").write_text(json.dumps({**content, "ancestors": ancestors}))
        chat = make(tmp_path / f"chat{number}", "sft", tmp_path / "base")
        write_model_card(tmp_path / f"chat{number}", chat)
        assert "`llmkit pretrain in.jsonl`" in (tmp_path / f"chat{number}" / "README.md").read_text()
    (tmp_path / "base" / "manifest.json").write_text('{"stage": ')
    chat = make(tmp_path / "chat", "sft", tmp_path / "base")
    assert chat["parents"] == [{"path": str(tmp_path / "base")}]
    told = capsys.readouterr().err
    assert "manifest.json:1: expected JSON, found" in told and "the manifest does not record how" in told


def test_a_changed_file_has_no_ancestors(tmp_path: Path) -> None:
    docs = make_file(tmp_path / "docs.jsonl", "crawl-filter")
    beside = Path(f"{docs}.manifest.json")
    former = json.loads(beside.read_text())
    assert "manifest" in describe_inputs([str(docs)])[0]
    docs.write_text(docs.read_text().upper())
    assert set(describe_inputs([str(docs)])[0]) == {"path", "bytes", "sha256"}
    del former["output"]  # as in old manifests
    for text in (json.dumps(former), "{", "[]"):
        beside.write_text(text)
        assert set(describe_inputs([str(docs)])[0]) == {"path", "bytes", "sha256"}


def test_a_model_card_tells_how_to_use_what_it_is(tmp_path: Path) -> None:
    make(tmp_path / "base", "pretrain", results={"val_bits_per_byte": 1.7, "curve": [1]}, inputs=["-"])
    make(tmp_path / "chat", "sft", tmp_path / "base")
    make(tmp_path / "policy", "rl", tmp_path / "chat")
    make(tmp_path / "judge", "train-reward", tmp_path / "chat")
    make(tmp_path / "small", "export", tmp_path / "judge")
    expected = {
        "base": (
            'sample base/ -p "Once',
            "AutoModelForCausalLM",
            "---\nlibrary_name: transformers\n",
            "# base\n",
            "| val_bits_per_byte | 1.7 |",
            'from_pretrained("base")',
            "pipeline_tag: text-generation",
        ),
        "chat": ("sample chat/ -p", "--chat", "apply_chat_template", "AutoModelForCausalLM"),
        "policy": ("sample policy/ -p", "--chat"),
        "judge": ("--score judge/", "AutoModelForSequenceClassification", "pipeline_tag: text-classification"),
        "small": ("--score small/", "AutoModelForSequenceClassification"),
    }
    for name, words in expected.items():
        write_model_card(tmp_path / name, read_manifest(tmp_path / name) or {})
        card = (tmp_path / name / "README.md").read_text()
        assert all(word in card for word in words) and "curve" not in card, card


# ---- unfinished runs


def folder_of(out: Path, resume: bool = False, force: bool = False, dry_run: bool = False) -> RunFolder:
    return RunFolder(str(out), "base/", resume=resume, force=force, dry_run=dry_run)


def finish(run: RunFolder, results: dict) -> None:
    write_manifest(run.work, "pretrain", as_options(CONFIG), results=results)
    run.put_in_place()


def test_a_run_is_made_in_a_partial_folder_and_can_be_resumed(tmp_path: Path, capsys) -> None:
    out = tmp_path / "base"
    out.write_text("mine")
    for details in ({"force": True}, {"resume": True}):
        with pytest.raises(UserError, match="expected a folder, found a file"):
            folder_of(out, **details)
    out.unlink()
    out.mkdir()  # an empty folder is accepted
    run = folder_of(out, resume=True)
    assert not run.resume and not run.is_finished
    assert "--resume: nothing at" in capsys.readouterr().err
    run.begin({})
    (run.work / "metrics.jsonl").write_text('{"step":1,"loss":2.0}\n')
    with pytest.raises(UserError, match=r"base\.partial: an unfinished run; --resume continues it"):
        folder_of(out)
    with pytest.raises(UserError, match="an unfinished run"):  # as the run itself would say
        folder_of(out, dry_run=True)
    assert RunFolder(None, "base/", resume=False, force=False, dry_run=True).folder == Path("base")
    resumed = folder_of(out, resume=True)
    assert not resumed.is_finished
    resumed.begin({})
    assert (run.work / "metrics.jsonl").exists() and not os.listdir(out)
    finish(resumed, {"steps": 1})
    assert os.listdir(tmp_path) == ["base"]
    assert set(os.listdir(out)) == {"manifest.json", "metrics.jsonl", "state"}
    with pytest.raises(UserError, match="already exists"):
        folder_of(out)
    again = folder_of(out, force=True)
    again.begin({})
    assert os.listdir(again.work) == ["state"]
    assert (out / "manifest.json").exists()  # until the new one is finished


def test_a_resumption_finds_the_notes_and_must_be_the_same_run(tmp_path: Path) -> None:
    out, identity = tmp_path / "base", {"--depth": 4, "INPUT...": ["a", "b"], "--flops": 1e-7, "the tokenizer": "abc"}
    assert folder_of(out).notes(identity) is None
    folder_of(out).begin(identity, {"plan": [0.1, None]})
    assert folder_of(out, resume=True).notes(identity) == {"plan": [0.1, None]}
    for change, words in (({"--depth": 5}, "--depth was 4 and is now 5"), ({"the tokenizer": "x"}, "was abc and is")):
        with pytest.raises(UserError, match=words):
            folder_of(out, resume=True).notes({**identity, **change})
    assert folder_of(out, force=True).notes({"--depth": 5}) is None
    for noted in ("{}", '{"identity":null,"notes":null,"job":null}', '{"identity":{"--depth":4},"notes":"x"}', "["):
        (tmp_path / "base.partial" / "state" / "run.json").write_text(noted)
        with pytest.raises(UserError, match=r"base\.partial/state/run\.json(:1)?: .*; start over with --force"):
            folder_of(out, resume=True).notes(identity)


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "base").symlink_to("disk/base")
    run = folder_of(tmp_path / "base")
    for _ in range(2):
        run.begin({})
        finish(run, {"steps": 1})
        assert (tmp_path / "base").is_symlink() and (tmp_path / "disk" / "base" / "manifest.json").exists()
        assert sorted(os.listdir(tmp_path)) == ["base", "disk"] and os.listdir(tmp_path / "disk") == ["base"]
        run = folder_of(tmp_path / "base", force=True)


def test_a_finished_run_has_results_and_another_folder_has_not(tmp_path: Path) -> None:
    run = folder_of(tmp_path / "base")
    run.begin({})
    finish(run, {"steps": 7})
    finished = folder_of(tmp_path / "base", resume=True)
    assert finished.is_finished and finished_results(finished.folder, "pretrain", CONFIG) == {"steps": 7}
    other = TrainingConfig(compile="on", quiet=True)
    with pytest.raises(UserError, match=r"base: another run: --compile was auto and is now on; resume with"):
        finished_results(finished.folder, "pretrain", other)
    with pytest.raises(UserError, match="not a finished sft run"):
        finished_results(finished.folder, "sft", CONFIG)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not a finished pretrain run"):
        finished_results(folder_of(tmp_path / "mine", resume=True).folder, "pretrain", CONFIG)


@pytest.mark.parametrize(
    ("resume", "has_begun", "error", "left"),
    [
        (False, False, UserError, []),
        (False, True, UserError, ["base.partial"]),
        (False, False, Interrupted, ["base.partial"]),
        (False, False, ZeroDivisionError, ["base.partial"]),
        (True, False, UserError, ["base.partial"]),
    ],
)
def test_a_user_error_before_the_first_step_leaves_nothing(tmp_path: Path, resume, has_begun, error, left) -> None:
    if resume:
        folder_of(tmp_path / "base").begin({})
    run = folder_of(tmp_path / "base", resume=resume)
    run.begin({})
    (run.work / "metrics.jsonl").write_text("")
    with pytest.raises(error), run.training(SimpleNamespace(has_begun=has_begun)):
        raise error("a reward that raises")
    assert os.listdir(tmp_path) == left
