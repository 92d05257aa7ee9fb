"""The README is correct: its first commands make an assistant, and everything that it names exists.

tests/test_docs.py has the tests for all pages, the README included.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import commands_of

from llmkit.io.metrics import METRICS, read_metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST = README.split("\n## A first assistant\n")[1].split("\n## ")[0]
PIPE = [command.text for command in commands_of(FIRST, "README.md")]


@pytest.mark.slow
def test_the_first_commands_make_an_assistant(tmp_path):
    """At full size; test_docs.py runs them at small sizes."""
    assert len(PIPE) == 12
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in PIPE[:-1]:
        shell = ["bash", "-euo", "pipefail", "-c", line]
        environment = {**os.environ, "PATH": path}
        typed = "How much is 202 * 643?\n" if "--chat" in line else ""
        details = {"env": environment, "input": typed, "capture_output": True, "text": True, "timeout": 900}
        done = subprocess.run(shell, cwd=tmp_path, **details)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    tried = [row["val_success"] for row in read_metrics(tmp_path / "policy" / METRICS) if "val_success" in row]
    assert tried[-1] > tried[0], "rl has learnt nothing"
    assert "calc answers: 129886" in done.stderr  # other rounding may lead to wrong copies
    python = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert python is not None
    loaded = [sys.executable, "-c", python[1] + "print(tokenizer.decode(model.generate(max_new_tokens=2)[0]))"]
    assert subprocess.run(loaded, cwd=tmp_path, capture_output=True, timeout=300).returncode == 0


def test_every_subcommand_has_its_section():
    from llmkit.cli import COMMANDS

    for name in COMMANDS:
        assert f"### {name}: " in README


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
