"""The reward examples, a few steps each: every command runs, and the table has a row for each measurement."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def table(script: str, curves: Path) -> list[list[str]]:
    command = [sys.executable, EXAMPLES / script, "--seeds", "1", "--quick", "--curves", curves]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_judge_is_gamed(tmp_path):
    rows = table("reward_hacking.py", tmp_path)
    assert rows[0][:3] == ["judge", "gold", "tokens"] and len(rows) == 6
    assert all("<polyline" in (tmp_path / f"reward-hacking-{run}.svg").read_text() for run in ("free", "watched"))


@pytest.mark.slow
def test_tools_by_reward_alone(tmp_path):
    rows = table("tool_reward.py", tmp_path)
    assert rows[0][:2] == ["called", "right"] and len(rows) == 5
    assert (tmp_path / "tool-reward.svg").exists()


@pytest.mark.parametrize(
    ("said", "worth"), [("0482", 1), ("04", 0.5), ("", 0), ("0482 ", 1), ("04820482", 0), ("0413", 0), ("1357", -1)]
)
def test_wrong_and_repeated_digits_reduce_the_gold_reward(monkeypatch, said, worth):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    gold = importlib.import_module("reward_hacking").gold
    assert gold({"answer": "0482", "completion": said}) == worth
