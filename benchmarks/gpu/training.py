"""Full training steps on a GPU, kernels on and off: tokens per second, share of the peak (MFU), peak memory.

    python benchmarks/gpu/training.py                  # 124M and 1.5B parameters, bf16; each run a separate process
    python benchmarks/gpu/training.py --model 124M --kernels triton
    python benchmarks/gpu/training.py --smoke          # a tiny model on a CPU, the kernels in the interpreter

The step is that of `llmkit pretrain`: its model, loss, optimizer (Muon and AdamW) and trainer, compiled in the same
way, on random tokens, one document per row. "triton" and "torch" are values of LLMKIT_KERNELS. MFU counts 6 FLOPs per
matrix weight and token, and half of the attention square for causal attention (nanochat counts the full square),
relative to the GPU's dense bf16 peak in its data sheet; "of product" is relative to a large product in the same
process. 124M has heads of size 128 like nanochat's models, "124M, heads of 64" those of GPT-2. Rows are appended to
--out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import tables
from rows import RESULTS, Rows, machine, read_rows, results

# Data sheets, dense bf16, TFLOP/s
PEAKS = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "MI300X": 1307.4}
# layers, hidden size, intermediate size, heads, vocabulary, tokens per row, rows per micro-batch, micro-batches
MODELS = {
    "124M": (12, 768, 2048, 6, 50304, 1024, 64, 8),
    "124M, heads of 64": (12, 768, 2048, 12, 50304, 1024, 64, 8),
    "1.5B": (48, 1600, 4288, 25, 50304, 1024, 16, 4),
    "smoke": (1, 32, 64, 2, 96, 32, 1, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU; times nothing")
    parser.add_argument("--model", nargs="*", choices=list(MODELS)[:-1], default=list(MODELS)[:-1])
    parser.add_argument("--kernels", nargs="*", choices=["triton", "torch"], default=["triton", "torch"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after 3 warm-up steps [10]")
    parser.add_argument("--seconds", type=float, default=280, help="time limit of a run [280]")
    parser.add_argument("-o", "--out", type=Path, help=f"file of the rows [{RESULTS}]")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker[0], options.worker[1], options.steps, options.seconds)))
        return 0
    if not options.smoke:
        import torch

        if not torch.cuda.is_available():
            print("training.py: no GPU here; --smoke runs it on a CPU", file=sys.stderr)
            return 2
    models = ["smoke"] if options.smoke else options.model
    kernels = [{"triton": "interpret"}.get(name, name) if options.smoke else name for name in options.kernels]
    steps = 1 if options.smoke else options.steps
    file = Rows(options.out or results(options.smoke))
    rows = [row for row in read_rows(file.path) if row["stage"] == "machine"][-1:]
    if not rows:
        from clock import Clock

        clock = Clock("cpu" if options.smoke else "cuda")
        rows = [machine(file, options.smoke, clock.ceilings)]
        clock.free()
        del clock
    for model in models:
        for kernel in kernels:
            rows.append(file.add(**run(model, kernel, steps, options.seconds)))
    print(tables(rows))
    return 1 if any("note" in row for row in rows) else 0


def run(model: str, kernels: str, steps: int, seconds: float) -> dict:
    """Run one model with one choice of kernels in a new process, because Triton has one mode per process."""
    command = [sys.executable, __file__, "--worker", model, kernels, "--steps", str(steps)]
    command += ["--seconds", str(seconds - 10)]  # so that the run can stop and report itself
    row = {"stage": "training", "model": model, "kernels": kernels}
    try:
        done = subprocess.run(
            command, env={**os.environ, "LLMKIT_KERNELS": kernels}, stdout=subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return row | {"note": f"not done in {seconds:.0f} s"}
    if done.returncode:
        return row | {"note": f"failed with exit code {done.returncode}"}
    return row | json.loads(done.stdout.splitlines()[-1])


def work(name: str, kernels: str, steps: int, limit: float) -> dict:
    begun = time.monotonic()
    import numpy as np
    import torch
    from llmkit.kernels.dispatch import backend

    from llmkit.data.batches import TokenRows
    from llmkit.model.config import ModelConfig
    from llmkit.model.transformer import Transformer
    from llmkit.training.loss import next_token_loss
    from llmkit.training.optimizer import Schedule, build_optimizer
    from llmkit.training.plan import recipe
    from llmkit.training.speed import peak_flops, synchronize
    from llmkit.training.trainer import Trainer, TrainerSettings

    layers, hidden, intermediate, heads, words, length, micro_rows, micro_batches = MODELS[name]
    device = torch.device("cpu" if name == "smoke" else "cuda")
    assert backend(device.type) == kernels
    config = ModelConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    rows = micro_rows * micro_batches
    dtype = torch.float32 if name == "smoke" else torch.bfloat16
    model = Transformer(config, seed=0).to(device=device, dtype=dtype)
    optimizer = build_optimizer(model, recipe(1e9, hidden, length, rows * length))
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, words, (rows, length))
    documents = np.zeros((rows, length), np.int32)
    loss = next_token_loss if name == "smoke" else torch.compile(next_token_loss, dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, optimizer, Schedule(0, 0.2), loss, folder=Path(folder),
            settings=TrainerSettings(micro_batch_rows=micro_rows, quiet=True),
        )  # fmt: skip
        seconds, losses = [], []
        untimed = 0 if name == "smoke" else 3
        for at in range(untimed + steps):
            if at > untimed and time.monotonic() - begun > limit:
                break  # fewer steps than requested
            started = time.perf_counter()
            losses.append(trainer.train_step(TokenRows(tokens, np.roll(tokens, -1, 1), documents))["loss"])
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    rate = rows * length / statistics.median(seconds[untimed:])
    figures = {"loss": losses[-1], "step_s": statistics.median(seconds[untimed:]), "tokens_per_second": rate,
             "parameters": sum(p.numel() for p in model.parameters()),
             "micro_batch_rows": trainer.micro_batch_rows}  # fmt: skip
    if name != "smoke":
        gpu = torch.cuda.get_device_name()
        flops = rate * config.flops_per_token(context=length)
        peak = next((peak for key, peak in PEAKS.items() if key in gpu), None)
        figures |= {"gpu": gpu, "torch": torch.__version__, "peak_mb": torch.cuda.max_memory_allocated() / 2**20,
                  "mfu": None if peak is None else flops / peak / 1e12,
                  "of_product": flops / peak_flops(device, dtype)}  # fmt: skip
    return figures


if __name__ == "__main__":
    sys.exit(main())
