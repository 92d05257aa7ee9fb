"""Distributed training: the messages between ranks, and each rank's share of the work and the parameters.

    world = join(choose_device("auto"), config)                  # all ranks that torchrun has started
    with world.in_turn():                                        # rank 0 does the work, the others find it done
        shards = tokenize_documents(...)
    world.check_same({"the number of tokens": shards.tokens})
    shard(model)
    loss, targets = world.sum(loss, targets)

With a single process every method returns its argument at no cost. Messages are few numbers and go through CPU memory
(gloo); parameters and gradients go from device to device (nccl on GPUs).

`shard` divides the parameters of a model among the ranks with torch's FSDP2: every parameter is sharded along its rows;
a layer is gathered while it computes, and its gradient is reduce-scattered in float32. The optimizer keeps masters and
moments of its own rows. Zhao et al. 2023 (arXiv 2304.11277);
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. K matrices, M x N; this rank has m of M rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count, islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.config import TrainingConfig, options_by_flag
from llmkit.errors import UserError
from llmkit.io.files import remove
from llmkit.io.ranks import launch
from llmkit.model.devices import choose_dtype
from llmkit.model.transformer import Transformer
from llmkit.training import failures

PROCESS_TIMEOUT = 600.0  # seconds to wait for another process


class World:
    """The ranks of this job; see the module."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, watch: Any = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")
        self.watch, self._numbers = watch, count()

    @property
    def leads(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sum each number over all ranks."""
        return self._reduce(values, "SUM")

    def largest(self, *values: float) -> tuple[float, ...]:
        """Return the maximum of each number over all ranks."""
        return self._reduce(values, "MAX")

    def _reduce(self, values: tuple[float, ...], operation: str) -> tuple[float, ...]:
        if self.size == 1:
            return values
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        with self.watch.waiting():
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
        return tuple(tensor.tolist())

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all ranks, in place, on its device."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each rank, on every rank, without a timeout."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.barrier()
        values: list[Any] = [None] * self.size
        with self.watch.waiting():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0, which is JSON, without a timeout."""
        if self.size == 1:
            return value
        return self._publish(value, next(self._numbers))

    def _publish(self, value: Any, number: int) -> Any:
        key = f"said/{number}"
        if self.leads:
            self.watch.store.set(key, json.dumps(value))
            return value
        self._await([key])
        return json.loads(self.watch.store.get(key))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block on rank 0, however long it takes, and then on the others."""
        number = next(self._numbers)
        if not self.leads:
            self._publish(None, number)
        yield
        if self.leads and self.size > 1:
            self._publish(None, number)

    def barrier(self) -> None:
        """Wait for all ranks, without a timeout."""
        if self.size > 1:
            number = next(self._numbers)
            self.watch.store.set(f"here/{number}/{self.rank}", "1")
            self._await([f"here/{number}/{rank}" for rank in range(self.size)])

    def _await(self, keys: list[str]) -> None:
        # no timeout: the watch ends this process if another rank fails
        while not self.watch.store.check(keys):
            time.sleep(0.02)

    @contextmanager
    def saving_by(self, save: Callable[[Callable[[Any], bool]], bool]) -> Iterator[None]:
        """In the block, `save` writes this rank's part of a checkpoint when another rank fails, maybe in another
        thread. It gets a function that returns whether all ranks have the same value; it returns True if it wrote."""
        if self.size > 1:
            self.watch.save = save
        yield  # no try: if this rank fails too, the watch still has to write its part
        if self.size > 1:
            self.watch.save = None

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Raise UserError if a value differs from that of rank 0: JSON values, under names that users know."""
        for name, value in self.broadcast(dict(what)).items():
            if (own := json.loads(json.dumps(what.get(name)))) != value:
                raise UserError(
                    f"{name} is {own} here and {value} at rank 0; start all processes with the same options and data"
                )
        self.barrier()  # no rank continues if one is refused

    def check_folder(self, folder: Path, name: str, fresh: bool) -> None:
        """Raise UserError on all ranks unless each sees the file `name` that rank 0 wrote to `folder`, and can write
        there itself; a `fresh` folder is removed in that case."""
        if self.size == 1:
            return
        self.barrier()
        problem, probe = None, folder / f"rank-{self.rank}.probe"
        if not (folder / name).exists():
            problem = "not visible from here; --out must be on a disk that all machines share"
        else:
            try:
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as error:
                problem = f"cannot be written: {str(error.strerror).lower()}; all processes write checkpoints there"
        problems = [f"rank {rank}: {folder}: {text}" for rank, text in enumerate(self.gather(problem)) if text]
        if problems:
            if self.leads and fresh:
                remove(folder)
            raise UserError(problems[0])

    def check_rows(self, rows: int, what: str) -> None:
        """Raise UserError if a batch has fewer rows than there are ranks; `what`: the option, and what it counts."""
        if rows < self.size:
            raise UserError(f"{what}: expected at least {self.size} in a batch, one per process, found {rows}")

    # ---- each rank's share of the work

    def share(self, total: int) -> tuple[int, int]:
        """Return the start and stop of this rank's share of `total` rows or items."""
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def deal(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield this rank's share of the batches, as many on each rank: a batch without targets fills up the end."""
        if self.size == 1:
            yield from batches
            return
        batches = iter(batches)
        while hand := list(islice(batches, self.size)):
            yield hand[self.rank] if self.rank < len(hand) else hand[0].nothing()


_world = World()


def world() -> World:
    """Return the job that this process has joined, or a job of one."""
    return _world


def join(device: torch.device, config: TrainingConfig) -> World:
    """Join the other ranks of this job, if any, to compute on `device` with the options of a stage.

    Raises UserError if the options differ or name stdin, or if the others cannot be reached.
    """
    global _world
    me = launch()
    if me.size == 1 or _world.size > 1:
        return _world
    import torch.distributed as dist

    timeout = float(os.environ.get("LLMKIT_PROCESS_TIMEOUT", PROCESS_TIMEOUT))
    watch = failures.watch(timeout)
    if config.reads_stdin():  # type: ignore[attr-defined]  # every stage that trains has it
        raise UserError("stdin: several processes cannot read it; use a file that all of them see")
    store = dist.PrefixStore("groups", watch.store.clone())  # type: ignore[reportPrivateImportUsage]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    world = World(me.rank, me.size, device, watch)
    machine = {"the version of torch": torch.__version__, "the kind of device": device.type}
    machine["the precision"] = str(choose_dtype(config.dtype, device))
    world.check_same({**machine, **options_by_flag(config)})
    # a wait that the watch does not see, such as FSDP's, times out a little later
    limit = timedelta(seconds=timeout + 2.0)
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=limit)
    _world = world
    return world


def leave() -> None:
    """Leave the job: stop watching the other ranks, which may have ended."""
    global _world
    if _world.size > 1:
        import torch.distributed as dist

        _world.watch.stop()
        dist.destroy_process_group()
        _world = World()


def shard(model: Transformer) -> None:
    """Shard the parameters of a model over the ranks of this job, in place; each rank has all of them before."""
    if world().size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gradients of micro-batches and of ranks are summed in float32, as in a single process. The root stays gathered
    # between forward and backward, because its head is used outside of forward.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        sharded = fully_shard(module, mesh=mesh(), mp_policy=policy, reshard_after_forward=module is not model)
        sharded.set_gradient_divide_factor(1.0)  # a sum, later divided by the number of targets on all ranks
        sharded.set_force_sum_reduction_for_comms(True)


@cache
def mesh(kind: str | None = None) -> Any:
    """Return the one-dimensional mesh of all ranks, on their devices or on those of a `kind`."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind or world().device.type, (world().size,))


def is_sharded(tensor: Tensor) -> bool:
    """Return True if a tensor is sharded over several ranks."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor; all rows if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(rows: Tensor, like: Tensor, kind: str | None = None) -> Tensor:
    """Return `rows` as this rank's part of a tensor that is sharded like `like`."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(rows, mesh(kind), [Shard(0)], run_check=False, shape=like.shape, stride=stride)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole_model(model: Transformer) -> Transformer:
    """Return the model with all of its parameters on this rank, for generation; the same object if it is not sharded.

    Collective.
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
    """Apply `work` to K matrices of `rows` rows, of which this rank has m: each rank works on its share of complete
    matrices and gets its rows of all results.

    This sends each matrix twice in total; gathering on every rank would send it once per rank.
    """
    count, own, columns = part_KmN.shape
    me, size = world().rank, world().size
    height = -(-rows // size)  # split as by torch.chunk and FSDP; the last may be empty
    heights = [max(0, min(height, rows - rank * height)) for rank in range(size)]
    shares = [(rank + 1) * count // size - rank * count // size for rank in range(size)]
    whole_KMN = torch.cat(_exchange(part_KmN.split(shares), [(shares[me], m, columns) for m in heights]), dim=1)
    done_KMN = work(whole_KMN) if shares[me] else whole_KMN
    return torch.cat(_exchange(done_KMN.split(heights, dim=1), [(n, own, columns) for n in shares]))


def _exchange(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Send `tensors[i]` to rank i (all-to-all); return the tensors that the ranks sent, of these shapes."""
    import torch.distributed as dist

    inward = [prod(shape) for shape in shapes]
    received = tensors[0].new_empty(sum(inward))
    outward = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_to_all_single(received, outward, inward, [tensor.numel() for tensor in tensors])
    return [values.view(shape) for values, shape in zip(received.split(inward), shapes, strict=True)]
