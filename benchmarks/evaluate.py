"""`llmkit evaluate` compared with lm-evaluation-harness (`--model hf`, float32, batches of 16): scores, CPU seconds.

    python benchmarks/evaluate.py FOLDER --data eval/ --peer-python peers/bin/python --limit 300

Both evaluate each task in turn, `--rounds` times, each time in a fresh process on one thread; the ratio is the median
of the rounds' ratios. CPU seconds cover evaluation only: reading, encoding and scoring, without imports and loading the
model. The last columns are the largest difference between log-likelihoods, and the number of items that only one of
the two gets right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

TASKS = [
    "arc_easy", "arc_challenge", "piqa", "boolq", "openbookqa", "winogrande", "copa", "lambada_openai", "mmlu", "blimp",
]  # fmt: skip
PEER = Path(__file__).with_name("peers") / "lm_eval_scores.py"


def ours(folder: str, data: str, name: str, limit: int) -> None:
    """Evaluate one task and print the same JSON as the peer's script."""
    from dataclasses import replace

    from llmkit.evaluation.evaluator import Settings, chunks, open_model
    from llmkit.evaluation.tasks import load_items, load_tasks

    (task,) = load_tasks([name], data)
    task = replace(task, group="")  # the first items of the file, like the peer
    with open_model(folder, Settings()) as model:
        model.evaluate(task, load_items(task, 1).items)  # warms up lazy imports
        started = time.process_time()
        loaded = load_items(task, limit)
        records = [record for chunk in chunks(loaded.items) for record in model.evaluate(loaded.task, chunk)]
        cpu = time.process_time() - started
    acc = [record["metrics"]["acc"] for record in records]
    print(json.dumps({"cpu": cpu, "acc": acc, "logprobs": [record["logprobs"] for record in records]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        ours(options.folder, options.data, options.only, options.limit)
        return
    print("task            items  ms an item  the harness  ratio  log-likelihood  unequal")
    ratios = []
    for name in options.tasks:
        again = [sys.executable, __file__, options.folder, "--data", options.data, "--limit", str(options.limit)]
        theirs = [options.peer_python, str(PEER), options.folder, options.data, name, str(options.limit)]
        rounds = [(_run([*again, "--only", name]), _run(theirs)) for _ in range(options.rounds)]
        mine, peer = rounds[0]
        if mine is None or peer is None:
            print(f"{name:14} {'the harness' if peer is None else 'llmkit'} fails", flush=True)
            continue
        count = len(mine["acc"])
        cost, cost_there = (1000 * median(each[side]["cpu"] for each in rounds) / count for side in (0, 1))
        ratios.append(median(there["cpu"] / here["cpu"] for here, there in rounds))
        items = zip(mine["logprobs"], peer["logprobs"], strict=True)
        apart = max(abs(a - b) for item in items for a, b in zip(*item, strict=True))
        unequal = sum(a != b for a, b in zip(mine["acc"], peer["acc"], strict=True))
        row = f"{name:14} {count:6} {cost:11.2f} {cost_there:12.2f} {ratios[-1]:6.1f} {apart:15.1e} {unequal:8}"
        print(row, flush=True)
    print(f"{'median':14} {'':6} {'':11} {'':12} {median(ratios):6.1f}")


def _run(command: list[str]) -> dict | None:
    """Return the last line of a process's stdout as JSON, or None if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


if __name__ == "__main__":
    main()
