"""Kernels: attention, cross-entropy and row-wise steps, one name each, whatever the machine.

Imported as `llmkit.kernels`. Nothing here knows of models, tokenizers or training.
"""

from llmkit.kernels.allocator import keep_freed_memory
from llmkit.kernels.attention import Packing, attention_mask, scaled_dot_product_attention
from llmkit.kernels.branching import Branching
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.decode import attention_decode
from llmkit.kernels.dispatch import BACKENDS, backend
from llmkit.kernels.linear import linear
from llmkit.kernels.logprobs import linear_logprobs
from llmkit.kernels.projections import qkv_rotary, swiglu_mlp
from llmkit.kernels.rowwise import add_rms_norm, rms_norm, swiglu

__all__ = [
    "BACKENDS",
    "Branching",
    "Packing",
    "add_rms_norm",
    "attention_decode",
    "attention_mask",
    "backend",
    "keep_freed_memory",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "qkv_rotary",
    "rms_norm",
    "scaled_dot_product_attention",
    "swiglu",
    "swiglu_mlp",
]
