"""Does reward alone teach an assistant to call its calculator? Calls and held-out accuracy, before and after.

    python examples/tool_reward.py                # three seeds, a table
    python examples/tool_reward.py --seeds 1 --quick

For each seed, a tokenizer and a base model are trained on written sums, and an assistant is tuned on the same sums: one
in six examples calls `calc`, the others answer directly, which is too hard for the model. Then `llmkit rl` trains it
with the calculator; only correct answers are rewarded.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable
from pathlib import Path

from calculator import SHAPE, chats, expression
from make_tool_chats import arithmetic
from running import llmkit, run_seeds, write

CALLING = 1 / 6  # share of the examples with a call
MOST_TOKENS = "40"


def of_two(sums: Iterable[tuple]) -> Iterable[tuple]:
    """Yield the sums of two numbers."""
    return (one for one in sums if expression(one[0]).count(" ") == 2)


def written_out(question: str, answer: str, _) -> str:
    """Return a pretraining document; its repetition teaches copying, which calls and their results need."""
    return f"{question} {expression(question)}; {expression(question)} = {answer}; {answer}; {answer}"


def measured(folder: Path, model: Path, asked: Path, temperature: str) -> dict[str, float]:
    """Return the shares of held-out problems with a call and with the correct answer."""
    options = ["--tools", "calc", "--jsonl", "--temperature", temperature, "--max-tokens", MOST_TOKENS, "--quiet"]
    out = llmkit(folder, "sample", model, *options, stdin=asked)
    rows = [json.loads(line) for line in out.splitlines()]
    right = [row["completion"].strip() == row["answer"] for row in rows]
    called = [bool(row["tool_calls"]) for row in rows]
    return {"called": sum(called) / len(rows), "right": sum(right) / len(rows)}


def experiment(folder: Path, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Return the shares for one seed before and after rl, sampled as in training and greedy."""
    rng = random.Random(seed)
    sums = list(of_two(arithmetic(500 if quick else 8000, 2 * seed)))
    seen = {question for question, _, _ in sums}
    held_out = [one for one in of_two(arithmetic(400, 2 * seed + 1)) if one[0] not in seen][: 10 if quick else 200]

    def problems(name: str, some: list[tuple]) -> Path:
        return write(folder / f"{name}.jsonl", [{"prompt": question, "answer": answer} for question, answer, _ in some])

    def train(stage: str, *arguments: str | Path, steps: tuple[str, str], out: str) -> Path:
        horizon = ("--max-steps", "3") if quick else steps
        llmkit(folder, stage, *arguments, *horizon, "--seed", str(seed), "-o", folder / out)
        return folder / out

    texts = write(folder / "texts.jsonl", [{"text": written_out(*one)} for one in sums])
    llmkit(folder, "train-bpe", texts, "--vocab-size", "320", "-o", folder / "tok")
    base = train("pretrain", texts, "--tokenizer", folder / "tok", *SHAPE, steps=("--epochs", "4"), out="base")
    examples = [chat for one in sums for chat in chats([one], tool=rng.random() < CALLING)]
    shown = write(folder / "chats.jsonl", examples)
    before = train("sft", base, "--data", shown, steps=("--epochs", "4"), out="before")
    rows = [{"messages": [{"role": "user", "content": one[0]}], "answer": one[1]} for one in held_out]
    test = write(folder / "asked.jsonl", rows)
    options = ["--data", problems("train", sums), "--val", problems("val", held_out), "--eval-every", "10"]
    options += ["--tools", "calc", "--reward", "verifier", "--max-tokens", MOST_TOKENS]
    options += ["--reward", "length"] if quick else []  # a hardly trained model is never right
    after = train("rl", before, *options, steps=("--max-steps", "60"), out="after")
    return {
        f"{name}, {how}": measured(folder, model, test, temperature)
        for name, model in (("before", before), ("after", after))
        for how, temperature in (("drawn", "1"), ("likeliest", "0"))
    }


def main() -> None:
    found = run_seeds(__doc__, experiment, {"after/success.svg": "tool-reward.svg"})
    print(f"{'':<20} {'called':>7} {'right':>7}  called / right by seed")
    for name in found[0]:
        rows = [one[name] for one in found]
        means = " ".join(f"{statistics.mean(row[key] for row in rows):7.1%}" for key in ("called", "right"))
        print(f"{name:<20} {means}  {', '.join('{called:.1%} / {right:.1%}'.format(**row) for row in rows)}")


if __name__ == "__main__":
    main()
