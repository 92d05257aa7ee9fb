"""A model in the terms of GGUF: the keys and tensors that llama.cpp's own converter writes for its family.

llama and mistral become llama.cpp's `llama`, whose rotated pairs are neighbours, (2i, 2i + 1), as ours are; qwen2 and
qwen3 keep half a head between them. What llama.cpp would compute otherwise than we do is refused, or told in a note.
Source: llama.cpp's convert_hf_to_gguf.py and src/models/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.model.config import ModelConfig
from llmkit.model.folder import SavedTensors
from llmkit.model.transformer import rotary_frequencies
from llmkit.model.weights import pairs_together, stock_shapes

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufModel:
    """A model folder as llama.cpp will read it.

    context  tokens within which it computes what we do
    notes    what the file cannot say
    """

    config: ModelConfig
    architecture: str
    context: int
    notes: tuple[str, ...]


def for_gguf(config: ModelConfig, where: str) -> GgufModel:
    """Check that llama.cpp computes this model as we do. Raises UserError, naming `where`, if it does not."""
    if config.model_type == "qwen3" and (config.attention_bias or config.attention_out_bias):
        raise UserError(f"{where}: llama.cpp's qwen3 has no attention_bias; --format hf keeps it")
    if config.model_type == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError(
            f"{where}: llama.cpp's qwen2 expects head_dim {config.hidden_size // config.num_attention_heads}, "
            f"found {config.head_dim}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3" and ARCHITECTURES[config.model_type] != "llama":
        raise UserError(f"{where}: llama.cpp's {config.model_type} has no rope scaling llama3")
    if scaling is not None and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
        raise UserError(f"{where}: llama.cpp has yarn with beta_fast 32, beta_slow 1 and truncate alone")
    windows = [window for window in config.layer_windows or () if window is not None]
    context = min([config.max_position_embeddings, *windows])
    notes = []
    if context < config.max_position_embeddings:
        notes.append(
            f"a context of {context} tokens, of {config.max_position_embeddings}: within its sliding window, "
            "which llama.cpp does not know in this family"
        )
    return GgufModel(config, ARCHITECTURES[config.model_type], context, tuple(notes))


def add_model_keys(writer: GGUFWriter, model: GgufModel) -> None:
    """Add the keys of the architecture."""
    from gguf import RopeScalingType

    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(model.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
            its_own = max(1.0, 0.1 * math.log(scaling.factor) + 1.0)  # by which llama.cpp multiplies what is stated
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / its_own)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF's name of every tensor of the file -> (its name in the folder, its shape)."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    architecture = MODEL_ARCH[ARCHITECTURES[config.model_type].upper()]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        shapes[ROPE_FACTORS] = (ROPE_FACTORS, (config.head_dim // 2,))
    for name, shape in stock_shapes(config).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, f"gguf has no name for {name}"
        shapes[theirs] = (name, shape)
    return shapes


def read_tensors(config: ModelConfig, tensors: SavedTensors) -> Iterator[tuple[str, Tensor]]:
    """(name, values in float32), one at a time, in the order of `tensor_shapes`."""
    permuted = ARCHITECTURES[config.model_type] == "llama"
    for theirs, (name, _) in tensor_shapes(config).items():
        if name == ROPE_FACTORS:
            plain = rotary_frequencies(config.head_dim, config.rope_theta)
            yield name, (plain / rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)).float()
            continue
        value = tensors.read(name).to(torch.float32)
        if permuted and (".q_proj." in name or ".k_proj." in name):
            value = pairs_together(value, config.head_dim)
        yield theirs, value.contiguous()
