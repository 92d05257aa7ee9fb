"""Tile sizes: which part of a problem one program takes, by kernel, GPU, head size and dtype."""

from dataclasses import dataclass

import torch
from llmkit.kernels.triton.launch import target


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M queries by BLOCK_N keys, on `num_warps` warps, with `num_stages` tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tiles(kernel: str, size: int, dtype: torch.dtype) -> Tiles:
    return Tiles(64, 64, 8, 2)
