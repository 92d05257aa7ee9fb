"""Figures about samples: intervals, calibration, rank statistics."""

from __future__ import annotations

import math

import numpy as np

STANDARD_ERRORS = 1.959964  # of a 95% interval
BINS = 10  # of confidence: Guo et al. 2017 use 15 for 10,000 answers, ours are fewer


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials: Wilson 1927."""
    z2 = STANDARD_ERRORS**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = STANDARD_ERRORS / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidence: np.ndarray, right: np.ndarray, lowest: float = 0.0) -> float:
    """Expected calibration error: how far confidence (N,) from `lowest` to 1 lies from the share of what is right (N,),
    on average over bins of confidence (Guo et al. 2017, arXiv:1706.04599, section 2)."""
    bins = np.minimum(((confidence - lowest) / (1 - lowest) * BINS).astype(int), BINS - 1)
    gaps = (abs(float((confidence[bins == b] - right[bins == b]).sum())) for b in range(BINS))
    return sum(gaps) / len(confidence)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of the two is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return round(float(np.corrcoef(_ranks(one), _ranks(other))[0, 1]), 4)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
