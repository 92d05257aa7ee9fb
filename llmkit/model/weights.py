"""Between our parameters and the tensors of a stock Hugging Face checkpoint: names, shapes, order, folding.

Three things differ. Projections that read the same input are one matrix here and two or three there. The rotated
pairs of a head are neighbours here, (2i, 2i + 1), and half a head apart there, (i, i + D/2). And what exists only
while we train (`ModelConfig`) is folded into stock tensors on the way out, exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.kernels.rowwise import rms_norm_reference
from llmkit.model.config import ModelConfig
from llmkit.model.transformer import Transformer

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class StockTensor:
    """A tensor of the checkpoint, and where it stands in our model.

    layer, attribute  of the parameter; None for one of the model itself
    first             row of the parameter where it begins
    pairs             True if its rows are rotated
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    attribute: str
    first: int = 0
    pairs: bool = False


def stock_tensors(config: ModelConfig) -> list[StockTensor]:
    """List every tensor of the checkpoint, in the order of the layers; the head of a tied one is absent."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    tensors = [StockTensor(EMBEDDING, (config.vocab_size, hidden), None, "embed_tokens")]
    for i in range(config.num_hidden_layers):

        def add(name: str, shape: tuple[int, ...], attribute: str, first: int = 0, pairs: bool = False, i=i) -> None:
            tensors.append(StockTensor(f"model.layers.{i}.{name}", shape, i, attribute, first, pairs))

        add("input_layernorm.weight", (hidden,), "input_norm")
        for name, rows, first in (("q", query, 0), ("k", key, query), ("v", key, query + key)):
            add(f"self_attn.{name}_proj.weight", (rows, hidden), "qkv", first, name != "v")
            if config.attention_bias:
                add(f"self_attn.{name}_proj.bias", (rows,), "qkv_bias", first, name != "v")
        add("self_attn.o_proj.weight", (hidden, query), "out")
        if config.attention_out_bias:
            add("self_attn.o_proj.bias", (hidden,), "out_bias")
        if config.qk_norm:
            add("self_attn.q_norm.weight", (config.head_dim,), "q_norm", pairs=True)
            add("self_attn.k_norm.weight", (config.head_dim,), "k_norm", pairs=True)
        add("post_attention_layernorm.weight", (hidden,), "mlp_norm")
        add("mlp.gate_proj.weight", (wide, hidden), "gate_up")
        add("mlp.up_proj.weight", (wide, hidden), "gate_up", wide)
        add("mlp.down_proj.weight", (hidden, wide), "down")
    tensors.append(StockTensor(FINAL_NORM, (hidden,), None, "norm"))
    if not config.tied_on_disk:
        tensors.append(StockTensor(HEAD, (config.vocab_size, hidden), None, "head_weight"))
    return tensors


def stock_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map the name of every tensor of the checkpoint to its shape."""
    return {tensor.name: tensor.shape for tensor in stock_tensors(config)}


def pairs_apart(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (H * D, ...) from neighbouring pairs to Hugging Face's order."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def pairs_together(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (H * D, ...) from Hugging Face's order to neighbouring pairs."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def export_state_dict(model: Transformer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of the stock model that gives the same logits; `dtype` defaults to the parameters'.

    Folding is done in float32 or wider and rounded once.
    """
    config = model.config
    dtype = dtype or model.embed_tokens.dtype
    wide = torch.float64 if model.embed_tokens.dtype == torch.float64 else torch.float32
    out: dict[str, Tensor] = {}
    for tensor in stock_tensors(config):
        owner = model if tensor.layer is None else model.layers[tensor.layer]
        parameter, scales = getattr(owner, tensor.attribute), getattr(owner, "residual_scale", None)
        if parameter is None:  # a norm without gains
            value = torch.ones(tensor.shape, dtype=wide)
        else:
            value = parameter.detach()[tensor.first : tensor.first + tensor.shape[0]].to("cpu", wide)
        if tensor.name == EMBEDDING and config.normalize_embedding:
            value = rms_norm_reference(value, None, config.rms_norm_eps)
        elif tensor.attribute == "q_norm":
            value = value * config.qk_gain
        elif tensor.attribute in ("out", "down") and scales is not None:
            value = value * scales.detach().to("cpu", wide)[int(tensor.attribute == "down")]
        if tensor.pairs:
            value = pairs_apart(value, config.head_dim)
        # a copy where nothing was computed: the file must not share storage with the model, nor tensors with others
        out[tensor.name] = value.to(dtype, copy=True).contiguous()
    return out


@torch.no_grad()
def import_state_dict(model: Transformer, read: Callable[[str], Tensor]) -> None:
    """Fill a model whose configuration has no training extras from stock tensors, read by name."""
    if model.config != model.config.folded():
        raise UserError("stock tensors can only be loaded into a model without training extras")
    for tensor in stock_tensors(model.config):
        value = read(tensor.name)
        parameter = getattr(model if tensor.layer is None else model.layers[tensor.layer], tensor.attribute)
        rows = pairs_together(value, model.config.head_dim) if tensor.pairs else value
        parameter[tensor.first : tensor.first + tensor.shape[0]].copy_(rows)
