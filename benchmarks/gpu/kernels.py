"""The kernels compared with their peers on a GPU: milliseconds, TFLOP/s or TB/s, share of the ceiling, memory, error.

    python benchmarks/gpu/kernels.py                    # under 10 minutes on one H200; no network, no build
    python benchmarks/gpu/kernels.py --only loss grpo
    python benchmarks/gpu/kernels.py --smoke            # on a CPU, tiny shapes in Triton's interpreter: times nothing

First the tiles of each kernel are tuned over a short list, and written to the file that the dispatch reads (--tiles;
--no-tune skips this). Then, for each case, every contender's outputs and gradients are checked against float32, and
only correct ones are timed. A peer that is not installed, or cannot compute the case, is listed with the reason.

Rows are appended to --out at once, and printed as tables at the end (report.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

from rows import RESULTS, Rows, machine, results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, in the interpreter")
    parser.add_argument("-o", "--out", type=Path, help=f"file of the rows [{RESULTS}]")
    parser.add_argument("--only", nargs="*", metavar="KIND", help="prefixes of kinds of cases: attention, loss, ...")
    parser.add_argument("--who", nargs="*", metavar="NAME", default=[], help="prefixes of contenders")
    parser.add_argument("--tiles", type=Path, help="file of the tuned tiles [the dispatch's]")
    parser.add_argument("--no-tune", action="store_true", help="use the tiles as they are")
    parser.add_argument("--tune-only", action="store_true", help="tune the tiles and time nothing else")
    parser.add_argument("--specialized", action="store_true", help="ours with warp specialization, at head size 128")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)  # cases up to one whose kernel faulted
    parser.add_argument("--seconds", type=float, default=570, help="start no case after this time [570]")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.smoke:  # before torch, which may import triton
        os.environ |= {"LLMKIT_KERNELS": "interpret", "TRITON_INTERPRET": "1"}
        warnings.filterwarnings("ignore")
    import torch
    from cases import OURS, Makers
    from clock import Clock
    from llmkit.kernels.dispatch import backend, triton_module
    from measuring import measure
    from report import SPECIALIZED, tables
    from shapes import CANDIDATES, FULL, SMOKE, SMOKE_CANDIDATES, specialized_tiles
    from tuning import tune

    device = "cpu" if options.smoke else "cuda"
    if not options.smoke and not torch.cuda.is_available():
        print("kernels.py: no GPU here; --smoke runs it on a CPU", file=sys.stderr)
        return 2
    assert backend(device) == ("interpret" if options.smoke else "triton"), backend(device)
    started = time.monotonic()
    late = lambda share=1.0: time.monotonic() - started > share * options.seconds  # noqa: E731
    clock, makers, shapes = Clock(device), Makers(device), SMOKE if options.smoke else FULL
    file, rows = Rows(options.out or results(options.smoke)), []
    rows.append(machine(file, options.smoke, clock.ceilings))
    if not options.no_tune:
        usual = file.path.with_name("tiles.json") if options.smoke else triton_module("tiles").TUNED
        path = (options.tiles or usual).resolve()
        candidates = SMOKE_CANDIDATES if options.smoke else CANDIDATES
        # at most half of the time if cases follow
        for name, times in tune(
            makers, shapes, candidates, clock, path, lambda: late(1.0 if options.tune_only else 0.5)
        ):
            file.add(stage="tiles", kernel=name, milliseconds=times)
        os.environ["LLMKIT_TILES"] = str(path)
    elif options.tiles:
        os.environ["LLMKIT_TILES"] = str(options.tiles.resolve())
    within = ExitStack()
    if options.specialized:
        tiles = triton_module("tiles")
        options.who = [OURS]
        for name, chosen in specialized_tiles(tiles).items():
            within.enter_context(tiles.trying(name, chosen))
    for number, (kind, shape, make) in enumerate(() if options.tune_only else makers.cases(shapes)):
        if number < options.skip:
            continue
        if options.specialized and not options.smoke and "attention" in kind and not shape.endswith(",128"):
            continue  # the default tiles
        if options.only and not kind.startswith(tuple(options.only)):
            continue
        if late():
            rows.append(file.add(stage="kernel", kind=kind, shape=shape, who="all", note="not reached in time"))
            continue
        try:
            for row in measure(make(), clock, options.who):
                row |= {"who": SPECIALIZED} if options.specialized else {}
                rows.append(file.add(**row))  # written before the next case can fault
                if clock.is_lost():
                    break
        except Exception as error:  # the case's inputs may not fit into GPU memory
            note = f"failed: {type(error).__name__}: {str(error)[:120]}"
            rows.append(file.add(stage="kernel", kind=kind, shape=shape, who="all", note=note))
        if clock.is_lost():
            rest = [sys.executable, *sys.argv, "--no-tune", "--skip", str(number + 1)]
            return max(1, subprocess.run(rest).returncode)
        clock.free()
    print(tables(rows))
    return 1 if any(row.get("who") == OURS and row.get("note") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
