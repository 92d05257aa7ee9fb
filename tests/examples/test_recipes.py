"""The recipes of examples/ run, and the lines of pipes.md print what the page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = ["fineweb", "foreign", "gsm8k", "helpful-harmless", "quality"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def pipes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pipes

    return pipes


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def make(*arguments: str) -> str:
    programs = [f"PYTHON={sys.executable}", f"LLMKIT={sys.executable} -m llmkit"]
    return run("make", "-C", EXAMPLES, *arguments, *programs, folder=ROOT)


def test_the_page_has_every_subcommand_and_what_it_printed(pipes):
    found = pipes.pipes_of(pipes.PAGE.read_text())
    assert len(found) >= 20
    assert pipes.PAGE.read_text().count("```sh\n") == len(found)
    assert set(COMMANDS) <= set(re.findall(r"llmkit ([a-z-]+)", " ".join(one.command for one in found)))
    assert all(one.printed.strip() for one in found)


def test_an_output_is_compared_as_the_page_says(pipes):
    page = "## sample\n\n```sh\necho 1\n```\n\n```text {}\n1\n```\n"
    same, lines, some = (pipes.pipes_of(page.format(alike))[0] for alike in ("same", "lines", "some"))
    assert (same.heading, same.command, same.printed) == ("sample", "echo 1\n", "1\n")
    assert [bool(one.differs("2\n")) for one in (same, lines, some)] == [True, False, False]
    assert [bool(one.differs("1\n2\n")) for one in (same, lines, some)] == [True, True, False]
    assert all(one.differs("\n") for one in (same, lines, some))


def test_the_lines_of_the_first_two_stages_print_what_the_page_says(tmp_path):
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    world, python = tmp_path / "world", sys.executable
    make("-C", "tinyworld", f"OUT={world}", "QUICK=1", "tok")
    for heading in ("crawl-filter", "train-bpe"):
        run(python, EXAMPLES / "pipes.py", world, "--only", heading, folder=tmp_path)


@pytest.mark.slow  # 3.5 CPU minutes together; the job `examples` of the CI runs them all
@pytest.mark.parametrize("recipe", [*RECIPES, "pipes"])
def test_runs_at_its_smallest(recipe, tmp_path):
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    if recipe == "quality":
        pytest.importorskip("floret")
    said = make(f"smoke-{recipe}", f"OUT={tmp_path}")
    if recipe == "gsm8k":
        before, after = json.loads((tmp_path / recipe / "accuracy.json").read_text())
        assert before["asked"] == after["asked"] == 8
        assert f"{before['right']} of 8" in said
    if recipe == "quality":
        seed, *scores = (tmp_path / recipe / "bits-per-byte.tsv").read_text().split()[-3:]
        assert seed == "0" and all(0 < float(score) < 8 for score in scores)
