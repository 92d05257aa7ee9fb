"""crawl-filter end to end, compared with datatrove's FineWeb recipe, on one WARC and one core: pages per second.

    python benchmarks/crawl_filter.py WARC --peer-script datatrove_fineweb.py --peer-python peer/bin/python

The peer script gets the WARC and an output folder; its stdout begins with a JSON object with `pages`, `kept` and
`removed`. It runs in a separate environment, because datatrove 0.10 pins other versions of libraries than llmkit.
Start-up and output files are included on both sides. Both are pinned to one core. Wall time means little on a shared
machine, so the ratio is that of CPU seconds, over all processes of a run.

datatrove's extraction times out after 1 second of wall time per page. On a loaded machine 325 of 340 pages timed out
[measured], each at the cost of a new process; here the limit is --peer-timeout, 60 by default, so that none does.

duplicates.py measures MinHash alone, crawl_filters.py the filters alone, extractors.py the speed of the extractors and
examples/train_extractor.py their F1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTRACTORS = ("model", "fast")
STEPS = {  # from the peer's name of a step to ours
    "1_url": "url",
    "2_lang": "language",
    "3_gopher_rep": "gopher_repetition",
    "4_gopher_qual": "gopher_quality",
    "5_c4": "c4",
    "6_fineweb_qual": "fineweb",
    "7_minhash": "near_duplicates",
}


@dataclass(frozen=True)
class Run:
    """Cost and results of one run."""

    name: str
    cpu: float  # seconds, children included
    wall: float
    pages: int
    kept: int
    dropped: dict[str, int]  # by step


def timed(command: list[str], core: int, log: Path) -> tuple[float, float]:
    """Run a command on one core and return its CPU and wall seconds; its output goes to files named after `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CORE": str(core)}
    with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
        started = time.monotonic()
        child = subprocess.Popen(
            ["taskset", "-c", str(core), *command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        print(Path(f"{log}.err").read_text(errors="replace")[-2000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started


def ours(warc: str, extractor: str, core: int, folder: Path) -> Run:
    """Run llmkit's complete recipe with one of its extractors."""
    out = folder / f"{extractor}.jsonl"
    command = [sys.executable, "-m", "llmkit", "crawl-filter", warc, "-o", str(out), "--workers", "1", "--force"]
    cpu, wall = timed([*command, "--extractor", extractor], core, folder / extractor)
    funnel: list[dict[str, Any]] = json.loads(Path(f"{out}.manifest.json").read_bytes())["results"]["funnel"]
    pages = funnel[0]["in"] - sum(funnel[0]["dropped"].values())
    dropped = {row["step"]: sum(row["dropped"].values()) for row in funnel[1:]}
    return Run(f"llmkit, {extractor}", cpu, wall, pages, funnel[-1]["kept"], dropped)


def peer(warc: str, python: str, script: str, timeout: float, core: int, folder: Path) -> Run:
    """Run datatrove's recipe. It counts all dropped pages but those whose extraction fails: these are the remainder."""
    command = [python, script, warc, str(folder / "peer"), "--sandbox-timeout", str(timeout)]
    cpu, wall = timed(command, core, folder / "peer-log")
    text = Path(folder / "peer-log.out").read_text(errors="replace")
    figures, _ = json.JSONDecoder().raw_decode(text[text.index('{\n "pages"') :])
    dropped = {STEPS[name]: count for name, count in figures["removed"].items()}
    dropped["extract"] = figures["pages"] - figures["kept"] - sum(dropped.values())
    return Run("datatrove", cpu, wall, figures["pages"], figures["kept"], dropped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warc")
    parser.add_argument("--peer-script", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-timeout", type=float, default=60.0)
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    warc = os.path.abspath(options.warc)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = peer(
            warc, options.peer_python, os.path.abspath(options.peer_script), options.peer_timeout, options.core, folder
        )
        runs = [theirs, *(ours(warc, extractor, options.core, folder) for extractor in EXTRACTORS)]
    show(warc, runs)


def show(warc: str, runs: list[Run]) -> None:
    """Print the table and both funnels."""
    print(f"{os.path.basename(warc)}, {os.path.getsize(warc) / 1e6:.1f} MB, {runs[0].pages} pages, one core\n")
    print("| | CPU s | s | pages/CPU s | pages/s | times datatrove (CPU) | kept |\n|---|--:|--:|--:|--:|--:|--:|")
    base = runs[0].pages / runs[0].cpu
    for run in runs:
        rate = run.pages / run.cpu
        row = f"{run.cpu:.2f} | {run.wall:.1f} | {rate:.1f} | {run.pages / run.wall:.1f} | {rate / base:.1f}"
        print(f"| {run.name} | {row} | {run.kept} |")
    print(f"\n| dropped by | {' | '.join(run.name for run in runs)} |\n|---|{'--:|' * len(runs)}")
    for step in [step for step in runs[1].dropped if any(run.dropped.get(step) for run in runs)]:
        print(f"| {step} | {' | '.join(str(run.dropped.get(step, 0)) for run in runs)} |")


if __name__ == "__main__":
    main()
