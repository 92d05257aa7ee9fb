"""Rotary position tables: the cosine and sine of every position, computed once for a length."""

import math

import torch
from torch import Tensor

from llmkit.model.config import RopeScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, float64. Scaling as transformers defines it."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        kept = _yarn_kept(head_dim, theta, scaling)
        return frequencies * kept + frequencies / scaling.factor * (1 - kept)
    # llama3: long wavelengths are stretched, short ones kept, and those between interpolated.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The share of each frequency that yarn keeps: all of those that turn `beta_fast` times in the first context."""

    def pair_that_turns(times: float) -> float:
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


class RotaryTable:
    """Cosines and sines of positions 0 ... length - 1, grown on demand and kept on each device asked for.

    Float32 whatever the model computes in: bfloat16 would round every cosine by up to 0.4%.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None):
        self._frequencies = rotary_frequencies(head_dim, theta, scaling)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(length, head_dim / 2, 2): cosine and sine side by side."""
        key = (device, torch.float64 if dtype == torch.float64 else torch.float32)
        if key not in self._tables or self._tables[key].shape[0] < length:
            rows = 256 * math.ceil(length / 256)
            angles = torch.arange(rows, dtype=torch.float64, device="cpu").unsqueeze(1) * self._frequencies
            self._tables[key] = torch.stack((angles.cos(), angles.sin()), -1).to(*key)
        return self._tables[key][:length]
