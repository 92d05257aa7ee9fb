"""Shared by the experiments with `llmkit rl`: the four commands from dialogues to a policy, and the table of seeds."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from running import llmkit, write

from llmkit.report.page import curve_svg

Rows = list[dict]


def dialogue(prompt: str, completion: str) -> dict:
    """Return a document in which the prompt is as far from its answer as in the chat format."""
    return {"text": f"user: {prompt}\nassistant: {completion}"}


def train(folder: Path, seed: int, data: Mapping[str, Rows], options: Mapping[str, list[str]]) -> tuple[Path, Path]:
    """Train an assistant and its policy from scratch, and return both folders.

    data     `documents` for train-bpe and pretrain, `chats` for sft, `problems` and `val` for rl
    options  options by command: pretrain, sft and rl
    """
    path = {name: write(folder / f"{name}.jsonl", rows) for name, rows in data.items()}
    again = ["--seed", str(seed)]
    llmkit(folder, "train-bpe", path["documents"], "--vocab-size", "320", "-o", folder / "tok")
    known = ["--tokenizer", folder / "tok", *options["pretrain"], *again]
    llmkit(folder, "pretrain", path["documents"], *known, "-o", folder / "base")
    chat, policy = folder / "chat", folder / "policy"
    llmkit(folder, "sft", folder / "base", "--data", path["chats"], *options["sft"], *again, "-o", chat)
    asked = ["--data", path["problems"], "--val", path["val"], "--reward", "verifier"]
    llmkit(folder, "rl", chat, *asked, *again, *options["rl"], "-o", policy)
    return chat, policy


def success(folder: Path, model: Path, asked: Rows) -> float:
    """Return the share of problems answered correctly with greedy decoding; an answer may follow `####`."""
    rows = [{"messages": [{"role": "user", "content": one["prompt"]}], "answer": one["answer"]} for one in asked]
    options = ["--jsonl", "--temperature", "0", "--max-tokens", "64", "--quiet"]
    out = llmkit(folder, "sample", model, *options, stdin=write(folder / "asked.jsonl", rows))
    answers = [json.loads(line) for line in out.splitlines()]
    return statistics.mean(row["completion"].split("####")[-1].strip() == row["answer"] for row in answers)


def evaluations(policy: Path) -> Rows:
    """Return the rows of `metrics.jsonl` with results on held-out problems."""
    rows = map(json.loads, (policy / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "val_success" in row]


def cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def draw(path: Path, key: str, seeds: list[Rows]) -> None:
    """Draw one metric of the evaluations, a curve for each seed."""
    path.write_text(curve_svg({f"seed {i}": [(row["step"], row[key]) for row in seed] for i, seed in enumerate(seeds)}))


def main(
    description: str | None,
    experiment: Callable[[Path, int, bool, list[str]], tuple[dict[str, float], Rows]],
    curves: Mapping[str, str],
) -> None:
    """Parse the command line, run an experiment for each seed, and print its table.

    experiment  from (folder, seed, quick, further options of rl) to figures by name, and the policy's evaluations
    curves      from file name to key of `metrics.jsonl`
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    parser.add_argument("--curves", type=Path, metavar="FOLDER", help="folder for the curves of all seeds")
    arguments, further = parser.parse_known_args()
    results, seeds = [], []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix="llmkit-learning-") as temporary:
            figures, rows = experiment(Path(temporary), seed, arguments.quick, further)
        results.append(figures)
        seeds.append(rows)
        print(f"seed {seed}: {figures}", file=sys.stderr)
    for name, key in curves.items() if arguments.curves else ():
        draw(arguments.curves / name, key, seeds)
    print(f"{'held-out problems':<28} {'mean':>6}  by seed")
    for name in results[0]:
        values = [one[name] for one in results]
        shown = ".1%" if max(values) <= 1 else ".1f"
        print(f"{name:<28} {statistics.mean(values):6{shown}}  {', '.join(f'{value:{shown}}' for value in values)}")
