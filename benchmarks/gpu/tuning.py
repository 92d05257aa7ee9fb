"""Tunes tile sizes: times each kernel's candidates on one case, and stores the fastest under the GPU's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import DTYPE, OURS, Case, Makers, as_list
from clock import Clock
from llmkit.kernels.dispatch import triton_module
from shapes import Shapes


def tune(
    makers: Makers, shapes: Shapes, candidates: dict[str, Any], clock: Clock, path: Path, late: Callable[[], bool]
) -> Iterator[tuple[str, dict[str, float | str]]]:
    """Time the candidates of each kernel, write the fastest to `path`, and yield the name and milliseconds of all.

    A candidate that does not compile, or exceeds the GPU's resources, is "failed". `late()` or a kernel's fault ends
    the trials early.
    """
    tiles = triton_module("tiles")
    for name, usual, listed, run in _trials(tiles, makers, shapes, candidates):
        if late():
            return
        times: dict[Any, float | str] = {}
        for candidate in dict.fromkeys((usual, *listed)):
            with tiles.trying(name, candidate):
                try:
                    run()
                    times[candidate] = clock.milliseconds(run)
                except Exception as error:  # of the compiler or driver: the candidate is unusable
                    times[candidate] = f"failed: {type(error).__name__}"
            if lost := clock.is_lost():
                break
        if not lost:
            clock.free()
        if timed := {candidate: ms for candidate, ms in times.items() if isinstance(ms, float)}:
            _keep(tiles, path, name, asdict(min(timed, key=timed.__getitem__)))
        yield name, {str(candidate): ms for candidate, ms in times.items()}
        if lost:  # after a fault, the remaining kernels keep their default tiles
            return


def _keep(tiles: ModuleType, path: Path, name: str, best: dict[str, int]) -> None:
    """Write one kernel's tiles under this GPU's name at once, so that an interrupted run keeps them."""
    import triton  # late: the mode is set by now

    table = json.loads(path.read_text()) if path.exists() else {}
    gpu = table.setdefault(tiles.gpu_name(), {"tiles": {}})
    gpu["tiles"][name] = best
    gpu |= {"triton": triton.__version__, "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    tiles.forget_tuned()


def _trials(tiles, makers: Makers, shapes: Shapes, candidates: dict[str, Any]) -> Iterator[tuple]:
    """Yield (name of the tiles, default tiles, candidates, function to run)."""
    for size in {shape.size: shape for shape in shapes.attention}:
        case = makers.attention(next(shape for shape in shapes.attention if shape.size == size), "causal")
        for kernel in ("attention_forward", "attention_grad_query", "attention_grad_key_value"):
            listed = [tiles.Tiles(*numbers) for numbers in candidates[kernel].get(size, ())]
            run = _forward(case) if kernel == "attention_forward" else _both(case)
            yield tiles.sized_name(kernel, size, DTYPE), tiles.tiles(kernel, size, DTYPE), listed, run
    shape = shapes.decode[-1]
    listed = [tiles.DecodeTiles(*numbers) for numbers in candidates["attention_decode"]]
    name = tiles.sized_name("attention_decode", shape.size, DTYPE)
    yield name, tiles.decode_tiles(shape.size, DTYPE), listed, _forward(makers.decode(shape))
    listed = [tiles.ProductTiles(*numbers) for numbers in candidates["linear_logsumexp"]]
    run = _forward(makers.logprobs(shapes.loss[0]))
    yield tiles.product_name(DTYPE), tiles.product_tiles(DTYPE), listed, run
    listed = [tiles.RowTiles(*numbers) for numbers in candidates["cross_entropy"]]
    for words in sorted({shape.words for shape in shapes.loss}):
        shape = next(shape for shape in shapes.loss if shape.words == words)
        width = -(-words // 64) * 64  # the padding of the logits
        name = tiles.row_name("cross_entropy", width)
        yield name, tiles.row_tiles("cross_entropy", width), listed, _both(makers.loss(shape))


def _forward(case: Case) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return case.contenders[OURS](*case.inputs)

    return run


def _both(case: Case) -> Callable[[], object]:
    return lambda: torch.autograd.grad(as_list(case.contenders[OURS](*case.inputs)), case.inputs, case.upstream)
