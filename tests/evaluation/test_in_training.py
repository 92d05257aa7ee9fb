"""`--evaluate` in training stages: scores next to the validation loss, and the same model as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_folder

from llmkit.config import resolve
from llmkit.errors import UserError
from llmkit.stages import rl, sft

CHATS = [{"prompt": "What is the sea?", "completion": "Salt."}, {"prompt": "What is snow?", "completion": "Ice."}]
CHOICES = [{"query": chat["prompt"], "choices": ["Salt.", "Ice."], "gold": i} for i, chat in enumerate(CHATS)]
PROBLEMS = [{"prompt": "What is the sea?", "answer": "Salt"}, {"prompt": "What is snow?", "answer": "Ice"}]


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def scores(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith("task/") for name in row)]


def test_tasks_are_scored_in_training_and_leave_the_model_as_it_is(tmp_path):
    base = save_folder(tmp_path / "base")
    files = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("choices", CHOICES), ("qa", PROBLEMS))]
    options = {
        "model": str(base), "data": [write_lines(tmp_path / "chats.jsonl", CHATS)], "sequence_length": "64",
        "batch_tokens": "128", "learning_rate": "0.004", "warmup_steps": "1", "max_steps": "60", "quiet": True,
    }  # fmt: skip
    watched = {"evaluate": [",".join(files)], "eval_every": "30"}
    plain, chat = tmp_path / "plain", tmp_path / "chat"
    sft.run(resolve(sft.SftConfig, {**options, "out": str(plain)}))
    summary = sft.run(resolve(sft.SftConfig, {**options, **watched, "out": str(chat)}))
    assert (chat / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert [row["step"] for row in scores(chat)] == [30, 60]
    assert summary.tasks == {"choices": 1.0, "qa": 1.0}
    assert json.loads((chat / "manifest.json").read_text())["results"]["tasks"] == summary.tasks
    policy = tmp_path / "policy"
    options = {
        "model": str(chat), "data": [files[1]], "reward": ["length"], "batch_size": "2", "group": "8",
        "max_tokens": "8", "max_steps": "1", "temperature": "10", "quiet": True, "out": str(policy),
    }  # fmt: skip
    learnt = rl.run(resolve(rl.RlConfig, {**options, "evaluate": [files[0]]}))
    assert learnt.tasks == {"choices": 1.0}
    assert [row["step"] for row in scores(policy)] == [0, 1]


def test_a_task_that_there_is_not_ends_the_run_at_once(tmp_path):
    base, data = save_folder(tmp_path / "base"), write_lines(tmp_path / "chats.jsonl", CHATS)
    given = {"model": str(base), "data": [data], "evaluate": ["arc_esy"], "out": str(tmp_path / "chat"), "quiet": True}
    with pytest.raises(UserError, match="--evaluate arc_esy: expected a task or a file of items"):
        sft.run(resolve(sft.SftConfig, given))
    assert not (tmp_path / "chat.partial").exists() or not list((tmp_path / "chat.partial").glob("*.safetensors"))
