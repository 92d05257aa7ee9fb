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
# 4 layers of 256 with a vocabulary of 8,192 (5M) take 1.4 ms a token on one thread, 1.5 ms on two, and 50 ms on two
# that others keep busy
ONE_THREAD_PARAMETERS = 20_000_000
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MADV_COLLAPSE, _HUGE_PAGE = 25, 2**21  # madvise(2), of Linux 6.1
BATCH_BYTES = 80  # a token of a step: its id, target and document, 20 bytes, in the four batches that are made ahead


@cache
def can_narrow() -> bool:
    """True if FBGEMM is there."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU, else the CPU; of several GPUs the first, or in a job of several processes this process's own.

    Raises UserError for a device that is not there.
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
    """True if the model is too small for a second thread to pay off."""
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
    """`auto` is bfloat16 where the hardware multiplies it (GPUs, CPUs with AVX512-BF16 or AMX), else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Precision(NamedTuple):
    """dtype: of the parameters and of what is computed from them; weights: how the decoder holds matrices."""

    dtype: torch.dtype
    weights: Weights

    @property
    def name(self) -> str:
        """For people: "float32", "bfloat16", "half precision", "int8"."""
        return {"dense": str(self.dtype).removeprefix("torch."), "half": "half precision"}.get(self.weights, "int8")


def choose_precision(name: str, device: torch.device, backend: str = "llmkit") -> Precision:
    """Choose the precision of sampling by --dtype.

    `auto` on a CPU is float32: narrower is faster, but only float32 and int8 give a text its bits whatever is sampled
    beside it, and int8 costs quality; a resumed run must go on as it began.

    bfloat16 on a CPU that cannot multiply it is half precision (model/quantized.py), where that is to be had.
    """
    if backend == "transformers":  # which holds matrices in one way
        if name == "int8":
            raise UserError("--dtype int8: expected --backend llmkit, whose products these are; use bfloat16")
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
    """True if the CPU multiplies bfloat16, and torch may use it: ATEN_CPU_CAPABILITY=avx2 forbids that."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return allowed and any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def check_memory(wanted: Mapping[str, float], device: torch.device) -> None:
    """Raise UserError where training would take more bytes than the device has, with what the most of them say to do.

    wanted: bytes by advice, such as {"lower --depth": 1e9, "lower --batch-tokens": 1e6}
    """
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = sum(wanted.values())
    if total > there:
        size = f"about {total / 1e9:,.0f}" if total < 1e15 else "over a million"
        advice = max(wanted, key=lambda part: wanted[part])
        raise UserError(f"training takes {size} GB of memory, and {device} has {there / 1e9:,.0f}; {advice}")


def check_batch_memory(tokens: float, advice: str, token_bytes: int = BATCH_BYTES) -> None:
    """Raise UserError with the advice where this machine cannot hold the tokens of the batches of some steps."""
    check_memory({advice: float(tokens) * token_bytes}, torch.device("cpu"))


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for its whole length; False where the C library is not glibc.

    Training frees and takes the same tensors every step. glibc hands a large block back to the kernel when it is freed,
    and the next step pays a page fault for each of its 4 KiB pages again: 240,000 faults and a seventh of the time of a
    step of 16,384 tokens x 320 hidden, 4 layers. Resident memory then stays at its peak, which training needs anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def use_huge_pages() -> None:
    """Move memory that is in use, such as a model's weights, to pages of 2 MiB; nothing where the kernel cannot.

    Decoding reads every weight for each token, and a processor's prefetchers stop at the end of a page. It copies
    0.2 to 1 GB a second, while others compute.
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
            if is_resident(address, size, resident) == 0 and all(resident):  # a hole would become memory
                advise(address, size, _MADV_COLLAPSE)
