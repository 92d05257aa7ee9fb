"""Decoding on a GPU, with and without CUDA graphs, compared with transformers' generate: tokens/s and launches.

    python benchmarks/gpu/generation.py                # random weights, 124M and 1.5B parameters, bf16: a few minutes
    python benchmarks/gpu/generation.py --model 124M --batches 1
    python benchmarks/gpu/generation.py --smoke        # a tiny model on a CPU, the kernels in the interpreter

All contenders have the same weights and prompts of 128 tokens, and take turns to generate --new tokens in each of
--rounds rounds. A step of ours is `Decoder.step`, the argmax, and its transfer to Python; transformers' time is the
difference between `generate` of 1 + NEW tokens and of one. The figure is the median over the rounds.

    launches  GPU operations launched per step, copies included
    share     of the copy bandwidth in this run: weights once, and keys and values up to the mean position
    x eager   tokens per second relative to ours without graphs; x hf relative to transformers
    error     distance of the last logits from those of the model's full forward pass, relative to their norm

A contender with wrong logits is not timed. Rows are appended to --out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from report import tables
from rows import RESULTS, Rows, machine, results

# layers, hidden size, intermediate size, heads, vocabulary, prompt tokens
MODELS = {
    "124M": (12, 768, 2048, 12, 50304, 128),
    "1.5B": (48, 1600, 4288, 25, 50304, 128),
    "smoke": (1, 32, 64, 2, 96, 12),
}
GRAPHS, EAGER, PEER = "llmkit graphs", "llmkit eager", "transformers"
BOUND = 0.05  # on the error; bf16 with 48 layers has about 0.01
STARTS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "hipLaunch", "hipExtLaunch",
          "hipModuleLaunch", "hipGraphLaunch", "hipMemcpy", "hipMemset")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU; times nothing")
    parser.add_argument("--model", nargs="*", choices=["124M", "1.5B"], default=["124M", "1.5B"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--new", type=int, default=64, help="new tokens per round [64]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, help=f"file of the rows [{RESULTS}]")
    options = parser.parse_args()
    if options.smoke:  # before torch, which may import triton
        os.environ |= {"LLMKIT_KERNELS": "interpret", "TRITON_INTERPRET": "1"}
        warnings.filterwarnings("ignore")
        options.model, options.batches, options.new, options.rounds = ["smoke"], [1, 2], 2, 1
    import torch
    from clock import Clock
    from llmkit.kernels.dispatch import backend

    if not options.smoke and not torch.cuda.is_available():
        print("generation.py: no GPU here; --smoke runs it on a CPU", file=sys.stderr)
        return 2
    device = "cpu" if options.smoke else "cuda"
    file = Rows(options.out or results(options.smoke))
    with torch.inference_mode():
        rows = [machine(file, options.smoke, Clock(device).ceilings)]
        bandwidth = rows[0]["TB/s"]
        for name in options.model:
            for row in measure(name, device, options.batches, options.new, options.rounds, bandwidth):
                rows.append(file.add(stage="generation", kernels=backend(device), **row))
    print(tables(rows))
    return (
        1 if any(row.get("who", PEER) != PEER and "note" in row and "absent" not in row["note"] for row in rows) else 0
    )


def measure(name: str, device: str, batches: list[int], new: int, rounds: int, bandwidth: float) -> Iterator[dict]:
    """Yield the rows of one model: all contenders at each batch size."""
    import torch

    from llmkit.model.config import ModelConfig
    from llmkit.model.transformer import Transformer

    layers, hidden, intermediate, heads, words, prompt = MODELS[name]
    config = ModelConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Transformer(config, seed=0)
    for layer in model.layers:  # zero at initialization
        layer.out.data.normal_(0, 0.02)
        layer.down.data.normal_(0, 0.02)
    model = model.to(device=device, dtype=dtype).eval()
    peer = transformers_model(model, device)
    for batch in batches:
        ids_BT = torch.randint(0, words, (batch, prompt + new), generator=torch.Generator().manual_seed(batch))
        runs = {
            GRAPHS: ours(model, ids_BT, prompt, "auto") if device == "cuda" else "absent: needs a GPU",
            EAGER: ours(model, ids_BT, prompt, None),
            PEER: peer if isinstance(peer, str) else theirs(peer, ids_BT.to(device), prompt),
        }
        expected_BV = model.logits(model(ids_BT.to(device))[:, -1]).float()
        cache = 2 * layers * hidden * dtype.itemsize * (prompt + new / 2)
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) * dtype.itemsize
        results = contest(runs, expected_BV, rounds)
        for who, row in results.items():
            row |= {"model": name, "batch": batch, "who": who}
            if "step_s" in row:
                row["tokens_per_second"] = batch / row["step_s"]
                row["share"] = (matrices + batch * cache) / row["step_s"] / 1e12 / bandwidth
                for other, key in ((EAGER, "x_eager"), (PEER, "x_hf")):
                    if "step_s" in results[other]:
                        row[key] = results[other]["step_s"] / row["step_s"]
        yield from results.values()
        del runs
        gc.collect()


# A run is one round: it returns seconds per step, the last logits (B, V), and, if the argument is True, launches per
# step.
Run = Callable[[bool], tuple[float, object, int | None]]


def contest(runs: dict[str, Run | str], expected_BV, rounds: int) -> dict[str, dict]:
    """Return each contender's results: checked in an untimed round, then timed in turn."""
    found: dict[str, dict] = {}
    for who, run in runs.items():
        if isinstance(run, str):
            found[who] = {"note": run}
            continue
        try:
            _, logits_BV, launches = run(True)
        except Exception as error:  # any error of a peer goes into its row
            found[who] = {"note": f"failed: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:120]}"}
            continue
        error = float((logits_BV.float() - expected_BV).norm() / expected_BV.norm())
        found[who] = {"error": error, "launches": launches, "times": []}
        if not error <= BOUND:
            found[who]["note"] = f"WRONG: error above {BOUND}; not timed"
    for _ in range(rounds):
        for who, row in found.items():
            if "note" not in row:
                row["times"].append(runs[who](False)[0])
    for row in found.values():
        if times := row.pop("times", None):
            row["step_s"] = statistics.median(times)
    return found


def ours(model, ids_BT, prompt: int, record) -> Run:
    import numpy as np

    from llmkit.generation.decode import Decoder
    from llmkit.generation.next_token import Sampling, choose_tokens

    rows_BT = ids_BT.tolist()
    decoder = Decoder(model, len(rows_BT), record=record)
    draws = np.zeros(len(rows_BT))  # not used

    def step(at: int):
        logits_BV = decoder.step([row[at] for row in rows_BT], [at] * len(rows_BT))
        choose_tokens(logits_BV, draws, Sampling(0.0)).tokens.tolist()
        return logits_BV

    def run(counting: bool):
        for slot, row in enumerate(rows_BT):
            decoder.load(slot, decoder.prefill(row[:prompt]))
        synchronize(model.embed_tokens.device)
        started = time.perf_counter()
        for at in range(prompt, len(rows_BT[0])):
            logits_BV = step(at)
        seconds = (time.perf_counter() - started) / (len(rows_BT[0]) - prompt)
        launches = starts(lambda: step(len(rows_BT[0]) - 1)) if counting else None
        return seconds, logits_BV, launches

    return run


def transformers_model(model, device: str):
    """Return the same weights as a transformers model, or the reason why that is impossible."""
    if importlib.util.find_spec("transformers") is None:
        return "absent: not installed"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from llmkit.model.folder import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        try:  # any error of the import makes the peer absent
            from transformers import AutoModelForCausalLM

            dtype = model.embed_tokens.dtype
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        except Exception as error:
            return f"absent: {str(error).splitlines()[0]}"
    peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = None, 0
    return peer.to(device).eval()


def theirs(peer, ids_BT, prompt: int) -> Run:
    def seconds(length: int) -> float:
        prompts_BT = ids_BT[:, :prompt]
        details = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        synchronize(ids_BT.device)
        started = time.perf_counter()
        peer.generate(prompts_BT, attention_mask=prompts_BT.new_ones(prompts_BT.shape), **details)
        synchronize(ids_BT.device)
        return time.perf_counter() - started

    def run(counting: bool):
        new = ids_BT.shape[1] - prompt
        logits_BV, launches = peer(ids_BT).logits[:, -1], None
        if counting and (many := starts(lambda: seconds(5))) and (few := starts(lambda: seconds(1))):
            launches = round((many - few) / 4)
        return (seconds(1 + new) - seconds(1)) / new, logits_BV, launches

    return run


def starts(run: Callable[[], object]) -> int | None:
    """Count the driver calls of a run that launch GPU operations; None without a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    return sum(event.name.startswith(STARTS) for event in profiled.events()) or None


def synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
