"""A model whose parameters are divided among processes: torch's FSDP2, and what our own code must do about it.

Every parameter is cut along its rows; a layer is put together for the moment in which it computes, and its gradient is
summed in float32 and cut again. The optimizer keeps masters and moments of its own rows. Zhao et al. 2023 (arXiv
2304.11277); https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

Where neighbouring processes compute each layer together (llmkit/model/tensor_parallel.py), FSDP divides what each has
of it among those that have the same of it. The optimizer knows nothing of that: it has its rows of whole matrices, as
without, to which gradients are sent (`to_rows`), and from which working copies come back (`from_rows`).

K matrices, M x N; this process has m of the M rows, and where layers are cut, n of the N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.engine.distributed import world
from llmkit.model.tensor_parallel import Cut, cut_layers
from llmkit.model.transformer import Transformer


def shard(model: Transformer) -> None:
    """Divide the parameters of a model among the processes of this job, in place; each holds them all before."""
    if world().size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gradients of several micro-batches, and of several processes, are summed in float32, as in a single process.
    # The root stays whole between forward and backward: its head is used outside of forward.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    among, cuts = mesh(), {}
    if (count := world().tensor_parallel_size) > 1:
        among, together = grid()["data"], grid()["tensor"]
        cuts = cut_layers(model, world().rank % count, together.get_group())
    for module in (*model.layers, model):
        whole = fully_shard(module, mesh=among, mp_policy=policy, reshard_after_forward=module is not model)
        whole.set_gradient_divide_factor(1.0)  # a sum, which the number of targets of all processes divides
        whole.set_force_sum_reduction_for_comms(True)
    for name, parameter in model.named_parameters():
        parameter.cut = cuts.get(name)  # type: ignore[attr-defined]


@cache
def mesh(kind: str | None = None) -> Any:
    """All processes in a row, with their devices or with those of a `kind`."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind or world().device.type, (world().size,))


@cache
def grid() -> Any:
    """All processes in a grid: those in a row compute layers together, those in a column have the same part of them."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(
        world().device.type,
        (world().data_parallel_size, world().tensor_parallel_size),
        mesh_dim_names=("data", "tensor"),
    )


def is_sharded(tensor: Tensor) -> bool:
    """True if a tensor is a part of one that several processes hold."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The rows of this process: of a tensor that is not divided, all."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(rows: Tensor, whole: Tensor, kind: str | None = None) -> Tensor:
    """`rows` as this process's of a tensor that is divided as `whole` is, or, where layers are cut, would be."""
    if not is_sharded(whole):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    cut = cut_of(whole)
    shape = whole.shape if cut is None else torch.Size(cut.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh(kind), [Shard(0)], run_check=False, shape=shape, stride=stride)


def cut_of(tensor: Tensor) -> Cut | None:
    """How the processes that compute a layer together have cut it; None where none do."""
    return getattr(tensor, "cut", None)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided, in every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def begin_backward(model: nn.Module, last: bool) -> None:
    """Of several micro-batches only the last sends its gradients, with those of the others."""
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
        part = parameters[name]
        parameter.copy_(full_tensor(part_of(to_rows(local(part)[None], cut_of(part))[0], part)))
    return copy.train(model.training)


def on_whole_matrices(part_KmN: Tensor, rows: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on K matrices of `rows` rows, of which this process has some: each process works on its share of the
    matrices, and gets its rows of all the results.

    What is sent is twice the matrices, all told: gathering them everywhere would be as many times as there are
    processes.
    """
    count, own, columns = part_KmN.shape
    me, size = world().rank, world().size
    heights = [len(_chunk(torch.arange(rows), rank, size)) for rank in range(size)]
    shares = [(rank + 1) * count // size - rank * count // size for rank in range(size)]
    whole_KMN = torch.cat(_exchange(part_KmN.split(shares), [(shares[me], m, columns) for m in heights]), dim=1)
    done_KMN = work(whole_KMN) if shares[me] else whole_KMN
    return torch.cat(_exchange(done_KMN.split(heights, dim=1), [(n, own, columns) for n in shares]))


def to_rows(part: Tensor, cut: Cut | None) -> Tensor:
    """This process's rows of K whole tensors (K, m, N), of what all have of them after a cut, (K, m, n) or (K, m)."""
    if cut is None:
        return part
    me, size = world().rank, world().size
    sent = [part[:, _meeting(cut, me, owner, once=True)[0]] for owner in range(size)]
    places = [_meeting(cut, holder, me, once=True)[1] for holder in range(size)]
    received = _exchange(sent, [(len(part), len(rows), *part.shape[2:]) for rows in places])
    result = part.new_empty(len(part), len(_chunk(torch.arange(cut.shape[0]), me, size)), *cut.shape[1:])
    for holder, (rows, values) in enumerate(zip(places, received, strict=True)):
        result[cut.place(rows, holder % world().tensor_parallel_size, world().tensor_parallel_size)] = values
    return result


def from_rows(rows: Tensor, cut: Cut | None) -> Tensor:
    """The way back from `to_rows`."""
    if cut is None:
        return rows
    me, size, count = world().rank, world().size, world().tensor_parallel_size
    sent = [rows[cut.place(_meeting(cut, holder, me)[1], holder % count, count)] for holder in range(size)]
    places = [_meeting(cut, me, owner)[0] for owner in range(size)]
    columns = sent[me].shape[2:]
    received = _exchange(sent, [(len(rows), len(where), *columns) for where in places])
    result = rows.new_empty(len(rows), len(_held(cut, me)), *columns)
    for where, values in zip(places, received, strict=True):
        result[:, where] = values
    return result


@cache
def _meeting(cut: Cut, holder: int, owner: int, once: bool = False) -> tuple[Tensor, Tensor]:
    """Where the rows stand that one process holds after a cut and another owns of the whole: with the one, the other.

    once: of several that hold the same rows, only one counts
    """
    held, owned = _held(cut, holder), _chunk(torch.arange(cut.shape[0]), owner, world().size)
    where = torch.isin(held, owned).nonzero().view(-1)
    if once and cut.is_none and (holder - owner) % world().tensor_parallel_size:
        where = where[:0]
    first, device = owned[:1].sum(), world().device  # 0 of none
    return where.to(device), (held[where] - first).to(device)


def _held(cut: Cut, rank: int) -> Tensor:
    share, index = divmod(rank, world().tensor_parallel_size)
    return _chunk(cut.rows(index, world().tensor_parallel_size), share, world().data_parallel_size)


def _chunk(rows: Tensor, index: int, count: int) -> Tensor:
    """As torch.chunk cuts, and FSDP; the last may be empty."""
    height = -(-len(rows) // count)
    return rows[index * height : (index + 1) * height]


def _exchange(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """What each process sends to this one, of given shapes; `parts` go to each."""
    import torch.distributed as dist

    inward = [prod(shape) for shape in shapes]
    received = parts[0].new_empty(sum(inward))
    outward = torch.cat([part.reshape(-1) for part in parts])
    dist.all_to_all_single(received, outward, inward, [part.numel() for part in parts])
    return [values.view(shape) for values, shape in zip(received.split(inward), shapes, strict=True)]
