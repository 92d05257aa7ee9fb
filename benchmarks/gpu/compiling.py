"""Compile a part of the kernels ahead of time, for this or another GPU, into Triton's cache on disk.

    python benchmarks/gpu/compiling.py --part 3/14     # every fourteenth job, from the fourth on

A job is a kernel of the tests' list (tests/kernels/compile_cases.py) with its default tiles, or a candidate of
shapes.py. No GPU is needed. Triton's cache is keyed by source, target and options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

from compile_cases import (  # noqa: E402
    launch_attention,
    launch_cross_entropy,
    launch_decode,
    launch_logprobs,
    specialized,
)
from llmkit.kernels.triton import tiles  # noqa: E402
from llmkit.kernels.triton.launch import compiling_for  # noqa: E402
from shapes import CANDIDATES, FULL, SMOKE, SMOKE_CANDIDATES  # noqa: E402

DTYPE = torch.bfloat16


def jobs(smoke: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (name, function that compiles), the kernels of training first."""
    shapes, candidates = (SMOKE, SMOKE_CANDIDATES) if smoke else (FULL, CANDIDATES)
    heads = {(x.size, x.heads // x.kv_heads) for x in shapes.attention}
    for size, group in sorted(heads, reverse=True):
        for packed in (False, True):
            run = partial(launch_attention, size, DTYPE, packed=packed, group=group)
            yield f"attention {size} group {group} packed {packed}", run
            if size == 128:
                yield f"attention specialized group {group} packed {packed}", partial(specialized, run)
    for words in sorted({x.words for x in shapes.loss}, reverse=True):
        for mean, gradient in ((True, True), (True, False), (False, True)):
            run = partial(launch_cross_entropy, words, DTYPE, mean=mean, gradient=gradient)
            yield f"loss {words} mean {mean} gradient {gradient}", run
    for shape in shapes.loss:
        yield f"logprobs {shape}", partial(launch_logprobs, shape.hidden, DTYPE, words=shape.words)
    if not smoke:
        run = partial(launch_logprobs, shapes.grpo[0][1].hidden, DTYPE, words=shapes.grpo[0][1].words)
        yield "logprobs specialized", partial(specialized, run)
    for decode in shapes.decode[:1]:
        yield f"decode {decode.size}", partial(launch_decode, decode.size, DTYPE, group=decode.heads // decode.kv_heads)
    for kernel in ("attention_forward", "attention_grad_query", "attention_grad_key_value"):
        for size, listed in candidates[kernel].items():
            for numbers in listed:
                run = partial(launch_attention, size, DTYPE, group=max(g for s, g in heads if s == size))
                yield f"{kernel} {size} {numbers}", _with(tiles.sized_name(kernel, size, DTYPE), numbers, run)
    for numbers in candidates["linear_logsumexp"]:
        run = partial(launch_logprobs, shapes.loss[0].hidden, DTYPE, words=shapes.loss[0].words)
        yield f"linear_logsumexp {numbers}", _with(tiles.product_name(DTYPE), numbers, run)
    for numbers in candidates["cross_entropy"]:
        for words in sorted({x.words for x in shapes.loss}):
            name = tiles.row_name("cross_entropy", -(-words // 64) * 64)
            run = partial(launch_cross_entropy, words, DTYPE, mean=True)
            yield f"cross_entropy {words} {numbers}", _with(name, numbers, run)


def _with(name: str, numbers: tuple[int, ...], run: Callable[[], None]) -> Callable[[], None]:
    kind = {"linear": tiles.ProductTiles, "cross": tiles.RowTiles}.get(name.partition("_")[0], tiles.Tiles)

    def compile_so() -> None:
        with tiles.trying(name, kind(*numbers)):
            run()

    return compile_so


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="jobs I, I + N, I + 2 N, ... [0/1]")
    parser.add_argument("--target", default="sm_90", help="sm_80, sm_90 or gfx942 [sm_90]")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    first, step = map(int, options.part.split("/"))
    for number, (name, run) in enumerate(jobs(options.smoke)):
        if number % step != first:
            continue
        started = time.monotonic()
        try:
            with compiling_for(options.target):
                run()
            outcome = "compiled"
        except Exception as error:  # a candidate that also fails on the GPU, where it is skipped
            outcome = f"failed: {type(error).__name__}"
        print(f"{name}: {outcome} in {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
