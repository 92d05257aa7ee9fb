"""Launch a kernel, or only compile it for an absent GPU, with the same arguments.

Triton's interpreter is repaired here, too: it stores bfloat16 as 16-bit integers and computes on those, so that in
Triton 3.6 and 3.9 a product of two bfloat16 numbers is garbage, and a cast truncates the lower bits. A GPU does both
correctly, so the kernels are not changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton import knobs, set_allocator
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_compiling: tuple[str, dict[str, Any]] | None = None


def repair_bfloat16() -> None:
    """Make the interpreter compute on bfloat16 as a GPU does: in float32, rounded once at the end."""
    if getattr(InterpreterBuilder, "repaired", False):
        return

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrowed(data):
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
        rounded = np.where(np.isnan(data), 0x7FC0, rounded)
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def repaired(original):
        def compute(self, *operands):
            handles = [x for x in operands if isinstance(x, TensorHandle)]
            if not any(x.dtype.scalar == tl.bfloat16 for x in handles):
                return original(self, *operands)
            result = original(self, *(widened(x) if isinstance(x, TensorHandle) else x for x in operands))
            # the last handle has the result's type: the other factor, or the accumulator
            is_bfloat16 = handles[-1].dtype.scalar == tl.bfloat16 and result.dtype.scalar == tl.float32
            return narrowed(result.data) if is_bfloat16 else result

        return compute

    for name in ("binary_op", "unary_op", "ternary_op", "create_dot"):
        setattr(InterpreterBuilder, name, repaired(getattr(InterpreterBuilder, name)))

    cast = InterpreterBuilder.cast_impl

    def cast_as_a_gpu_does(self, src, dst_type):  # the interpreter's cast truncates
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return narrowed(src.data)
        return cast(self, widened(src), dst_type)

    InterpreterBuilder.cast_impl = cast_as_a_gpu_does
    InterpreterBuilder.repaired = True  # type: ignore[attr-defined]


def cdiv(size: int, block: int) -> int:
    """Return ceil(size / block), without the 4 us of triton.cdiv."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`, without the 4 us of triton's own."""
    return 1 << (size - 1).bit_length()


def interpreting() -> bool:
    return bool(knobs.runtime.interpret)


def compiling() -> bool:
    """Return True within `compiling_for`."""
    return _compiling is not None


def target() -> str:
    """Return the key of the tile tables: a name of TARGETS, the nearest one for other GPUs, or "interpreter"."""
    if _compiling is not None:
        return _compiling[0]
    return "interpreter" if interpreting() else _target_here()


@cache
def _target_here() -> str:
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 2, **constexprs) -> None:
    """Run `kernel` over `grid` on the device of its first tensor. An empty grid launches nothing."""
    if 0 in grid:
        return
    # Fusing a * b + c rounds once instead of twice; Triton's default for it has changed between releases.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if _compiling is not None:
        compiled = kernel.warmup(*args, grid=grid, **constexprs, **options)
        _compiling[1][kernel.__name__] = compiled
        return
    # Memory for tensor descriptors; set at each launch, because autograd's threads have no such variable yet.
    set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    first = next(x for x in args if isinstance(x, Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **constexprs, **options)
    else:
        kernel[grid](*args, **constexprs, **options)


@contextmanager
def compiling_for(name: str) -> Iterator[dict[str, Any]]:
    """In the block, `launch` compiles for the GPU `name` and runs nothing; yields kernel name -> compiled kernel."""
    global _compiling
    assert not interpreting(), "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
    assert _compiling is None
    _compiling = name, {}
    answers = {"device": name, "target": TARGETS[name], "stream": 0}  # to what Triton asks the driver
    absent_gpu = {f"get_current_{what}": lambda *_, answer=answer: answer for what, answer in answers.items()}
    driver.set_active(SimpleNamespace(**absent_gpu, get_device_interface=lambda: None))  # type: ignore[arg-type]
    try:
        yield _compiling[1]
    finally:
        _compiling = None
        driver.reset_active() if torch.cuda.is_available() else driver.set_active(None)  # type: ignore[arg-type]
