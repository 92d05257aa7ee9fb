"""Quantized matrices: a frozen base for training with adapters, and a decoder's weights on a CPU.

The frozen matrices of a layer have 4 or 8 bits and are dequantized for each product.

    with quantized_when_filled(layer, "nf4", torch.bfloat16, "cpu"):
        layer.qkv.copy_(weight)                      # and so on
    layer.qkv                                        # bfloat16, of its shape, freed after use

Blocks of 64 weights, in row-major order, share a float32 scale, their largest magnitude.

- "nf4": each weight is the nearest of 16 levels between -1 and 1, times the scale: quantiles of a normal distribution,
  which trained weights resemble (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E). 4.5 bits per
  weight; the paper's double quantization, of the scales, would save 0.37 more.
- "int8": each weight is an integer up to 127, times a 127th of the scale. 8.5 bits per weight.

Embedding, head, norms and biases are not quantized. The gradients of the input, and of an adapter on the matrix, go
through the dequantized matrix; codes and scales have none.

Matrix products with narrow weights on a CPU: each token reads every weight once, so decoding is bound by bytes.

    product = narrow_linear(weight, bias, "int8")    # packed once
    y_BN = product(x_BK)                             # float32 in, float32 out

FBGEMM, which torch includes on x86, has kernels for weights of 16 and 8 bits that need only AVX2. Its ops belong to
torch's deprecated eager quantization: only this file uses them.

- "half": IEEE half precision, multiplied and summed in float32. It rounds a weight 8 times finer than bfloat16.
- "int8": weights of 7 bits, with a scale per output channel; inputs of 8 bits, with a scale per row. AVX2 adds two
  products of 8 bits in 16, which overflows if both factors use all their bits: 255 * 127 * 2 > 2^15. torch's dynamic
  quantization takes the missing bit from the inputs, and their scale from the complete batch. Here it is taken from
  the weights: the error is the same on normal inputs and smaller with outliers (2.6% instead of 5.4%), and a row's
  sums are integers that do not depend on the other rows.

B rows, K inputs, N outputs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmkit.model.devices import Weights
from llmkit.model.transformer import MATRICES, Layer, Transformer

BLOCK = 64  # weights
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LEVELS = 127  # of int8
# on a CPU: temporaries of complete matrices leave 3 GB of unused heap at 1.7B parameters
BLOCKS_AT_ONCE = 1 << 16
SMALLEST_SCALE = 1e-30  # divisor for a block or a row of zeros
WEIGHT_LEVELS, INPUT_LEVELS, INPUT_ZERO = 64, 127, 128  # of a decoder's int8
LARGEST_HALF = 65504.0


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte as complex numbers (256,), so that one lookup decodes both."""
    numbers = torch.tensor(NF4, device=device)
    return torch.complex(numbers.repeat_interleave(16), numbers.repeat(16))


class Quantized(nn.Module):
    """Parametrization that dequantizes a matrix from codes: int8 (blocks, 64), or uint8 (blocks, 32) of nf4."""

    def __init__(self, shape: torch.Size, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.register_buffer("scales", scales)  # (blocks, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the matrix, computed in float32 and rounded once."""
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
    """Compute codes and scales (blocks, 1) for `Quantized`. A block with NaN or infinity has it as its scale."""
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
    """Allocate a meta layer in float32, to be filled in this context.

    At its end, the matrices are quantized, for dequantization to `dtype`, and the other parameters converted to it.
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
    """Return True if the matrices of the layers are quantized."""
    return any(isinstance(module, Quantized) for module in model.modules())


def narrow_linear(weight: Tensor, bias: Tensor | None, weights: Weights) -> Callable[[Tensor], Tensor] | None:
    """Return `x_BK -> x_BK @ weight_NK.T + bias` in float32, or None if half precision cannot represent the weights."""
    weight_NK = weight.detach().float()
    bias_N = None if bias is None else bias.detach().float()
    if weights == "half" and not bool(weight_NK.abs().max() <= LARGEST_HALF):  # NaN too, which packing would hide
        return None
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"  # torch's own choice depends on the CPU
    try:
        if weights == "half":
            packed = torch.ops.quantized.linear_prepack_fp16(weight_NK, bias_N)
            product = _without_checks(torch.ops.quantized.linear_dynamic_fp16.default)
            return lambda x_BK: product(x_BK, packed)
        scale_N = (weight_NK.abs().amax(1) / WEIGHT_LEVELS).clamp_min(SMALLEST_SCALE)
        zero_N = torch.zeros(len(weight_NK), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantize_per_channel.* deprecated")
            narrow = torch.quantize_per_channel(weight_NK, scale_N.double(), zero_N, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(narrow, None)
    finally:
        torch.backends.quantized.engine = engine
    product = _without_checks(torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default)

    def multiply(x_BK: Tensor) -> Tensor:
        # vector_norm(inf) takes 113 us for 16 x 1,024, these two ops 9
        largest_B1 = x_BK.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST_SCALE)
        y_BN = product(x_BK / largest_B1, 1 / INPUT_LEVELS, INPUT_ZERO, packed).mul_(largest_B1)
        return y_BN if bias_N is None else y_BN.add_(bias_N)

    return multiply


def _without_checks(op: Any) -> Callable[..., Tensor]:
    """Return the bare op: torch first searches the arguments of such ops for fake tensors, 13 us of 67."""
    return getattr(op, "_op", op)
