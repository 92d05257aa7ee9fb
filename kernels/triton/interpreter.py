"""A repair of Triton's interpreter, which holds bfloat16 as 16-bit integers and computes on those.

A product of two bfloat16 numbers is garbage there, and a cast drops the lower bits, in Triton 3.6 and 3.9. A GPU does
both right, so the interpreter is repaired and the kernels are left alone.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair_bfloat16() -> None:
    """Let the interpreter compute on bfloat16 as a GPU does: in float32, rounded once at the end."""
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
            # the last handle has the result's type: the other factor, or what a product is added to
            is_bfloat16 = handles[-1].dtype.scalar == tl.bfloat16 and result.dtype.scalar == tl.float32
            return narrowed(result.data) if is_bfloat16 else result

        return compute

    for name in ("binary_op", "unary_op", "ternary_op", "create_dot"):
        setattr(InterpreterBuilder, name, repaired(getattr(InterpreterBuilder, name)))

    cast = InterpreterBuilder.cast_impl

    def cast_as_a_gpu_does(self, src, dst_type):  # the interpreter's own cast drops the lower bits
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return narrowed(src.data)
        return cast(self, widened(src), dst_type)

    InterpreterBuilder.cast_impl = cast_as_a_gpu_does
    InterpreterBuilder.repaired = True  # type: ignore[attr-defined]
