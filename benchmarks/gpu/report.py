"""Tables of measurements for the docs, and the list of open goals.

    python benchmarks/gpu/report.py build/gpu/results.jsonl     # the tables, then the list of README.md
    python benchmarks/gpu/report.py                             # only the list, with all goals open

share     relative to a large product, or a copy, in the same file
x best    the best peer's time over ours: above 1 we are faster
error     largest distance of outputs and gradients from float32, relative to their norms
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import read_rows
from shapes import FULL

OURS = "llmkit"
SPECIALIZED = "llmkit, specialized"  # with warp specialization (docs/kernels.md)
SMOKE = "**A smoke run: tiny shapes on a CPU. Nothing was timed; the milliseconds are the interpreter's.**"
Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Return all rows as Markdown, a table per kind of stage."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    machines = stages.get("machine", [])
    lines = [SMOKE, ""] if machines and "smoke" in machines[-1] else []
    if machines:
        lines += [", ".join(f"{name} {_text(value)}" for name, value in machines[-1].items() if name != "stage"), ""]
    for stage, columns in COLUMNS.items():
        if stage in stages:
            lines += [*_table(columns, [_with_ratios(row, machines, stages[stage]) for row in stages[stage]]), ""]
    return "\n".join(lines).rstrip()


def _with_ratios(row: Row, machines: Sequence[Row], others: Sequence[Row]) -> Row:
    """Add the share of the ceiling to a kernel's row, and to ours the ratio of the best peer's time."""
    if row["stage"] != "kernel":
        return row
    same = [x for x in others if (x["kind"], x["shape"]) == (row["kind"], row["shape"])]
    peers = [x for x in same if x["who"] not in (OURS, SPECIALIZED)]
    for name in ("forward", "both"):
        if f"{name}_ms" not in row:
            continue
        if machines and (ceiling := machines[-1].get(row["unit"])):
            row = row | {"share": row[f"{name}_rate"] / ceiling}
        if row["who"] == OURS and (times := [x[f"{name}_ms"] for x in peers if f"{name}_ms" in x]):
            row = row | {f"{name}_ratio": min(times) / row[f"{name}_ms"]}
    return row


COLUMNS = {  # by stage: heading, key, format
    "check": (("check", "name", ""), ("outcome", "outcome", ""), ("seconds", "seconds", ".0f")),
    "tiles": (("kernel", "kernel", ""), ("milliseconds by tiles", "milliseconds", "")),
    "kernel": (
        ("case", "kind", ""), ("shape", "shape", ""), ("who", "who", ""), ("fwd ms", "forward_ms", ".4g"),
        ("fwd+bwd ms", "both_ms", ".4g"), ("fwd rate", "forward_rate", ".4g"), ("bwd rate", "backward_rate", ".4g"),
        ("unit", "unit", ""), ("share", "share", ".0%"), ("peak MB", "peak_mb", ".0f"), ("error", "error", ".1e"),
        ("x best fwd", "forward_ratio", ".2f"), ("x best fwd+bwd", "both_ratio", ".2f"), ("note", "note", ""),
    ),
    "training": (
        ("model", "model", ""), ("kernels", "kernels", ""), ("parameters", "parameters", ",d"), ("loss", "loss", ".4f"),
        ("s/step", "step_s", ".3f"), ("tokens/s", "tokens_per_second", ",.0f"), ("MFU", "mfu", ".1%"),
        ("of product", "of_product", ".1%"), ("peak MB", "peak_mb", ",.0f"), ("note", "note", ""),
    ),
    "generation": (
        ("model", "model", ""), ("who", "who", ""), ("batch", "batch", "d"), ("tokens/s", "tokens_per_second", ",.0f"),
        ("s/step", "step_s", ".2e"), ("launches", "launches", ",d"), ("share", "share", ".0%"),
        ("x eager", "x_eager", ".2f"), ("x hf", "x_hf", ".2f"), ("error", "error", ".1e"), ("note", "note", ""),
    ),
    "end": (("stage", "name", ""), ("outcome", "outcome", ""), ("seconds", "seconds", ".0f")),
}  # fmt: skip


def _table(columns: Sequence[tuple[str, str, str]], rows: Iterable[Row]) -> list[str]:
    lines = ["| " + " | ".join(heading for heading, _, _ in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = ["" if row.get(key) is None else _text(row[key], form) for _, key, form in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _text(value: Any, form: str = "") -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(x, '.4g')}" for name, x in value.items())
    return format(value, form or ".4g" if isinstance(value, float) else form) if not isinstance(value, str) else value


# ---- the goals


@dataclass(frozen=True)
class Goal:
    """A goal; `figure` returns the measured figure from rows, or None if it is open."""

    what: str
    peers: str
    goal: str
    figure: Callable[[list[Row]], str | None]


def _kernel(kind: str, shape: object, *keys: str, peer: str | None = None) -> Callable[[list[Row]], str | None]:
    """Return a function for the figures `keys` of our row of a case, followed by the speed-up over `peer`, if given."""

    def figure(rows: list[Row]) -> str | None:
        times = {row["who"]: row for row in rows if (row.get("kind"), row.get("shape")) == (kind, str(shape))}
        ours = times.get(OURS, {})
        if any(ours.get(key) is None for key in keys):
            return None
        texts = [f"{ours[key]:.4g} {'ms' if key.endswith('_ms') else ours['unit']}" for key in keys]
        name = "forward_ms" if keys[0].startswith("forward") else "both_ms"
        if peer and name in times.get(peer, {}):
            texts.append(f"{times[peer][name] / ours[name]:.2f}x {peer}")
        return ", ".join(texts)

    return figure


def _all(stage: str, key: str, form: str, **fields: object) -> Callable[[list[Row]], str | None]:
    """Return a function for one figure of every row of a stage that has these fields."""

    def figure(rows: list[Row]) -> str | None:
        texts = [
            f"{row.get('kernels') or row.get('who')} {format(row[key], form)}"
            for row in rows
            if row["stage"] == stage and all(row.get(k) == v for k, v in fields.items()) and row.get(key) is not None
        ]
        return ", ".join(texts) or None

    return figure


def _tiles(rows: list[Row]) -> str | None:
    chosen = [row for row in rows if row["stage"] == "tiles"]
    return f"{len(chosen)} kernels, in tuned.json" if chosen else None


def _specialized(rows: list[Row]) -> str | None:
    """Return the speed-up of warp specialization over the default tiles, for each case that has both."""
    times = {(row["kind"], row["shape"], row["who"]): row for row in rows if row["stage"] == "kernel"}
    texts = []
    for (kind, shape, who), row in times.items():
        usual = times.get((kind, shape, OURS), {}) if who == SPECIALIZED else {}
        ratios = [
            f"{name} {usual[key] / row[key]:.2f}x"
            for name, key in (("forward", "forward_ms"), ("both", "both_ms"))
            if key in usual and key in row
        ]
        if ratios or (who == SPECIALIZED and "note" in row):
            texts.append(f"{kind} {shape}: {', '.join(ratios) or row['note']}")
    return "; ".join(texts) or None


def _unmeasured(rows: list[Row]) -> None:
    return None


LONG, LOSS, GRPO, CACHE = FULL.attention[0], FULL.loss[0], FULL.grpo[0][1], FULL.decode[1]
GOALS = (
    Goal("attention forward, head size 128, causal, 8,192 tokens", "SDPA flash, SDPA cuDNN, flex_attention",
         "500 TFLOP/s, 1.3x SDPA flash", _kernel("attention causal", LONG, "forward_rate", peer="SDPA flash")),
    Goal("attention backward, the same", "the same", "380 TFLOP/s",
         _kernel("attention causal", LONG, "backward_rate")),
    Goal("attention, packed documents", "flex_attention compiled", "1.5x flex",
         _kernel("attention packed", LONG, "both_rate", peer="flex_attention")),
    Goal("attention, sliding window", "flex_attention compiled", "cost proportional to the window",
         _kernel("attention windowed", LONG, "both_ms", peer="flex_attention")),
    Goal("attention at head size 64 and 128, shorter rows", "all of them", "reported",
         _kernel("attention causal", FULL.attention[2], "forward_rate", "backward_rate", peer="SDPA flash")),
    Goal("decode against a KV cache, batch 1, 32, 256", "SDPA masked, flex_attention", "reported in TB/s",
         _kernel("decode", CACHE, "forward_rate", peer="SDPA masked")),
    Goal("linear cross-entropy, 8192 x 4096 x 128256", "Liger, cut-cross-entropy, compiled torch, torch's own",
         "36 ms, 3x Liger's Triton path, its memory", _kernel("loss", LOSS, "both_ms", peer="Liger")),
    Goal("linear cross-entropy, 65536 x 768 x 50304 and 16384 x 1600 x 50304", "the same", "reported",
         _kernel("loss", FULL.loss[1], "both_ms", peer="torch.compile")),
    Goal("log-probs for RL, forward only", "Liger's, compiled torch", "3x Liger",
         _kernel("logprobs", GRPO, "forward_ms", peer="Liger")),
    Goal("a GRPO step", "Liger's, compiled torch", "no slower than compiled torch",
         _kernel("grpo", GRPO, "both_ms", peer="torch.compile")),
    Goal("tile sizes of every kernel", "the default tiles, chosen by compiling", "the fastest", _tiles),
    Goal("warp specialization: forward, backward, log-probabilities", "the default tiles",
         "the faster of the two, by case", _specialized),
    Goal("decode step at 124M and 1.5B parameters, batch 1, 16, 64", "CUDA graphs off; transformers' generate",
         "reported, with the share of bandwidth", _all("generation", "tokens_per_second", ",.0f", model="124M")),
    Goal("`--quantize nf4` and `int8` with LoRA at 1.5B and 7B: seconds per step, peak memory", "PEFT on bitsandbytes",
         "1.2x its step, its memory", _unmeasured),
    Goal("training step at 124M parameters, kernels on and off", "nanochat (41% MFU)", "45% MFU",
         _all("training", "mfu", ".1%", model="124M")),
    Goal("training step at 1.5B parameters, kernels on and off", "nanochat (50% MFU)", "52% MFU",
         _all("training", "mfu", ".1%", model="1.5B")),
)  # fmt: skip


def goals(rows: list[Row]) -> str:
    """Return the table of README.md: every goal, with its figure or "open"; smoke runs measure none."""
    rows = [] if any("smoke" in row for row in rows) else rows
    columns = (("what", "what", ""), ("compared with", "peers", ""), ("goal", "goal", ""), ("measured", "figure", ""))
    lines = ({"what": g.what, "peers": g.peers, "goal": g.goal, "figure": g.figure(rows) or "open"} for g in GOALS)
    return "\n".join(_table(columns, lines))


if __name__ == "__main__":
    measured = [row for path in sys.argv[1:] for row in read_rows(Path(path))]
    if measured:
        print(tables(measured), end="\n\n")
    print(goals(measured))
