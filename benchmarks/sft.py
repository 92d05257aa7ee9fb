"""`llmkit sft` on packed conversations compared with TRL's SFTTrainer: same model, data, rows, batch; one thread each.

    python benchmarks/sft.py --peers PEERS --peer-python peers/bin/python

PEERS contains `make_tiny.py OUT` (a Llama of 4 x 128 with a chat template, and 2,000 conversations) and
`trl_sft.py OUT packing STEPS`, which prints CPU seconds per step; both run under --peer-python. A step is 4 rows of 512
tokens in float32. Rounds alternate peer and ours, each in a new process. Ours is the command: the CPU seconds of a long
run minus those of a short one, divided by the difference in steps, so that start-up cancels on both sides. tok/CPU s
counts input tokens without padding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS, LENGTH = 4, 512
SHORT, LONG = 5, 45  # steps


def cpu_seconds(command: list[str], folder: Path) -> tuple[float, str]:
    """Return user and system seconds of a command and its children, and its stdout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def ours(model: Path, folder: Path, round_number: int) -> float:
    """Return CPU seconds per step of `llmkit sft`."""
    spent = []
    for steps in (SHORT, LONG):
        out = folder / f"ours-{round_number}-{steps}"
        command = [
            sys.executable,
            "-m",
            "llmkit",
            "sft",
            str(model),
            "--data",
            str(model / "sft.jsonl"),
            "-o",
            str(out),
        ]
        command += ["--max-steps", str(steps), "--sequence-length", str(LENGTH), "--batch-tokens", str(ROWS * LENGTH)]
        command += ["--dtype", "float32", "--learning-rate", "0.001", "--quiet"]
        spent.append(cpu_seconds(command, folder)[0])
    return (spent[1] - spent[0]) / (LONG - SHORT)


def peer(python: str, script: Path, model: Path, folder: Path) -> float:
    """Return CPU seconds per step of TRL."""
    _, out = cpu_seconds([python, str(script), str(model), "packing", "12"], folder)
    return json.loads(out.splitlines()[-1])["cpu_s_per_step"]


def filled(model: Path) -> float:
    """Return the share of positions in our rows that are not padding."""
    from llmkit.data.batches import Mixture, Source
    from llmkit.data.examples import read_examples
    from llmkit.formats.conversations import read_conversation
    from llmkit.io.jsonl import read_jsonl
    from llmkit.io.records import BadRecords
    from llmkit.tokenizer.chat import ChatFormat, write_chat_tokenizer
    from llmkit.tokenizer.encoding import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        chat = ChatFormat(write_chat_tokenizer(load_tokenizer(model), Path(folder)))
    data = read_jsonl([str(model / "sft.jsonl")], None, read_conversation)
    examples, _ = read_examples("data", data, chat.encode_many, LENGTH + 1, "truncate", bad=BadRecords())
    mixture = Mixture([Source(examples, 1.0)], LENGTH, ROWS, chat.end_id)
    steps = mixture.steps_for(examples.inputs)
    return examples.inputs / (steps * ROWS * LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder of make_tiny.py and trl_sft.py")
    parser.add_argument("--peer-python", required=True, help="a Python with TRL")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmkit-sft-") as name:
        folder, model = Path(name), Path(name) / "tiny"
        print(
            cpu_seconds([arguments.peer_python, str(arguments.peers.resolve() / "make_tiny.py"), str(model)], folder)[1]
        )
        share = filled(model)
        rows = []
        for number in range(arguments.rounds):
            theirs = peer(arguments.peer_python, arguments.peers.resolve() / "trl_sft.py", model, folder)
            rows.append((theirs, ours(model, folder, number)))
            print(f"round {number + 1}: TRL {theirs:.3f}, ours {rows[-1][1]:.3f} CPU s per step", file=sys.stderr)
    tokens = ROWS * LENGTH
    theirs, mine = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [share * a / b for a, b in rows]
    print(f"{'':>14} {'CPU s/step':>11} {'tok/CPU s':>10}")
    print(f"{'TRL packing':>14} {theirs:11.3f} {tokens / theirs:10,.0f}")
    print(f"{'llmkit sft':>14} {mine:11.3f} {tokens * share / mine:10,.0f}   rows {share:.1%} full")
    print(f"ours over TRL's: {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
