"""How fast this machine is: its rate of matrix products, and the tokens a second of a model on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from llmkit.engine.evaluation import next_token_loss
from llmkit.engine.scaling import Recipe
from llmkit.engine.setup import build_optimizer
from llmkit.engine.trainer import Batch, Loss
from llmkit.kernels import keep_freed_memory
from llmkit.model.config import ModelConfig
from llmkit.model.transformer import Transformer


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest of `repeats` runs of `work`, after one that does not count."""
    work()
    synchronize(device)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here: what MFU is measured against. Takes about 0.1 s on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: left @ left, device, repeats=5)


def tokens_per_second(
    config: ModelConfig, recipe: Recipe, rows: int, sequence_length: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Training speed of a model of this shape: the best of 2 steps on random tokens, the update included."""
    keep_freed_memory()  # as the trainer does
    model = Transformer(config, seed=0).to(device=device, dtype=dtype)
    optimizer = build_optimizer(model, recipe)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, sequence_length))
    batch = (tokens, tokens, np.zeros_like(tokens, dtype=np.int32))

    def step() -> None:
        next_token_loss(model, batch)[0].backward()
        optimizer.accumulate()
        optimizer.step(factor=0.0, scale=1e-6)

    return rows * sequence_length / best_seconds(step, device, repeats=2)


def batch_seconds(model: nn.Module, loss: Loss, batch: Batch, micro_batch_rows: int, device: torch.device) -> float:
    """Seconds of the forward and backward pass of a batch, by one that comes after a first of a micro-batch."""
    keep_freed_memory()
    parts = [
        tuple(array[start : start + micro_batch_rows] for array in batch)
        for start in range(0, len(batch[0]), micro_batch_rows)
    ]
    for timed in (parts[:1], parts):
        started = time.perf_counter()
        for rows in timed:
            loss(model, rows)[0].backward()
        synchronize(device)
        model.zero_grad()
    return time.perf_counter() - started
