"""Memory and time of tuning adapters on frozen weights, unquantized, int8 and nf4, with 1.7B random parameters.

    python benchmarks/quantize.py --work /tmp/quantize --length 128 --steps 3 --save

Makes a folder of SmolLM2-1.7B's shape in bfloat16 (3.4 GB, once), with a vocabulary of 512, and runs `llmkit sft
--lora-rank 16` on it, in a process for each format. Peaks are of anonymous resident memory (RssAnon; the system can
drop the pages of the mapped folder at any time): during loading, during the steps, and with --save until the folder of
the last format is written, in float32. Seconds are wall and CPU, the minimum of the steps after the first. Set
OMP_NUM_THREADS=1 if other programs keep the cores busy, because threads wait for each other. The quality of the formats
is measured by benchmarks/narrow_weights.py. Linux only: reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FORMS = ("none", "int8", "nf4")
SHAPE = {
    "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_theta": 130000.0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def make_folder(folder: Path) -> None:
    """Write a folder of random weights and a tokenizer, with one weights file in memory at a time."""
    import torch

    from llmkit.model.config import ModelConfig
    from llmkit.model.folder import save_tensors
    from llmkit.model.weights import stock_shapes
    from llmkit.stages.train_bpe import TrainBpeConfig, run

    config = ModelConfig(**SHAPE, model_type="llama", qk_norm=False)
    texts = folder.with_suffix(".jsonl")
    texts.write_text(
        "".join(json.dumps({"text": f"The number {i} is {i * i % 97} beside {i + 3}."}) + "\n" for i in range(3000))
    )
    run(TrainBpeConfig(inputs=(str(texts),), vocab_size=512, out=str(folder), quiet=True))
    generator, shapes = torch.Generator().manual_seed(0), stock_shapes(config)

    def drawn(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()

    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    save_tensors(folder, config.to_hf("bfloat16"), sizes, drawn, 10**9)


def resident(process: subprocess.Popen) -> float:
    """Return anonymous resident memory in GB, 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon")), 0.0)


def cpu_seconds(process: subprocess.Popen) -> float:
    """Return user and system time so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(form: str, arguments: argparse.Namespace, folder: Path, data: Path) -> dict[str, float]:
    """Return the figures of a run, which is killed after its steps unless --save is given."""
    out = arguments.work / f"out-{form}"
    command = [sys.executable, "-m", "llmkit", "sft", str(folder), "--data", str(data), "--lora-rank", "16", "--quiet"]
    command += ["--max-steps", str(arguments.steps), "--sequence-length", str(arguments.length), "--force"]
    command += ["--batch-tokens", str(arguments.length), "--dtype", arguments.dtype, "-o", str(out), "--compile", "off"]
    command += [] if form == "none" else ["--quantize", form]
    command += ["--activation-checkpointing"] if arguments.activation_checkpointing else []
    work, peaks, rows, clocks = Path(f"{out}.partial"), {"load": 0.0, "steps": 0.0, "save": 0.0}, 0, []
    shutil.rmtree(work, ignore_errors=True)  # left by a killed run
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (rows < arguments.steps or (arguments.save and form == arguments.forms[-1])):
        begun = rows or (work / "state").exists()
        phase = "load" if not begun else "steps" if rows < arguments.steps else "save"
        peaks[phase] = max(peaks[phase], resident(process))
        now = (work / "metrics.jsonl").read_bytes().count(b"\n") if (work / "metrics.jsonl").exists() else 0
        if now > rows:
            rows = now
            clocks.append((time.perf_counter(), cpu_seconds(process)))
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
    errors = process.communicate()[1]
    if rows < arguments.steps:
        raise SystemExit(f"{' '.join(command)}\n{errors[-2000:]}")
    spent = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(clocks)]
    least = {"s a step": min(wall for wall, _ in spent), "CPU s a step": min(cpu for _, cpu in spent)}
    return {f"{phase} GB": value for phase, value in peaks.items() if value} | least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the model and the runs, 4 GB; 11 with --save"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--length", type=int, default=128, help="tokens per step, in one row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: expected 2 or more, for the first is not counted")
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder, data = arguments.work / "model", arguments.work / "chats.jsonl"
    if not (folder / "model.safetensors.index.json").exists():
        make_folder(folder)
    talk = "The number 7 is 49 beside 10. " * (arguments.length // 8)
    data.write_text("".join(json.dumps({"text": f"{i}: {talk}"}) + "\n" for i in range(8)))
    for form in arguments.forms:
        figures = measure(form, arguments, folder, data)
        print(f"{form:6}" + "".join(f"  {name} {value:.2f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
