"""Several processes that train one model: their messages to each other, and each one's share of the work.

    world = join(choose_device("auto"), config)                  # where torchrun has started several processes
    with world.in_turn():                                        # the first does the work, the others find it done
        shards = tokenize_documents(...)
    world.check_same({"the number of tokens": shards.tokens})
    shard(model)
    loss, targets = world.sum(loss, targets)

In a job of one process every method returns its argument, and costs nothing. Messages go through the processors, few
numbers at a time (gloo); parameters and gradients go from device to device (nccl on GPUs).

`shard` divides the parameters of a model among the processes by torch's FSDP2: every parameter is cut along its rows; a
layer is put together for the moment in which it computes, and its gradient is summed in float32 and cut again. The
optimizer keeps masters and moments of its own rows. Zhao et al. 2023 (arXiv 2304.11277);
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. K matrices, M x N, of whose M rows this has m.
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
    """The processes of this job: `rank` of `size`; see the module."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, watch: Any = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")
        self.watch, self._numbers = watch, count()

    @property
    def leads(self) -> bool:
        """True if this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        """The sum over all processes of each number."""
        return self._reduce(values, "SUM")

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of all processes of each number."""
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
        """Sum a tensor over all processes, in place, on its device."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank, in every process, however long each takes to have it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.barrier()
        values: list[Any] = [None] * self.size
        with self.watch.waiting():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value, which is JSON, whenever it comes."""
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
        """The first process does what is inside, however long it takes, then the others do."""
        number = next(self._numbers)
        if not self.leads:
            self._publish(None, number)
        yield
        if self.leads and self.size > 1:
            self._publish(None, number)

    def barrier(self) -> None:
        """Wait until all processes are here, however long that takes."""
        if self.size > 1:
            number = next(self._numbers)
            self.watch.store.set(f"here/{number}/{self.rank}", "1")
            self._await([f"here/{number}/{rank}" for rank in range(self.size)])

    def _await(self, keys: list[str]) -> None:
        # no deadline: the watch ends this process where another one fails
        while not self.watch.store.check(keys):
            time.sleep(0.02)

    @contextmanager
    def saving_by(self, save: Callable[[Callable[[Any], bool]], bool]) -> Iterator[None]:
        """While inside, `save` writes this process's part of what there is to save when another one fails, also in
        another thread. It gets a function that tells if all processes have the same; it gives True if it has written.
        """
        if self.size > 1:
            self.watch.save = save
        yield  # no try: where this process fails, too, its part is still to be written, by the watch, on the way out
        if self.size > 1:
            self.watch.save = None

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Raise UserError where this process was given something else than the first: values of JSON, by a name that
        the user knows."""
        for name, value in self.broadcast(dict(what)).items():
            if (own := json.loads(json.dumps(what.get(name)))) != value:
                raise UserError(
                    f"{name} is {own} here and {value} at rank 0; start all processes with the same options and data"
                )
        self.barrier()  # nobody goes on where one is refused

    def check_folder(self, folder: Path, name: str, fresh: bool) -> None:
        """Raise UserError in all processes unless each sees the file `name` that the first has put into a folder, and
        can write there itself; a `fresh` folder is removed then."""
        if self.size == 1:
            return
        self.barrier()
        problem, probe = None, folder / f"rank-{self.rank}.probe"
        if not (folder / name).exists():
            problem = "not to be seen from here; --out must be on a disk that all machines share"
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
        """Raise UserError where a batch has fewer rows than shares; `what`: the option, and what it is."""
        if rows < self.size:
            raise UserError(f"{what}: expected at least {self.size} in a batch, one a process, found {rows}")

    # ---- what each process takes of the work

    def share(self, total: int) -> tuple[int, int]:
        """The first of `total` rows or things that are this process's, and the first that is not; by rank."""
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def deal(self, batches: Iterable[Any]) -> Iterator[Any]:
        """This process's share of some batches, and as many as every other's: one that predicts nothing at the end."""
        if self.size == 1:
            yield from batches
            return
        batches = iter(batches)
        while hand := list(islice(batches, self.size)):
            yield hand[self.rank] if self.rank < len(hand) else hand[0].nothing()


_world = World()


def world() -> World:
    """The job that this process has joined, or a job of one."""
    return _world


def join(device: torch.device, config: TrainingConfig) -> World:
    """Join the other processes of this job, where there are any, to compute on `device` under the options of a stage.

    Raises UserError where the options differ, where they name stdin, or the others cannot be reached.
    """
    global _world
    me = launch()
    if me.size == 1 or _world.size > 1:
        return _world
    import torch.distributed as dist

    patience = float(os.environ.get("LLMKIT_PROCESS_TIMEOUT", PROCESS_TIMEOUT))
    watch = failures.watch(patience)
    if config.reads_stdin():  # type: ignore[attr-defined]  # every stage that trains has it
        raise UserError("stdin: several processes cannot read it; give a file that all of them see")
    store = dist.PrefixStore("groups", watch.store.clone())  # type: ignore[reportPrivateImportUsage]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    world = World(me.rank, me.size, device, watch)
    machine = {"the version of torch": torch.__version__, "the kind of device": device.type}
    machine["the precision"] = str(choose_dtype(config.dtype, device))
    world.check_same({**machine, **options_by_flag(config)})
    # a wait that the watch does not see, such as that of FSDP, ends by itself, a little later
    limit = timedelta(seconds=patience + 2.0)
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=limit)
    _world = world
    return world


def leave() -> None:
    """The work is done: stop watching over the others, who may have ended."""
    global _world
    if _world.size > 1:
        import torch.distributed as dist

        _world.watch.stop()
        dist.destroy_process_group()
        _world = World()


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
    height = -(-rows // size)  # as torch.chunk cuts, and FSDP; the last may be empty
    heights = [max(0, min(height, rows - rank * height)) for rank in range(size)]
    shares = [(rank + 1) * count // size - rank * count // size for rank in range(size)]
    whole_KMN = torch.cat(_exchange(part_KmN.split(shares), [(shares[me], m, columns) for m in heights]), dim=1)
    done_KMN = work(whole_KMN) if shares[me] else whole_KMN
    return torch.cat(_exchange(done_KMN.split(heights, dim=1), [(n, own, columns) for n in shares]))


def _exchange(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Exchange tensors with all processes: send `tensors`, one to each, and return what they sent, of these shapes."""
    import torch.distributed as dist

    inward = [prod(shape) for shape in shapes]
    received = tensors[0].new_empty(sum(inward))
    outward = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_to_all_single(received, outward, inward, [tensor.numel() for tensor in tensors])
    return [values.view(shape) for values, shape in zip(received.split(inward), shapes, strict=True)]
