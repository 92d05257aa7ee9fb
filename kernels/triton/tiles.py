"""Tile sizes: which part of a problem one program takes, by kernel, GPU, head size and dtype.

Chosen for no spilled registers and for shared memory within the GPU's (`tests/kernels/test_compile.py` keeps it so),
the widest first; what a GPU's clock says may replace them.
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
        "attention_forward": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
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
_FLOAT32 = {32: (64, 32, 8, 1), 64: (32, 32, 8, 1), 96: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
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
