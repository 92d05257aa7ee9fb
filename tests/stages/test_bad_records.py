"""One bad record among good ones: every command skips, tells and counts it, up to `--max-bad`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_assistant, save_folder

from llmkit.errors import UserError
from llmkit.manifest import read_manifest
from llmkit.stages import pretrain, probe_knowledge, rl, sample, sft, train_bpe, train_reward

SURROGATE = '{"text": "a\\ud800", "prompt": "a\\ud800"}'
QUICK = {"max_steps": 1, "sequence_length": 32, "batch_tokens": 64}
# what each command reads, and what is bad there
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


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(command: str, folders: dict[str, Path], given: Path, out: Path, **options):
    """Run a command on a file of records, as small as it can be."""
    data, base, chat = (str(given),), str(folders["base"]), str(folders["chat"])
    options |= {"out": str(out)}
    if command == "train-bpe":
        return train_bpe.run(train_bpe.TrainBpeConfig(inputs=data, vocab_size=320, **options))
    if command == "pretrain":
        shape = {"depth": 1, "hidden_size": 32, "num_attention_heads": 1}
        return pretrain.run(pretrain.PretrainConfig(inputs=data, tokenizer=base, **shape, **QUICK, **options))
    if command == "sft":
        return sft.run(sft.SftConfig(model=base, data=data, **QUICK, **options))
    if command == "train-reward":
        more = {"val": data, "max_steps": 1}
        return train_reward.run(train_reward.TrainRewardConfig(inputs=(base,), data=data, **more, **options))
    if command == "score":
        judge = str(folders["judge"])
        return train_reward.run(train_reward.TrainRewardConfig(inputs=data, score=judge, **options))
    if command == "rl":
        few = {"group": 8, "batch_size": 2, "max_tokens": 8, "max_steps": 1, "reward": ("verifier", "length:0.1")}
        return rl.run(rl.RlConfig(model=str(folders["babbler"]), data=data, **few, **options))
    if command == "probe-knowledge":
        few = {"samples": 1, "max_tokens": 4}
        config = probe_knowledge.ProbeKnowledgeConfig(model=chat, questions=data, **few, **options)
        return probe_knowledge.run(config)
    return sample.run(sample.SampleConfig(model=base, inputs=data, jsonl=True, max_tokens=4, **options))


@pytest.mark.parametrize("command", GOOD)
def test_a_bad_record_is_skipped_told_and_counted(folders, tmp_path, capsys, command):
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
    with pytest.raises(UserError, match=r"all\.jsonl:1: .*; none of the 2 records"):
        run(command, folders, all_bad, tmp_path / "out3", max_bad="100%", quiet=True)
    assert "skipped" not in capsys.readouterr().err
    if command != "sample":  # what it has written can be gone on with
        assert not list(tmp_path.glob("out*"))


def test_a_sample_beyond_its_bound_is_resumed(folders, tmp_path, capsys):
    given = write(tmp_path / "p.jsonl", *[{"prompt": f"{n}"} for n in range(30)], *["{"] * 4)
    with pytest.raises(UserError, match=r"4 of 34 records .*--resume goes on"):
        run("sample", folders, given, tmp_path / "out.jsonl", batch_size=1)
    kept = len((tmp_path / "out.jsonl.partial").read_text().splitlines())
    assert kept > 20
    summary = run("sample", folders, given, tmp_path / "out.jsonl", batch_size=1, max_bad="4", resume=True)
    assert f"kept the completions of {kept} prompts" in capsys.readouterr().err
    assert summary.bad_records == 4 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 30


def test_the_cache_of_tokens_knows_what_it_left_out(folders, tmp_path, capsys):
    given = write(tmp_path / "d.jsonl", *[GOOD["pretrain"]] * 20, "{")
    for name in ("one", "two"):
        summary = run("pretrain", folders, given, tmp_path / name, token_cache=str(tmp_path / "cache"))
        assert summary.bad_records == 1 and f"{given}: 1 of 21 records skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"d\.jsonl:21: .*--max-bad 0 allows"):
        run("pretrain", folders, given, tmp_path / "three", token_cache=str(tmp_path / "cache"), max_bad="0")


@pytest.mark.parametrize("given", ["1 %%", "-1", "x", "1.5", "101%", "-1%", "nan%"])
def test_a_bound_that_is_none_is_refused(given):
    with pytest.raises(UserError, match=r"--max-bad: expected a share such as 1% or a count such as 10"):
        sft.SftConfig(max_bad=given)
