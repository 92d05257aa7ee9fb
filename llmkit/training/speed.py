"""Speed of this machine: FLOP/s of matrix products, and tokens/s of a model.

Threads wait for each other hundreds of times per step. On shared cores, a second thread may cost more than it gains, so
`StepThreads` times one thread and all threads on steps of the training itself: at its start, when steps slow down, and
now and then. Results are the same on one thread and on several (tests/training/test_speed.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from llmkit.data.batches import TokenRows
from llmkit.io.progress import counted, quantity
from llmkit.model.config import ModelConfig
from llmkit.model.devices import keep_freed_memory
from llmkit.model.transformer import Transformer
from llmkit.training.loss import Batch, Loss, next_token_loss, rows_of
from llmkit.training.optimizer import build_optimizer
from llmkit.training.plan import Recipe

GAIN = 1.15  # all threads must be this much faster than one
TRIAL_STEPS, TRIAL_SECONDS = 2, 0.1  # minimum for each thread count
LONGEST_STEP = 10.0  # expected seconds on one thread; above, a trial costs more than it can save
SLOWER, RECENT = 1.3, 5  # a mean of RECENT steps this much above the last trial's starts a new trial
PAUSE, TRIAL_SHARE = 30.0, 0.02  # seconds between trials, and their maximum share of the time
LONGEST = 3.0  # maximum seconds of timing for an estimate
SHARE = 0.4  # fraction of the rate of large products that steps reach, about


class StepThreads:
    """Sets the number of torch's threads for each step.

    with threads.step(size=batch.size):
        train(batch)
    """

    def __init__(self, most: int) -> None:
        self.most = self.chosen = most
        self._usual = math.inf  # seconds per unit of work in the last trial
        self._recent: list[float] = []
        self._begin_trial()
        self._warm = False

    @contextmanager
    def step(self, size: int) -> Iterator[None]:
        """Time a step of `size` units of work, to choose the threads of later steps."""
        count = self.count
        if self.most > 1:
            torch.set_num_threads(count)
        started = time.perf_counter()
        yield
        self.record(count, time.perf_counter() - started, size)

    @property
    def count(self) -> int:
        """Threads of the next step."""
        if not self._trial:
            return self.chosen
        return min(self._trial, key=lambda count: (len(self._trial[count]), -count))

    def record(self, count: int, seconds: float, size: int) -> None:
        """Record the time of a step; start or end a trial when due."""
        if self.most == 1:
            return
        if not self._warm:  # the first step allocates memory
            self._warm = True
            if seconds * self.most > LONGEST_STEP:
                self._trial, self.most = {}, 1  # torch's setting stays
            return
        self._seconds += seconds
        if self._trial:
            self._trial[count].append(seconds / size)
            enough = all(len(steps) >= TRIAL_STEPS for steps in self._trial.values())
            if enough and self._seconds > TRIAL_SECONDS * len(self._trial):
                self._choose()
            return
        self._recent = [*self._recent[1 - RECENT :], seconds / size]
        slower = len(self._recent) == RECENT and sum(self._recent) / RECENT > SLOWER * self._usual
        if self._seconds > max(PAUSE / 6 if slower else PAUSE, self._cost / TRIAL_SHARE):
            self._begin_trial()

    def _begin_trial(self) -> None:
        self._trial: dict[int, list[float]] = {count: [] for count in {1, self.most}} if self.most > 1 else {}
        self._seconds = self._cost = 0.0

    def _choose(self) -> None:
        means = {count: sum(steps) / len(steps) for count, steps in self._trial.items()}
        self.chosen = self.most if means[1] > GAIN * means[self.most] else 1
        self._usual, self._recent = means[self.chosen], []
        self._trial, self._cost, self._seconds = {}, self._seconds, 0.0


def most_threads(device: torch.device, processes: int, compiled: bool) -> int:
    """Return the largest number of threads to try.

    It is 1 on a GPU, with several processes, if the user set a number, and with torch.compile, which recompiles for
    another number.
    """
    if device.type != "cpu" or processes > 1 or compiled or "OMP_NUM_THREADS" in os.environ:
        return 1
    return torch.get_num_threads()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the shortest time of `repeats` runs of `work`, after a warm-up."""
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
    """Measure the FLOP/s of a large matrix product, the reference for MFU. Takes about 0.1 s on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: left @ left, device, repeats=5)


def tokens_per_second(
    config: ModelConfig, recipe: Recipe, rows: int, sequence_length: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Measure the training speed of a model of this shape: the best of 2 steps on random tokens, update included."""
    keep_freed_memory()  # as the trainer does
    model = Transformer(config, seed=0).to(device=device, dtype=dtype)
    optimizer = build_optimizer(model, recipe)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, sequence_length))
    batch = TokenRows(tokens, tokens, np.zeros_like(tokens, dtype=np.int32))

    def step() -> None:
        next_token_loss(model, batch).total.backward()
        optimizer.accumulate()
        optimizer.step(factor=0.0, scale=1e-6)

    return rows * sequence_length / best_seconds(step, device, repeats=2)


def expected_tokens_per_second(
    config: ModelConfig, recipe: Recipe, rows: int, sequence_length: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, str]:
    """Estimate tokens/s of training in at most about `LONGEST` seconds; also return the basis of the estimate, in
    words.

    For a small model this is `tokens_per_second`. For a larger one the passes of a single layer are timed, on as many
    tokens as the time allows, and its FLOP/s are assumed for the complete model, update included.
    """
    reachable = SHARE * peak_flops(device, dtype)
    step_flops = rows * sequence_length * config.flops_per_token(sequence_length) + update_flops(config, recipe)
    if 3 * step_flops < LONGEST * reachable:  # one step to warm up, and the best of two
        return tokens_per_second(config, recipe, rows, sequence_length, device, dtype), "whole steps, timed here"
    layer = replace(
        config, num_hidden_layers=1, vocab_size=256, bos_token_id=None, eos_token_id=None, no_rope_layers=(),
        layer_windows=config.layer_windows and config.layer_windows[:1],
    )  # fmt: skip
    affordable = LONGEST / 2 * reachable / layer.flops_per_token(sequence_length)
    length = min(sequence_length, max(16, int(affordable)))
    tokens = np.random.default_rng(0).integers(0, layer.vocab_size, (1, length))
    model = Transformer(layer, seed=0).to(device=device, dtype=dtype)
    batch = TokenRows(tokens, tokens, np.zeros_like(tokens, dtype=np.int32))
    rate = length * layer.flops_per_token(length) / batch_seconds(model, next_token_loss, batch, 1, device)
    step_flops = recipe.batch_tokens * config.flops_per_token(sequence_length) + update_flops(config, recipe)
    return (
        recipe.batch_tokens * rate / step_flops,
        f"one layer, timed here on {counted(length, 'token')} at {quantity(rate)}FLOP/s",
    )


def update_flops(config: ModelConfig, recipe: Recipe) -> float:
    """Return the FLOPs of an update: Muon's five iterations on the matrices of the layers (`orthogonalise`), each two
    products of M x M by M x N and one of M x M by M x M. AdamW's are negligible."""
    if recipe.optimizer != "muon":
        return 0.0
    rows, hidden = config.stacked_rows, config.hidden_size
    others = (*rows["qkv"], rows["qkv"][0], *rows["gate_up"], config.intermediate_size)
    sides = [(min(hidden, other), max(hidden, other)) for other in others]
    return config.num_hidden_layers * 5.0 * sum(m * m * (4 * n + 2 * m) for m, n in sides)


def batch_seconds(model: nn.Module, loss: Loss, batch: Batch, micro_batch_rows: int, device: torch.device) -> float:
    """Time the forward and backward pass of a batch, after a warm-up with one micro-batch."""
    keep_freed_memory()
    micro_batches = [
        rows_of(batch, start, start + micro_batch_rows) for start in range(0, len(batch[0]), micro_batch_rows)
    ]
    for timed in (micro_batches[:1], micro_batches):
        started = time.perf_counter()
        for rows in timed:
            loss(model, rows).total.backward()
        synchronize(device)
        model.zero_grad()
    return time.perf_counter() - started
