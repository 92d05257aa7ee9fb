"""Milliseconds, peak megabytes and a machine's ceilings, from GPU events, or wall time in a smoke run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSHED_BYTES = 256 * 2**20  # more than any GPU's cache, so that each run starts cold
SECONDS_A_TIMING = 0.3
WARM_UP_PRODUCTS = 1000  # 0.2 s on an H200
LONGEST_HEAD_START = 0.02  # seconds
CYCLES_A_SECOND = 2e9  # upper bound of a GPU's clock, so that a head start is not too short


class Clock:
    def __init__(self, device: str):
        self.device, self.on_gpu = device, device == "cuda"
        self._flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None
        if self.on_gpu:  # an idle GPU has a low clock rate
            warm = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
            for _ in range(WARM_UP_PRODUCTS):
                torch.mm(warm, warm)
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], graph: bool = False) -> float:
        """Return the median of at least 5 runs after a warm-up (1 in a smoke run), without Python's time.

        Before the first event the GPU sleeps for as long as Python needs to queue a run; with `graph` the run is
        captured once and replayed, if possible.
        """
        if not self.on_gpu:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        if graph:
            run = _recorded(run)
        started = time.perf_counter()
        run()
        queueing = min(2 * (time.perf_counter() - started), LONGEST_HEAD_START)
        torch.cuda.synchronize()
        repeats = max(5, min(50, int(1e3 * SECONDS_A_TIMING / max(self._once(run, queueing), 1e-3))))
        return statistics.median(self._once(run, queueing) for _ in range(repeats))

    def _once(self, run: Callable[[], object], head_start: float) -> float:
        assert self._flush is not None
        self._flush.zero_()
        torch.cuda._sleep(int(head_start * CYCLES_A_SECOND))
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def peak_megabytes(self, run: Callable[[], object]) -> float | None:
        """Return a run's peak allocation beyond what was allocated before; None without a GPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def ceilings(self) -> dict[str, float]:
        """Return TFLOP/s of a large bfloat16 product and TB/s of a copy (reads plus writes), the basis of shares."""
        size, copied = (8192, 2**31) if self.on_gpu else (128, 2**20)
        left = torch.randn(size, size, device=self.device).to(torch.bfloat16)
        source = torch.empty(copied, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return {
            "TFLOP/s": 2 * size**3 / self.milliseconds(lambda: left @ left) / 1e9,
            "TB/s": 2 * copied / self.milliseconds(lambda: target.copy_(source)) / 1e9,
        }

    def is_lost(self) -> bool:
        """Return True after a kernel's fault (bad address, assertion): this process can no longer use the GPU."""
        try:
            if self.on_gpu:
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def free(self) -> None:
        """Free memory and torch's compiled code: after 8 compilations of a function torch falls back to eager."""
        if self.on_gpu:
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def _recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Capture the run as a CUDA graph; return it unchanged if that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay
