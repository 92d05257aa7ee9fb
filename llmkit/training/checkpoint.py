"""Training checkpoints: everything that a bit-exact resume needs, without pickle.

`state/step-00000120/` contains `tensors.safetensors` (masters, moments) and `state.json` (step, tokens, loss, seconds,
and the checksum of each file). A checkpoint is written to a temporary folder and renamed. The last two are kept, and an
older one is deleted once the new one is on disk, so that a kill or a power cut at any moment leaves an intact one. If
the newest is damaged, a line says so and the one before it is loaded. Writing happens in a thread, on a copy.

With several ranks, each writes its parts of the tensors to its own safetensors file, by torch.distributed.checkpoint in
its Hugging Face format, which stores the places of the parts in the files' headers; its other format uses pickle. Any
number of ranks can read what any number wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.io.files import PARTIAL, atomic_folder, file_sha256, remove, replace_folder, sync
from llmkit.io.progress import counted, say
from llmkit.io.resume import read_sealed, write_sealed
from llmkit.io.run_folder import CHECKPOINTS_KEPT, checkpoint_place, checkpoint_steps, keep_checkpoints
from llmkit.model.folder import write_tensors
from llmkit.training.distributed import is_sharded, local, mesh, part_of, world

TENSORS, STATE = "tensors.safetensors", "state.json"


class Checkpoints:
    """The checkpoints of one run; the last `keep` of them are kept."""

    def __init__(self, folder: Path, keep: int = CHECKPOINTS_KEPT) -> None:
        self.folder, self.keep = folder, keep
        self._verified: dict[int, dict[str, Any]] = {}  # states of checkpoints whose checksums were right
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._group: Any = None  # the thread's collectives must not mix with those of training

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, ascending."""
        return checkpoint_steps(self.folder)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Create the process group for writing, while all ranks still answer."""
        if any(map(is_sharded, tensors.values())):
            import torch.distributed as dist

            self._group = self._group or dist.new_group(backend="gloo")
            mesh("cpu")

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], wait: bool = False) -> None:
        """Copy the tensors and write them in the background; with `wait`, return when they are on disk. Collective.

        Raises the error of the previous background write, such as OSError for a full disk.
        """
        self.prepare(tensors)
        self.wait()
        copies = {
            name: part_of(local(value.detach()).to("cpu", copy=True).contiguous(), value, "cpu")
            for name, value in tensors.items()
        }
        write = self._write_parts if any(map(is_sharded, tensors.values())) else self._write
        self._writing = self._pool.submit(self._written, write, step, copies, dict(state))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the current write, and raise its error."""
        if self._writing is not None:
            wait_for([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    def _written(self, write: Callable[..., None], step: int, tensors: dict[str, Tensor], state: dict) -> None:
        write(step, tensors, state)
        self._verified.pop(step, None)
        if world().leads:
            keep_checkpoints(self.folder, self.keep, step)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        if not world().leads:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(checkpoint_place(self.folder, step), force=True) as partial:
            write_tensors(partial / TENSORS, tensors)
            digests = {TENSORS: file_sha256(partial / TENSORS)}
            write_sealed(partial / STATE, {**state, "step": step, "sha256": digests})

    def _write_parts(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        partial, group = Path(f"{checkpoint_place(self.folder, step)}{PARTIAL}"), self._group
        if world().leads:
            remove(partial)  # left by a run that was killed
            partial.mkdir(parents=True)
        dist.barrier(group)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            save(tensors, storage_writer=writer, process_group=group)  # type: ignore[arg-type]
        except CheckpointException as error:
            rank, (first, _) = min(error.failures.items())
            raise UserError(f"{partial}: rank {rank} cannot write there: {first}; make room, then --resume") from error
        # each rank syncs and hashes its own files: a file from another machine may not be visible yet
        own = list(partial.glob(f"shard-{world().rank + 1:05d}-*.safetensors"))
        for part in own:
            sync(part)
        gathered: list[dict[str, str]] = [{}] * world().size
        dist.all_gather_object(gathered, {part.name: file_sha256(part) for part in own}, group=group)
        digests = {name: digest for checksums in gathered for name, digest in checksums.items()}
        if world().leads:
            noted = {**state, "step": step, "parts": len(digests), "sha256": digests}
            write_sealed(partial / STATE, noted)
            replace_folder(partial, checkpoint_place(self.folder, step))
        dist.barrier(group)

    def state(self) -> dict[str, Any] | None:
        """Return the newest intact checkpoint's state, with its `step`; None if there is none."""
        newest = world().broadcast(self._newest() if world().leads else None)
        return newest and newest[1]

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and state of the newest intact checkpoint; report each newer, damaged one on stderr.

        Raises UserError if there are checkpoints and all of them are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            folder = checkpoint_place(self.folder, step)
            try:
                if step not in self._verified:
                    self._verified[step] = _verified_state(folder, step)
            except (OSError, ValueError) as error:
                reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
                damaged.append(f"{folder}: damaged checkpoint ({reason})")
                continue
            for line in damaged:
                say(f"{line}; continuing from step {step}")
            return step, self._verified[step]
        if damaged:
            raise UserError(f"{damaged[0]}; start over with --force")
        return None

    def load(self, like: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the state of the newest intact checkpoint, or None if there is none.

        like: tensors of the same names and shapes; sharded ones are overwritten

        Raises UserError if all checkpoints are damaged, or if a sharded one has other shapes than `like`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        newest = self._newest() if like is None or world().leads else None
        newest = newest if like is None else world().broadcast(newest)
        if newest is None:
            return None
        folder, state = checkpoint_place(self.folder, newest[0]), newest[1]
        try:
            sharded = like is not None and any(map(is_sharded, like.values()))
            if sharded or "parts" in state:
                return _load_parts(folder, state.get("parts", 1), like), state
            return load_file(folder / TENSORS), state
        except LookupError as error:
            message = f"{folder}: a checkpoint of another model: {error}"
            raise UserError(f"{message}; choose another --out, or start over with --force") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{folder}: damaged checkpoint ({error}); start over with --force") from error


def _verified_state(folder: Path, step: int) -> dict[str, Any]:
    """Read the state of a step's checkpoint and verify its files. Raises ValueError or OSError if it is damaged."""
    state = read_sealed(folder / STATE)
    if state.get("step") != step:
        raise ValueError(f"{STATE} belongs to another step")
    for name, digest in state["sha256"].items():
        if not (folder / name).is_file():  # to open a pipe would wait for its writer
            raise ValueError(f"{name} is not a file")
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum in {STATE}")
    return state


def _load_parts(folder: Path, count: int, like: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Load the tensors of a sharded checkpoint; without `like`, all of them and unsharded."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    files = sum(1 for _ in folder.glob("*.safetensors"))
    if files != count:
        raise ValueError(f"expected {counted(count, 'file')} of tensors, found {files}")
    reader = HuggingFaceStorageReader(str(folder))
    described: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    if like is None:
        tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in described.items()}
    else:
        tensors = {name: value if is_sharded(value) else torch.empty_like(value) for name, value in like.items()}
        for name, value in tensors.items():
            there = tuple(described[name].size) if name in described else None
            if there != tuple(value.shape):
                raise LookupError(f"{name} is {there or 'missing'} in the checkpoint and {tuple(value.shape)} here")
    try:
        with warnings.catch_warnings():  # each rank reads its own parts, as intended
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
            load(tensors, storage_reader=reader, no_dist=True)  # type: ignore[arg-type]
    except CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    return tensors
