"""Conversion between our parameters and the tensors of a stock Hugging Face checkpoint: names, shapes, order, folding.

Projections of the same input are one matrix here, and two or three there in some families. The rotated pairs of a head
are adjacent here, (2i, 2i + 1), and half of the rotated channels apart there, (i, i + D/2). gpt2 stores matrices as
(in, out), gemma gains of norms minus one. Parameters for training only (`ModelConfig`) are folded exactly on export.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.kernels.rowwise import rms_norm_reference
from llmkit.model.config import ModelConfig
from llmkit.model.families import FAMILIES
from llmkit.model.transformer import Layer, Transformer

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StockTensor:
    """A tensor of the checkpoint, and its place in our model.

    shape       in the checkpoint
    layer       index; None for a tensor of the model itself
    attribute   the parameter
    first       its first row in the parameter
    pairs       number of its rows that are rotated, from the first
    transposed  True if it is stored as (in, out)
    offset      added to it on import
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    attribute: str
    first: int = 0
    pairs: int = 0
    transposed: bool = False
    offset: float = 0.0

    @property
    def rows(self) -> slice:
        """Its rows in the parameter."""
        return slice(self.first, self.first + self.shape[-1 if self.transposed else 0])


def stock_tensors(config: ModelConfig) -> list[StockTensor]:
    """List every tensor of the checkpoint, in the order of the layers; a tied head is absent."""
    family = FAMILIES[config.model_type]
    prefix, hidden, offset = family.prefix, config.hidden_size, family.gain_offset

    def table(attribute: str, shape: tuple[int, ...]) -> StockTensor:
        kind = "bias" if attribute.endswith("_bias") else "weight"
        name = f"{prefix}{family.tables[attribute.removesuffix('_bias')]}.{kind}"
        return StockTensor(name, shape, None, attribute, offset=offset if attribute == "norm" else 0.0)

    tensors = [table("embed_tokens", (config.vocab_size, hidden))]
    if config.learned_positions:
        tensors.append(table("embed_positions", (config.max_position_embeddings, hidden)))
    layer = _layer_tensors(config)
    for i in range(config.num_hidden_layers):
        tensors += [replace(item, name=f"{prefix}{family.layers}.{i}.{item.name}", layer=i) for item in layer]
    tensors.append(table("norm", (hidden,)))
    if config.layer_norm:
        tensors.append(table("norm_bias", (hidden,)))
    if not config.tied_on_disk:
        tensors.append(StockTensor(HEAD, (config.vocab_size, hidden), None, "head_weight"))
    return tensors


def _layer_tensors(config: ModelConfig) -> list[StockTensor]:
    """List the tensors of a layer, by their names within it; each bias follows its matrix."""
    family, shapes = FAMILIES[config.model_type], config.layer_shapes()
    rotated = 0 if config.learned_positions else sum(config.stacked_rows["qkv"][:2])
    tensors = []
    for attribute, modules in stacked_modules(config).items():
        inputs = shapes[attribute][1:]  # none for a norm
        transposed = family.transposed and bool(inputs)
        offset = family.gain_offset if attribute.endswith("_norm") else 0.0
        turned = {"qkv": rotated, "q_norm": math.inf, "k_norm": math.inf}.get(attribute, 0)
        first = 0
        for module, size in modules:
            pairs = int(max(0, min(size, turned - first)))
            shape = (*inputs, size) if transposed else (size, *inputs)
            weight = StockTensor(f"{module}.weight", shape, None, attribute, first, pairs, transposed, offset)
            tensors.append(weight)
            if (bias := f"{attribute}_bias") in shapes:
                tensors.append(StockTensor(f"{module}.bias", (size,), None, bias, first, pairs))
            first += size
    return tensors


def stacked_modules(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Return the modules of a layer and their rows, by the parameter that stacks them."""
    family, shapes, stacked = FAMILIES[config.model_type], config.layer_shapes(), config.stacked_rows
    out = {}
    for attribute, modules in family.layer.items():
        if attribute in shapes:
            rows = stacked.get(attribute, shapes[attribute][:1])
            out[attribute] = list(zip(modules, rows if len(modules) > 1 else (sum(rows),), strict=True))
    return out


def embedding_name(config: ModelConfig) -> str:
    """Return the name of the embedding in the checkpoint."""
    family = FAMILIES[config.model_type]
    return f"{family.prefix}{family.tables['embed_tokens']}.weight"


def stock_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map the name of every tensor of the checkpoint to its shape."""
    return {tensor.name: tensor.shape for tensor in stock_tensors(config)}


def pairs_apart(rows: Tensor, config: ModelConfig, count: int, *, back: bool = False) -> Tensor:
    """Reorder the first `count` of rows (H * D, ...) from adjacent pairs to Hugging Face's order, or `back`."""
    heads = rows[:count].unflatten(0, (-1, config.head_dim))
    turned = config.rotary_dim or config.head_dim
    apart = heads[:, :turned].unflatten(1, (2, -1) if back else (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([torch.cat([apart, heads[:, turned:]], 1).flatten(0, 1), rows[count:]])


def export_state_dict(model: Transformer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of the stock model that gives the same logits; `dtype` defaults to the parameters'."""
    dtype = dtype or model.embed_tokens.dtype
    return {tensor.name: export_tensor(model, tensor, dtype) for tensor in stock_tensors(model.config)}


@torch.no_grad()
def export_tensor(model: Transformer, tensor: StockTensor, dtype: torch.dtype) -> Tensor:
    """Return one tensor of the stock model. Folding is done in float32 or wider and rounded once."""
    config = model.config
    wide = torch.float64 if model.embed_tokens.dtype == torch.float64 else torch.float32
    owner = model if tensor.layer is None else model.layers[tensor.layer]
    parameter, scales = getattr(owner, tensor.attribute), getattr(owner, "residual_scale", None)
    # a norm may be without gains
    value = torch.ones(tensor.shape, dtype=wide) if parameter is None else parameter[tensor.rows].to("cpu", wide)
    if tensor.attribute == "embed_tokens" and config.normalize_embedding:
        value = rms_norm_reference(value, None, config.rms_norm_eps)
    elif tensor.attribute == "q_norm":
        value = value * config.qk_gain
    elif tensor.attribute in ("out", "down") and scales is not None:
        value = value * scales.to("cpu", wide)[int(tensor.attribute == "down")]
    if tensor.pairs:
        value = pairs_apart(value, config, tensor.pairs)
    if tensor.offset:
        value = value - tensor.offset
    if tensor.transposed:
        value = value.T
    # a copy even if nothing was computed: the file must not share storage with the model, nor tensors with others
    return value.to(dtype, copy=True).contiguous()


@torch.no_grad()
def import_state_dict(
    model: Transformer, read: Callable[[str], Tensor], around: Callable[[Layer], AbstractContextManager] = nullcontext
) -> None:
    """Fill a model without training extras from stock tensors, read by name.

    around: context manager in which each layer is filled
    """
    if model.config != model.config.folded():
        raise UserError("stock tensors can only be loaded into a model without training extras")
    for index, tensors in groupby(stock_tensors(model.config), key=lambda tensor: tensor.layer):
        owner = model if index is None else model.layers[index]
        with around(owner) if isinstance(owner, Layer) else nullcontext():
            for tensor in tensors:
                value, parameter = read(tensor.name), getattr(owner, tensor.attribute)
                if tensor.transposed:
                    value = value.T
                if tensor.pairs:
                    value = pairs_apart(value, model.config, tensor.pairs, back=True)
                if tensor.offset:
                    value = value.to(torch.float32) + tensor.offset
                parameter[tensor.rows].copy_(value)
