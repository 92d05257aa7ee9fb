"""Matrix products with narrow weights on a CPU: one token reads every weight once, so bytes are what it costs.

    product = narrow_linear(weight, bias, "int8")    # packed once
    y_BN = product(x_BK)                             # float32 in, float32 out

FBGEMM, which torch carries for x86, has kernels for weights of 16 and of 8 bits that need no more than AVX2. Its ops
are those under torch's deprecated eager quantisation: they are named in this file and nowhere else.

- "half": IEEE half precision, multiplied and summed in float32. It rounds a weight 8 times finer than bfloat16.
- "int8": weights of 7 bits, with a scale for each output channel; inputs of 8 bits, with a scale for each row. AVX2
  adds two products of 8 bits in 16, which overflows where both factors use all their bits: 255 * 127 * 2 > 2^15.
  torch's dynamic quantisation takes the bit from the inputs and their scale from the whole batch. Here the weights
  give it: at equal error on normal inputs, less on those with outliers (2.6% where that has 5.4%), and a row's sums
  are whole numbers of its own, the same bits beside any others.

B rows, K inputs, N outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Weights = Literal["dense", "half", "int8"]  # "dense": as they are in the model
WEIGHT_LEVELS, INPUT_LEVELS, INPUT_ZERO = 64, 127, 128
LARGEST_HALF = 65504.0
SMALLEST_SCALE = 1e-30  # of a row that is all zeros


@cache
def can_narrow() -> bool:
    """True if FBGEMM is there."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def narrow_linear(weight: Tensor, bias: Tensor | None, weights: Weights) -> Callable[[Tensor], Tensor] | None:
    """`x_BK -> x_BK @ weight_NK.T + bias` in float32, or None for weights that half precision cannot hold."""
    weight = weight.detach().float()
    bias = None if bias is None else bias.detach().float()
    if weights == "half" and not bool(weight.abs().max() <= LARGEST_HALF):  # or NaN, which packing would hide
        return None
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"  # torch's own choice depends on the processor
    try:
        return _half_linear(weight, bias) if weights == "half" else _int8_linear(weight, bias)
    finally:
        torch.backends.quantized.engine = engine


def _without_checks(op: Any) -> Callable[..., Tensor]:
    """The op itself: torch looks through the arguments of such ops for fake ones first, 13 us of 67."""
    return getattr(op, "_op", op)


def _half_linear(weight_NK: Tensor, bias_N: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.quantized.linear_prepack_fp16(weight_NK, bias_N)
    product = _without_checks(torch.ops.quantized.linear_dynamic_fp16.default)
    return lambda x_BK: product(x_BK, packed)


def _int8_linear(weight_NK: Tensor, bias_N: Tensor | None) -> Callable[[Tensor], Tensor]:
    scale_N = (weight_NK.abs().amax(1) / WEIGHT_LEVELS).clamp_min(SMALLEST_SCALE)
    zero_N = torch.zeros(len(weight_NK), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantize_per_channel.* deprecated")
        narrow = torch.quantize_per_channel(weight_NK, scale_N.double(), zero_N, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(narrow, None)
    product = _without_checks(torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default)

    def multiply(x_BK: Tensor) -> Tensor:
        # vector_norm(inf) takes 113 us for 16 x 1,024, these two 9
        largest_B1 = x_BK.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST_SCALE)
        y_BN = product(x_BK / largest_B1, 1 / INPUT_LEVELS, INPUT_ZERO, packed).mul_(largest_B1)
        return y_BN if bias_N is None else y_BN.add_(bias_N)

    return multiply
