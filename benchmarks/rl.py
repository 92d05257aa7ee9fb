"""`llmkit rl` compared with TRL's GRPOTrainer: same model, prompts, groups and lengths, one thread each.

    python benchmarks/rl.py --peers PEERS --peer-python peers/bin/python

PEERS contains `make_tiny.py OUT` (a Llama of 4 x 128 with a chat template, and sums as problems) and
`trl_grpo.py OUT STEPS MAX_NEW`, which prints CPU seconds per step of 8 prompts x 8 samples; both run under
--peer-python. Rounds alternate peer and ours, each in a new process. Ours is the command: the CPU seconds of a long run
minus those of a short one, divided by the difference in steps, so that start-up cancels on both sides, and scaled to 64
rollouts, because a step samples more to replace groups without signal.

equal work  a random model, 10 tokens per rollout, a different reward for each rollout: nothing can be skipped
in use      a model that answers in words of very unequal length, prompts with four worked examples, and a reward for
            exact answers: rollouts end early, prompts are shared, and groups without signal are skipped
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

from sft import cpu_seconds

ROLLOUTS = 64  # per step: 8 problems with 8 rollouts each
SHORT, LONG = 2, 10  # steps
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def llmkit(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llmkit", *map(str, arguments)]


def ours(model: Path, folder: Path, number: int, max_tokens: int, reward: str) -> tuple[float, dict[str, float]]:
    """Return CPU seconds of `llmkit rl` for `ROLLOUTS` rollouts, and the metrics of its last step."""
    spent, attempts, out = [], [], folder / "none"
    for steps in (SHORT, LONG):
        out = folder / f"ours-{model.name}-{number}-{steps}"
        command = llmkit("rl", model, "--data", model / "rl.jsonl", "--reward", reward, "--max-steps", steps)
        command += ["--batch-size", "8", "--group", "8", "--max-tokens", str(max_tokens)]
        command += ["--dtype", "float32", "--learning-rate", "1e-4", "--quiet", "-o", str(out)]
        spent.append(cpu_seconds(command, folder)[0])
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        attempts.append(8 * sum(row["groups"] for row in rows))
    return (spent[1] - spent[0]) / (attempts[1] - attempts[0]) * ROLLOUTS, rows[-1]


def peer(python: str, script: Path, model: Path, folder: Path, max_tokens: int) -> tuple[float, float]:
    """Return CPU seconds per step of TRL, and the mean length of its rollouts."""
    _, out = cpu_seconds([python, str(script), str(model), "6", str(max_tokens)], folder)
    figures = json.loads(out.splitlines()[-1])
    return figures["cpu_s_per_step"], figures["mean_len"][-1]


def first_update(model: Path, folder: Path) -> float:
    """Return CPU seconds of a complete run of one step, saving included."""
    command = llmkit("rl", model, "--data", model / "rl.jsonl", "--reward", "py:reward.py:score", "--max-steps", 1)
    command += ["--batch-size", "8", "--max-tokens", "10", "--quiet", "-o", str(folder / "first")]
    return cpu_seconds(command, folder)[0]


def sums(count: int, seed: int) -> list[tuple[str, str]]:
    """Return sums after four worked examples; answers spell every digit, those of large sums several times."""
    rng = random.Random(seed)

    def one() -> tuple[str, str]:
        a, b = rng.randrange(5), rng.randrange(5)
        return f"{a}+{b}=", " ".join([NUMBERS[a + b]] * (1 + (a * b) ** 2 // 8))

    examples = [one() for _ in range(4 * count)]
    shots = ["; ".join(f"{q} {a}" for q, a in examples[4 * i : 4 * i + 4]) for i in range(count)]
    return [
        (f"{shot}; {question}", answer) for shot, (question, answer) in zip(shots, (one() for _ in shots), strict=True)
    ]


def make_models(python: str, peers: Path, folder: Path) -> tuple[Path, Path]:
    """Make the random model, and the one trained to answer half of the sums correctly."""
    tiny, random_model, taught = folder / "tiny", folder / "random", folder / "taught"
    cpu_seconds([python, str(peers / "make_tiny.py"), str(tiny)], folder)
    once = ["--max-steps", "1", "--learning-rate", "1e-9", "--sequence-length", "128", "--quiet"]
    cpu_seconds(llmkit("sft", tiny, "--data", tiny / "sft.jsonl", *once, "-o", random_model), folder)
    (random_model / "rl.jsonl").write_bytes((tiny / "rl.jsonl").read_bytes())
    chats, problems = folder / "chats.jsonl", []
    with chats.open("w") as handle:
        for question, answer in sums(3000, 0):
            handle.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    some = ["--epochs", "1", "--sequence-length", "512", "--batch-tokens", "2048", "--quiet"]
    cpu_seconds(llmkit("sft", tiny, "--data", chats, *some, "-o", taught), folder)
    problems = [{"prompt": [{"role": "user", "content": q}], "answer": a, "verifier": "exact"} for q, a in sums(500, 1)]
    (taught / "rl.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (folder / "reward.py").write_text("def score(record):\n    return hash(record['completion']) % 1000 / 1000\n")
    return random_model, taught


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder of make_tiny.py and trl_grpo.py")
    parser.add_argument("--peer-python", required=True, help="a Python with TRL")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    peers = arguments.peers.resolve()
    with tempfile.TemporaryDirectory(prefix="llmkit-rl-") as name:
        folder = Path(name)
        os.environ["PYTHONHASHSEED"] = "0"
        random_model, taught = make_models(arguments.peer_python, peers, folder)
        print(f"one step from a cold start, saved: {first_update(random_model, folder):.1f} CPU s")
        cases = {
            "equal work": (random_model, 10, "py:reward.py:score"),
            "in use": (taught, 64, "verifier"),
        }
        for case, (model, max_tokens, reward) in cases.items():
            rows, last, their_length = [], {}, 0.0
            for number in range(arguments.rounds):
                theirs, their_length = peer(arguments.peer_python, peers / "trl_grpo.py", model, folder, max_tokens)
                mine, last = ours(model, folder, number, max_tokens, reward)
                rows.append((theirs, mine))
                print(f"{case}, round {number + 1}: TRL {theirs:.3f}, ours {mine:.3f} CPU s per step", file=sys.stderr)
            ratios = [a / b for a, b in rows]
            theirs, mine = (statistics.median(column) for column in zip(*rows, strict=True))
            print(
                f"{case}: rollouts and update per CPU s: TRL {ROLLOUTS / theirs:.0f}, llmkit {ROLLOUTS / mine:.0f}; "
                f"ours over TRL's {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
            )
            print(
                f"    mean length: TRL {their_length:.1f}, llmkit {last['length']:.1f}; "
                f"{last['groups_without_signal']} of 8 groups without signal in the last step; log-probabilities of "
                f"sampler and trainer differ by at most {last['logprob_difference_max']:.1e}"
            )


if __name__ == "__main__":
    main()
