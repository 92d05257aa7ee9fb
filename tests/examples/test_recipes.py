"""The recipes of examples/ run, and the commands of pipes.md print what the page shows."""

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
from llmkit.evaluation.scores import core_tasks
from llmkit.evaluation.tasks import load_items

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = ["evaluation", "fineweb", "foreign", "gsm8k", "helpful-harmless", "labelling", "quality"]
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


def test_a_user_bundle_has_the_format_of_core(tmp_path):
    facts = [{"query": "The sea is", "choices": ["wet.", "dry."], "gold": 0, "tier": "often"}]
    pairs = [{"good": "In it are fish now.", "bad": "In are it fish now."}, {"good": "Fish swim.", "bad": "Swim fish."}]
    for name, rows in (("facts", facts), ("word_order", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundle = tmp_path / "bundle"
    run(
        sys.executable,
        EXAMPLES / "evaluation" / "bundle.py",
        "facts.jsonl",
        "word_order.jsonl",
        "-o",
        bundle,
        folder=tmp_path,
    )
    tasks = {task.name: load_items(task, shots=0).items for task in core_tasks(str(bundle))}
    assert set(tasks) == {"core/facts", "core/facts_after_three", "core/last_word", "core/word_order"}
    (item,) = tasks["core/word_order"]
    assert (item.contexts, item.continuations) == (("In it are", "In are it"), ("fish now.",))
    assert tasks["core/last_word"][0].continuations == ("wet.",)


def judgements_by_http(made: Path, folder: Path) -> list[dict]:
    """Run the scripted labeller of the smallest recipe without a browser, and return its judgements."""
    folder.mkdir()
    script = [sys.executable, EXAMPLES / "labelling" / "label.py", made / "chat", "--prompts", made / "prompts.jsonl"]
    files = ["--collect", folder / "judged.jsonl", "--guide", EXAMPLES / "labelling" / "guide.md"]
    run(*script, *files, *["--good", "e", "--judgements", "12", "--max-tokens", "8", "--by", "http"], folder=folder)
    return [json.loads(line) for line in (folder / "judged.preferences.jsonl").read_text().splitlines()]


@pytest.mark.slow  # 4 CPU minutes in total; the CI job `examples` runs them all
@pytest.mark.parametrize("recipe", [*RECIPES, "pipes"])
def test_runs_at_its_smallest(recipe, tmp_path):
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    if recipe == "quality":
        pytest.importorskip("floret")
    if recipe == "labelling":
        pytest.importorskip("uvicorn")
    said = make(f"smoke-{recipe}", f"OUT={tmp_path}")
    if recipe == "gsm8k":
        before, after = json.loads((tmp_path / recipe / "accuracy.json").read_text())
        assert before["asked"] == after["asked"] == 8
        assert f"{before['right']} of 8" in said
    if recipe == "evaluation":
        scores, core = (json.loads((tmp_path / recipe / name).read_text()) for name in ("scores.json", "core.json"))
        assert [Path(one["model"]).name for one in scores["models"]] == ["base", "chat", "policy"]
        assert len(scores["comparisons"]) == 4 and all("core" in one for one in core["models"])
        gate = json.loads((tmp_path / recipe / "gate.json").read_text())
        facts = gate["models"][0]["tasks"]["facts"]
        assert facts["in_training"]["items"] + facts["not_in_training"]["items"] == facts["items"]
        assert "What the models can do" in (tmp_path / recipe / "report.html").read_text()
        done = subprocess.run(
            ["make", "-C", EXAMPLES / recipe, f"OUT={tmp_path / recipe}", "QUICK=1", "GATE=facts=1.01", "gate",
             f"PYTHON={sys.executable}", f"LLMKIT={sys.executable} -m llmkit"],
            env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and "is under --fail-under 1.01" in done.stderr and "Error 3" in done.stderr
    if recipe == "labelling":
        rows = [json.loads(line) for line in (tmp_path / recipe / "judged.preferences.jsonl").read_text().splitlines()]
        assert len(rows) == 12 and {row["labeller"] for row in rows} == {"script"}
        scored = [json.loads(line)["answers"] for line in said.splitlines() if line.startswith('{"answers"')]
        assert scored == ["scored-chat.jsonl", "scored-policy.jsonl"]
        again = judgements_by_http(tmp_path / recipe, tmp_path / "again")
        assert [{**row, "time": ""} for row in again] == [{**row, "time": ""} for row in rows]
    if recipe == "quality":
        seed, *scores = (tmp_path / recipe / "bits-per-byte.tsv").read_text().split()[-3:]
        assert seed == "0" and all(0 < float(score) < 8 for score in scores)
