"""Rows of measurements as JSONL, appended at once, so that an interrupted run keeps its results."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RESULTS = Path("build/gpu/results.jsonl")


def results(smoke: bool) -> Path:
    """Return the default file of rows; smoke runs have another one than measurements."""
    return RESULTS.with_name("smoke.jsonl") if smoke else RESULTS


class Rows:
    """Appends rows to a file that other processes append to at the same time."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: object) -> dict:
        with open(self.path, "a", encoding="utf-8") as file:  # one write per row, which is atomic
            file.write(json.dumps(row) + "\n")
        return row


def read_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a file, without an incomplete last line."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def machine(file: Rows, smoke: bool, ceilings: Callable[[], dict[str, float]]) -> dict:
    """Return the row of this machine and day with its ceilings, measured by the first process that calls this."""
    import torch
    import triton

    name = platform.processor() or platform.machine() if smoke else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    row = {"stage": "machine", "device": name, **versions, "date": time.strftime("%Y-%m-%d")}
    row |= {"smoke": "a CPU"} if smoke else {}
    known = (x for x in read_rows(file.path) if "TFLOP/s" in x and all(x.get(key) == row[key] for key in row))
    return next(known, None) or file.add(**row, **ceilings())
