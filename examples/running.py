"""Shared by the experiments: running a stage, writing records, iterating over seeds and printing their shares."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def llmkit(folder: Path, *arguments: str | Path, stdin: Path | None = None) -> str:
    """Run a subcommand and return its stdout."""
    with (folder / f"{arguments[0]}.log").open("ab") as log, (stdin or Path("/dev/null")).open() as given:
        command = [sys.executable, "-m", "llmkit", *map(str, arguments)]
        done = subprocess.run(command, stdin=given, stdout=subprocess.PIPE, stderr=log, text=True)
    if done.returncode:
        raise SystemExit(f"llmkit {arguments[0]} failed:\n{Path(log.name).read_text()[-2000:]}")
    return done.stdout


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_seeds(
    description: str | None, experiment: Callable[[Path, int, bool], T], curves: Mapping[str, str] | None = None
) -> list[T]:
    """Parse the command line, run an experiment for each seed, and return the results.

    experiment  called with a folder, a seed and whether to run quickly, as a smoke test
    curves      from path in the experiment's folder to file name: the files of the first seed to copy (`--curves`)
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    if curves:
        parser.add_argument("--curves", type=Path, metavar="FOLDER", help="folder for the curves of the first seed")
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix="llmkit-") as temporary:
            found.append(experiment(Path(temporary), seed, arguments.quick))
            if curves and arguments.curves and seed == 0:
                for source, name in curves.items():
                    shutil.copy(Path(temporary) / source, arguments.curves / name)
        print(f"seed {seed}: {json.dumps(found[-1])}", file=sys.stderr)
    return found


def print_shares(heading: str, results: list[dict[str, float]]) -> None:
    """Print a row for each name: the mean, then the share for each seed."""
    width = max(map(len, (heading, *results[0])))
    print(f"{heading:<{width}} {'mean':>6}  by seed")
    for name in results[0]:
        values = [one[name] for one in results]
        print(f"{name:<{width}} {statistics.mean(values):6.1%}  {', '.join(f'{value:.1%}' for value in values)}")
