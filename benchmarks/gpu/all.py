"""All open GPU measurements in one call of eight minutes, the most important first; rows are written at once.

    python benchmarks/gpu/all.py --wheel orjson*.whl --wheel safetensors*.whl     # on a bare machine
    python benchmarks/gpu/all.py --smoke                  # all stages on a CPU in 3 minutes; times nothing
    python benchmarks/gpu/report.py build/gpu/results.jsonl

All kernels are compiled first, in --processes processes, while the GPU times stages that need none of them. Each stage
is a separate process with a time limit and appends its results to --out/results.jsonl at once, so the run may be
interrupted at any time. A stage that fails or hangs is named there, with its log in the same folder, and the next stage
starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from report import goals, tables
from rows import RESULTS, Rows, read_rows

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
NEEDED = {"training.py": ("orjson", "safetensors"), "generation.py": ("orjson",)}
LEAST = 8  # seconds; with less time left no stage starts
# Tests that run the kernels, except those with random shapes: each new shape is compiled
TESTS = ("test_fused_attention.py", "test_fused_loss.py", "test_decode.py")
NOT_TESTED = (
    "any_shape or any_loss or any_logprobs or any_lengths or many_examples or compiled or opcheck or accepts "
    "or specialized"
)


@dataclass(frozen=True)
class Stage:
    """A script with its options, and its time limit in seconds."""

    name: str
    limit: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def stages() -> list[Stage]:
    """Return the stages in order; the first runs during compilation."""
    kernels = ("kernels.py", "--no-tune")
    training = [
        Stage(
            f"training {model} {kernel}",
            limit,
            ("training.py", "--model", model, "--kernels", kernel, "--steps", "6", "--seconds", str(limit - 8)),
        )
        for model, limit in (("124M", 60), ("1.5B", 75))
        for kernel in ("triton", "torch")
    ]
    return [
        Stage("ceilings and SDPA", 40, (*kernels, "--only", "attention causal", "--who", "SDPA")),
        Stage("tiles", 90, ("kernels.py", "--tune-only", "--seconds", "80")),
        Stage("attention", 45, (*kernels, "--only", "attention", "--who", "llmkit")),
        Stage(
            "specialized tiles",
            40,
            (*kernels, "--specialized", "--only", "attention causal", "attention packed", "logprobs"),
        ),
        Stage("loss", 75, (*kernels, "--only", "loss")),
        *training[:2],
        Stage("flex", 75, (*kernels, "--only", "attention packed", "attention windowed", "--who", "flex")),
        Stage("log-probabilities", 45, (*kernels, "--only", "logprobs", "grpo")),
        Stage("decode", 30, (*kernels, "--only", "decode", "--who", "llmkit", "SDPA")),
        Stage("generation", 60, ("generation.py", "--model", "124M", "--rounds", "3")),
        *training[2:],
        Stage(
            "training with heads of 64",
            100,
            ("training.py", "--model", "124M, heads of 64", "--steps", "6", "--seconds", "46"),
        ),
        Stage("flex, decode and causal", 60, (*kernels, "--only", "decode", "attention causal", "--who", "flex")),
        Stage("generation 1.5B", 60, ("generation.py", "--model", "1.5B", "--rounds", "3")),
    ]


class Run:
    """Stages with a common deadline and a common file of rows."""

    def __init__(self, options: argparse.Namespace):
        self.smoke, self.out, self.processes = options.smoke, options.out.resolve(), options.processes
        self.deadline = time.monotonic() + options.seconds
        self.file = Rows(self.out / RESULTS.name)
        self.tiles = self.out / "tiles.json"
        self.hung: set[str] = set()  # stages that hit their limit
        self.passed: dict[str, int] = {}  # by group of tests
        here = ROOT / RESULTS.parent  # not --out, which is copied back from the machine
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LLMKIT_KERNELS", "LLMKIT_TILES")},
            "PYTHONPATH": str(_site(here, options.wheel)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(here / "cache" / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(here / "cache" / "inductor"),
        }

    def start(self, stage: Stage) -> tuple[Stage, float, subprocess.Popen[bytes]]:
        """Start a stage; its output goes to a log with its name."""
        with open(self.out / f"{stage.name.replace(' ', '-')}.log", "wb") as log:
            environment = self.environment | stage.environment
            process = subprocess.Popen(
                [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return stage, time.monotonic(), process

    def end(self, started: tuple[Stage, float, subprocess.Popen[bytes]]) -> None:
        """Wait for a stage up to its limit or the deadline, and record the outcome."""
        stage, begun, process = started
        try:
            code = process.wait(max(0.0, min(begun + stage.limit, self.deadline) - time.monotonic()))
            outcome = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = "cut off"
            self.hung.add(stage.name)
        self.file.add(stage="end", name=stage.name, outcome=outcome, seconds=round(time.monotonic() - begun, 1))

    def measure(self, stage: Stage) -> None:
        """Run one stage, unless the time is over."""
        if self.deadline - time.monotonic() < LEAST:
            self.file.add(stage="end", name=stage.name, outcome="not begun")
            return
        script, *rest = stage.command
        path = [self.environment["PYTHONPATH"], *sys.path]
        if missing := [name for name in NEEDED.get(script, ()) if PathFinder.find_spec(name, path) is None]:
            outcome = f"absent: {', '.join(missing)} not installed; bring the wheel (--wheel)"
            self.file.add(stage="end", name=stage.name, outcome=outcome)
            return
        tiles = ("--tiles", str(self.tiles)) if script == "kernels.py" else ()
        smoke = ("--smoke",) if self.smoke else ()
        command = (str(HERE / script), *rest, *tiles, *smoke, "-o", str(self.file.path))
        environment = {} if script == "kernels.py" else {"LLMKIT_TILES": str(self.tiles)}
        self.end(self.start(Stage(stage.name, stage.limit, command, stage.environment | environment)))

    def compile(self) -> list[tuple[Stage, float, subprocess.Popen[bytes]]]:
        """Start compiling, one part per process."""
        parts = 2 if self.smoke else self.processes
        smoke = ("--smoke",) if self.smoke else ()
        script = str(HERE / "compiling.py")
        return [
            self.start(Stage(f"compile {part}", 100, (script, "--part", f"{part}/{parts}", *smoke)))
            for part in range(parts)
        ]

    def check(self) -> None:
        """Run the kernels' tests on the GPU; in a smoke run, a few of them in the interpreter.

        Warp-specialized kernels (docs/kernels.md) may hang, so they have a separate process and limit.
        """
        chosen = "last_rows or sure_prediction" if self.smoke else f"not ({NOT_TESTED})"
        self.test("correctness", 90, chosen)
        if not self.smoke:
            self.test("specialized", 45, "specialized")

    def test(self, name: str, limit: float, chosen: str) -> None:
        """Run the kernels' tests selected by `chosen`, a pytest -k expression."""
        if self.deadline - time.monotonic() < LEAST:
            return
        folder = ROOT / "tests" / "kernels"
        command = (
            # -v: if a kernel hangs, the log has the outcomes of the others
            "-m", "pytest", "-v",
            "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(ROOT),
            "--confcutdir", str(folder), "-m", "not slow", "-k", chosen,
            *(("-n", str(self.processes)) if importlib.util.find_spec("xdist") and not self.smoke else ()),
            *(str(folder / name) for name in TESTS),
        )  # fmt: skip
        # torch's deterministic mode requires a cuBLAS workspace
        device = {} if self.smoke else {"LLMKIT_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if importlib.util.find_spec("pytest") is None:
            self.file.add(stage="check", name=name, outcome="absent: pytest is not installed")
            return
        self.end(self.start(Stage(name, limit, command, device)))
        log = (self.out / f"{name}.log").read_text(errors="replace")
        outcomes = outcomes_in(log)
        for test, outcome in outcomes.items():
            if name == "specialized" or outcome != "passed":
                self.file.add(stage="check", name=test.rpartition("/")[2], outcome=outcome)
        passed = self.passed[name] = list(outcomes.values()).count("passed")
        summary = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|errors?|deselected)\b[^=\n]*)", log, re.MULTILINE)
        end = "cut off" if name in self.hung else "no summary"
        outcome = (
            summary[-1] if summary else f"{passed} passed, {len(outcomes) - passed} failed, then {end}: see the log"
        )
        name = "tests/kernels" if name == "correctness" else f"tests/kernels -k {chosen}"
        self.file.add(stage="check", name=name, outcome=outcome)


def outcomes_in(log: str) -> dict[str, str]:
    """Read the outcome of each test from the log of `pytest -v`: after the test's name, or before it with xdist."""
    outcomes = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR) (\S+::\S+)", log, re.MULTILINE)
    outcomes += [(end, test) for test, end in re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR)\b", log, re.MULTILINE)]
    return {test: outcome.lower() for outcome, test in outcomes}


def _site(out: Path, wheels: list[Path]) -> Path:
    """Make a folder for PYTHONPATH: the package as if installed, with `kernels/` in it, and the unpacked wheels."""
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)  # of an earlier run
    (site / "llmkit").mkdir(parents=True)
    for path in [*(ROOT / "llmkit").iterdir(), ROOT / "kernels"]:
        if path.name != "__pycache__":
            (site / "llmkit" / path.name).symlink_to(path)
    for wheel in wheels:
        if not wheel.exists():
            print(f"all.py: no wheel {wheel}: continuing without it", file=sys.stderr)
            continue
        zipfile.ZipFile(wheel).extractall(site)
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, in the interpreter")
    parser.add_argument("--seconds", type=float, default=480, help="total time [480]")
    parser.add_argument("--processes", type=int, default=14, help="processes that compile and test [14]")
    parser.add_argument("--wheel", type=Path, action="append", default=[], help="wheel to put on the path; repeatable")
    parser.add_argument("-o", "--out", type=Path, help=f"folder [{RESULTS.parent}]")
    options = parser.parse_args()
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print("all.py: no GPU here; --smoke runs it on a CPU", file=sys.stderr)
        return 2
    options.out = options.out or RESULTS.parent / ("smoke" if options.smoke else ".")
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    run.tiles.write_text("{}\n")
    first, *others = stages()
    compiling = run.compile()
    run.measure(first)
    for started in compiling:
        run.end(started)
    run.check()
    for stage in others:
        if stage.name == "specialized tiles" and ("specialized" in run.hung or run.passed.get("specialized") == 0):
            continue  # would hang or fail again
        if not (run.smoke and "1.5B" in stage.name):  # a smoke run has one tiny model
            run.measure(stage)
    rows = list(read_rows(run.file.path))
    print(tables(rows), goals(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
