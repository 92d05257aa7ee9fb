"""What stands beside a model in a run folder: manifest with ancestry, metrics, loss curve, model card.

write_manifest(folder, "pretrain", options, inputs=[...], parents=["tok/"], results={...})
with MetricsLog(folder / "metrics.jsonl") as log:
    log.write({"step": 1, "loss": 4.2})
write_loss_curve(folder)
write_model_card(folder)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from llmkit.errors import UserError
from llmkit.stream import atomic_file

MANIFEST_VERSION = 1
PACKAGES = ("llmkit", "torch", "triton", "numpy", "tokenizers", "safetensors")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_inputs(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Path, size in bytes and SHA-256 of each input file; stdin is named without a hash."""
    return [
        {"path": path}
        if path == "-"
        else {"path": path, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}
        for path in paths
    ]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a folder, or None where a folder of foreign origin has none."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; remove the file to go on without it") from error


def write_manifest(
    folder: Path,
    stage: str,
    options: Mapping[str, Any],
    *,
    inputs: Sequence[Mapping[str, Any]] = (),
    parents: Sequence[str] = (),
    results: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `manifest.json`: how the folder was made, by what, from what, back to the first ancestor."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "stage": stage,
        "command": shlex.join(["llmkit", *sys.argv[1:]]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": dict(options),
        "versions": versions,
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "inputs": [dict(item) for item in inputs],
        "parents": [{"path": path, "manifest": read_manifest(path)} for path in parents],
        "results": dict(results or {}),
    }
    with atomic_file(folder / "manifest.json", "w") as handle:
        json.dump(manifest, handle, indent=2, ensure_ascii=False)
        handle.write("\n")
    return manifest


class MetricsLog:
    """`metrics.jsonl`: one object a line, each on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: Mapping[str, Any]) -> None:
        self.handle.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [orjson.loads(line) for line in lines if line.strip()]


def trim_metrics(path: Path, step: int) -> None:
    """Drop rows after `step`, which a resumed run will write again."""
    kept = [row for row in read_metrics(path) if row.get("step", 0) <= step]
    with atomic_file(path) as handle:
        for row in kept:
            handle.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def write_loss_curve(folder: Path) -> None:
    """Draw `loss.svg` from `metrics.jsonl`: training loss, and validation loss where it was measured."""
    rows = read_metrics(folder / "metrics.jsonl")
    curves = {
        "training": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "validation": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
    }
    with atomic_file(folder / "loss.svg", "w") as handle:
        handle.write(_svg({name: points for name, points in curves.items() if points}))


def _svg(curves: Mapping[str, list[tuple[float, float]]], width: int = 720, height: int = 360) -> str:
    colours = {"training": "#3b6fb6", "validation": "#d1495b"}
    left, right, top, bottom = 56, 12, 12, 36
    points = [point for line in curves.values() for point in line] or [(0, 0)]
    steps, losses = [p[0] for p in points], sorted(p[1] for p in points)
    low, high = (
        losses[0],
        losses[min(len(losses) - 1, int(0.98 * len(losses)))],
    )  # the first steps would flatten the rest
    high = high if high > low else low + 1
    last = max(steps) or 1

    def place(point: tuple[float, float]) -> str:
        x = left + point[0] / last * (width - left - right)
        y = top + (1 - (min(point[1], high) - low) / (high - low)) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for part in range(5):
        loss, step = low + part / 4 * (high - low), part / 4 * last
        y, x = place((0, loss)).split(",")[1], place((step, low)).split(",")[0]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{loss:.2f}</text>')
        parts.append(f'<text x="{x}" y="{height - 18}" text-anchor="middle">{step:,.0f}</text>')
    for number, (name, line) in enumerate(curves.items()):
        thin = line[:: max(1, len(line) // 1000)]
        parts.append(
            f'<polyline fill="none" stroke="{colours[name]}" stroke-width="1.5" points="{" ".join(map(place, thin))}"/>'
        )
        parts.append(f'<text x="{width - 90}" y="{24 + 16 * number}" fill="{colours[name]}">{name}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">step</text></svg>')
    return "\n".join(parts) + "\n"


def write_model_card(folder: Path) -> None:
    """Write `README.md` from the manifest: what the model is, how it was made, how to run it."""
    manifest = read_manifest(folder) or {}
    results = manifest.get("results", {})
    rows = "\n".join(
        f"| {key} | {value} |" for key, value in results.items() if not isinstance(value, (dict, list))
    )
    ancestry, line = manifest, []
    while ancestry:
        line.append(f"1. `{ancestry.get('command', '?')}`")
        ancestry = next((p["manifest"] for p in ancestry.get("parents", []) if p.get("manifest")), None)
    name = folder.name.removesuffix(".partial")
    inputs = "\n".join(f"- `{i['path']}` {i.get('sha256', '')[:12]}" for i in manifest.get("inputs", []))
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmkit]
---
# {name}

Made by `llmkit {manifest.get("stage", "?")}` on {manifest.get("created", "?")[:10]}.

| | |
|---|---|
{rows}

## How it was made (last step first)
{chr(10).join(line)}

Inputs:
{inputs}

## Use
    llmkit sample {name}/ -p "Once upon a time"

or with transformers:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("{name}")
    model = AutoModelForCausalLM.from_pretrained("{name}")

A small model trained on its inputs alone: it simulates documents, and what it says may be wrong.
"""
    with atomic_file(folder / "README.md", "w") as handle:
        handle.write(card)
