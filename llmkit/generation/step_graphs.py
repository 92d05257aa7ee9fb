"""Decode steps recorded once and replayed: at few rows a GPU waits for launches, a dozen a layer, not for memory.

A recorded step is one launch. It knows nothing of the host but what it was recorded with, so it is a function of
tensors that stay in their place: the tokens and positions fed, and what its decoder holds. One is recorded for each
number of rows and of positions seen, both rounded up. After the tensors that a step reads were moved, `forget` all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from llmkit.io.progress import say

FEW_ROWS = 8  # up to it rows are rounded to powers of two, beyond it to its multiples, which cost a product no more
LEAST_SEEN = 256
MOST_GRAPHS = 48  # held at once: of a 48-layer model each has some 700 nodes, at about 1 KB


class Recording(Protocol):
    """Recorded work of a function without arguments: `out` is its result; `replay` computes it again in place."""

    out: Tensor

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Tensor], Any], Recording]  # (what to record, another recording to share memory with)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: each stream has a workspace of cuBLAS of its own, 32 MiB on sm_90."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """A recording by CUDA (or HIP)."""

    def __init__(self, compute: Callable[[], Tensor], beside: CudaGraph | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        device = torch.device("cuda", torch.cuda.current_device())
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        pool = None if beside is None else beside._graph.pool()
        # A failed capture leaves its stream the current one; this block puts the former back.
        with torch.cuda.stream(stream):
            # Once outside: kernels are compiled and loaded, handles and workspaces made, which no capture allows.
            compute()
            # Only this thread's calls may break the capture: others may copy or wait meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.out = compute()

    def replay(self) -> None:
        self._graph.replay()


class StepGraphs:
    """The recorded steps of one decoder of `slots` slots.

    The graphs share one pool of memory: a replay spoils what another has left there, but for logits, of which the
    caller has a copy. The longest unused goes where there are too many.
    """

    def __init__(self, record: Record, slots: int, device: torch.device) -> None:
        self._record: Record | None = record
        self._fed_2R = torch.zeros((2, slots), dtype=torch.long, device=device)
        self._graphs: OrderedDict[tuple[int, int], Recording] = OrderedDict()

    def forget(self) -> None:
        """Drop all recordings, after the tensors that they read were moved."""
        self._graphs.clear()

    def run(self, rows: int, seen: int, fed: list[list[int]], compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`compute(token_B, position_B)` of what is `fed`, (2, rows), over `seen` positions: the caller's own logits.

        A step that cannot be recorded, for want of memory or by its nature, is computed, now and from then on.
        """
        on_gpu = self._fed_2R.device.type == "cuda"
        token_B, position_B = self._fed_2R[:, :rows]
        # from pinned memory the copy waits for nothing, and torch keeps the memory until it is done
        self._fed_2R[:, :rows].copy_(torch.tensor(fed, pin_memory=on_gpu), non_blocking=True)
        graph = self._graphs.pop((rows, seen), None)
        if graph is None and self._record is not None:
            try:
                graph = self._record(lambda: compute(token_B, position_B), next(iter(self._graphs.values()), None))
            except RuntimeError as error:  # torch's for CUDA's errors and for want of memory
                self._record = None
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"decoding without CUDA graphs, which is slower: {first}")
        if graph is None:
            return compute(token_B, position_B)
        self._graphs[rows, seen] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        graph.replay()
        return graph.out.clone()


def rounded_rows(used: int) -> int:
    """1, 2, 4, 8, 16, 24, 32 ..."""
    return 1 << (used - 1).bit_length() if used <= FEW_ROWS else -(-used // FEW_ROWS) * FEW_ROWS


def rounded_seen(positions: int, context: int) -> int:
    """256, 512, 1,024 ... `context`: a stretch of keys that no row has reached costs a program that ends at once."""
    rounded = max(LEAST_SEEN, 1 << (positions - 1).bit_length())
    return rounded if positions > context else min(rounded, context)
