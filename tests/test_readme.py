"""The README cannot lie: the commands under "Try it" are run one after another, at their full size, and what it names
exists. tests/test_docs.py has what holds for all pages, this one among them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands(heading: str) -> list[str]:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^    (.+)$", section, re.MULTILINE)


def test_the_commands_of_try_it_work(tmp_path):
    shell = [line for line in commands("Try it") if not re.match(r"from |model|make ", line)]
    assert len(shell) == 6
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in shell:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert '"id": 7' in done.stdout and '"completion"' in done.stdout
    assert (tmp_path / "base" / "model.safetensors").exists()


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
