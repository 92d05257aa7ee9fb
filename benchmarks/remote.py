"""crawl-filter from a bucket whose server takes 20 ms per request, compared with the same archives on disk.

    python benchmarks/remote.py shared/web/dev-0*.warc.gz [--delay 0.02] [--repeats 3]

The server is moto in a separate process on this machine. Each repeat runs both at the same time, with --workers 1 each,
so that other programs slow down both equally; start-up and output are included, and the documents are compared byte by
byte. The ratio is the median over the repeats. CPU time is that of all processes of a run, without the server.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
sys.path[:0] = [str(HELPERS)]

from object_store import environment  # noqa: E402


def timed(places: dict[str, list[str]], folder: Path, workers: int) -> dict[str, tuple[float, float]]:
    """Run crawls at the same time and return their wall and CPU seconds, by name."""
    seconds, children = {}, {}
    started = time.monotonic()
    for name, inputs in places.items():
        command = [sys.executable, "-m", "llmkit", "crawl-filter", *inputs, "-o", str(folder / f"{name}.jsonl")]
        command += ["--force", "--quiet", "--workers", str(workers)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        children[child.pid] = name, child
    while children:
        pid, status, usage = os.wait3(0)
        name, child = children.pop(pid)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{name}: exit code {child.returncode}")
        seconds[name] = time.monotonic() - started, usage.ru_utime + usage.ru_stime
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warc", nargs="+")
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    command = [sys.executable, str(HELPERS / "object_store.py"), "--delay", str(options.delay), "crawl", *options.warc]
    places = {"disk": options.warc, "s3": [f"s3://crawl/{os.path.basename(path)}" for path in options.warc]}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        os.environ |= environment(server.stdout.readline().strip())
        for repeat in range(options.repeats):
            order = dict(sorted(places.items(), reverse=bool(repeat % 2)))
            for name, taken in timed(order, Path(folder), options.workers).items():
                seconds[name].append(taken)
                print(f"{name}: {taken[0]:.1f} s, {taken[1]:.1f} CPU s", file=sys.stderr)
        same = Path(folder, "disk.jsonl").read_bytes() == Path(folder, "s3.jsonl").read_bytes()
        server.kill()
    size = sum(map(os.path.getsize, options.warc)) / 1e6
    print(f"{len(options.warc)} archives, {size:.1f} MB, {options.delay:g} s per request, {options.repeats} repeats\n")
    print("| from | s (median) | s (all) | CPU s (median) | MB/s |\n|---|--:|--:|--:|--:|")
    clock = {name: statistics.median(wall for wall, _ in runs) for name, runs in seconds.items()}
    cpu = {name: statistics.median(cpu for _, cpu in runs) for name, runs in seconds.items()}
    for name, runs in seconds.items():
        every = ", ".join(f"{wall:.1f}" for wall, _ in runs)
        print(f"| {name} | {clock[name]:.1f} | {every} | {cpu[name]:.1f} | {size / clock[name]:.2f} |")
    ratios = [disk / s3 for (disk, _), (s3, _) in zip(seconds["disk"], seconds["s3"], strict=True)]
    every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"\ns3 has {statistics.median(ratios):.2f} of the speed from disk ({every})", end="; ")
    print(f"by CPU time {cpu['disk'] / cpu['s3']:.2f}; the same bytes: {same}")


if __name__ == "__main__":
    main()
