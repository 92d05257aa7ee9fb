"""Cost of training on a machine that is busy: CPU and wall seconds, idle and with a competing process.

    python benchmarks/busy_machine.py --steps 60

Trains 1.5M parameters with `llmkit pretrain` as it is, and as it was before it chose the number of threads (torch's
busy waiting, one thread per core). A run of two steps is subtracted, so that start-up does not count. Reports whether
all runs wrote the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPETITOR = "while True: pass"


def train(folder: Path, steps: int, before: bool) -> tuple[float, float, str]:
    """Return CPU and wall seconds of a training, and the hash of its weights."""
    environment = dict(os.environ)
    if before:
        environment |= {"KMP_BLOCKTIME": "200", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [
        *(sys.executable, "-m", "llmkit", "pretrain", "docs.jsonl", "--tokenizer", "tok/", "--depth", "2", "--quiet"),
        *("--sequence-length", "256", "--batch-tokens", "2048", "--max-steps", str(steps), "-o", "base/", "--force"),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    digest = hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()
    return used.ru_utime + used.ru_stime, time.perf_counter() - started, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--competitors", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(3000)]
        numbers = random.Random(0)
        with open(folder / "docs.jsonl", "w") as file:
            for _ in range(1000):
                file.write(json.dumps({"text": " ".join(numbers.choices(words, k=150))}) + "\n")
        tokenizer = [sys.executable, "-m", "llmkit", "train-bpe", "docs.jsonl", "--vocab-size", "4096", "-o", "tok/"]
        subprocess.run(tokenizer, cwd=folder, check=True, capture_output=True)
        print("| | CPU s, idle | CPU s, busy | | wall s, idle | wall s, busy | |\n|---|--:|--:|--:|--:|--:|--:|")
        digests = set()
        for label, before in (("before", True), ("now", False)):
            figures: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for _ in range(options.rounds):
                for busy in (False, True):
                    others = []
                    if busy:
                        others = [
                            subprocess.Popen([sys.executable, "-c", COMPETITOR]) for _ in range(options.competitors)
                        ]
                    try:
                        short = train(folder, 2, before)
                        full = train(folder, options.steps, before)
                    finally:
                        for other in others:
                            other.kill()
                    digests.add(full[2])
                    figures[busy].append((full[0] - short[0], full[1] - short[1]))
            row = []
            for kind in (0, 1):
                idle, busy = (statistics.median(found[kind] for found in figures[b]) for b in (False, True))
                row += [f"{idle:.1f}", f"{busy:.1f}", f"{busy / idle:.2f}x"]
            print(f"| {label} | {' | '.join(row)} |", flush=True)
        print("all weights are equal" if len(digests) == 1 else f"{len(digests)} different weights")


if __name__ == "__main__":
    main()
