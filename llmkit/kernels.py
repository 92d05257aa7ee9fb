"""Kernels: attention, cross-entropy and row-wise steps, one name each, whatever the machine.

They stand in kernels/, at the top level for its readers, and know nothing of models, tokenizers or training. kernels/
has no __init__.py: in a clone, Python would take it for the package `kernels` of PyPI, which transformers looks for.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
# a clone has kernels/ beside llmkit/, a wheel llmkit/kernels/; this module, found before a folder of its name, is the
# package of either
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "kernels")]

from llmkit.kernels.attention import Branching, Packing, scaled_dot_product_attention
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
    "backend",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "qkv_rotary",
    "rms_norm",
    "scaled_dot_product_attention",
    "swiglu",
    "swiglu_mlp",
]
