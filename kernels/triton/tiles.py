"""Tile sizes: which part of a problem one program takes, by kernel, GPU, head size and dtype.

Chosen by compiling: of tiles without spilled registers in backward and within the GPU's shared memory, wide ones.
Exceptions: float32, and the keys' gradient at head size 256 on sm_90, whose tile of 32 keys is too small for Hopper's
warp-group products (64 keys spill 184 bytes). What a GPU's clock says may replace them.
"""

from dataclasses import asdict, dataclass

import torch
from llmkit.kernels.triton.launch import target


@dataclass(frozen=True)
class Tiles:
    """`block_m` queries by `block_n` keys, on `num_warps` warps, with `num_stages` tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Under the names that kernels and Triton give them."""
        renamed = {"block_m": "BLOCK_M", "block_n": "BLOCK_N"}
        return {renamed.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class DecodeTiles:
    """`split_keys` keys a program, `block_n` at a time."""

    split_keys: int
    block_n: int
    num_warps: int
    num_stages: int


SIZES = (32, 64, 96, 128, 256)  # head sizes that the tables are for; others take the next larger one's
# Of 16-bit inputs, in the order of SIZES. Head size 96 is padded to 128 and its masks take registers of their own.
_ATTENTION = {
    "sm_90": {
        "attention_forward": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "attention_grad_query": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
        "attention_grad_key_value": (
            (64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (32, 32, 8, 2),
        ),
    },
    "sm_80": {
        "attention_forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        "attention_grad_query": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "attention_grad_key_value": (
            (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2),
        ),
    },
    # Four warps may have 512 registers a lane there, eight have 256.
    "gfx942": {
        "attention_forward": ((128, 64, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
        "attention_grad_query": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
        "attention_grad_key_value": (
            (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1),
        ),
    },
}  # fmt: skip
# Float32 is multiplied without tensor cores, in registers: small tiles, for correctness and not for speed.
_FLOAT32 = {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 96: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
# Small enough that a test's few hundred tokens make several blocks, large enough that they are not many.
_INTERPRETER = (64, 32, 4, 1), (32, 64, 4, 1)


def tiles(kernel: str, size: int, dtype: torch.dtype) -> Tiles:
    """For one of the three kernels of attention, by its name."""
    if target() == "interpreter":
        return Tiles(*_INTERPRETER[kernel == "attention_grad_key_value"])
    index = next(i for i, table_size in enumerate(SIZES) if size <= table_size)
    if dtype == torch.float32:
        return Tiles(*_FLOAT32[SIZES[index]])
    return Tiles(*_ATTENTION[target()][kernel][index])


def decode_tiles(size: int, dtype: torch.dtype) -> DecodeTiles:
    """A split must not depend on the batch: a row's sums are added in the same order beside any others."""
    if target() == "interpreter":
        return DecodeTiles(128, 32, 4, 1)
    if dtype == torch.float32 or size > 128:
        return DecodeTiles(256, 32, 4, 1 if dtype == torch.float32 else 2)
    return DecodeTiles(256, 64, 4, 2 if target() != "sm_90" else 3)


@dataclass(frozen=True)
class RowTiles:
    """`rows` whole rows a program, `block` numbers of each at a time."""

    rows: int
    block: int
    num_warps: int


def row_tiles(kernel: str, width: int) -> RowTiles:
    """For rows of `width` numbers: 4,096 numbers at a time, of several rows where rows are shorter.

    A norm needs the whole row at once, whatever its width.
    """
    whole = 1 << max(6, (width - 1).bit_length())
    if kernel.startswith("rms_norm"):
        return RowTiles(16 if target() == "interpreter" else max(1, 4096 // whole), whole, 8)
    if target() == "interpreter":
        return RowTiles(16, min(whole, 1024), 4)
    block = min(whole, 4096)
    return RowTiles(4096 // block, block, 8)


@dataclass(frozen=True)
class ProductTiles:
    """`block_n` tokens by `split` times `block_v` words a program, `block_d` of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    split: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Under the names that kernels and Triton give them."""
        return {n if n.startswith("num_") else n.upper(): value for n, value in asdict(self).items()}


# A tile of 128 by 128 asks 9 TB/s of the cache at 600 TFLOP/s, one of 128 by 256 three quarters of it; on sm_90 it
# leaves two registers too few, before and after the product's loop.
_PRODUCT = {
    "sm_90": (128, 256, 64, 4, 8, 3),
    "sm_80": (128, 256, 32, 4, 8, 3),
    "gfx942": (128, 128, 64, 4, 8, 2),
}


def product_tiles(dtype: torch.dtype) -> ProductTiles:
    """For `linear_logsumexp`. `split` must not depend on the number of tokens, nor a row's bits on its neighbours."""
    if target() == "interpreter":
        return ProductTiles(64, 256, 64, 2, 4, 1)
    if dtype == torch.float32:
        return ProductTiles(64, 64, 16, 4, 8, 1)
    return ProductTiles(*_PRODUCT[target()])
