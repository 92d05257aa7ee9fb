"""Rows of measurements, one JSON object a line: appended as they come, so that a run cut off leaves what it has."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RESULTS = Path("build/gpu/results.jsonl")


def results(smoke: bool) -> Path:
    """Where rows go by themselves; those of a smoke run never among measurements."""
    return RESULTS.with_name("smoke.jsonl") if smoke else RESULTS


class Rows:
    """Appends rows to a file that other processes append to, too."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: object) -> dict:
        with open(self.path, "a", encoding="utf-8") as file:  # one write a row: the system does not mix two of them
            file.write(json.dumps(row) + "\n")
        return row


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a file; a last line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def machine(file: Rows, smoke: bool, ceilings: Callable[[], dict[str, float]]) -> dict:
    """The row of this machine and day with its ceilings; measured once, by the first of the processes that ask."""
    import torch
    import triton

    name = platform.processor() or platform.machine() if smoke else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    row = {"stage": "machine", "device": name, **versions, "date": time.strftime("%Y-%m-%d")}
    row |= {"smoke": "a CPU"} if smoke else {}
    known = (x for x in read_rows(file.path) if "TFLOP/s" in x and all(x.get(key) == row[key] for key in row))
    return next(known, None) or file.add(**row, **ceilings())
