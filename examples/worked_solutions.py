"""Does a policy discover that writing out the solution pays off? Accuracy and length of a tiny model rise together.

    python examples/worked_solutions.py                   # three seeds, a table
    python examples/worked_solutions.py --seeds 1 --quick
    python examples/worked_solutions.py --curves docs/    # also draws the seeds, accuracy and length

The task is a walk through five rooms in a ring, from room 0: each digit is the number of doors to pass. `Walk 12231231`
ends in room 0. An answer that lists every room (`13034140 #### 0`) is nearly always right; one that stops earlier and
guesses is mostly wrong. The assistant is tuned on both: six in ten examples answer directly, one in ten lists every
room. Then `llmkit rl` rewards only correct answers, never the work itself (DeepSeek-AI 2025, arXiv 2501.12948,
figure 3, at a small scale).
"""

from __future__ import annotations

import random
from itertools import accumulate
from pathlib import Path

from learning import Rows, cpu_seconds, dialogue, evaluations, main, success, train

SHAPE = ["--depth", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--sequence-length", "64"]
ATTEMPTS = ["--batch-size", "32", "--group", "8", "--max-tokens", "16"]
STEPS = 8
ROOMS = 5


def walks(count: int, seed: int) -> list[str]:
    """Return `count` different walks, as digits from 1 to 3: the doors passed in each step."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices("123", k=STEPS))] = None
    return list(found)


def solution(doors: str, written: int) -> str:
    """Return the first `written` rooms and the last.

    >>> solution("12231231", 3)
    '130 #### 0'
    """
    rooms = [str(sum_ % ROOMS) for sum_ in accumulate(map(int, doors))]
    return " ".join([*(["".join(rooms[:written])] if written else []), f"#### {rooms[-1]}"])


def impatient(rng: random.Random) -> int:
    """Draw how many rooms a conversation lists: none with probability .6, otherwise each may be the last."""
    if rng.random() < 0.6:
        return 0
    return next((written for written in range(1, STEPS) if rng.random() < 0.15), STEPS)


def thorough(rng: random.Random) -> int:
    """Draw how many rooms a document lists: all of them in every other document."""
    return STEPS if rng.random() < 0.5 else rng.randint(0, STEPS)


def experiment(folder: Path, seed: int, quick: bool, further: list[str]) -> tuple[dict[str, float], Rows]:
    """Return the figures for one seed, and the evaluations of its policy."""
    started, rng = cpu_seconds(), random.Random(seed)
    every = iter(walks(1_000 if quick else 6_000, seed))
    test, val, shown = ([next(every) for _ in range(20 if quick else count)] for count in (400, 200, 1_500))
    rest = list(every)

    def rows_of(some: list[str]) -> Rows:
        return [{"prompt": f"Walk {doors}", "answer": solution(doors, 0)[-1], "verifier": "gsm8k"} for doors in some]

    data = {
        "documents": [dialogue(f"Walk {doors}", solution(doors, thorough(rng))) for doors in rest],
        "chats": [{"prompt": f"Walk {doors}", "completion": solution(doors, impatient(rng))} for doors in shown],
        "problems": rows_of(rest),
        "val": rows_of(val),
    }
    horizon = ["--max-steps", "60", "--eval-every", "5"]
    if quick:  # hardly any answer is correct after so few steps, but some rollouts end in an answer
        horizon = ["--max-steps", "2", "--eval-every", "1", "--batch-size", "8", "--reward", r"format:.*#### \d"]
    options = {
        "pretrain": [*SHAPE, "--batch-tokens", "4096", "--max-steps", "10" if quick else "250"],
        "sft": ["--epochs", "2"],
        "rl": [*ATTEMPTS, "--eval-samples", "4", *horizon, *further],
    }
    chat, policy = train(folder, seed, data, options)
    rows = evaluations(policy)
    results = {f"right after {model.name}, greedily": success(folder, model, rows_of(test)) for model in (chat, policy)}
    for name, row in (("first", rows[0]), ("last", rows[-1])):
        results |= {f"right, drawn, {name}": row["val_success"], f"tokens, drawn, {name}": row["val_length"]}
    return results | {"CPU seconds": cpu_seconds() - started}, rows


if __name__ == "__main__":
    main(__doc__, experiment, {"worked-success.svg": "val_success", "worked-length.svg": "val_length"})
