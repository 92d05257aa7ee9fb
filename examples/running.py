"""What the experiments share: to run a stage, to write records, to go through seeds and to print their shares."""

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
    """Run a subcommand; its stdout."""
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
    """Run an experiment as its command line says; what it found with each seed.

    experiment  of a folder, a seed, and whether it is only to be seen that it runs
    curves      names for what `--curves FOLDER` keeps of the first seed, by its place in the experiment's folder
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the whole experiment")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    if curves:
        parser.add_argument("--curves", type=Path, metavar="FOLDER", help="copy the curves of the first seed here")
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix="llmkit-") as place:
            found.append(experiment(Path(place), seed, arguments.quick))
            if curves and arguments.curves and seed == 0:
                for source, name in curves.items():
                    shutil.copy(Path(place) / source, arguments.curves / name)
        print(f"seed {seed}: {json.dumps(found[-1])}", file=sys.stderr)
    return found


def print_shares(heading: str, found: list[dict[str, float]]) -> None:
    """Print a row for each name: the mean of its shares, and those of the seeds."""
    width = max(map(len, (heading, *found[0])))
    print(f"{heading:<{width}} {'mean':>6}  by seed")
    for name in found[0]:
        values = [one[name] for one in found]
        print(f"{name:<{width}} {statistics.mean(values):6.1%}  {', '.join(f'{value:.1%}' for value in values)}")
