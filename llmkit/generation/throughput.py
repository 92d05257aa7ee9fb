"""How well a generator used the machine, in one line: tokens a second, slots, and the memory's bandwidth."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from llmkit.io.progress import counted, quantity

if TYPE_CHECKING:
    from llmkit.generation.generator import Generator

BEYOND_CACHES = 64 * 2**20  # bytes of weights: fewer stay in a processor's cache, and memory is not what they wait for
WORTH_MEASURING = 1.0  # seconds of decoding


def describe(generator: Generator, seconds: float) -> str:
    """Such as "1.2k tokens at 96 tok/s, 91% of the slots in use, 18.3 GB/s: 84% of the memory's bandwidth".

    The bandwidth is given for decoding on a CPU, of weights that no cache holds, for long enough: measuring what the
    memory can do takes 0.1 s. It counts what a step must read, weights, keys and values, by the time of the steps.
    """
    parts = [f"{counted(generator.tokens, 'token')} at {quantity(generator.tokens / max(seconds, 1e-9))} tok/s"]
    if generator.steps and generator.slots > 1:
        parts.append(f"{generator.rows / (generator.steps * generator.slots):.0%} of the slots in use")
    decoder = generator.decoder
    if decoder.device.type == "cpu" and decoder.weight_bytes > BEYOND_CACHES and decoder.seconds > WORTH_MEASURING:
        rate = decoder.bytes_read / decoder.seconds
        parts.append(f"{rate / 1e9:.1f} GB/s: {rate / read_bandwidth():.0%} of the memory's bandwidth")
    return ", ".join(parts)


def read_bandwidth(size: int = 1 << 27) -> float:
    """Bytes a second at which the threads in use read memory, the best of three: 128 MiB, more than caches hold."""
    data, best = torch.ones(size // 4), 0.0
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        best = max(best, size / (time.perf_counter() - started))
    return best
