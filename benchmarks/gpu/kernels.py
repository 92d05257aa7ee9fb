"""The kernels beside their peers on a GPU: milliseconds, TFLOP/s or TB/s, share of the ceiling, memory, error.

    python benchmarks/gpu/kernels.py                    # under 10 minutes on one H200; no network, nothing is built
    python benchmarks/gpu/kernels.py --only loss grpo
    python benchmarks/gpu/kernels.py --smoke            # on a CPU, tiny shapes in Triton's interpreter: times nothing

First the tiles of each kernel are chosen by the clock from a short list, and written where the dispatch reads them
(--tiles; --no-tune leaves them). Then each case: every contender's outputs and gradients are checked against float32,
and only who is right is timed. A peer that is not installed, or cannot compute the case, is named with the reason.

    share     of what a large product, or a copy, reaches here in this very run
    x best    the best peer's time over ours: above 1 we are faster
    error     the largest of outputs' and gradients' distances from float32, relative to their norms

Written to --out as kernels.json and kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, in the interpreter")
    parser.add_argument("-o", "--out", type=Path, default=Path("build/gpu"), help="folder of the results [build/gpu]")
    parser.add_argument("--only", nargs="*", metavar="KIND", help="cases whose kind begins so: attention, loss, ...")
    parser.add_argument("--tiles", type=Path, help="file of the chosen tiles [the one that the dispatch reads]")
    parser.add_argument("--no-tune", action="store_true", help="take the tiles as they are")
    parser.add_argument("--seconds", type=float, default=570, help="begin no case after so long [570]")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.smoke:  # before torch, which may import triton
        os.environ |= {"LLMKIT_KERNELS": "interpret", "TRITON_INTERPRET": "1"}
        warnings.filterwarnings("ignore")
    import torch
    from cases import Makers
    from clock import Clock
    from llmkit.kernels.dispatch import backend, triton_module
    from measuring import markdown, measure
    from shapes import CANDIDATES, FULL, SMOKE, SMOKE_CANDIDATES
    from tuning import tune

    device = "cpu" if options.smoke else "cuda"
    if not options.smoke and not torch.cuda.is_available():
        print("kernels.py: no GPU here; --smoke runs it on a CPU", file=sys.stderr)
        return 2
    assert backend(device) == ("interpret" if options.smoke else "triton"), backend(device)
    started = time.monotonic()
    late = lambda: time.monotonic() - started > options.seconds  # noqa: E731
    clock, makers, shapes = Clock(device), Makers(device), SMOKE if options.smoke else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(options.smoke), "ceilings": clock.ceilings(), "rows": []}
    if not options.no_tune:
        usual = options.out / "tiles.json" if options.smoke else triton_module("tiles").TUNED
        path = (options.tiles or usual).resolve()
        # half of the time at most, and nothing but the tables and the trials' own while it lasts
        half = lambda: time.monotonic() - started > options.seconds / 2  # noqa: E731
        report["tiles"] = tune(makers, shapes, SMOKE_CANDIDATES if options.smoke else CANDIDATES, clock, path, half)
        report["tiles_file"] = path.name
        os.environ["LLMKIT_TILES"] = str(path)
    elif options.tiles:
        os.environ["LLMKIT_TILES"] = str(options.tiles.resolve())
    for kind, shape, make in makers.cases(shapes):
        if options.only and not kind.startswith(tuple(options.only)):
            continue
        if late():
            report["rows"].append({"kind": kind, "shape": shape, "who": "all", "note": "not reached in time"})
            continue
        report["rows"] += measure(make(), clock, report["ceilings"])
        clock.free()
        save(report, options.out)  # what has been measured outlives a fault of the next case
    report["seconds"] = round(time.monotonic() - started, 1)
    save(report, options.out)
    print(markdown(report))
    wrong = [row for row in report["rows"] if row["who"] == "llmkit" and row.get("note")]
    return 1 if wrong else 0


def machine(smoke: bool) -> dict[str, str]:
    import torch
    import triton

    name = platform.processor() or platform.machine() if smoke else torch.cuda.get_device_name()
    found = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    found |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    return found | ({"smoke": "run in the interpreter"} if smoke else {})


def save(report: dict, out: Path) -> None:
    from measuring import markdown

    (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "kernels.md").write_text(markdown(report) + "\n")


if __name__ == "__main__":
    sys.exit(main())
