"""`llmkit sft --loss dpo|ipo|kto|orpo|simpo` compared with TRL's trainers: equal steps, and pairs per CPU second.

    python benchmarks/preferences.py chat/ prefs.jsonl --peer-python peers/bin/python            # speed
    python benchmarks/preferences.py chat/ prefs.jsonl --peer-python peers/bin/python --check    # losses and gradients

chat/ is a model folder that both read, prefs.jsonl has {"prompt", "chosen", "rejected"} as texts. With --check, our
loss repeats 50 steps of TRL (`peers/trl_preferences.py`) on the same tokens, each side with torch's AdamW on its own
weights; printed are the largest differences of the loss and of the full gradient, relative to TRL's. Speed is that of
the command, and of TRL's trainer with precomputed log-probabilities of the reference, in float32 on one thread. Rounds
alternate TRL and ours, each in a new process; ours is the CPU time of a long run minus that of a short one, divided by
the difference in pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sft import cpu_seconds

PEER = Path(__file__).parent / "peers" / "trl_preferences.py"
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
SETTINGS = {  # for --check
    "dpo": {"beta": 0.1, "sft_weight": 0.3},
    "ipo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "margin": 1.0, "sft_weight": 0.3, "label_smoothing": 0.1},
}
STEPS, RATE = 50, 1e-4  # for --check: steps, and AdamW's learning rate
PAIRS = 8  # per step; answers for kto
SHORT, LONG = 5, 45  # steps


def differences(model_folder: str, data: str, loss: str, python: str, folder: Path) -> tuple[float, float]:
    """Return the largest relative differences of loss and gradient in `STEPS` steps."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from llmkit.model.folder import load_model
    from llmkit.model.weights import export_state_dict
    from llmkit.reward_model.comparisons import Candidates, Comparisons, packed_comparisons
    from llmkit.reward_model.preferences import PreferenceLoss, sequence_logprobs, with_references
    from llmkit.training.finetuning import load_unchanged
    from llmkit.training.preferences import Objective

    torch.set_num_threads(1)
    settings, record = SETTINGS[loss], folder / loss
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [python, str(PEER), model_folder, data, loss, "--steps", str(STEPS), "--batch", str(PAIRS), *options]
    subprocess.run([*command, "--learning-rate", str(RATE), "--record", str(record)], check=True, capture_output=True)

    def candidates(row: dict) -> Candidates:
        names = ("completion", "mismatched") if loss == "kto" else ("chosen", "rejected")
        ids = [np.array(row[name], np.int32) for name in ("prompt", *names)]
        trained = tuple(np.full(len(part), number > 0) for number, part in enumerate(ids))
        if loss == "orpo":
            trained = (np.arange(len(ids[0])) > 0, *trained[1:])
        ranks = (1 if row["label"] else 2, 0) if loss == "kto" else (1, 2)
        return Candidates(ids[0], tuple(ids[1:]), ranks, trained=trained)

    steps = json.loads((record / "steps.json").read_text())
    source = Comparisons(data, [candidates(row) for step in steps for row in step["answers"]])
    tuning = load_unchanged(model_folder, torch.device("cpu"), torch.float32)
    objective = Objective.of(loss, **settings)
    if objective.needs_reference:
        source = with_references(source, sequence_logprobs(source.candidates, tuning.model, tuning.pad_id, quiet=True))
    model, of_loss = tuning.model, PreferenceLoss(objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    apart_loss = apart_gradient = 0.0
    shell = load_model(model_folder, dtype=torch.float32)
    for number, step in enumerate(steps):
        batch = packed_comparisons([[one] for one in source.candidates[number * PAIRS : (number + 1) * PAIRS]], 8, 0)
        summed = of_loss(model, batch)
        optimizer.zero_grad()
        mean = summed.total / summed.targets
        mean.backward()
        for parameter, other in zip(shell.parameters(), model.parameters(), strict=True):
            parameter.data = other.grad.clone()
        ours, theirs = export_state_dict(shell, torch.float32), load_file(record / f"{number:03d}.safetensors")
        squares = [(ours[name] - value).square().sum() for name, value in theirs.items()]
        size = sum(value.square().sum() for value in theirs.values())
        apart_loss = max(apart_loss, abs(float(mean.detach()) - step["loss"]) / max(abs(step["loss"]), 1e-6))
        apart_gradient = max(apart_gradient, float((sum(squares) / size).sqrt()))
        optimizer.step()
    return apart_loss, apart_gradient


def ours(model: str, data: str, loss: str, folder: Path, tokens: int, round_number: int) -> float:
    """Return CPU seconds per pair of `llmkit sft`; the reference's log-probabilities are cached by an earlier run."""
    spent, pairs = [], []
    for steps in (SHORT, LONG):
        out = folder / f"{loss}-{round_number}-{steps}"
        command = [sys.executable, "-m", "llmkit", "sft", model, "--data", data, "--loss", loss, "-o", str(out)]
        command += ["--max-steps", str(steps), "--batch-tokens", str(tokens), "--learning-rate", "1e-4"]
        spent.append(cpu_seconds([*command, "--dtype", "float32", "--quiet"], folder)[0])
        pairs.append(sum(row["targets"] for row in map(json.loads, (out / "metrics.jsonl").open()) if "targets" in row))
    return (spent[1] - spent[0]) / (pairs[1] - pairs[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--peer-python", required=True, help="a Python with TRL")
    parser.add_argument("--loss", nargs="*", default=LOSSES, choices=LOSSES)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per step of ours")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, data = str(Path(arguments.model).resolve()), str(Path(arguments.data).resolve())
    with tempfile.TemporaryDirectory(prefix="llmkit-preferences-") as name:
        folder = Path(name)
        for loss in arguments.loss:
            if arguments.check:
                of_loss, of_gradient = differences(model, data, loss, arguments.peer_python, folder)
                print(f"{loss:6} {STEPS} steps: losses within {of_loss:.1e}, gradients {of_gradient:.1e}", flush=True)
                continue
            rows = []
            if loss in ("dpo", "ipo", "kto"):  # TRL also computes the reference before its clock starts
                ours(model, data, loss, folder, arguments.tokens, 0)
            command = [arguments.peer_python, str(PEER), model, data, loss, "--steps", "22", "--batch", str(PAIRS)]
            for number in range(1, arguments.rounds + 1):
                _, out = cpu_seconds(command, folder)
                theirs = json.loads(out.splitlines()[-1])["cpu_s_per_step"] / PAIRS
                rows.append((theirs, ours(model, data, loss, folder, arguments.tokens, number)))
            ratios = [their / own for their, own in rows]
            theirs, own = (1 / statistics.median(column) for column in zip(*rows, strict=True))
            print(
                f"{loss:6} TRL {theirs:6.1f}, ours {own:6.1f} pairs per CPU second: {statistics.median(ratios):.2f}x "
                f"({min(ratios):.2f}-{max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
