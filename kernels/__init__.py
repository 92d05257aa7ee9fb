"""Kernels: attention, cross-entropy and row-wise steps, one name each, whatever the machine.

Imported as `llmkit.kernels`. Nothing here knows of models, tokenizers or training.
"""

from llmkit.kernels.attention import Packing, scaled_dot_product_attention
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.dispatch import BACKENDS, backend
from llmkit.kernels.linear import linear
from llmkit.kernels.rowwise import norm_rotary, rms_norm, rotary, swiglu

__all__ = [
    "BACKENDS",
    "Packing",
    "backend",
    "linear",
    "linear_cross_entropy",
    "norm_rotary",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "swiglu",
]
