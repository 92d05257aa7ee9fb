"""Generation speed of llmkit compared with transformers' generate, on the same random Llama folders on a CPU.

    python benchmarks/generation.py --peers hf_generate.py --peer-python peers/bin/python

Two models with tied embeddings: `14m` (6 layers of 384, vocabulary 8,192) and `110m` (12 of 768, 32,000). Every run is
a fresh process, ours and theirs in turn, in rounds.

    decode   wall milliseconds per greedy step after prompts of 64 tokens: minimum and median over the steps, best of
             the rounds. The peer is the script of --peers FOLDER BATCH NEW [f32|bf16], which prints ms_per_step_min
             and ms_per_step_median as JSON. Ours is the generator, sampling and text included. The ratios, over
             transformers' float32 and over its bfloat16, are of minima, because the speed of a shared machine varies
    mixed    64 prompts of 4 to 60 tokens with completions of 4 to 200: CPU seconds of ours with 16 slots, and of
             transformers in padded batches of 16, each of which runs until its longest completion ends
    first    `llmkit sample` on a model of 0.1M parameters, from process start to the first byte of text, compared with
             `import torch` alone

"bfloat16" is the format that `sample --dtype bfloat16` selects on the machine; the last line prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # layers, hidden, heads, intermediate, vocabulary
    "14m": (6, 384, 6, 1024, 8192),
    "110m": (12, 768, 12, 2048, 32000),
    "tiny": (2, 64, 4, 160, 257),
}
DTYPES = ("float32", "bfloat16", "int8")
PROMPT = 64


def make_folder(name: str, folder: Path) -> Path:
    """Make a random Llama that never ends a text, with a tokenizer of one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from llmkit.model.config import ModelConfig
    from llmkit.model.folder import save_model
    from llmkit.model.transformer import Transformer

    layers, hidden, heads, intermediate, vocabulary = SHAPES[name]
    config = ModelConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads, model_type="llama",
        qk_norm=False, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = Transformer(config, seed=0)
    for layer in model.layers:  # zero at initialization
        layer.out.data.normal_(0, 0.02)
        layer.down.data.normal_(0, 0.02)
    folder.mkdir(parents=True)
    save_model(model, folder)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def mixed_work() -> list[tuple[int, int]]:
    """Return (prompt tokens, new tokens) of 64 requests: most are short, a few long."""
    chooser = random.Random(0)
    return [(chooser.randint(4, 60), min(200, 4 + int(chooser.expovariate(1 / 40)))) for _ in range(64)]


# ---- in a worker process


def ours(folder: str, dtype: str, slots: int):
    import torch

    from llmkit.generation.generator import Generator
    from llmkit.generation.next_token import Sampling
    from llmkit.model.devices import choose_precision
    from llmkit.model.folder import load_model
    from llmkit.tokenizer.encoding import load_tokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    precision = choose_precision(dtype, torch.device("cpu"))
    model = load_model(folder, dtype=precision.dtype)
    options = {"slots": slots, "end_ids": (), "weights": precision.weights}
    return Generator(model, load_tokenizer(folder), Sampling(0.0), **options), precision.name


def decode(folder: str, dtype: str, batch: int, new: int) -> dict:
    from llmkit.generation.requests import Request

    generator, name = ours(folder, dtype, batch)
    times, step = [], generator.decoder.step

    def timed(*arguments):
        times[-1].append(time.perf_counter())
        return step(*arguments)

    generator.decoder.step = timed
    for turn in range(3):
        times.append([])
        prompts = [[random.randrange(257) for _ in range(PROMPT)] for _ in range(batch)]
        list(generator.complete(Request(ids, max_tokens=new, number=turn) for ids in prompts))
    steps = [1000 * (after - before) for turn in times for before, after in pairwise(turn)]
    return {"least": min(steps), "median": statistics.median(steps), "name": name}


def mixed(folder: str, dtype: str) -> dict:
    from llmkit.generation.requests import Request

    generator, _ = ours(folder, dtype, 16)
    work = [Request([7] * length, max_tokens=new, number=i) for i, (length, new) in enumerate(mixed_work())]
    list(generator.complete(work[:4]))
    started = time.process_time()
    tokens = sum(len(samples[0].token_ids) for samples in generator.complete(work))
    return {"cpu": time.process_time() - started, "tokens": tokens}


def padded(folder: str) -> dict:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    work, started = mixed_work(), 0.0
    with torch.inference_mode():
        for turn in range(-1, len(work) // 16):
            rows = work[:2] if turn < 0 else work[16 * turn : 16 * turn + 16]
            started = time.process_time() if turn == 0 else started
            width = max(length for length, _ in rows)
            mask = torch.tensor([[0] * (width - length) + [1] * length for length, _ in rows])
            new = 2 if turn < 0 else max(new for _, new in rows)
            model.generate(mask * 7, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return {"cpu": time.process_time() - started, "tokens": sum(new for _, new in work)}


# ---- all contenders


def run(command: list[str], threads: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def decode_table(model: str, folder: Path, arguments: argparse.Namespace) -> None:
    worker = [sys.executable, __file__, "--worker", "decode", str(folder)]
    for batch in arguments.batches:
        commands = {f"llmkit {name}": [*worker, name, str(batch), str(arguments.new)] for name in DTYPES}
        if arguments.peers:
            peer = [arguments.peer_python, arguments.peers, str(folder), str(batch), str(arguments.new)]
            commands |= {f"transformers {name}": [*peer, name] for name in ("f32", "bf16")}
        runs: dict[str, list[dict]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                one = run(command, arguments.threads)
                if "peer" in one:
                    one = {"least": one["ms_per_step_min"], "median": one["ms_per_step_median"]}
                runs[name].append(one)
        least = {name: min(one["least"] for one in found) for name, found in runs.items()}
        print(f"\n{model}, batch {batch}\n{'':20}{'least ms':>10} {'median':>8} {'x f32':>6} {'x bf16':>7}")
        for name, found in runs.items():
            over = [least.get(f"transformers {peer}", float("nan")) / least[name] for peer in ("f32", "bf16")]
            median = min(one["median"] for one in found)
            print(f"{name:20}{least[name]:10.2f} {median:8.2f} {over[0]:6.2f} {over[1]:7.2f}", flush=True)


def mixed_table(model: str, folder: Path, arguments: argparse.Namespace) -> None:
    commands = {f"llmkit {name}": [sys.executable, __file__, "--worker", "mixed", str(folder), name] for name in DTYPES}
    if arguments.peers:
        commands["padded batches"] = [arguments.peer_python, __file__, "--worker", "padded", str(folder)]
    runs = {name: [run(command, arguments.threads) for _ in range(arguments.rounds)] for name, command in
            commands.items()}  # fmt: skip
    cpu = {name: min(one["cpu"] for one in found) for name, found in runs.items()}
    print(
        f"\n{model}, mixed lengths, {runs['llmkit float32'][0]['tokens']} tokens\n{'':20}{'CPU s':>8} {'x padded':>9}"
    )
    for name, seconds in cpu.items():
        print(f"{name:20}{seconds:8.2f} {cpu.get('padded batches', float('nan')) / seconds:9.2f}", flush=True)


def first_token(folder: Path, arguments: argparse.Namespace) -> None:
    commands = {
        "first token": [sys.executable, "-m", "llmkit", "sample", str(folder), "-p", "It was", "--max-tokens", "1"],
        "import torch": [sys.executable, "-c", "import torch; print()"],
    }
    print(f"\nfrom the start of the process\n{'':20}{'clock s':>8} {'CPU s':>8}")
    for name, command in commands.items():
        best = [float("inf")] * 2
        for _ in range(arguments.rounds + 1):
            started = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
            ) as process:
                assert process.stdout
                process.stdout.read(1)
                seconds = time.perf_counter() - started
                process.stdout.read()
                _, process.returncode, usage = os.wait4(process.pid, 0)
            best = [min(a, b) for a, b in zip(best, (seconds, usage.ru_utime + usage.ru_stime), strict=True)]
        print(f"{name:20}{best[0]:8.2f} {best[1]:8.2f}", flush=True)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--worker"]:
        kind, folder, *rest = sys.argv[2:]
        jobs = {"decode": decode, "mixed": mixed, "padded": padded}
        print(json.dumps(jobs[kind](folder, *[int(word) if word.isdigit() else word for word in rest])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--peers", help="script that times transformers' generate; without it, only ours")
    parser.add_argument("--peer-python", default=sys.executable, help="Python with transformers")
    parser.add_argument("--models", nargs="*", default=["14m", "110m"], choices=["14m", "110m"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--only", nargs="*", default=["decode", "mixed", "first"], choices=["decode", "mixed", "first"])
    parser.add_argument("--new", type=int, default=32, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models if arguments.only != ["first"] else []:
            folder = make_folder(model, Path(scratch, model))
            if "decode" in arguments.only:
                decode_table(model, folder, arguments)
            if "mixed" in arguments.only:
                mixed_table(model, folder, arguments)
        if "first" in arguments.only:
            first_token(make_folder("tiny", Path(scratch, "tiny")), arguments)
    from torch.backends.cpu import get_cpu_capability

    from llmkit.model.devices import choose_precision, torch

    sixteen = choose_precision("bfloat16", torch.device("cpu")).name
    print(f"\n{platform.machine()} {get_cpu_capability()}, {arguments.threads} threads; bfloat16 is {sixteen} here")


if __name__ == "__main__":
    main()
