"""The example that writes conversations with calculator calls: sft can read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llmkit.formats.conversations import read_conversation
from llmkit.io.records import Row
from llmkit.tools.calc import calculate

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "make_tool_chats.py"


def written(*arguments: str) -> list[dict]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_marks_become_calls_and_results(tmp_path):
    solution = "He sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"question": "How many?", "answer": solution}) + "\n")
    (row,) = written(str(problems))
    answer = read_conversation(Row(row, "x", 1)).messages[1]
    assert [part.kind for part in answer.parts] == ["text", "calc", "result", "text", "calc", "result", "text"]
    assert answer.text == "He sold 48/2 = 24 clips in May.\nIn all 48+24 = 72.\nThe answer is 72."
    (plain,) = written(str(problems), "--no-tool")
    assert read_conversation(Row(plain, "x", 1)).messages[1].text == answer.text


def test_sums_are_right_and_the_same_for_a_seed():
    rows = written("--arithmetic", "50", "--seed", "3")
    for row in rows:
        parts = read_conversation(Row(row, "x", 1)).messages[1].parts
        assert [part.kind for part in parts] == ["calc", "result", "text"]
        assert calculate(parts[0].text) == parts[1].text == parts[2].text
    problems = written("--arithmetic", "50", "--seed", "3", "--problems")
    assert [row["prompt"] for row in problems] == [row["messages"][0]["content"] for row in rows]
