"""Compute the accuracy of answers written by `llmkit sample`, checked as by `--reward verifier`.

    python examples/gsm8k/accuracy.py answers-chat.jsonl answers-policy.jsonl | jq '.[].accuracy'

A record has `messages` or `prompt`, `answer`, `completion`, and `tool_calls` if tools were called.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmkit.formats.problems import read_problem
from llmkit.io.records import Row
from llmkit.rewards.verifiers import is_number_right


def accuracy(path: Path) -> dict:
    """Count the correct answers and the tool calls in a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    problems = [read_problem(Row(row, str(path), number)) for number, row in enumerate(rows, 1)]
    right = sum(is_number_right(problem, row["completion"]) for problem, row in zip(problems, rows, strict=True))
    calls = sum(len(row.get("tool_calls", ())) for row in rows)
    counts = {"answers": path.stem, "asked": len(rows), "right": right}
    return {**counts, "accuracy": right / max(1, len(rows)), "calls": calls}


if __name__ == "__main__":
    print(json.dumps([accuracy(Path(path)) for path in sys.argv[1:]], indent=2))
