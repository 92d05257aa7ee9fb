"""Start a kernel, or only compile it for a GPU that is not there, with the very arguments of a real start.

>>> with compiling_for("sm_90") as kernels:      # doctest: +SKIP
...     attention.forward(query, key, value, ...)  # tensors on "meta"
>>> kernels["_forward"].asm["ptx"]               # doctest: +SKIP
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_compiling: tuple[str, dict[str, Any]] | None = None


def interpreting() -> bool:
    return bool(knobs.runtime.interpret)


def compiling() -> bool:
    """True within `compiling_for`."""
    return _compiling is not None


def target() -> str:
    """Whose table of tile sizes applies: a name of TARGETS, the nearest one for other GPUs, or "interpreter"."""
    if _compiling is not None:
        return _compiling[0]
    if interpreting():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 2, **constexprs) -> None:
    """Run `kernel` over `grid` on the device of its first tensor. No program at all is no launch."""
    if 0 in grid:
        return
    # Fusing a * b + c rounds once instead of twice; Triton's default for it has changed between releases.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if _compiling is not None:
        compiled = kernel.warmup(*args, grid=grid, **constexprs, **options)
        _compiling[1][kernel.__name__] = compiled
        return
    first = next(x for x in args if isinstance(x, Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **constexprs, **options)
    else:
        kernel[grid](*args, **constexprs, **options)


class _AbsentGPU:
    """Answers what Triton asks a driver for while it compiles."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_device_interface(self):
        return None


@contextmanager
def compiling_for(name: str) -> Iterator[dict[str, Any]]:
    """Within it `launch` compiles for the GPU `name` and starts nothing; yields kernel name to compiled kernel."""
    global _compiling
    assert not interpreting(), "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
    assert _compiling is None
    _compiling = name, {}
    driver.set_active(_AbsentGPU(name))  # type: ignore[arg-type]
    try:
        yield _compiling[1]
    finally:
        _compiling = None
        driver.reset_active() if torch.cuda.is_available() else driver.set_active(None)  # type: ignore[arg-type]
