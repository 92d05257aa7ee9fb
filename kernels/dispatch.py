"""Choose the implementation of the kernels: one switch, read from `LLMKIT_KERNELS` when it is needed.

- `torch`: eager PyTorch; runs everywhere, and is the fastest on a CPU.
- `triton`: the kernels of `kernels/triton/`, compiled for this machine's GPU.
- `interpret`: the same kernels in Triton's interpreter on CPU tensors: slow, for tests and debugging.
- `auto`: `triton` on a GPU that it supports (NVIDIA sm_80 and later, AMD gfx9), `torch` elsewhere.

Triton is imported when a kernel is first run: computing on a CPU imports torch alone.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType

import torch
from torch import Tensor

from llmkit.errors import UserError

BACKENDS = ("auto", "triton", "torch", "interpret")


def backend(device_type: str = "cpu") -> str:
    """Return the implementation for tensors on this type of device: "triton", "torch" or "interpret".

    Raises UserError for an unknown value of LLMKIT_KERNELS, and if Triton is requested and cannot run.
    """
    chosen = os.environ.get("LLMKIT_KERNELS", "auto") or "auto"
    if chosen not in BACKENDS:
        raise UserError(f"LLMKIT_KERNELS: expected one of {', '.join(BACKENDS)}, found {chosen!r}")
    if chosen in ("auto", "triton"):
        obstacle = _obstacle(device_type)
        if obstacle is None:
            return "triton"
        if chosen == "triton":
            raise UserError(f"LLMKIT_KERNELS=triton: {obstacle}; use auto, or interpret to run the kernels on a CPU")
        return "torch"
    if chosen == "interpret" and not _triton_is_installed():
        raise UserError("LLMKIT_KERNELS=interpret: triton is not installed; pip install triton")
    return chosen


# As torch.compiler.assume_constant_result: graphs take the result as a constant. Its import costs 1.5 s and triton.
backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_eager(*tensors: Tensor) -> bool:
    """Return True if only autograd has to see an operator, so that torch's dispatcher can be bypassed.

    False under torch.compile, in a TorchDispatchMode (tracing, fake tensors), and for subclasses of Tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def once_differentiable(backward: Callable) -> Callable:
    """Decorate the backward of a torch.autograd.Function without a second one: it raises under `create_graph=True`.

    torch's decorator of this name raises only if the upstream gradient requires grad; otherwise, such as after a sum, a
    second derivative would silently be zero.
    """

    @wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{type(ctx).__name__}: create_graph=True, but it has no second derivative")
        return backward(ctx, *grads)

    return once


def eager_function(name: str, compute: Callable, save: Callable, backward: Callable) -> Callable:
    """Return the computation of a torch operator as a torch.autograd.Function `name` with the same parts.

    The dispatcher of an operator takes longer than a small kernel, and imports the compiler on its first call.
    """

    def forward(ctx, *inputs):
        output = compute(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]


def in_one_dtype(operation: str, **tensors: Tensor) -> list[Tensor]:
    """Return the tensors unchanged, or within torch.autocast in its dtype (except float64), as torch's products do.

    Raises TypeError if their dtypes differ: implicit copies would cost more than the operation.
    """
    values = list(tensors.values())
    if (kind := values[0].device.type) != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        values = [x if x.dtype == torch.float64 else x.to(dtype) for x in values]
    if any(x.dtype != values[0].dtype for x in values):
        listed = ", ".join(f"{name} {str(x.dtype).removeprefix('torch.')}" for name, x in tensors.items())
        raise TypeError(f"{operation}: expected tensors of one dtype, found {listed}")
    return values


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _obstacle(device_type: str) -> str | None:
    """Return the reason why Triton's compiled kernels cannot run on this type of device, or None."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"expected a GPU, found {device_type}"
    if not _triton_is_installed():
        return "triton is not installed"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(0).gcnArchName
        return None if name.startswith("gfx9") else f"expected a gfx9 GPU, found {name}"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"expected a GPU of sm_80 or later, found sm_{major}{minor}"


def triton_module(name: str) -> ModuleType:
    """Import `llmkit.kernels.triton.NAME` on first use, in the mode of LLMKIT_KERNELS, and return it.

    Triton reads TRITON_INTERPRET on import, so a process cannot change its mode.
    """
    module = sys.modules.get(f"llmkit.kernels.triton.{name}")
    if module is None:
        interpret = os.environ.get("LLMKIT_KERNELS") == "interpret"
        _choose_mode(interpret)
        if interpret:
            importlib.import_module("llmkit.kernels.triton.launch").repair_bfloat16()
        module = importlib.import_module(f"llmkit.kernels.triton.{name}")
    return module


def _choose_mode(interpret: bool) -> None:
    if interpret and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if interpret != (os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")):
        advice = "set TRITON_INTERPRET=1 too" if interpret else "start a process without TRITON_INTERPRET"
        chosen = os.environ.get("LLMKIT_KERNELS") or "auto"
        raise UserError(f"LLMKIT_KERNELS={chosen}: Triton was imported before, in its other mode; {advice}")


if os.environ.get("LLMKIT_KERNELS") == "interpret":
    _choose_mode(True)  # now, because torch imports triton with the first optimizer
