"""How fast a training is expected to be, without the steps of a large model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmkit.training import plan, speed

CPU = torch.device("cpu")


def test_the_speed_of_a_layer_is_that_of_its_products(monkeypatch):
    """A layer that takes a second gives FLOP/s; tokens/s times the FLOPs of a token are those, but for the update."""
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
    # no more work than the time allows at the rate that is expected: the passes are made twice
    assert 2 * flops <= speed.LONGEST * speed.SHARE * 1e10

    doubled = replace(config, num_hidden_layers=24, vocab_size=16384)
    half, _ = speed.expected_tokens_per_second(doubled, recipe, 8, 1024, CPU, torch.float32)
    assert half == pytest.approx(rate / 2, rel=1e-6)


def test_the_flops_of_an_update_are_those_of_its_products():
    """By hand for one layer of width 64: four matrices of 64 x 64 and three of 64 x 192."""
    config = plan.shape_for_depth(1, 512, 256)
    square, wide = 2 * 64**3 * 3, 2 * 64**3 + 2 * 2 * 64 * 64 * 192
    recipe = plan.recipe(1e6, config.hidden_size, 256)
    assert speed.update_flops(config, recipe) == 5 * (4 * square + 3 * wide)
