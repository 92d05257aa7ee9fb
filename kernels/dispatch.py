"""Choose the implementation of the kernels that runs: one switch, read from `LLMKIT_KERNELS` when it is needed.

- `torch`: eager PyTorch; runs everywhere, and is what a CPU is best served by.
- `triton`: the kernels of `kernels/triton/`, compiled for the GPU that is there.
- `interpret`: the same kernels run by Triton's interpreter on CPU tensors: slow, for tests and for finding faults.
- `auto`: `triton` on a GPU that it compiles for (NVIDIA sm_80 and later, AMD gfx9), `torch` elsewhere.

Triton is imported when a kernel is first run, never before: a computation on a CPU pays for torch alone.
"""

import importlib
import importlib.util
import os
import sys
from functools import cache
from types import ModuleType

import torch

from llmkit.errors import UserError

BACKENDS = ("auto", "triton", "torch", "interpret")


def backend(device_type: str = "cpu") -> str:
    """Name of the implementation for tensors of this kind of device: "triton", "torch" or "interpret".

    Raises UserError for an unknown value of LLMKIT_KERNELS, and where Triton is asked for and cannot run.
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


# What torch.compiler.assume_constant_result does: a graph takes the answer as it is. Its import costs 1.5 s and triton.
backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _obstacle(device_type: str) -> str | None:
    """Return the reason why Triton's compiled kernels cannot run there, or None."""
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
    """`llmkit.kernels.triton.NAME`, imported on first use, in the mode that LLMKIT_KERNELS asks for.

    Triton reads TRITON_INTERPRET while it is imported, so a process has one mode for good.
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
        raise UserError("LLMKIT_KERNELS: triton is loaded in another mode already; start a process for each")


if os.environ.get("LLMKIT_KERNELS") == "interpret":
    _choose_mode(True)  # now: torch imports triton as well, with the first optimizer
