"""Device, precision, threads and memory of a computation."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from llmkit.errors import UserError
from llmkit.io.progress import counted
from llmkit.io.ranks import launch

Weights = Literal["dense", "half", "int8"]  # "dense": as they are in the model
# 4 layers of 256 with a vocabulary of 8,192 (5M) take 1.4 ms per token on one thread, 1.5 ms on two, and 50 ms on two
# that other processes keep busy
ONE_THREAD_PARAMETERS = 20_000_000
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MADV_COLLAPSE, _HUGE_PAGE = 25, 2**21  # madvise(2), of Linux 6.1
BATCH_BYTES = 80  # per token of a step: id, target and document, 20 bytes, in four prefetched batches


@cache
def can_narrow() -> bool:
    """Return True if FBGEMM is available."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def choose_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is a GPU if there is one, else the CPU.

    With several GPUs it is the first, or with several ranks the rank's own. Raises UserError if the device is missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU found here; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    if name == "cuda" and (me := launch()).size > 1:
        if me.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{counted(torch.cuda.device_count(), 'GPU')} here, and this is process {me.local_rank + 1} of this "
                "machine; start torchrun with a lower --nproc-per-node"
            )
        torch.cuda.set_device(me.local_rank)
        return torch.device("cuda", me.local_rank)
    return torch.device(name)


def is_small(parameters: int, device: torch.device) -> bool:
    """Return True if the model is too small for a second thread to pay off."""
    return device.type == "cpu" and parameters < ONE_THREAD_PARAMETERS


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; `auto` is bfloat16 on GPUs and on CPUs that multiply it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Precision(NamedTuple):
    """dtype: of parameters and activations; weights: format of the decoder's matrices."""

    dtype: torch.dtype
    weights: Weights

    @property
    def name(self) -> str:
        """Name for users: "float32", "bfloat16", "half precision", "int8"."""
        return {"dense": str(self.dtype).removeprefix("torch."), "half": "half precision"}.get(self.weights, "int8")


def choose_precision(name: str, device: torch.device, backend: str = "llmkit") -> Precision:
    """Choose the precision of sampling by --dtype.

    `auto` on a CPU is float32: narrower is faster, but only with float32 and int8 is a text independent of the other
    rows in its batch, as a resumed run needs, and int8 costs quality.

    bfloat16 on a CPU that cannot multiply it is half precision (model/quantized.py), if available.
    """
    if backend == "transformers":  # which has one format of matrices
        if name == "int8":
            raise UserError("--dtype int8: expected --backend llmkit, found transformers; use bfloat16")
        return Precision(
            torch.float32 if name == "auto" and device.type == "cpu" else choose_dtype(name, device), "dense"
        )
    if name == "int8":
        if device.type != "cpu" or not can_narrow():
            raise UserError("--dtype int8: expected an x86 CPU; use bfloat16")
        return Precision(torch.float32, "int8")
    if device.type == "cpu":
        if name == "bfloat16" and not _cpu_has_bfloat16() and can_narrow():
            return Precision(torch.float32, "half")
        return Precision(torch.bfloat16 if name == "bfloat16" else torch.float32, "dense")
    return Precision(choose_dtype(name, device), "dense")


def _cpu_has_bfloat16() -> bool:
    """Return True if the CPU multiplies bfloat16 and torch may use it: ATEN_CPU_CAPABILITY=avx2 forbids that."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return allowed and any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def check_memory(wanted: Mapping[str, float], device: torch.device) -> None:
    """Raise UserError if training needs more bytes than the device has, with the advice for the largest part.

    wanted: bytes by advice, such as {"lower --depth": 1e9, "lower --batch-tokens": 1e6}
    """
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = sum(wanted.values())
    if total > available:
        size = f"about {total / 1e9:,.0f}" if total < 1e15 else "over a million"
        advice = max(wanted, key=lambda text: wanted[text])
        raise UserError(f"training takes {size} GB of memory, and {device} has {available / 1e9:,.0f}; {advice}")


def check_batch_memory(tokens: float, advice: str, token_bytes: int = BATCH_BYTES) -> None:
    """Raise UserError with the advice if this machine's memory is too small for the batches of `tokens` tokens."""
    check_memory({advice: float(tokens) * token_bytes}, torch.device("cpu"))


def keep_freed_memory() -> bool:
    """Keep freed memory in the process until it ends; return False if the C library is not glibc.

    Training frees and allocates the same tensors every step. glibc returns a large block to the kernel when it is
    freed, and the next step pays a page fault for each of its 4 KiB pages again: 240,000 faults and a seventh of the
    time of a step of 16,384 tokens x 320 hidden, 4 layers. Resident memory stays at its peak, which training needs
    anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def use_huge_pages() -> None:
    """Move resident memory, such as a model's weights, to pages of 2 MiB; do nothing if the kernel cannot.

    Decoding reads every weight for each token, and a CPU's prefetchers stop at the end of a page. This copies 0.2 to 1
    GB/s while other threads compute.
    """
    try:
        libc = ctypes.CDLL(None)
        advise, is_resident = libc.madvise, libc.mincore
        maps = Path("/proc/self/maps").read_text().splitlines()
    except (AttributeError, OSError, TypeError):
        return
    resident = (ctypes.c_ubyte * (_HUGE_PAGE // os.sysconf("SC_PAGE_SIZE")))()
    for addresses, access, _, _, inode, *name in map(str.split, maps):
        if access != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        for first in range(-(-start // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE):
            address, size = ctypes.c_void_p(first), ctypes.c_size_t(_HUGE_PAGE)
            if is_resident(address, size, resident) == 0 and all(resident):  # holes would be allocated
                advise(address, size, _MADV_COLLAPSE)
