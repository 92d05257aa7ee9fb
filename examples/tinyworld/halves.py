"""Split the assistant's training conversations in two: half stay, half become prompts for an earlier assistant.

    python examples/tinyworld/halves.py world/data half/ --seed 0
    llmkit write-chats --guide half/guide.md --answer half/prompts.jsonl --writer writer/ --tools calc -o written.jsonl
    python examples/tinyworld/halves.py world/data both/ --seed 0 --written written.jsonl

Writes to OUT: chats.jsonl and tools.jsonl, the half that stays, mixed with the written conversations;
guided-chats.jsonl and guided-tools.jsonl, the same half with the guide as its system message, to train a writer; and
prompts.jsonl, the other half with answers from the ledger and the calculator. Small talk and refusals have no prompts,
because nothing can check the answers.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from ledger import read_rows
from problems import last_line

from llmkit.io.jsonl import open_output

Row = dict[str, Any]
GUIDE = "Answer."
VERIFIERS = {"problems": "exact", "questions": "match", "system messages": "match", "tools": "number"}


def said(row: Row) -> str:
    """Return the text of the last message, without tool calls."""
    content = row["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def guided(row: Row) -> Row:
    """Prepend the guide to the system message, as write-chats does."""
    first, rest = row["messages"][0], row["messages"]
    if first["role"] == "system":
        return {**row, "messages": [{**first, "content": f"{GUIDE}\n\n{first['content']}"}, *rest[1:]]}
    return {**row, "messages": [{"role": "system", "content": GUIDE}, *rest]}


def prompts(rows: list[Row]) -> list[Row]:
    """Return the prompts with the answer and its verifier."""
    return [
        {"messages": row["messages"][:-1], "source": row["source"], "kind": row["source"],
         "answer": row.get("right", last_line(said(row))), "verifier": VERIFIERS[row["source"]]}
        for row in rows if row["source"] in VERIFIERS
    ]  # fmt: skip


def main() -> None:
    """Write the halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--written", type=Path, help="conversations of write-chats to mix with those that stay")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = read_rows(arguments.written) if arguments.written else []
    files: dict[str, list[Row]] = {"prompts": []}
    for name in ("chats", "tools"):
        rows = read_rows(arguments.world / f"{name}.jsonl")
        random.Random(f"{arguments.seed} {name}").shuffle(rows)
        half, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        files[f"guided-{name}"] = [*map(guided, half)]
        files["prompts"] += prompts(rest)
        files[name] = half + [row for row in written if (row["source"] == "tools") == (name == "tools")]
    (arguments.out / "guide.md").write_text(GUIDE + "\n")
    for name, rows in files.items():
        with open_output(str(arguments.out / f"{name}.jsonl"), True) as write:
            for row in rows:
                write(row)


if __name__ == "__main__":
    main()
