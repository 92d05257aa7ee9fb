"""Between our parameters and the tensors of a stock Hugging Face checkpoint: names, shapes, order, folding.

Three things differ. Projections that read the same input are one matrix here and two or three there. The rotated
pairs of a head are neighbours here, (2i, 2i + 1), and half a head apart there, (i, i + D/2). And what exists only
while we train (`ModelConfig`) is folded into stock tensors on the way out, exactly.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.kernels.rowwise import rms_norm_reference
from llmkit.model.config import ModelConfig
from llmkit.model.transformer import Transformer

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def stock_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, in the order of the layers; the head of a tied one absent."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
            if config.attention_bias:
                shapes[f"{attention}{name}_proj.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, query)
        if config.attention_out_bias:
            shapes[attention + "o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (config.head_dim,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, intermediate)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tied_on_disk:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def pairs_apart(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (H * D, ...) from neighbouring pairs to Hugging Face's order."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def pairs_together(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (H * D, ...) from Hugging Face's order to neighbouring pairs."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def export_state_dict(model: Transformer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of the stock model that gives the same logits; `dtype` defaults to the parameters'.

    Folding is done in float32 or wider and rounded once.
    """
    config = model.config
    dtype = dtype or model.embed_tokens.dtype
    wide = torch.float64 if model.embed_tokens.dtype == torch.float64 else torch.float32

    def full(parameter: Tensor | None, size: int) -> Tensor:
        return torch.ones(size, dtype=wide) if parameter is None else parameter.detach().to("cpu", wide)

    out: dict[str, Tensor] = {}
    embedding = full(model.embed_tokens, 0)
    out[EMBEDDING] = (
        rms_norm_reference(embedding, None, config.rms_norm_eps) if config.normalize_embedding else embedding
    )
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for i, layer in enumerate(model.layers):
        name, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        out[name + "input_layernorm.weight"] = full(layer.input_norm, config.hidden_size)
        for part, stacked in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if stacked is not None:
                q, k, v = full(stacked, 0).split((query, key, key))
                out[f"{attention}q_proj.{part}"] = pairs_apart(q, config.head_dim)
                out[f"{attention}k_proj.{part}"] = pairs_apart(k, config.head_dim)
                out[f"{attention}v_proj.{part}"] = v
        scales = full(layer.residual_scale, 2)
        out[attention + "o_proj.weight"] = full(layer.out, 0) * scales[0]
        if layer.out_bias is not None:
            out[attention + "o_proj.bias"] = full(layer.out_bias, 0)
        if config.qk_norm:
            q_norm = full(layer.q_norm, config.head_dim) * config.qk_gain
            out[attention + "q_norm.weight"] = pairs_apart(q_norm, config.head_dim)
            out[attention + "k_norm.weight"] = pairs_apart(full(layer.k_norm, config.head_dim), config.head_dim)
        out[name + "post_attention_layernorm.weight"] = full(layer.mlp_norm, config.hidden_size)
        gate, up = full(layer.gate_up, 0).chunk(2)
        out[name + "mlp.gate_proj.weight"], out[name + "mlp.up_proj.weight"] = gate, up
        out[name + "mlp.down_proj.weight"] = full(layer.down, 0) * scales[1]
    out[FINAL_NORM] = full(model.norm, config.hidden_size)
    if not config.tied_on_disk:
        out[HEAD] = full(model.head_weight, 0)
    # A clone where nothing was computed: the file must not share storage with the model, nor tensors with others.
    return {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in out.items()}


def import_state_dict(model: Transformer, read: Callable[[str], Tensor]) -> None:
    """Fill a model whose configuration has no training extras from stock tensors, read by name."""
    config = model.config
    if config != config.folded():
        raise UserError("stock tensors can only be loaded into a model without training extras")

    def fill(parameter: Tensor | None, value: Tensor) -> None:
        if parameter is not None:
            parameter.data.copy_(value)

    fill(model.embed_tokens, read(EMBEDDING))
    for i, layer in enumerate(model.layers):
        name, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        for part, stacked in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if stacked is not None:
                q, k, v = (read(f"{attention}{x}_proj.{part}") for x in "qkv")
                q, k = pairs_together(q, config.head_dim), pairs_together(k, config.head_dim)
                stacked.data.copy_(torch.cat([q, k, v]))
        fill(layer.input_norm, read(name + "input_layernorm.weight"))
        fill(layer.out, read(attention + "o_proj.weight"))
        if layer.out_bias is not None:
            fill(layer.out_bias, read(attention + "o_proj.bias"))
        if config.qk_norm:
            fill(layer.q_norm, pairs_together(read(attention + "q_norm.weight"), config.head_dim))
            fill(layer.k_norm, pairs_together(read(attention + "k_norm.weight"), config.head_dim))
        fill(layer.mlp_norm, read(name + "post_attention_layernorm.weight"))
        fill(layer.gate_up, torch.cat([read(f"{name}mlp.{part}_proj.weight") for part in ("gate", "up")]))
        fill(layer.down, read(name + "mlp.down_proj.weight"))
    fill(model.norm, read(FINAL_NORM))
    if model.lm_head is not None:
        fill(model.lm_head, read(HEAD))
