"""TRL's preference trainers (DPOTrainer, KTOTrainer, ORPOTrainer, CPOTrainer) on a model folder and a file of pairs.

    trl-python benchmarks/peers/trl_preferences.py chat/ prefs.jsonl dpo --steps 50 --record record/
    trl-python benchmarks/peers/trl_preferences.py chat/ prefs.jsonl dpo --steps 12

With `--record`, each step's token ids, loss and gradients go to a file, and torch's AdamW updates the model. Without it
the trainer runs as usual, and the last line has the CPU seconds per step. TRL itself is not patched.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("loss", choices=("dpo", "ipo", "kto", "orpo", "simpo"))
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch", type=int, default=8, help="pairs per step; answers for kto")
parser.add_argument("--beta", type=float, default=0.1)
parser.add_argument("--margin", type=float, default=0.05, help="gamma of simpo")
parser.add_argument("--label-smoothing", type=float, default=0.0, help="label smoothing of simpo")
parser.add_argument("--sft-weight", type=float, default=0.0, help="SFT loss weight of dpo, ipo and simpo")
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--record", type=Path)
arguments = parser.parse_args()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)


def records() -> list[dict]:
    """Return conversations for TRL, as many as the steps need; for kto, every second answer is desirable."""
    with open(arguments.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    wanted = arguments.steps * arguments.batch
    rows = (rows * -(-wanted // len(rows)))[:wanted]
    made = []
    for number, row in enumerate(rows):
        prompt = [{"role": "user", "content": row["prompt"]}]
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        if arguments.loss == "kto":
            good = number % 2 == 0
            made.append({"prompt": prompt, "completion": sides["chosen" if good else "rejected"], "label": good})
        else:
            made.append({"prompt": prompt, **sides})
    return made


def make_trainer():
    """Make the trainer of the loss: float32, one thread, batches in the order of the file."""
    folder = tempfile.mkdtemp(prefix="trl-")
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": arguments.batch,
        "max_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "beta": arguments.beta,
        "max_length": 512,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "seed": 0,
    }
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    given = {"model": model, "train_dataset": Dataset.from_list(records()), "processing_class": tokenizer}
    if arguments.loss in ("dpo", "ipo"):
        from trl import DPOConfig, DPOTrainer

        types, weights = ["sigmoid" if arguments.loss == "dpo" else "ipo"], [1.0]
        if arguments.sft_weight:
            types, weights = [*types, "sft"], [*weights, arguments.sft_weight]
        args = DPOConfig(**common, loss_type=types, loss_weights=weights, precompute_ref_log_probs=True)
        return DPOTrainer(args=args, **given)
    if arguments.loss == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer(args=KTOConfig(**common, precompute_ref_log_probs=True), **given)
    if arguments.loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(args=ORPOConfig(**common), **given)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    more = {"simpo_gamma": arguments.margin, "cpo_alpha": arguments.sft_weight}
    more["label_smoothing"] = arguments.label_smoothing
    return CPOTrainer(args=CPOConfig(**common, loss_type="simpo", **more), **given)


def answers_of(batch: dict) -> list[dict]:
    """Return the token ids of each pair; for kto, of each answer and of its mismatched answer for the KL term."""
    rows = []
    if arguments.loss in ("orpo", "simpo"):
        for number in range(len(batch["chosen_input_ids"])):
            sides = {}
            for side in ("chosen", "rejected"):
                attended = batch[f"{side}_attention_mask"][number].bool()
                ids, labels = batch[f"{side}_input_ids"][number][attended], batch[f"{side}_labels"][number][attended]
                sides[side], sides["prompt"] = ids[labels != -100].tolist(), ids[labels == -100].tolist()
            rows.append(sides)
        return rows
    names = {"": "completion", "KL_": "mismatched"} if arguments.loss == "kto" else {"": "answer"}
    for prefix, name in names.items():
        for number, ids in enumerate(batch[f"{prefix}input_ids"]):
            attended, answered = (batch[f"{prefix}{kind}_mask"][number].bool() for kind in ("attention", "completion"))
            if prefix == "":
                rows.append({"prompt": ids[attended & ~answered].tolist()})
            rows[number][name] = ids[answered].tolist()
    if arguments.loss == "kto":
        for row, label in zip(rows, batch["label"].tolist(), strict=True):
            row["label"] = bool(label)
        return rows
    half = len(rows) // 2
    return [
        {"prompt": better["prompt"], "chosen": better["answer"], "rejected": worse["answer"]}
        for better, worse in zip(rows[:half], rows[half:], strict=True)
    ]


class Clock(TrainerCallback):
    """CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.process_time())


def main() -> None:
    trainer = make_trainer()
    if arguments.record is None:
        trainer.add_callback(clock := Clock())
        trainer.train()
        started, ended = clock.seconds[1], clock.seconds[-1]  # after two warm-up steps
        print(json.dumps({"cpu_s_per_step": (ended - started) / (len(clock.seconds) - 2)}))
        return
    arguments.record.mkdir(parents=True, exist_ok=True)
    model = trainer.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    model.train()
    steps = []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        optimizer.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        save_file(gradients, arguments.record / f"{number:03d}.safetensors")
        steps.append({"loss": float(loss), "answers": answers_of(batch)})
        optimizer.step()
        if number + 1 == arguments.steps:
            break
    (arguments.record / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
