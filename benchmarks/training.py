"""Training speed of `llmkit pretrain` compared with transformers' Trainer and litgpt: same shape, tokens and batch.

    python benchmarks/training.py docs.jsonl.gz --hf-trainer hf_trainer.py --peer-python peers/bin/python

Two models: `tiny` (4 layers of 128, vocabulary 512, 12 rows of 64 per step) and `17m` (6 of 384, 8,192, 16 of 256).
Every run is a fresh process, one after the other, in rounds; a table's row is the best of the rounds in each column,
because the speed of a shared machine varies.

    tok/s        median over the steps after the first --skip, and its ratio to the best peer without compilation
    CPU ms       user + system time of the process per step, after --skip: steadier than tok/s on a shared machine; and
                 the ratio of the best peer without compilation to it
    first step   CPU and wall seconds from process start to the end of step 1
    peak MB      ru_maxrss

Ours is the command with cached tokens, measured from metrics.jsonl. Its optimizer is Muon + AdamW; the rows "AdamW" use
the library to run the same trainer, loss and batches with AdamW for every parameter, as the peers do. "plain eager" is
our model with torch's operations (the kernels' references), float32. Ours normalizes queries and keys (Qwen3), masks
documents and writes a line of metrics per step; the peers' models are Llamas without these.

transformers' Trainer is run by the script of --hf-trainer, which prints "STEP n" at the end of each step (fused AdamW;
bf16 is autocast). litgpt is its own `pretrain` (benchmarks/peers/litgpt_trainer.py): "as it comes" compiles and uses
AdamW unfused; the others use fused AdamW, with and without torch.compile, each from an empty compilation cache. Linux
only: reads /proc.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Shape:
    layers: int
    dim: int
    heads: int
    ffn: int
    vocab: int
    block: int
    batch: int
    tied: bool

    def peer_options(self, steps: int) -> list[str]:
        names = ("layers", "dim", "heads", "ffn", "vocab", "block", "batch")
        return [text for name in names for text in (f"--{name}", str(getattr(self, name)))] + ["--steps", str(steps)]

    def our_options(self, steps: int) -> list[str]:
        options = {
            "depth": self.layers, "hidden-size": self.dim, "num-attention-heads": self.heads,
            "sequence-length": self.block, "batch-tokens": self.batch * self.block,
            "max-steps": steps,
        }  # fmt: skip
        pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return pairs + (["--tie-word-embeddings"] if self.tied else [])


SHAPES = {
    "tiny": Shape(layers=4, dim=128, heads=4, ffn=384, vocab=512, block=64, batch=12, tied=True),
    "17m": Shape(layers=6, dim=384, heads=6, ffn=1024, vocab=8192, block=256, batch=16, tied=False),
}
# name: (program, precision, optimizer, options of the worker or the peer's script)
CONTENDERS = {
    "llmkit bf16": ("command", "bfloat16", "Muon+AdamW", []),
    "llmkit fp32": ("command", "float32", "Muon+AdamW", []),
    "llmkit bf16 AdamW": ("library", "bfloat16", "AdamW", []),
    "llmkit fp32 AdamW": ("library", "float32", "AdamW", []),
    "llmkit fp32 plain eager": ("library", "float32", "Muon+AdamW", ["--plain"]),
    "Trainer fp32": ("trainer", "float32", "AdamW", []),
    "Trainer bf16": ("trainer", "bfloat16", "AdamW", ["--bf16", "1"]),
    "litgpt fp32 eager": ("litgpt", "float32", "AdamW", ["--precision", "32-true", "--fused", "--eager"]),
    "litgpt bf16 eager": ("litgpt", "bfloat16", "AdamW", ["--precision", "bf16-mixed", "--fused", "--eager"]),
    "litgpt fp32 compiled": ("litgpt", "float32", "AdamW", ["--precision", "32-true", "--fused"]),
    "litgpt bf16 compiled": ("litgpt", "bfloat16", "AdamW", ["--precision", "bf16-mixed", "--fused"]),
    "litgpt bf16 as it comes": ("litgpt", "bfloat16", "AdamW unfused", ["--precision", "bf16-mixed"]),
}
COMPILED = ("litgpt fp32 compiled", "litgpt bf16 compiled", "litgpt bf16 as it comes")


# ---- ours through the library, in a worker process


def work(name: str, shape: Shape, steps: int, shards: str, tokenizer_vocab: int, out: Path) -> None:
    """Train as `pretrain` does, with the optimizer or the kernels of a contender."""
    from llmkit.data.batches import Batches
    from llmkit.data.shards import TokenShards
    from llmkit.model.devices import choose_device, choose_dtype
    from llmkit.model.transformer import Transformer
    from llmkit.stages.pretrain import PretrainConfig
    from llmkit.training.loss import next_token_loss
    from llmkit.training.optimizer import GroupSettings, Optimizer, Schedule, build_optimizer
    from llmkit.training.plan import Planner
    from llmkit.training.trainer import Trainer, TrainerSettings

    _, precision, rule, options = CONTENDERS[name]
    if "--plain" in options:
        _plain_kernels()
    tokens = TokenShards(Path(shards))
    options = PretrainConfig(
        depth=shape.layers, hidden_size=shape.dim, num_attention_heads=shape.heads,
        sequence_length=shape.block, batch_tokens=shape.batch * shape.block, tie_word_embeddings=shape.tied,
        max_steps=steps,
    )  # fmt: skip
    plan = Planner(options=options, vocab_size=tokenizer_vocab, corpus_tokens=tokens.tokens).plan()
    device = choose_device("cpu")
    dtype = choose_dtype(precision, device)
    model = Transformer(plan.model, seed=0).to(device=device, dtype=dtype)
    if rule == "AdamW":
        settings = GroupSettings("adamw", 1e-3)
        optimizer = Optimizer((key, parameter, settings) for key, parameter in model.named_parameters())
    else:
        optimizer = build_optimizer(model, plan.recipe)
    batches = Batches([tokens], plan.sequence_length, plan.batch_rows, seed=0)
    out.mkdir()
    trainer = Trainer(
        model,
        optimizer,
        Schedule(plan.warmup_steps, plan.decay_fraction),
        next_token_loss,
        folder=out,
        settings=TrainerSettings(micro_batch_rows=plan.micro_batch_rows, quiet=True),
    )
    trainer.fit(batches.prefetch(0), total_steps=steps)


def _plain_kernels() -> None:
    """Replace the kernels' CPU paths by their references, to time the formulas in eager torch."""
    import torch.nn.functional as F

    from llmkit.kernels import attention, projections, rowwise
    from llmkit.model import transformer

    def plain_loss(input, linear_weight, target, *, reduction, ignore_index, **_):
        logits = F.linear(input, linear_weight).flatten(0, -2)
        return F.cross_entropy(logits, target.flatten(), reduction=reduction, ignore_index=ignore_index)

    sys.modules["llmkit.kernels.linear"]._onednn = None  # the package exports a function of the same name
    rowwise.by_hand = projections.by_hand = lambda x: False
    attention._blocks_pay = lambda query, keys: False
    transformer.linear_cross_entropy = plain_loss


# ---- one run of a contender


@dataclass
class Outcome:
    step_seconds: list[float] = field(default_factory=list)
    first_cpu: float = 0.0
    first_wall: float = 0.0
    cpu_per_step: float = 0.0
    peak_mb: float = 0.0


def session_cpu(session: int) -> float:
    """Return the CPU seconds of all running processes of a session and of their ended children."""
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                total += sum(int(value) for value in fields[11:15])
    return total / TICK


def follow_lines(process: subprocess.Popen, marks: tuple[str, ...]):
    """Yield (steps done, clock) for each line of stdout that marks the end of a step."""
    done = 0
    for line in process.stdout:  # type: ignore[union-attr]
        if any(mark in line for mark in marks):
            done += 1
            yield done, time.perf_counter()


def follow_metrics(process: subprocess.Popen, path: Path):
    """Yield (rows, clock) whenever metrics.jsonl has grown; polls often only before the first row, because it costs."""
    seen = 0
    while True:
        running = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        rows = path.read_bytes().count(b"\n") if path.exists() else 0
        if rows > seen:
            seen = rows
            yield rows, time.perf_counter()
        if not running:
            return
        time.sleep(0.1 if seen else 0.005)


def measure(name: str, command: list[str], shape: Shape, steps: int, skip: int, threads: int, folder: Path) -> Outcome:
    who = CONTENDERS[name][0]
    ours = who in ("command", "library")
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]) if ours else "",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # no code compiled by earlier runs
    }  # fmt: skip
    outcome, marks = Outcome(), {}
    late = skip + (steps - skip) * 3 // 4  # before the run folder is renamed
    with open(folder / "log", "w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=log, stdout=log if ours else subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        metrics = folder / ("run.partial" if who == "command" else "run") / "metrics.jsonl"
        events = follow_metrics(process, metrics) if ours else follow_lines(process, ("STEP ", " step "))
        clocks = {}
        try:
            for done, clock in events:
                clocks[done] = clock
                for mark in (1, skip, late):
                    if done >= mark and mark not in marks:
                        marks[mark] = (done, session_cpu(process.pid))
                if not outcome.first_wall:
                    outcome.first_cpu, outcome.first_wall = marks[1][1], clock - started
        except BaseException:
            process.kill()
            raise
        _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode or late not in marks:
        raise SystemExit(f"{name}: failed\n" + "\n".join((folder / "log").read_text().splitlines()[-15:]))
    outcome.peak_mb = usage.ru_maxrss / 1024
    (first, before), (last, after) = marks[skip], marks[late]
    outcome.cpu_per_step = (after - before) / (last - first)
    if ours:
        final = folder / "run" / "metrics.jsonl"
        rows = [json.loads(line) for line in final.read_text().splitlines()]
        rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][skip:]
        outcome.step_seconds = [shape.batch * shape.block / rate for rate in rates]
    else:
        outcome.step_seconds = [clocks[step] - clocks[step - 1] for step in range(skip + 1, steps + 1)]
    return outcome


def command_of(name: str, arguments: argparse.Namespace, setting: Setting, steps: int) -> list[str]:
    who, precision, _, options = CONTENDERS[name]
    shape = SHAPES[setting.shape]
    if who == "command":
        return [
            sys.executable, "-m", "llmkit", "pretrain", str(setting.shards), "--tokenizer", str(setting.tokenizer),
            "--dtype", precision, "--device", "cpu", "--quiet", "-o", "run",
            *shape.our_options(steps),
        ]  # fmt: skip
    if who == "library":
        job = [name, setting.shape, str(steps), str(setting.shards), str(shape.vocab)]
        return [sys.executable, __file__, "--worker", *job]
    if who == "trainer":
        return [
            arguments.peer_python, arguments.hf_trainer, "--tokens", str(setting.tokens), *shape.peer_options(steps),
            *options,
        ]  # fmt: skip
    script = str(ROOT / "benchmarks" / "peers" / "litgpt_trainer.py")
    untied = [] if shape.tied else ["--untied"]
    python = arguments.litgpt_python or arguments.peer_python
    return [python, script, "--tokens", str(setting.tokens), *shape.peer_options(steps), *untied, *options]


# ---- the contenders' inputs


@dataclass(frozen=True)
class Setting:
    shape: str
    documents: Path
    tokenizer: Path
    shards: Path
    tokens: Path


def prepare(name: str, documents: str, megabytes: float, folder: Path) -> Setting:
    """Prepare the first documents, a tokenizer trained on them, their shards, and the same tokens as raw uint16."""
    import numpy as np

    from llmkit.data.shards import tokenize_documents
    from llmkit.tokenizer.encoding import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sample, tokenizer = folder / "docs.jsonl", folder / f"tok{SHAPES[name].vocab}"
    if not sample.exists():
        left = megabytes * 1e6
        with (gzip.open if documents.endswith(".gz") else open)(documents, "rb") as lines, open(sample, "wb") as out:
            for line in lines:
                left -= len(line)
                out.write(line)
                if left < 0:
                    break
    if not tokenizer.exists():
        train = ["train-bpe", str(sample), "--vocab-size", str(SHAPES[name].vocab), "-o", str(tokenizer), "--quiet"]
        subprocess.run([sys.executable, "-m", "llmkit", *train], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    shards = tokenize_documents([str(sample)], load_tokenizer(str(tokenizer)), folder / "cache", quiet=True)
    raw = folder / f"tokens{SHAPES[name].vocab}.bin"
    np.concatenate([shard.tokens for shard in shards._shards]).astype(np.uint16).tofile(raw)
    return Setting(name, sample, tokenizer, Path(shards.folder), raw)


# ---- all contenders


def table(shape_name: str, outcomes: dict[str, list[Outcome]]) -> str:
    """Return a table of the best rounds. The columns "x peer" are 1.00 for the best peer without compilation."""
    shape = SHAPES[shape_name]

    def least(measured: Callable[[Outcome], float]) -> dict[str, float]:
        return {name: min(measured(run) for run in runs) for name, runs in outcomes.items()}

    seconds = least(lambda run: statistics.median(run.step_seconds))
    rate = {name: shape.batch * shape.block / value for name, value in seconds.items()}
    cpu = least(lambda run: 1000 * run.cpu_per_step)
    first_cpu, first_wall = least(lambda run: run.first_cpu), least(lambda run: run.first_wall)
    peak = least(lambda run: run.peak_mb)
    peers = [name for name in outcomes if not name.startswith("llmkit") and name not in COMPILED]
    best_rate = max((rate[name] for name in peers), default=math.nan)
    least_cpu = min((cpu[name] for name in peers), default=math.nan)
    heads = f"{'tok/s':>8} {'x peer':>6} {'CPU ms':>8} {'x peer':>6} {'1st: CPU':>8} {'wall':>6} {'peak MB':>8}"
    lines = [f"{shape_name}: {shape}", f"{'':26}{'optimizer':15}{heads}"]
    for name in outcomes:
        lines.append(
            f"{name:26}{CONTENDERS[name][2]:15}{rate[name]:8,.0f} {rate[name] / best_rate:6.2f} {cpu[name]:8.1f} "
            f"{least_cpu / cpu[name]:6.2f} {first_cpu[name]:8.2f} {first_wall[name]:6.2f} {peak[name]:8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, shape, steps, shards, vocab = sys.argv[2:]
        work(name, SHAPES[shape], int(steps), shards, int(vocab), Path("run"))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("documents", help="JSONL with `text`, plain or gzip")
    parser.add_argument("--hf-trainer", help="script that runs transformers' Trainer")
    parser.add_argument("--peer-python", default=sys.executable, help="Python with transformers and accelerate")
    parser.add_argument("--litgpt-python", help="Python with litgpt, if it is another")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--no-compiled", action="store_true", help="skip compiled contenders (slow start)")
    parser.add_argument("--steps", type=int, help="[tiny 220, 17m 25]")
    parser.add_argument("--skip", type=int, help="warm-up steps [20, 17m 5]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; compiled contenders run once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=4, help="size of the documents")
    parser.add_argument("--work", type=Path, help="folder for documents, tokenizers and tokens, which is kept")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the contenders too
    names = [name for name in arguments.only if not (arguments.no_compiled and name in COMPILED)]
    if not arguments.hf_trainer:
        names = [name for name in names if CONTENDERS[name][0] != "trainer"]
    with tempfile.TemporaryDirectory() as scratch:
        kept = (arguments.work or Path(scratch) / "work").resolve()
        for model in arguments.models:
            setting = prepare(model, arguments.documents, arguments.megabytes, kept)
            steps, skip = (220, 20) if model == "tiny" else (25, 5)
            steps, skip = arguments.steps or steps, arguments.skip or skip
            outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
            for turn in range(arguments.rounds):
                for name in names:
                    if turn and name in COMPILED:
                        continue
                    folder = Path(tempfile.mkdtemp(dir=scratch))
                    command = command_of(name, arguments, setting, steps)
                    shape = SHAPES[model]
                    run = measure(name, command, shape, steps, skip, arguments.threads, folder)
                    outcomes[name].append(run)
                    rate = shape.batch * shape.block / statistics.median(run.step_seconds)
                    print(f"{model} {turn} {name}: {rate:,.0f}, {1000 * run.cpu_per_step:.1f} ms", file=sys.stderr)
            print(table(model, outcomes), flush=True)
    print(f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
