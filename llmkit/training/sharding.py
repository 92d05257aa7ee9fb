"""A model whose parameters are divided among processes: torch's FSDP2, and what our own code must do about it.

Every parameter is cut along its rows; a layer is put together for the moment in which it computes, and its gradient is
summed in float32 and cut again. The optimizer keeps masters and moments of its own rows. Zhao et al. 2023 (arXiv
2304.11277); https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

K matrices, M x N, of whose M rows this process has m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.model.transformer import Transformer
from llmkit.training.distributed import world


def shard(model: Transformer) -> None:
    """Divide the parameters of a model among the processes of this job, in place; each holds them all before."""
    if world().size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gradients of several micro-batches, and of several processes, are summed in float32, as in a single process.
    # The root stays whole between forward and backward: its head is used outside of forward.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        whole = fully_shard(module, mesh=mesh(), mp_policy=policy, reshard_after_forward=module is not model)
        whole.set_gradient_divide_factor(1.0)  # a sum, which the number of targets of all processes divides
        whole.set_force_sum_reduction_for_comms(True)


@cache
def mesh(kind: str | None = None) -> Any:
    """All processes in a row, with their devices or with those of a `kind`."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind or world().device.type, (world().size,))


def is_sharded(tensor: Tensor) -> bool:
    """True if a tensor is a part of one that several processes hold."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The rows of this process: of a tensor that is not divided, all."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(rows: Tensor, whole: Tensor, kind: str | None = None) -> Tensor:
    """`rows` as this process's of a tensor that is divided as `whole` is."""
    if not is_sharded(whole):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(rows, mesh(kind), [Shard(0)], run_check=False, shape=whole.shape, stride=stride)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided, in every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def begin_backward(model: nn.Module, last: bool) -> None:
    """Reduce gradients across processes only after the last micro-batch."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]


@torch.no_grad()
def whole_model(model: Transformer) -> Transformer:
    """A model with all of its parameters in this process, to generate with: the same one where it is not divided.

    All processes call it together.
    """
    if not hasattr(model, "reshard"):
        return model
    model.reshard()  # type: ignore[operator]
    copy = Transformer(model.config, dtype=model.embed_tokens.dtype, device=model.embed_tokens.device)
    parameters = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.copy_(full_tensor(parameters[name]))
    return copy.train(model.training)


def on_whole_matrices(part_KmN: Tensor, rows: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on K matrices of `rows` rows, of which this process has some: each process works on its share of the
    matrices, and gets its rows of all the results.

    This sends twice the matrices, all told: gathering them everywhere would be as many times as there are
    processes.
    """
    count, own, columns = part_KmN.shape
    me, size = world().rank, world().size
    heights = [len(_chunk(torch.arange(rows), rank, size)) for rank in range(size)]
    shares = [(rank + 1) * count // size - rank * count // size for rank in range(size)]
    whole_KMN = torch.cat(_exchange(part_KmN.split(shares), [(shares[me], m, columns) for m in heights]), dim=1)
    done_KMN = work(whole_KMN) if shares[me] else whole_KMN
    return torch.cat(_exchange(done_KMN.split(heights, dim=1), [(n, own, columns) for n in shares]))


def _chunk(rows: Tensor, index: int, count: int) -> Tensor:
    """As torch.chunk cuts, and FSDP; the last may be empty."""
    height = -(-len(rows) // count)
    return rows[index * height : (index + 1) * height]


def _exchange(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Exchange tensors with all processes: send `parts`, one to each, and return what they sent, of these shapes."""
    import torch.distributed as dist

    inward = [prod(shape) for shape in shapes]
    received = parts[0].new_empty(sum(inward))
    outward = torch.cat([part.reshape(-1) for part in parts])
    dist.all_to_all_single(received, outward, inward, [part.numel() for part in parts])
    return [values.view(shape) for values, shape in zip(received.split(inward), shapes, strict=True)]
