"""Tile sizes: the part of a problem that one program takes, by kernel, GPU, head size and dtype.

They were chosen by compiling: wide tiles that fit the GPU's shared memory and whose loops do not use local memory. For
the keys' gradient on sm_90, 64 queries instead of 32 halve what the products read from shared memory.

Tiles timed on a GPU replace them: `tuned.json` next to this file, or the file in LLMKIT_TILES, has by the GPU's name
the fastest ones that benchmarks/gpu/kernels.py found.
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
        """Return the fields by the names of kernels and Triton; `specialize` only if it is on."""
        return {n if n.startswith("num_") else n.upper(): x for n, x in vars(self).items() if x or n != "specialize"}


@dataclass(frozen=True)
class Tiles(_Options):
    """`block_m` queries by `block_n` keys, on `num_warps` warps, with `num_stages` tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    specialize: int = 0  # off until a GPU has verified it


@dataclass(frozen=True)
class DecodeTiles:
    """`split_keys` keys per program, `block_n` at a time."""

    split_keys: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowTiles:
    """`rows` complete rows per program, `block` numbers of each at a time."""

    rows: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class ProductTiles(_Options):
    """`block_n` tokens by `split` times `block_v` words per program, `block_d` of the hidden size at a time."""

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
    """Return the name of this process's GPU, under which tuned tiles are stored; "interpreter" without one."""
    return "interpreter" if interpreting() else torch.cuda.get_device_name()


@cache
def _tuned(path: str, gpu: str) -> dict[str, dict[str, int]]:
    """Read tiles by kernel and the rest of their key. Raises UserError for a file with other content."""
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


_caches: list[Callable[[], None]] = []  # functions that clear the caches of `_looked_up_once`


def _looked_up_once(choose: Callable[..., AnyTiles]) -> Callable[..., AnyTiles]:
    """Cache `choose` by its arguments, the GPU and the file of tuned tiles: launches wait for it."""

    @cache
    def kept(case: tuple, target: str, ahead_of_time: bool, path: str | None, tried: tuple) -> AnyTiles:
        return choose(*case)

    @wraps(choose)
    def look_up(*case) -> AnyTiles:
        return kept(case, target(), compiling(), os.environ.get("LLMKIT_TILES"), tuple(_tried.items()))

    _caches.append(kept.cache_clear)
    return look_up


def _chosen(name: str, usual: AnyTiles) -> AnyTiles:
    """Return the tiles on trial, else the tuned ones, else `usual`. Ahead-of-time compilation uses the tables only."""
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
    """In the block, the kernel `name` ("attention_forward 128 bfloat16") uses these tiles."""
    _tried[name] = tiles
    try:
        yield
    finally:
        del _tried[name]


def forget_tuned() -> None:
    """Clear the caches, so that the file is read again."""
    for clear in (_tuned.cache_clear, *_caches):
        clear()


SIZES = (32, 64, 96, 128, 256)  # head sizes of the tables; others use the next larger one's
# For 16-bit inputs, in the order of SIZES. Head size 96 is padded to 128, and its masks need more registers. Those of
# sm_80 also serve sm_86, 89 and 120, whose blocks have 99 KB of shared memory (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); an A100's have 163.
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
    # Four warps may use 512 registers per lane there, eight 256.
    "gfx942": {
        "attention_forward": ((128, 64, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
        "attention_grad_query": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
        "attention_grad_key_value": ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1)),
    },
}  # fmt: skip
# Float32 is multiplied without tensor cores, in registers: small tiles, for correctness, not speed.
_FLOAT32 = {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 96: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
# Wide rows loaded by the tensor memory accelerator are stored twice, in shared memory's order and in the product's.
_FLOAT32_TMA = (16, 16, 8, 2)
# Small enough that a test's few hundred tokens need several blocks, large enough that these are not many.
_INTERPRETER = (64, 32, 4, 1), (32, 64, 4, 1)


def _size_index(size: int) -> int:
    return next(i for i, table_size in enumerate(SIZES) if size <= table_size)


def sized_name(kernel: str, size: int, dtype: torch.dtype) -> str:
    """Return the key of an attention kernel's tiles in a file of tuned ones: "attention_forward 128 bfloat16"."""
    return f"{kernel} {SIZES[_size_index(size)]} {str(dtype).removeprefix('torch.')}"


def row_name(kernel: str, width: int) -> str:
    """Return the key of a row-wise kernel's tiles: "cross_entropy 65536"."""
    return f"{kernel} {_padded_width(width)}"


def product_name(dtype: torch.dtype) -> str:
    """Return the key of the tiles of `linear_logsumexp`."""
    return f"linear_logsumexp {str(dtype).removeprefix('torch.')}"


def _padded_width(width: int) -> int:
    """Return the power of two that a row fits in."""
    return max(64, next_power_of_2(width))


@_looked_up_once
def tiles(kernel: str, size: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles of one of the three attention kernels, by its name."""
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
    """Return the tiles of decoding. A split must not depend on the batch: it decides the order of a row's sums."""
    if target() == "interpreter":
        usual = DecodeTiles(128, 32, 4, 1)
    elif dtype == torch.float32 or size > 128:
        usual = DecodeTiles(256, 32, 4, 1 if dtype == torch.float32 else 2)
    else:
        usual = DecodeTiles(256, 64, 4, 2 if target() != "sm_90" else 3)
    return _chosen(sized_name("attention_decode", size, dtype), usual)


@_looked_up_once
def row_tiles(kernel: str, width: int) -> RowTiles:
    """Return the tiles for rows of `width` numbers: 4,096 numbers at a time, of several rows if they are shorter.

    Few long rows at once, so that they stay in cache: as many threads per row as a program may have.
    """
    padded = _padded_width(width)
    if target() == "interpreter":
        usual = RowTiles(16, min(padded, 1024), 4)
    elif padded < 16384:
        block = min(padded, 4096)
        usual = RowTiles(4096 // block, block, 8)
    else:
        usual = RowTiles(1, 16384, 16 if target() == "gfx942" else 32)
    return _chosen(row_name(kernel, width), usual)


# A tile of 128 by 128 needs 9 TB/s of the cache at 600 TFLOP/s, one of 128 by 256 three quarters of it.
_PRODUCT = {
    "sm_90": (128, 256, 64, 4, 8, 4),
    "sm_80": (128, 256, 32, 4, 8, 3),
    "gfx942": (128, 128, 64, 4, 8, 2),
}


@_looked_up_once
def product_tiles(dtype: torch.dtype) -> ProductTiles:
    """Return the tiles of `linear_logsumexp`. If `split` depended on the number of tokens, so would a row's bits."""
    if target() == "interpreter":
        usual = ProductTiles(64, 256, 64, 2, 4, 1)
    elif dtype == torch.float32:
        usual = ProductTiles(64, 64, 16, 4, 8, 1)
    else:
        usual = ProductTiles(*_PRODUCT[target()])
    return _chosen(product_name(dtype), usual)
