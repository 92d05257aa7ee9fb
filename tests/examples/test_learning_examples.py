"""The reinforcement learning examples, a few steps each: every command runs, and the table is complete."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.slow  # 18 CPU s each, mostly the start of six commands
@pytest.mark.parametrize(
    ("script", "figures", "curves"),
    [
        ("sorting.py", 3, ["sorting-success.svg"]),
        ("worked_solutions.py", 7, ["worked-length.svg", "worked-success.svg"]),
    ],
)
def test_runs(tmp_path, script, figures, curves):
    # the last option is for rl
    options = ["--seeds", "1", "--quick", "--curves", str(tmp_path), "--algo", "dr-grpo"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, EXAMPLES / script, *options], env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert rows[0].startswith("held-out problems") and len(rows) == 1 + figures
    assert rows[-1].startswith("CPU seconds")
    assert sorted(path.name for path in tmp_path.iterdir()) == curves
    assert all("<polyline" in (tmp_path / name).read_text() for name in curves)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_the_questions_can_be_answered(example):
    found = example("sorting").sorting(200, 0)
    assert len(dict(found)) == 200
    assert all(list(answer) == sorted(prompt.split()[1]) for prompt, answer in found)


@pytest.mark.parametrize(
    ("written", "text"), [(0, "#### 0"), (3, "130 #### 0"), (8, "13034140 #### 0")], ids=["none", "some", "all"]
)
def test_a_walk_ends_where_its_working_does(example, written, text):
    assert example("worked_solutions").solution("12231231", written) == text
