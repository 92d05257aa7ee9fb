"""Does a tiny assistant trained on calculator calls use the tool, and does it help? Accuracy on held-out sums.

Takes minutes on one CPU core.

    python examples/calculator.py                # three seeds, a table
    python examples/calculator.py --seeds 1 --quick

For each seed, a tokenizer and a base model are trained on written sums. Two assistants are then tuned on the same
problems, one on answers that call `calc`, the other on answers without calls, and tested on 200 held-out problems.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from make_tool_chats import arithmetic
from running import llmkit, print_shares, run_seeds, write

SHAPE = ["--depth", "2", "--hidden-size", "128", "--sequence-length", "128"]


def chats(problems: list[tuple], tool: bool) -> list[dict]:
    """Return conversations whose answers call the calculator if `tool`, otherwise state the result directly."""
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": parts if tool else [part for part in parts if part["type"] == "text"]},
            ]
        }
        for question, _, parts in problems
    ]


def expression(question: str) -> str:
    """Return the arithmetic expression in a question."""
    return "".join(c for c in question if c in "0123456789+-* ").strip()


def accuracy(folder: Path, model: Path, asked: Path, *tools: str) -> float:
    """Return the share of problems answered correctly with greedy decoding."""
    options = ["--jsonl", "--temperature", "0", "--max-tokens", "48", "--quiet"]
    out = llmkit(folder, "sample", model, *options, *tools, stdin=asked)
    rows = [json.loads(line) for line in out.splitlines()]
    return sum(row["completion"].strip() == row["answer"] for row in rows) / len(rows)


def experiment(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Return the accuracies for one seed."""
    count = 1000 if quick else 8000
    problems = list(arithmetic(count, 2 * seed))
    seen = {question for question, _, _ in problems}
    held_out = [one for one in arithmetic(400, 2 * seed + 1) if one[0] not in seen][: 20 if quick else 200]
    rng = random.Random(seed)
    texts = [f"{question} {expression(question)} = {answer}" for question, answer, _ in problems]
    rng.shuffle(texts)
    documents = write(folder / "documents.jsonl", [{"text": text} for text in texts])
    rows = [{"messages": [{"role": "user", "content": question}], "answer": answer} for question, answer, _ in held_out]
    test = write(folder / "asked.jsonl", rows)
    llmkit(folder, "train-bpe", documents, "--vocab-size", "320", "-o", folder / "tok")
    horizon = ["--max-steps", "20"] if quick else ["--epochs", "6"]
    options = ["--tokenizer", folder / "tok", *SHAPE, *horizon, "--seed", str(seed)]
    llmkit(folder, "pretrain", documents, *options, "-o", folder / "base")
    for name, tool in (("with", True), ("without", False)):
        data = write(folder / f"{name}.jsonl", chats(problems, tool))
        horizon = ["--max-steps", "5"] if quick else ["--epochs", "8"]
        llmkit(folder, "sft", folder / "base", "--data", data, *horizon, "--seed", str(seed), "-o", folder / name)
    return {
        "taught and given the tool": accuracy(folder, folder / "with", test, "--tools", "calc"),
        "taught, but not given it": accuracy(folder, folder / "with", test),
        "never taught it": accuracy(folder, folder / "without", test),
    }


if __name__ == "__main__":
    print_shares("accuracy on held-out sums", run_seeds(__doc__, experiment))
