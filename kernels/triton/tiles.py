"""Tile sizes: which part of a problem one program takes, by kernel, GPU, head size and dtype.

Chosen by compiling: of tiles within the GPU's shared memory whose loops do without local memory, wide ones: 64 queries
of the keys' gradient on sm_90, rather than 32, halve what the products read from shared memory.

What a GPU's clock says replaces them: `tuned.json` beside this file, or the file that LLMKIT_TILES names, holds for
the name of a GPU what benchmarks/gpu/kernels.py has found fastest there.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar

import torch
from llmkit.kernels.triton.launch import compiling, interpreting, next_power_of_2, target

from llmkit.errors import UserError

TUNED = Path(__file__).with_name("tuned.json")


class _Options:
    def options(self) -> dict[str, int]:
        """Under the names that kernels and Triton give them; `specialize` where it is on."""
        return {n if n.startswith("num_") else n.upper(): x for n, x in vars(self).items() if x or n != "specialize"}


@dataclass(frozen=True)
class Tiles(_Options):
    """`block_m` queries by `block_n` keys, on `num_warps` warps, with `num_stages` tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    specialize: int = 0  # until a GPU has shown it right


@dataclass(frozen=True)
class DecodeTiles:
    """`split_keys` keys a program, `block_n` at a time."""

    split_keys: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowTiles:
    """`rows` whole rows a program, `block` numbers of each at a time."""

    rows: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class ProductTiles(_Options):
    """`block_n` tokens by `split` times `block_v` words a program, `block_d` of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    split: int
    num_warps: int
    num_stages: int
    specialize: int = 0


AnyTiles = TypeVar("AnyTiles", Tiles, DecodeTiles, RowTiles, ProductTiles)
_tried: dict[str, Tiles | DecodeTiles | RowTiles | ProductTiles] = {}


@cache
def gpu_name() -> str:
    """Name of this process's GPU, under which tuned tiles are kept; "interpreter" without one."""
    return "interpreter" if interpreting() else torch.cuda.get_device_name()


@cache
def _tuned(path: str, gpu: str) -> dict[str, dict[str, int]]:
    """Tiles by kernel and what else they depend on. Raises UserError for a file that holds something else."""
    try:
        table = json.loads(Path(path).read_text()).get(gpu, {}).get("tiles", {})
        return {str(name): {str(k): int(v) for k, v in tile.items()} for name, tile in table.items()}
    except FileNotFoundError:
        if path == str(TUNED):
            return {}
        raise UserError(f"LLMKIT_TILES: no file {path}; unset it, or run benchmarks/gpu/kernels.py") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected tiles by GPU and kernel, found {error}; run benchmarks/gpu/kernels.py"
        ) from None


_caches: list[Callable[[], None]] = []  # what empties those of `_looked_up_once`


def _looked_up_once(choose: Callable[..., AnyTiles]) -> Callable[..., AnyTiles]:
    """Keep what `choose` gives for its arguments, the GPU and the file of tuned tiles: a start waits for it."""

    @cache
    def kept(case: tuple, target: str, ahead_of_time: bool, path: str | None, tried: tuple) -> AnyTiles:
        return choose(*case)

    @wraps(choose)
    def look_up(*case) -> AnyTiles:
        return kept(case, target(), compiling(), os.environ.get("LLMKIT_TILES"), tuple(_tried.items()))

    _caches.append(kept.cache_clear)
    return look_up


def _chosen(name: str, usual: AnyTiles) -> AnyTiles:
    """The tiles on trial, else the tuned ones, else `usual`. Compiling ahead of time knows the tables alone."""
    if name in _tried:
        return _tried[name]  # type: ignore[return-value]
    if compiling():
        return usual
    path = os.environ.get("LLMKIT_TILES") or str(TUNED)
    tuned = _tuned(path, gpu_name()).get(name)
    if tuned is None:
        return usual
    if set(tuned) != (expected := {field.name for field in fields(usual)}):
        raise UserError(f"{path}: {name}: expected {sorted(expected)}, found {sorted(tuned)}; run the benchmark again")
    return type(usual)(**tuned)


@contextmanager
def trying(name: str, tiles: Tiles | DecodeTiles | RowTiles | ProductTiles) -> Iterator[None]:
    """Within it the kernel `name` ("attention_forward 128 bfloat16") takes these tiles."""
    _tried[name] = tiles
    try:
        yield
    finally:
        del _tried[name]


def forget_tuned() -> None:
    """Read the file again where it is needed next."""
    for clear in (_tuned.cache_clear, *_caches):
        clear()


SIZES = (32, 64, 96, 128, 256)  # head sizes that the tables are for; others take the next larger one's
# Of 16-bit inputs, in the order of SIZES. Head size 96 is padded to 128 and its masks take registers of their own.
# Those of sm_80 serve sm_86, 89 and 120, too, whose blocks have 99 KB of shared memory (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"), and an A100's 163.
_ATTENTION = {
    "sm_90": {
        "attention_forward": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
        "attention_grad_query": ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "attention_grad_key_value": (
            (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2),
        ),
    },
    "sm_80": {
        "attention_forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "attention_grad_query": ((64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 16, 8, 2)),
        "attention_grad_key_value": ((64, 64, 4, 3), (32, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    },
    # Four warps may have 512 registers a lane there, eight have 256.
    "gfx942": {
        "attention_forward": ((128, 64, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
        "attention_grad_query": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
        "attention_grad_key_value": ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1)),
    },
}  # fmt: skip
# Float32 is multiplied without tensor cores, in registers: small tiles, for correctness and not for speed.
_FLOAT32 = {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 96: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
# Wide rows that the tensor memory accelerator brings are held twice, in shared memory's order and in the product's.
_FLOAT32_TMA = (16, 16, 8, 2)
# Small enough that a test's few hundred tokens make several blocks, large enough that they are not many.
_INTERPRETER = (64, 32, 4, 1), (32, 64, 4, 1)


def _size_index(size: int) -> int:
    return next(i for i, table_size in enumerate(SIZES) if size <= table_size)


def sized_name(kernel: str, size: int, dtype: torch.dtype) -> str:
    """Name the tiles of an attention kernel for a file of tuned ones: "attention_forward 128 bfloat16"."""
    return f"{kernel} {SIZES[_size_index(size)]} {str(dtype).removeprefix('torch.')}"


def row_name(kernel: str, width: int) -> str:
    """The same for a row-wise kernel: "cross_entropy 65536"."""
    return f"{kernel} {_whole(width)}"


def product_name(dtype: torch.dtype) -> str:
    """The same for `linear_logsumexp`."""
    return f"linear_logsumexp {str(dtype).removeprefix('torch.')}"


def _whole(width: int) -> int:
    """The power of two that a row fits in."""
    return max(64, next_power_of_2(width))


@_looked_up_once
def tiles(kernel: str, size: int, dtype: torch.dtype) -> Tiles:
    """For one of the three kernels of attention, by its name."""
    index = _size_index(size)
    if target() == "interpreter":
        usual = _INTERPRETER[kernel == "attention_grad_key_value"]
    elif dtype == torch.float32:
        usual = _FLOAT32_TMA if target() == "sm_90" else _FLOAT32[SIZES[index]]
    else:
        usual = _ATTENTION[target()][kernel][index]
    return _chosen(sized_name(kernel, size, dtype), Tiles(*usual))


@_looked_up_once
def decode_tiles(size: int, dtype: torch.dtype) -> DecodeTiles:
    """A split must not depend on the batch: a row's sums are added in the same order beside any others."""
    if target() == "interpreter":
        usual = DecodeTiles(128, 32, 4, 1)
    elif dtype == torch.float32 or size > 128:
        usual = DecodeTiles(256, 32, 4, 1 if dtype == torch.float32 else 2)
    else:
        usual = DecodeTiles(256, 64, 4, 2 if target() != "sm_90" else 3)
    return _chosen(sized_name("attention_decode", size, dtype), usual)


@_looked_up_once
def row_tiles(kernel: str, width: int) -> RowTiles:
    """For rows of `width` numbers: 4,096 numbers at a time, of several rows where rows are shorter.

    Of long rows few at once, so that they stay in cache: as many threads a row as a program may have.
    """
    whole = _whole(width)
    if target() == "interpreter":
        usual = RowTiles(16, min(whole, 1024), 4)
    elif whole < 16384:
        block = min(whole, 4096)
        usual = RowTiles(4096 // block, block, 8)
    else:
        usual = RowTiles(1, 16384, 16 if target() == "gfx942" else 32)
    return _chosen(row_name(kernel, width), usual)


# A tile of 128 by 128 asks 9 TB/s of the cache at 600 TFLOP/s, one of 128 by 256 three quarters of it.
_PRODUCT = {
    "sm_90": (128, 256, 64, 4, 8, 4),
    "sm_80": (128, 256, 32, 4, 8, 3),
    "gfx942": (128, 128, 64, 4, 8, 2),
}


@_looked_up_once
def product_tiles(dtype: torch.dtype) -> ProductTiles:
    """For `linear_logsumexp`. `split` must not depend on the number of tokens, or a row's bits would, too."""
    if target() == "interpreter":
        usual = ProductTiles(64, 256, 64, 2, 4, 1)
    elif dtype == torch.float32:
        usual = ProductTiles(64, 64, 16, 4, 8, 1)
    else:
        usual = ProductTiles(*_PRODUCT[target()])
    return _chosen(product_name(dtype), usual)
