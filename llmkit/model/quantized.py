"""Frozen matrices of a layer in 4 or 8 bits, dequantized whenever they are multiplied.

    with quantized_when_filled(layer, "nf4", torch.bfloat16, "cpu"):
        layer.qkv.copy_(weight)                      # and so on
    layer.qkv                                        # bfloat16, of its shape, for as long as somebody holds it

Blocks of 64 numbers of a matrix, row after row, share a float32 scale, the largest magnitude among them.

- "nf4": each number is the nearest of 16 between -1 and 1, times the scale: quantiles of a normal distribution, which
  trained weights resemble (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E). 4.5 bits a number; the
  paper's second quantization, of the scales, would save 0.37 more.
- "int8": each number is a whole one up to 127, times a 127th of the scale. 8.5 bits.

Embedding, head, norms and biases stay as they are. The gradient of the input, and of an adapter that is added to a
matrix, goes through the dequantized matrix; codes and scales have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmkit.model.transformer import MATRICES, Layer, Transformer

BLOCK = 64  # numbers
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LEVELS = 127  # of int8
# on a CPU: temporaries of whole matrices leave 3 GB of unused heap at 1.7B parameters
BLOCKS_AT_ONCE = 1 << 16
SMALLEST_SCALE = 1e-30  # to divide by, of a block of zeros


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,): the two numbers of a byte as a complex number, so that one look-up decodes both."""
    numbers = torch.tensor(NF4, device=device)
    return torch.complex(numbers.repeat_interleave(16), numbers.repeat(16))


class Quantized(nn.Module):
    """Dequantizes a matrix, as its parametrization, from codes: int8 (blocks, 64), or uint8 (blocks, 32) of nf4."""

    def __init__(self, shape: torch.Size, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.register_buffer("scales", scales)  # (blocks, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """The matrix; computed in float32 and rounded once."""
        at_once = BLOCKS_AT_ONCE if codes.device.type == "cpu" else len(codes)
        matrix = torch.empty(len(codes), BLOCK, dtype=self.dtype, device=codes.device)
        for first in range(0, len(codes), at_once):
            blocks = slice(first, first + at_once)
            if codes.dtype == torch.int8:
                numbers = codes[blocks].float()
            else:
                pairs = _pairs(codes.device).index_select(0, codes[blocks].flatten().int())
                numbers = torch.view_as_real(pairs).view(-1, BLOCK)
            matrix[blocks] = numbers.mul_(cast("Tensor", self.scales)[blocks])
        return matrix.flatten()[: self.shape.numel()].view(self.shape)


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Compute codes and scales (blocks, 1) for `Quantized`. The scale of a block with NaN or infinity is that."""
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    blocks = blocks / scales.clamp_min(SMALLEST_SCALE)
    if kind == "int8":
        return blocks.mul_(LEVELS).round_().to(torch.int8), scales / LEVELS
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    for lower, upper in pairwise(NF4):  # a third of the time and a quarter of the memory of torch.bucketize
        codes += blocks > (lower + upper) / 2
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


@contextmanager
def quantized_when_filled(layer: Layer, kind: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    """Give a layer of device meta memory in float32, to be filled in this context.

    At its end the matrices are quantized, to be dequantized to `dtype`, and the other parameters converted to that.
    """
    layer.float().to_empty(device=device)
    yield
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if name not in MATRICES:
            parameter.data = parameter.data.to(dtype)
            continue
        codes, scales = quantize(parameter, kind)
        setattr(layer, name, nn.Parameter(codes, requires_grad=False))
        parametrize.register_parametrization(layer, name, Quantized(parameter.shape, scales, dtype), unsafe=True)


def is_quantized(model: Transformer) -> bool:
    """True if the matrices of the layers are quantized."""
    return any(isinstance(module, Quantized) for module in model.modules())
