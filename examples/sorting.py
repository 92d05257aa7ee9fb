"""Does reinforcement learning go beyond imitation? A tiny model sorts digits: a little sft, then rl with a verifier.

    python examples/sorting.py                   # three seeds, a table
    python examples/sorting.py --seeds 1 --quick
    python examples/sorting.py --curves docs/    # also draws the seeds into docs/sorting-success.svg
    python examples/sorting.py --algo dapo       # other options go to `llmkit rl`

For each seed, a tokenizer and a base model are trained on dialogues in which digits are sorted, an assistant is tuned
on a few conversations until it solves about half of the problems, and a policy is trained with 512 rollouts per step.
Both are tested on 500 problems that were used neither for training nor for choosing the best step.
"""

from __future__ import annotations

import random
from pathlib import Path

from learning import Rows, cpu_seconds, dialogue, evaluations, main, success, train

SHAPE = ["--depth", "4", "--hidden-size", "64", "--sequence-length", "64", "--batch-tokens", "4096"]
ATTEMPTS = ["--batch-size", "64", "--group", "8", "--max-tokens", "12"]


def sorting(count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` different pairs of four to six digits and the same digits sorted."""
    rng = random.Random(seed)
    answers: dict[str, str] = {}
    while len(answers) < count:
        digits = "".join(rng.choices("0123456789", k=rng.randint(4, 6)))
        answers[digits] = "".join(sorted(digits))
    return [(f"Sort {digits}", answer) for digits, answer in answers.items()]


def experiment(folder: Path, seed: int, quick: bool, further: list[str]) -> tuple[dict[str, float], Rows]:
    """Return the figures for one seed, and the evaluations of its policy."""
    started = cpu_seconds()
    every = iter(sorting(2_000 if quick else 26_000, seed))
    test, val, shown = ([next(every) for _ in range(20 if quick else count)] for count in (500, 200, 600))
    rest = list(every)

    def rows_of(some: list[tuple[str, str]]) -> Rows:
        return [{"prompt": prompt, "answer": answer, "verifier": "exact"} for prompt, answer in some]

    data = {
        "documents": [dialogue(*one) for one in rest],
        "chats": [{"prompt": prompt, "completion": answer} for prompt, answer in shown],
        "problems": rows_of(rest),
        "val": rows_of(val),
    }
    learning = ["--updates", "2", "--learning-rate", "1e-3"]
    horizon = ["--max-steps", "110", "--eval-every", "10"]
    if quick:  # no answer is correct after so few steps, but some are numbers
        horizon = ["--max-steps", "2", "--eval-every", "1", "--batch-size", "8", "--reward", r"format:\d+"]
    options = {
        "pretrain": [*SHAPE, "--max-steps", "10" if quick else "130"],
        "sft": ["--epochs", "2"],
        "rl": [*ATTEMPTS, *learning, *horizon, *further],
    }
    chat, policy = train(folder, seed, data, options)
    results = {f"right after {model.name}": success(folder, model, rows_of(test)) for model in (chat, policy)}
    return results | {"CPU seconds": cpu_seconds() - started}, evaluations(policy)


if __name__ == "__main__":
    main(__doc__, experiment, {"sorting-success.svg": "val_success"})
