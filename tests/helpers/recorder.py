"""CUDA graphs simulated on a CPU: operations are recorded with their tensors and replayed in the same memory."""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Elsewhere:
    """A tensor allocated before recording: like a CUDA graph, this has its address but does not keep it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._place, self._dtype = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
        self._view = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        assert not self._place.expired(), "a graph reads memory that has been given back"
        return torch.empty(0, dtype=self._dtype).set_(UntypedStorage._new_with_weak_ptr(self._place.cdata), *self._view)


class Recorder(TorchDispatchMode):
    """Records `compute` in place of `CudaGraph`: values that Python computes are frozen in the recording.

    Reading a number from a tensor is an error, as in CUDA.
    """

    def __init__(self, compute, beside) -> None:
        super().__init__()
        self._done, self._own = [], set()
        compute()  # warm-up before recording, as for CUDA
        with self:
            self.out = compute()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = args, kwargs or {}
        with self:  # under inference mode composite operations arrive undecomposed
            if (parts := operation.decompose(*args, **given[1])) is not NotImplemented:
                return parts
        result = operation(*args, **given[1])
        aliases = [returned.alias_info for returned in operation._schema.returns if returned.alias_info]
        writes = any(alias.is_write for alias in aliases)
        if not aliases:
            self._own |= {_place(tensor) for tensor in tree_leaves(result)}
        if writes or not aliases:  # views stay valid
            self._done.append((operation, tree_map_only(Tensor, self._kept, given), None if writes else result))
        return result

    def _kept(self, tensor: Tensor) -> Tensor | _Elsewhere:
        return tensor if tensor.is_mkldnn or _place(tensor) in self._own else _Elsewhere(tensor)

    def replay(self) -> None:
        for operation, kept, result in self._done:
            args, kwargs = tree_map_only(_Elsewhere, _Elsewhere.tensor, kept)
            made = operation(*args, **kwargs)
            if result is not None:
                result.copy_(made)


class Counting:
    """A recorder that counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, compute, beside) -> Recorder:
        recording, replay = Recorder(compute, beside), Recorder.replay
        self.recorded += 1

        def counted():
            self.replayed += 1
            replay(recording)

        recording.replay = counted
        return recording


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
