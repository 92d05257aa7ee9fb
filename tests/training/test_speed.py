"""The predicted speed of training, and the choice of threads, with the same results for any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit.data.batches import TokenRows
from llmkit.model.transformer import Transformer
from llmkit.training import plan, speed
from llmkit.training.loss import next_token_loss
from llmkit.training.optimizer import Schedule, build_optimizer
from llmkit.training.speed import StepThreads, most_threads
from llmkit.training.trainer import Trainer, TrainerSettings

CPU = torch.device("cpu")


def test_the_speed_of_a_layer_is_that_of_its_products(monkeypatch):
    """A layer that takes a second defines FLOP/s; tokens/s times FLOPs per token equal them, except for the update."""
    timed = []
    monkeypatch.setattr(speed, "peak_flops", lambda device, dtype: 1e10)
    monkeypatch.setattr(speed, "batch_seconds", lambda model, loss, batch, rows, device: timed.append(model) or 1.0)
    config = plan.shape_for_depth(12, 8192, 1024)
    recipe = plan.recipe(20 * plan.active_parameters(config), config.hidden_size, 1024)
    rate, basis = speed.expected_tokens_per_second(config, recipe, 8, 1024, CPU, torch.float32)
    (model,) = timed
    length = int(basis.split(" tokens ")[0].split()[-1])
    assert model.config.num_hidden_layers == 1 and 16 <= length <= 1024
    flops = length * model.config.flops_per_token(length)
    update = speed.update_flops(config, recipe) / recipe.batch_tokens
    assert rate * (config.flops_per_token(1024) + update) == pytest.approx(flops)
    # no more work than the time limit allows at the expected rate: two passes
    assert 2 * flops <= speed.LONGEST * speed.SHARE * 1e10

    doubled = replace(config, num_hidden_layers=24, vocab_size=16384)
    half, _ = speed.expected_tokens_per_second(doubled, recipe, 8, 1024, CPU, torch.float32)
    assert half == pytest.approx(rate / 2, rel=1e-6)


def test_the_flops_of_an_update_are_those_of_its_products():
    """Calculated by hand for a layer of width 64: four matrices of 64 x 64 and three of 64 x 192."""
    config = plan.shape_for_depth(1, 512, 256)
    square, wide = 2 * 64**3 * 3, 2 * 64**3 + 2 * 2 * 64 * 64 * 192
    recipe = plan.recipe(1e6, config.hidden_size, 256)
    assert speed.update_flops(config, recipe) == 5 * (4 * square + 3 * wide)


def weights_after(steps: list[int], folder: Path) -> bytes:
    """Return the weights after training steps with these numbers of threads."""
    config = plan.shape_for_depth(2, 777, 100)
    model = Transformer(config, seed=0)
    optimizer = build_optimizer(model, plan.recipe(1e6, config.hidden_size, 100, 500))
    settings = TrainerSettings(micro_batch_rows=3, max_grad_norm=0.01, quiet=True)
    trainer = Trainer(model, optimizer, Schedule(0, 0.5), next_token_loss, folder=folder, settings=settings)
    tokens = np.random.default_rng(0).integers(0, 777, (5, 100))
    for count in steps:
        torch.set_num_threads(count)
        trainer.train_step(TokenRows(tokens, np.roll(tokens, -1, 1), np.zeros_like(tokens, dtype=np.int32)))
    return b"".join(value.numpy().tobytes() for value in optimizer.masters().values())


def test_a_training_is_the_same_on_any_number_of_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        alone = weights_after([1, 1, 1], tmp_path)
        assert weights_after([2, 2, 2], tmp_path) == alone
        assert weights_after([1, 2, 1], tmp_path) == alone
    finally:
        torch.set_num_threads(before)


def run(threads: StepThreads, steps: int, seconds: dict[int, float]) -> list[int]:
    """Return the thread counts of steps with these times per thread count."""
    counts = []
    for _ in range(steps):
        counts.append(threads.count)
        threads.record(threads.count, seconds[threads.count], size=10)
    return counts


@pytest.mark.parametrize(("two", "chosen"), [(0.6, 2), (0.86, 2), (0.9, 1), (1.0, 1), (5.0, 1)])
def test_a_second_thread_must_bring_15_percent(two, chosen):
    counts = run(StepThreads(2), 20, {1: 0.4, 2: 0.4 * two})
    assert counts[-1] == chosen
    assert sum(count != chosen for count in counts) <= 3  # the first step, and two of the trial


def test_steps_that_slow_down_are_timed_again():
    threads = StepThreads(2)
    assert run(threads, 100, {1: 0.1, 2: 0.06})[-1] == 2
    assert run(threads, 100, {1: 0.11, 2: 0.4})[-1] == 1  # another program started
    assert run(threads, 1000, {1: 0.1, 2: 0.06})[-1] == 2  # and ended


def test_long_steps_and_set_numbers_are_left_alone(monkeypatch):
    assert run(StepThreads(8), 5, {1: 20.0, 8: 3.0}) == [8] * 5
    assert run(StepThreads(1), 5, {1: 1.0}) == [1] * 5
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert most_threads(CPU, 1, compiled=False) == torch.get_num_threads()
    assert most_threads(CPU, 2, compiled=False) == most_threads(CPU, 1, compiled=True) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert most_threads(CPU, 1, compiled=False) == 1


@pytest.mark.parametrize(("own", "shown"), [({}, "passive 2000"), ({"OMP_WAIT_POLICY": "active"}, "active None")])
def test_waiting_threads_sleep_unless_the_user_has_said_how_they_wait(own, shown):
    code = (
        "import sys, os, llmkit.__main__ as m; sys.argv = ['llmkit', '--version']\n"
        "try: m.main()\nexcept SystemExit: print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | own
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == shown
