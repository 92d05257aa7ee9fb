"""`llmkit train-reward` compared with TRL's RewardTrainer: same model, pairs and batch, one thread each.

    python benchmarks/reward.py --peers PEERS --peer-python peers/bin/python

PEERS contains `make_tiny.py OUT` (a Llama of 4 x 128 with a chat template, and 2,000 preferences) and
`trl_reward.py OUT STEPS`, which prints CPU seconds per step of 16 pairs in float32. Rounds alternate peer and ours,
each in a new process. Ours is the command: the CPU seconds of a long run minus those of a short one, divided by the
difference in pairs, so that start-up cancels on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from sft import cpu_seconds

PAIRS = 16  # per step
SHORT, LONG = 5, 45  # steps


def ours(model: Path, folder: Path, round_number: int) -> float:
    """Return CPU seconds per pair of `llmkit train-reward`."""
    spent, pairs = [], []
    for steps in (SHORT, LONG):
        out = folder / f"ours-{round_number}-{steps}"
        command = [sys.executable, "-m", "llmkit", "train-reward", str(model), "--data", str(model / "pref.jsonl")]
        command += ["--max-steps", str(steps), "--batch-size", str(PAIRS), "--learning-rate", "0.001", "-o", str(out)]
        spent.append(cpu_seconds([*command, "--dtype", "float32", "--quiet"], folder)[0])
        pairs.append(sum(row["targets"] for row in map(json.loads, (out / "metrics.jsonl").open()) if "targets" in row))
    return (spent[1] - spent[0]) / (pairs[1] - pairs[0])


def peer(python: str, script: Path, model: Path, folder: Path) -> float:
    """Return CPU seconds per pair of TRL."""
    _, out = cpu_seconds([python, str(script), str(model), "12"], folder)
    return json.loads(out.splitlines()[-1])["cpu_s_per_step"] / PAIRS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder of make_tiny.py and trl_reward.py")
    parser.add_argument("--peer-python", required=True, help="a Python with TRL")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    peers = arguments.peers.resolve()
    with tempfile.TemporaryDirectory(prefix="llmkit-reward-") as name:
        folder, model = Path(name), Path(name) / "tiny"
        cpu_seconds([arguments.peer_python, str(peers / "make_tiny.py"), str(model)], folder)
        rows = []
        for number in range(arguments.rounds):
            theirs = peer(arguments.peer_python, peers / "trl_reward.py", model, folder)
            rows.append((theirs, ours(model, folder, number)))
            print(f"round {number + 1}: TRL {theirs:.4f}, ours {rows[-1][1]:.4f} CPU s per pair", file=sys.stderr)
    theirs, mine = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [a / b for a, b in rows]
    print(f"TRL RewardTrainer {1 / theirs:6.1f} pairs per CPU second")
    print(f"llmkit            {1 / mine:6.1f} pairs per CPU second")
    print(f"ours over TRL's: {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
