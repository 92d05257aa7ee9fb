"""Convert problems with answers to conversations in which the assistant uses its calculator, for `llmkit sft`.

    python examples/make_tool_chats.py gsm8k.train.jsonl > tool-chats.jsonl
    python examples/make_tool_chats.py --arithmetic 2000 --seed 1 > sums.jsonl
    python examples/make_tool_chats.py --arithmetic 200 --seed 2 --problems > held-out.jsonl

GSM8K's worked solutions annotate calculations, `48/2 = <<48/2=24>>24`: each annotation becomes a call of `calc` and its
result, and the next number is text. `--arithmetic N` writes N problems with two or three numbers. `--no-tool` writes
the same conversations without calls, `--problems` only {"prompt", "answer"}.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
from collections.abc import Iterator

from llmkit.tools.calc import CalculationError, calculate

MARK = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
QUESTIONS = ("What is {}?", "Work out {}.", "{} = ?", "Calculate {}.", "How much is {}?")


def parts_of(solution: str) -> list[dict[str, str]]:
    """Split a solution into text, calls and results; an annotation that the calculator disagrees with stays text."""
    parts, at = [], 0
    for mark in MARK.finditer(solution):
        try:
            result = calculate(mark[1])
        except CalculationError:
            continue
        if result != mark[2].strip().replace(",", ""):
            continue
        parts.append({"type": "text", "text": MARK.sub("", solution[at : mark.start()])})
        parts.append({"type": "calc", "text": mark[1]})
        parts.append({"type": "result", "text": result})
        at = mark.end()
    parts.append({"type": "text", "text": MARK.sub("", solution[at:])})
    return [part for part in parts if part["text"]]


def solved_problems(path: str) -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """Yield (question, answer, parts) from JSONL problems with a `solution` or an answer that ends in `#### N`."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for line in lines:
            row = json.loads(line)
            solution, _, answer = row.get("solution", row["answer"]).partition("####")
            question = row.get("question", row.get("prompt"))
            yield question, answer.strip(), parts_of(f"{solution.strip()}\nThe answer is {answer.strip()}.")


def arithmetic(count: int, seed: int) -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """Yield problems too hard for a small model without a tool: two or three numbers of up to three digits."""
    rng = random.Random(seed)
    for _ in range(count):
        first, second = rng.randrange(10, 1000), rng.randrange(10, 1000)
        expression = f"{first} {rng.choice('+-*')} {second}"
        if rng.random() < 0.3:
            expression = f"{expression} {rng.choice('+-')} {rng.randrange(10, 1000)}"
        answer = calculate(expression)
        call = [{"type": "calc", "text": expression}, {"type": "result", "text": answer}]
        yield rng.choice(QUESTIONS).format(expression), answer, [*call, {"type": "text", "text": answer}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversations that use the calculator, as JSONL on stdout.")
    parser.add_argument("files", nargs="*", help="problems with worked solutions, JSONL or JSONL.gz")
    parser.add_argument("--arithmetic", type=int, default=0, metavar="N", help="write N sums as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tool", action="store_true", help="leave the calls out")
    parser.add_argument("--problems", action="store_true", help="write prompts and answers only")
    arguments = parser.parse_args()
    solved = [problem for path in arguments.files for problem in solved_problems(path)]
    for question, answer, parts in [*solved, *arithmetic(arguments.arithmetic, arguments.seed)]:
        if arguments.problems:
            row: dict = {"prompt": question, "answer": answer}
        else:
            kept = [part for part in parts if part["type"] == "text" or not arguments.no_tool]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": kept}]
            row = {"messages": turns, "source": "calculator"}
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
