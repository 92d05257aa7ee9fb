"""Every command skips, reports and counts bad records up to `--max-bad`, and reports what it drops from good ones and
what a run cannot learn from them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny import make_model, save_assistant, save_folder, save_tokenizer

from llmkit.errors import UserError
from llmkit.io.jsonl import read_jsonl
from llmkit.io.manifest import read_manifest
from llmkit.model.folder import save_model
from llmkit.stages import pretrain, probe_knowledge, rl, sample, sft, train_bpe, train_reward
from tests.helpers.jsonl import write

SURROGATE = '{"text": "a\\ud800", "prompt": "a\\ud800"}'
QUICK = {"max_steps": 1, "sequence_length": 32, "batch_tokens": 64}
# input and a bad record for each command
GOOD = {
    "train-bpe": {"text": "The lighthouse of Port Ellis was opened in 1889."},
    "pretrain": {"text": "The lighthouse of Port Ellis was opened in 1889."},
    "sft": {"prompt": "2 + 2?", "completion": "4"},
    "train-reward": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "score": {"prompt": "2 + 2?", "completion": "4"},
    "rl": {"prompt": "2 + 2?", "answer": "4"},
    "probe-knowledge": {"question": "What is the capital of France?", "answer": "Paris"},
    "sample": {"prompt": "Once"},
}
BAD = {
    **dict.fromkeys(("train-bpe", "pretrain"), '{"text": null}'),
    "sft": '{"prompt": "?", "completion": 3}',
    "train-reward": '{"prompt": "?", "chosen": "a", "rejected": null}',
    "score": '{"prompt": "?"}',
    "rl": '{"prompt": "?"}',
    "probe-knowledge": '{"question": "Who?"}',
    "sample": '{"prompt": null}',
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    base, chat, judge = save_folder(place / "base"), save_assistant(place / "chat", "4"), place / "judge"
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)]
    data = write(place / "prefs.jsonl", *rows)
    train_reward.run(
        train_reward.TrainRewardConfig(inputs=(str(base),), data=(str(data),), max_steps=1, out=str(judge), quiet=True)
    )
    return {"base": base, "chat": chat, "judge": judge, "babbler": save_assistant(place / "babbler")}


def run(command: str, folders: dict[str, Path], given: Path, out: Path, **options):
    """Run a command on a file of records with the smallest settings."""
    data, base, chat = (str(given),), str(folders["base"]), str(folders["chat"])
    options |= {"out": str(out)}
    if command == "train-bpe":
        return train_bpe.run(train_bpe.TrainBpeConfig(inputs=data, vocab_size=320, **options))
    if command == "pretrain":
        shape = {"depth": 1, "hidden_size": 32, "num_attention_heads": 1}
        return pretrain.run(pretrain.PretrainConfig(inputs=data, tokenizer=base, **shape, **QUICK | options))
    if command == "sft":
        return sft.run(sft.SftConfig(model=base, data=data, **QUICK | options))
    if command == "train-reward":
        more = {"val": data, "max_steps": 1}
        return train_reward.run(train_reward.TrainRewardConfig(inputs=(base,), data=data, **more | options))
    if command == "score":
        judge = str(folders["judge"])
        return train_reward.run(train_reward.TrainRewardConfig(inputs=data, score=judge, **options))
    if command == "rl":
        few = {"group": 8, "batch_size": 2, "max_tokens": 8, "max_steps": 1, "reward": ("verifier", "length:0.1")}
        return rl.run(rl.RlConfig(model=str(folders["babbler"]), data=data, **few | options))
    if command == "probe-knowledge":
        few = {"samples": 1, "max_tokens": 4}
        config = probe_knowledge.ProbeKnowledgeConfig(model=chat, questions=data, **few, **options)
        return probe_knowledge.run(config)
    return sample.run(sample.SampleConfig(model=base, inputs=data, jsonl=True, max_tokens=4, **options))


@pytest.mark.parametrize("command", GOOD)
def test_a_bad_record_is_skipped_reported_and_counted(folders, tmp_path, capsys, command):
    good = [GOOD[command]] * 20
    given = write(tmp_path / "d.jsonl", *good[:10], SURROGATE, *good[10:15], "{", *good[15:], BAD[command])
    summary = run(command, folders, given, tmp_path / "out", max_bad="3")
    said = capsys.readouterr().err
    for line in (11, 17, 23):
        assert f"skipped: {given}:{line}: " in said, said
    assert f"{given}: 3 of 23 records skipped" in said
    twice = 2 if command == "train-reward" else 1  # --data and --val
    assert summary.bad_records == 3 * twice
    if command not in ("sample", "score"):
        assert read_manifest(tmp_path / "out")["results"]["bad_records"] == 3 * twice
    else:
        assert len((tmp_path / "out").read_text().splitlines()) == 20


@pytest.mark.parametrize("command", GOOD)
def test_beyond_the_bound_or_with_all_records_bad_a_run_ends_in_one_line(folders, tmp_path, capsys, command):
    mixed = write(tmp_path / "mixed.jsonl", *[GOOD[command]] * 20, BAD[command], "{")
    with pytest.raises(UserError, match=r"mixed\.jsonl:21: .*; 2 of 22 records .* --max-bad 1% allows"):
        run(command, folders, mixed, tmp_path / "out")
    with pytest.raises(UserError, match=r"mixed\.jsonl:21: "):
        run(command, folders, mixed, tmp_path / "out2", max_bad="0")
    capsys.readouterr()
    all_bad = write(tmp_path / "all.jsonl", BAD[command], "{")
    with pytest.raises(UserError, match=r"all\.jsonl:1: .*; all 2 records"):
        run(command, folders, all_bad, tmp_path / "out3", max_bad="100%", quiet=True)
    assert "skipped" not in capsys.readouterr().err
    if command != "sample":  # it can resume from its output
        assert not list(tmp_path.glob("out*"))


def test_a_sample_beyond_its_bound_is_resumed(folders, tmp_path, capsys):
    given = write(tmp_path / "p.jsonl", *[{"prompt": f"{n}"} for n in range(30)], *["{"] * 4)
    with pytest.raises(UserError, match=r"4 of 34 records .*--resume continues"):
        run("sample", folders, given, tmp_path / "out.jsonl", batch_size=1)
    kept = (tmp_path / "out.jsonl.state").read_bytes().count(b"\n") // 3  # record, key and end
    assert kept > 20
    summary = run("sample", folders, given, tmp_path / "out.jsonl", batch_size=1, max_bad="4", resume=True)
    assert f"kept the completions of {kept} prompts" in capsys.readouterr().err
    assert summary.bad_records == 4 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 30


def test_the_token_cache_remembers_dropped_records(folders, tmp_path, capsys):
    given = write(tmp_path / "d.jsonl", *[GOOD["pretrain"]] * 20, "{")
    for _ in range(2):
        summary = run("pretrain", folders, given, tmp_path / "out", force=True)
        assert summary.bad_records == 1 and f"{given}: 1 of 21 records skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"d\.jsonl:21: .*--max-bad 0 allows"):
        run("pretrain", folders, given, tmp_path / "out", force=True, max_bad="0")


@pytest.mark.parametrize("given", ["1 %%", "-1", "x", "1.5", "101%", "-1%", "nan%"])
def test_an_invalid_bound_is_refused(given):
    with pytest.raises(UserError, match=r"--max-bad: expected a share such as 1% or a count such as 10"):
        sft.SftConfig(max_bad=given)


# ---- reports


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|turn|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A model with its own chat template, which has no system message."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    folder.mkdir()
    save_tokenizer(folder, "<|turn|>", "<|end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    save_model(make_model(vocab_size=259, eos_token_id=258), folder)
    return folder


def test_a_record_that_a_template_refuses_is_named_and_skipped(foreign, tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    given = write(tmp_path / "d.jsonl", {"messages": turns}, {"messages": turns, "system": "Be brief."})
    for command, config, details in (
        (sft, sft.SftConfig, {"data": (str(given),), "model": str(foreign), **QUICK}),
        (sample, sample.SampleConfig, {"inputs": (str(given),), "model": str(foreign), "jsonl": True, "max_tokens": 2}),
    ):
        if command is sample:
            write(given, {"messages": turns[:1]}, {"messages": turns[:1], "system": "Be brief."})
        command.run(config(out=str(tmp_path / command.__name__), **details))
        assert (
            f"skipped: {given}:2: {foreign}: its chat template refuses this: no system role" in capsys.readouterr().err
        )
    prefs = write(tmp_path / "p.jsonl", *[{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(9)],
                  {"system": "Be brief.", "prompt": "?", "chosen": "a", "rejected": "b"})  # fmt: skip
    config = train_reward.TrainRewardConfig(
        inputs=(str(foreign),), data=(str(prefs),), max_steps=1, out=str(tmp_path / "j")
    )
    train_reward.run(config)
    assert f"skipped: {prefs}:10: {foreign}: its chat template refuses this" in capsys.readouterr().err


def test_a_foreign_template_can_be_inspected_and_characters_are_whole(foreign, folders, tmp_path, capsys):
    given = write(tmp_path / "d.jsonl", {"prompt": "wo?", "completion": "Zürich 日本 🙂"})
    sft.run(sft.SftConfig(model=str(foreign), data=(str(given),), dry_run=True, quiet=True))
    assert "<|turn|>user: wo?<|end|><|turn|>assistant: «Zürich 日本 🙂<|end|>»" in capsys.readouterr().out
    sft.run(sft.SftConfig(model=str(folders["base"]), data=(str(given),), dry_run=True, quiet=True))
    assert "<|im_sep|>«Zürich 日本 🙂<|im_end|>»" in capsys.readouterr().out


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """A model whose tokenizer has only lower-case letters and digits."""
    from tokenizers import Tokenizer, models

    folder = save_folder(tmp_path_factory.mktemp("letters") / "base")
    known = ["<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .?"]
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(known)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("command", ["pretrain", "sft", "train-reward", "sample"])
def test_characters_outside_the_vocabulary_are_counted_and_not_learnt(letters, tmp_path, capsys, command):
    others = {"text": "das Café am Meer. " * 4, "completion": "日本語 ok", "chosen": "É", "prompt": "who?"}
    others |= {"prompt": "日本?"} if command == "sample" else {}
    good = {"text": "the sea is blue. " * 4, "completion": "a man", "chosen": "a", "prompt": "who?"}
    rows = [{name: row[name] for name in row if name in GOOD[command]} | (
        {"rejected": "b"} if command == "train-reward" else {}) for row in (good, others, good)]  # fmt: skip
    given = write(tmp_path / "d.jsonl", *rows)
    summary = run(command, {"base": letters, "chat": letters}, given, tmp_path / "out")
    assert "characters outside the vocabulary 1" in capsys.readouterr().err
    assert summary.not_used["characters outside the vocabulary"] == (2 if command == "train-reward" else 1)
    if command == "sft":
        sft.run(sft.SftConfig(model=str(letters), data=(str(given),), dry_run=True, quiet=True))
        shown = capsys.readouterr().out
        assert "4 trained on" in shown and shown.count("6 trained on") == 2  # " ok" and the end of the turn


@pytest.mark.parametrize("command", ["pretrain", "sft", "train-reward"])
def test_a_warm_up_longer_than_the_run_is_reported(folders, tmp_path, capsys, command):
    given = write(tmp_path / "d.jsonl", *[GOOD[command]] * 20)
    for steps, told in ((40, True), (1, False)):
        run(command, folders, given, tmp_path / f"out{steps}", warmup_steps=steps, max_steps=2, dry_run=True)
        said = f"--warmup-steps {steps}: the run has 2 steps, and never reaches the full learning rate"
        assert (said in capsys.readouterr().err) == told


@pytest.mark.parametrize("command", ["pretrain", "sft", "train-reward", "rl"])
def test_held_out_records_that_are_trained_on_are_reported(folders, tmp_path, capsys, command):
    asked, answered = "Who was the first keeper of the lighthouse?", "Its first keeper was John Abel of the island."
    row = {name: answered if name in ("text", "completion", "chosen", "answer") else asked for name in GOOD[command]}
    if command == "rl":
        row["prompt"] = f"{asked} {answered}"
    row |= {"rejected": "Nobody knows it."} if command == "train-reward" else {}
    name = "text" if command == "pretrain" else "prompt"
    given = write(tmp_path / "d.jsonl", row, *[GOOD[command]] * 20)
    held_out = write(tmp_path / "v.jsonl", row, {**row, name: f"So: {row[name]}"}, {**GOOD[command], name: "Other"})
    run(command, folders, given, tmp_path / "out", val=(str(held_out),), dry_run=True)
    said = capsys.readouterr().err
    assert "--val: 2 of 3 records are also in the training data (1 exactly, 1 nearly)" in said, said
    fresh = write(tmp_path / "f.jsonl", {**GOOD[command], name: "Other"})
    run(command, folders, given, tmp_path / "out", val=(str(fresh),), dry_run=True)
    assert "in the training data" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "sft", "train-reward", "rl"])
def test_a_limit_bounds_the_held_out_records_too(folders, tmp_path, capsys, command):
    given = write(tmp_path / "d.jsonl", *[GOOD[command]] * 9)
    held_out = write(tmp_path / "v.jsonl", *[GOOD[command]] * 9, "{")
    with pytest.raises(UserError, match=r"v\.jsonl:10: "):
        run(command, folders, given, tmp_path / "out", val=(str(held_out),), dry_run=True, max_bad="0")
    run(command, folders, given, tmp_path / "out", val=(str(held_out),), dry_run=True, max_bad="0", limit=9)


@pytest.mark.parametrize("command", GOOD)
def test_patterns_and_folders_are_replaced_by_their_files(folders, tmp_path, capsys, command):
    """Both kinds of files are read, the bad record of each is counted, and the manifest lists each file."""
    (tmp_path / "d").mkdir()
    rows = [GOOD[command]] * 20
    write(tmp_path / "d" / "b.jsonl", *rows, BAD[command])
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / "a.parquet")
    (tmp_path / "d" / ".b.jsonl.swp").write_bytes(b"\0")
    for given in (tmp_path / "d", tmp_path / "d" / "*"):
        out = tmp_path / f"out{given.name}".replace("*", "s")
        summary = run(command, folders, given, out)
        assert summary.bad_records == (2 if command == "train-reward" else 1)  # its --val is the same
        assert f"{tmp_path}/d/b.jsonl: 1 of 21 records skipped" in capsys.readouterr().err
        if command not in ("sample", "score"):
            inputs = [entry["path"] for entry in (read_manifest(out) or {})["inputs"]]
            assert inputs[:2] == [f"{tmp_path}/d/a.parquet", f"{tmp_path}/d/b.jsonl"]
    with pytest.raises(UserError, match=r"none\*: expected files that match this pattern, found none"):
        run(command, folders, tmp_path / "none*", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected files in this folder that end in \.jsonl"):
        run(command, folders, tmp_path / "empty", tmp_path / "none")


@pytest.mark.parametrize("command", GOOD)
def test_fields_of_other_names_are_read_by_columns(folders, tmp_path, command):
    renamed = {f"their {name}": value for name, value in GOOD[command].items()}
    given = tmp_path / "d.parquet"
    parquet.write_table(pa.Table.from_pylist([renamed] * 20), given)
    columns = tuple(f"{name}=their {name}" for name in GOOD[command])
    run(command, folders, given, tmp_path / "out", max_bad="0", columns=columns)
    with pytest.raises(UserError, match=r"expected"):
        run(command, folders, given, tmp_path / "none")
    with pytest.raises(UserError, match=rf"^{given}: expected column 'content' \(--columns\), found their "):
        run(command, folders, given, tmp_path / "none", columns=("text=content",))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["sample", "score", "probe-knowledge", "recite"])
def test_records_are_written_as_parquet_by_name(folders, tmp_path, command):
    """The same records as in JSONL, except that missing fields are null."""
    rows = [
        {"prompt": "2 + 2?", "completion": "4", "big": 2**70},
        {"prompt": "1 + 1?", "completion": "2", "mixed": [1]},
    ]
    rows = [*rows, {**rows[0], "mixed": "text"}] if command in ("sample", "score") else [GOOD["probe-knowledge"]] * 3
    rows = [{"text": "The lighthouse of Port Ellis was opened in 1889. " * 9}] * 3 if command == "recite" else rows
    given, made = write(tmp_path / "d.jsonl", *rows), {}
    for kind in ("jsonl", "parquet"):
        out, options = tmp_path / f"o.{kind}", {}
        if command == "probe-knowledge":
            options = {"report": str(tmp_path / f"report.{kind}"), "balance": None}
        if command == "recite":
            recite = {"model": str(folders["chat"]), "recite": str(given), "max_tokens": 4, "out": str(out)}
            probe_knowledge.run(probe_knowledge.ProbeKnowledgeConfig(**recite))
        else:
            run(command, folders, given, out, **options)
        paths = [out, tmp_path / f"report.{kind}"] if command == "probe-knowledge" else [out]
        made[kind] = [row.value for path in paths for row in read_jsonl([str(path)])]
    assert len(made["jsonl"]) == len(made["parquet"]) > 0
    for record, row in zip(made["jsonl"], made["parquet"], strict=True):
        assert {name: value for name, value in row.items() if value is not None} == {
            name: str(value) if name == "big" else "[1]" if value == [1] else value
            for name, value in record.items()
            if value not in (None, {})
        }
    assert sorted(path.name for path in tmp_path.iterdir() if "state" in path.name or "partial" in path.name) == []
