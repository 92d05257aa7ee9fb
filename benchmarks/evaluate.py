"""`llmkit evaluate` beside lm-evaluation-harness (`--model hf`, float32, batches of 16): scores and CPU seconds.

    python benchmarks/evaluate.py FOLDER --data eval/ --peer-python peers/bin/python --limit 300

Each task is evaluated by both in turn, each in a fresh process on one thread. `cpu` counts evaluation alone: what is
read, encoded and scored, without imports and the loading of the model. The last columns: the largest difference of two
log-likelihoods, and how many items one has right and the other wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TASKS = [
    "arc_easy", "arc_challenge", "piqa", "boolq", "openbookqa", "winogrande", "copa", "lambada_openai", "mmlu", "blimp",
]  # fmt: skip
PEER = Path(__file__).with_name("peers") / "lm_eval_scores.py"


def ours(folder: str, data: str, name: str, limit: int) -> None:
    """Evaluate one task; print what the peer's script prints."""
    from dataclasses import replace

    from llmkit.evaluation.evaluator import CHUNK, Asking, open_model
    from llmkit.evaluation.tasks import load_items, load_tasks

    with open_model(folder, Asking()) as model:
        started = time.process_time()
        (task,) = load_tasks([name], data)
        loaded = load_items(replace(task, group=""), limit)  # the first of the file, as there
        chunks = [loaded.items[first : first + CHUNK] for first in range(0, len(loaded.items), CHUNK)]
        records = [record for chunk in chunks for record in model.evaluate(loaded.task, chunk)]
        cpu = time.process_time() - started
    acc = [record["metrics"]["acc"] for record in records]
    print(json.dumps({"cpu": cpu, "acc": acc, "logprobs": [record["logprobs"] for record in records]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        ours(options.folder, options.data, options.only, options.limit)
        return
    print("task            items  ms an item  the harness  ratio  log-likelihood  unequal")
    totals = [0.0, 0.0]
    for name in options.tasks:
        again = [sys.executable, __file__, options.folder, "--data", options.data, "--limit", str(options.limit)]
        theirs = [options.peer_python, str(PEER), options.folder, options.data, name, str(options.limit)]
        results = []
        for command in ([*again, "--only", name], theirs):
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None)
        if results[1] is None:
            print(f"{name:14} {len(results[0]['acc']):6} {'the harness fails':>30}")
            continue
        mine, peer = results
        count = len(mine["acc"])
        totals = [total + result["cpu"] for total, result in zip(totals, results, strict=True)]
        items = zip(mine["logprobs"], peer["logprobs"], strict=True)
        apart = max(abs(a - b) for item in items for a, b in zip(*item, strict=True))
        unequal = sum(a != b for a, b in zip(mine["acc"], peer["acc"], strict=True))
        cost, cost_there = (1000 * result["cpu"] / count for result in results)
        print(f"{name:14} {count:6} {cost:11.2f} {cost_there:12.2f} {cost_there / cost:6.1f} {apart:15.1e} {unequal:8}")
    print(f"{'all':14} {'':6} {'':11} {'':12} {totals[1] / totals[0]:6.1f}")


if __name__ == "__main__":
    main()
