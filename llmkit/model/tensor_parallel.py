"""Layers that several processes compute together: each has some of the heads and of the feed-forward units.

    cuts = cut_layers(model, index=1, group=group)  # in place; in the second process of a group of torch.distributed

The query, key, value, gate and up projections are cut by their rows, the output and down projections by their columns;
norms, embedding and head stay whole. What each half of a layer adds to the residual stream is summed over the group,
and so is the gradient of what each half reads. Shoeybi et al. 2019 (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.model.config import ModelConfig

if TYPE_CHECKING:
    from llmkit.model.transformer import Transformer


@dataclass(frozen=True)
class Cut:
    """How processes divide a tensor of `shape`: by the rows of each of the matrices that it stacks (`blocks` are their
    rows), by its columns, or, with neither, not at all."""

    shape: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    columns: bool = False

    @property
    def is_none(self) -> bool:
        """True if each process has all of it."""
        return not self.blocks and not self.columns

    def rows(self, index: int, count: int) -> Tensor:
        """int64: which rows process `index` of `count` has, in their order there.

        >>> Cut((8, 3), blocks=(4, 2, 2)).rows(1, 2).tolist()
        [2, 3, 5, 7]
        """
        all_rows = torch.arange(self.shape[0])
        if not self.blocks:
            return all_rows
        return torch.cat([block.chunk(count)[index] for block in all_rows.split(self.blocks)])

    def place(self, rows: Tensor, index: int, count: int) -> tuple[Any, ...]:
        """The index of `rows` of K such tensors, stacked, with the columns that process `index` has."""
        if not self.columns:
            return slice(None), rows
        width = self.shape[1] // count
        return slice(None), rows, slice(index * width, (index + 1) * width)


def check_divides(count: int, config: ModelConfig, new: bool = False) -> None:
    """Raise UserError unless so many processes divide the heads and units of a layer; `new`: which can be chosen."""
    heads, units = config.num_key_value_heads, config.intermediate_size
    fit = " or ".join(str(number) for number in range(1, count) if heads % number == units % number == 0)
    for name, size, flag in (
        ("key-value heads", heads, "--num-key-value-heads"),
        ("feed-forward units", units, "--intermediate-size"),
    ):
        if size % count:
            raise UserError(
                f"--tensor-parallel: expected a number that divides the {size} {name} of a layer, found {count}; "
                f"give {fit}{f', or another {flag}' if new else ''}"
            )


def cut_layers(model: Transformer, index: int, group: Any) -> dict[str, Cut]:
    """Leave to a model what process `index` of a group computes, in place; how each parameter was cut, by its name."""
    config, count = model.config, group.size()
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    blocks = dict.fromkeys(("qkv", "qkv_bias"), (query, key, key)) | {"gate_up": (config.intermediate_size,) * 2}
    cuts = {}
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        cut = cuts[name] = Cut(tuple(parameter.shape), blocks.get(kind, ()), kind in ("out", "down"))
        if not cut.is_none:
            rows = cut.rows(index, count).to(parameter.device)
            parameter.data = parameter.data[None][cut.place(rows, index, count)][0].contiguous()
    own = replace(
        config,
        num_attention_heads=config.num_attention_heads // count,
        num_key_value_heads=config.num_key_value_heads // count,
        intermediate_size=config.intermediate_size // count,
    )
    layer_group = LayerGroup(group)
    for layer in model.layers:
        layer.config, layer.group = own, layer_group
    return cuts


class LayerGroup:
    """Processes that compute a layer together: `size` of them, a group of torch.distributed.

    apply  runs an autograd function of this module with them
    """

    def __init__(self, processes: Any) -> None:
        self.size = processes.size()
        # a message ends a graph of torch.compile; said here, for it brings torch._dynamo, 2 s to import
        self.apply: Callable[..., Any] = torch.compiler.disable(lambda function, x: function.apply(x, processes))


def copied(x: Any, group: LayerGroup | None) -> Any:
    """A tensor that is the same in each process of a group, for each to compute with: its gradients are summed."""
    return x if x is None or group is None else group.apply(_Copied, x)


def summed(x: Tensor, group: LayerGroup | None) -> Tensor:
    """The sum of `x` over the processes of a group, in each of them."""
    return x if group is None else group.apply(_Summed, x)


def _sum(x: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
