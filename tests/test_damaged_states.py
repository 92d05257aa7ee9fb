"""Resuming from damaged or edited states: never a traceback, and the message names the damaged file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from damaged_states import COMMANDS

from llmkit.errors import UserError
from llmkit.io.metrics import read_metrics, scan_metrics, trim_metrics
from llmkit.io.resume import Kept, check_identity

EVERY = 29  # tests every 29th of about a thousand kinds of damage to each command's state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damage") / "world"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_resumes_or_names_the_damaged_file(folder: Path, command: str) -> None:
    words = [sys.executable, "damaged_states.py", str(folder), command, str(EVERY), "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder_of_script = Path(__file__).parent / "helpers"
    done = subprocess.run(words, cwd=folder_of_script, env=env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 10
    assert [line for line in lines if line.split()[0] not in ("ok", "UserError")] == []


@pytest.mark.parametrize("line", ["", "5", "[]", "{}", "\\xff{", '{"known": "yes"}', "edited"])
def test_a_record_of_an_unfinished_run_that_is_not_what_was_written_is_named(tmp_path: Path, line: str) -> None:
    place = tmp_path / "out.jsonl.state"
    state = Kept(place, {"--seed": 0}, resume=False)
    for number in range(3):
        state.add(f"q:{number}", {"known": "yes", "number": number, "share": 0.1})
    again = Kept(place, {"--seed": 0}, resume=True)
    assert [record["number"] for record in again.values()] == [0, 1, 2] and "q:1" in again and "q:3" not in again
    lines = place.read_text().splitlines()
    changed = 4 if line == "edited" else 3
    lines[changed] = lines[changed].replace("yes", "no") if line == "edited" else line
    place.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"out\.jsonl\.state: record [23]: damaged or edited; .*--force"):
        list(Kept(place, {"--seed": 0}, resume=True).values())


def test_metrics_that_were_edited_are_named_or_read_as_far_as_they_are_figures(tmp_path: Path) -> None:
    place = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": None, "sample": "The"}, {"loss": "low", "val_loss": [1], "step": 2}, {"reward": {}}]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = read_metrics(place)
    assert first["sample"] == "The" and first["loss"] != first["loss"]  # NaN, as in the run
    assert others == [{"step": 2}, {}]
    for line, found in (
        ('{"step": "x"}', "a string"),
        ('{"step": []}', "a list"),
        ("5", "a number"),
        ("\0", "expected one JSON"),
    ):
        place.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(UserError, match=rf"metrics\.jsonl:2: .*{found}.*; fix"):
            trim_metrics(place, 5)
        wrong: list[str] = []
        assert list(scan_metrics(place, wrong.append)) == [{"step": 1}]
        assert len(wrong) == 1 and f"{place}:2: " in wrong[0]
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a file, found a pipe"):
        trim_metrics(place, 5)


def test_a_difference_between_identities_is_named_at_any_depth() -> None:
    now = {"recipe": {"c4": {"min_lines": 5, "threshold": None}, "steps": ["a"]}, "--seed": 0}
    for same in (now, {**now, "older": 1}, {**now, "recipe": {"c4": {"min_lines": 5}, "steps": ["a"]}}):
        check_identity("out.state", same, now)
    for recipe, words in (
        ({"c4": {"min_lines": 3}, "steps": ["a"]}, "recipe.c4.min_lines was 3 and is now 5"),
        ({"c4": {"min_lines": 5}}, r"recipe.steps was none and is now \['a'\]"),
        (None, "recipe was none and is now"),
    ):
        with pytest.raises(UserError, match=rf"^out.state: another run: {words}.*--force"):
            check_identity("out.state", {**now, "recipe": recipe}, now)
