"""The measured shapes, their documents and windows, and the candidates of tile sizes."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Attention:
    batch: int
    heads: int
    kv_heads: int
    length: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch},{self.heads},{self.kv_heads},{self.length},{self.size}"

    @property
    def window(self) -> int:
        return self.length // 4

    def documents(self) -> torch.Tensor:
        """Return document ids (B, T); lengths are uniform up to half a row, a quarter on average."""
        generator = torch.Generator().manual_seed(0)
        rows = []
        for _ in range(self.batch):
            lengths = torch.randint(1, self.length // 2 + 1, (self.length,), generator=generator)
            rows.append(torch.repeat_interleave(torch.arange(self.length), lengths)[: self.length])
        return torch.stack(rows)


@dataclass(frozen=True)
class Linear:
    tokens: int
    hidden: int
    words: int

    def __str__(self) -> str:
        return f"{self.tokens},{self.hidden},{self.words}"


@dataclass(frozen=True)
class Decode:
    batch: int
    heads: int
    kv_heads: int
    capacity: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch},{self.heads},{self.kv_heads},{self.capacity},{self.size}"

    def lengths(self) -> torch.Tensor:
        """Return the lengths of the rows, from half of the cache to all of it."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.capacity // 2, self.capacity + 1, (self.batch,), generator=generator)


@dataclass(frozen=True)
class Shapes:
    attention: tuple[Attention, ...]
    loss: tuple[Linear, ...]
    grpo: tuple[tuple[int, Linear], ...]  # number of sequences, and the shape of all their tokens
    decode: tuple[Decode, ...]


FULL = Shapes(
    attention=(
        Attention(1, 32, 8, 8192, 128),
        Attention(32, 10, 10, 2048, 128),
        Attention(16, 12, 12, 1024, 64),
        Attention(8, 25, 25, 1024, 64),
    ),
    loss=(Linear(8192, 4096, 128256), Linear(65536, 768, 50304), Linear(16384, 1600, 50304)),
    grpo=((8, Linear(8192, 4096, 128256)),),
    decode=(Decode(1, 32, 8, 8192, 128), Decode(32, 32, 8, 8192, 128), Decode(256, 32, 8, 8192, 128)),
)
SMOKE = Shapes(
    attention=(Attention(1, 2, 1, 40, 16),),
    loss=(Linear(40, 32, 100),),
    grpo=((2, Linear(40, 32, 100)),),
    decode=(Decode(2, 4, 2, 160, 16),),
)

# Candidates of tile sizes by kernel, tried after the defaults of the tables. The list is short because each costs
# seconds of compilation. The defaults do not spill registers in the backward pass (tests/kernels/lint.py); candidates
# may.
CANDIDATES = {
    "attention_forward": {
        64: ((128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)),
    },
    "attention_grad_query": {
        64: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 3)),
    },
    "attention_grad_key_value": {
        64: ((64, 64, 4, 2), (64, 128, 8, 3), (32, 128, 8, 3)),
        128: ((32, 128, 8, 3), (64, 64, 8, 2), (64, 128, 8, 3)),
    },
    "attention_decode": ((128, 64, 4, 3), (512, 64, 4, 3), (256, 128, 4, 2), (256, 32, 4, 4)),
    "linear_logsumexp": ((128, 128, 64, 4, 8, 4), (128, 256, 64, 8, 8, 4), (128, 256, 64, 2, 8, 4)),
    "cross_entropy": ((1, 4096, 8), (1, 8192, 16), (1, 8192, 32), (1, 16384, 32)),
}
SMOKE_CANDIDATES = {
    "attention_forward": {16: ((32, 32, 4, 1),)},
    "attention_grad_query": {16: ((32, 16, 4, 1),)},
    "attention_grad_key_value": {16: ((16, 32, 4, 1),)},
    "attention_decode": ((64, 32, 4, 1),),
    "linear_logsumexp": ((32, 64, 32, 1, 4, 1),),
    "cross_entropy": ((8, 64, 4),),
}


def specialized_tiles(tiles: ModuleType) -> dict[str, Any]:
    """Return warp-specialized tiles (docs/kernels.md) in the types of kernels/triton/tiles.py."""
    blocks = {"attention_forward": 128, "attention_grad_query": 128, "attention_grad_key_value": 64}
    chosen = {
        tiles.sized_name(kernel, 128, torch.bfloat16): tiles.Tiles(block, 128, 4, 2, specialize=1)
        for kernel, block in blocks.items()
    }
    return chosen | {tiles.product_name(torch.bfloat16): tiles.ProductTiles(128, 256, 64, 4, 4, 3, specialize=1)}
