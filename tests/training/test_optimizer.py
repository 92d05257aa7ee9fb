"""The optimizer against definitions: polar factors by SVD, torch's AdamW, and exact resuming."""

import pytest
import torch
from torch import nn

from llmkit.training.optimizer import GroupSettings, Optimizer, Schedule, orthogonalise

MUON = GroupSettings("muon", learning_rate=0.02)
ADAMW = GroupSettings("adamw", learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("rows, columns", [(16, 16), (8, 40), (40, 8)])
def test_orthogonalise_is_near_the_polar_factor(rows, columns):
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalise(matrices)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.3  # Muon needs about 1
    overlap = (found * (u @ vh)).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * (u @ vh).norm(dim=(-2, -1)))
    assert overlap.min() > 0.98


def test_orthogonalise_keeps_a_zero_matrix_zero():
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_adamw_group_equals_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(5, 7)), None
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = Optimizer([("weight", ours, ADAMW)])
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(10):
        gradient = torch.randn(5, 7)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.accumulate()
        optimizer.step(factor=1.0)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_stacked_parameters_move_as_they_would_alone():
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Optimizer([(str(i), p, MUON) for i, p in enumerate(together)])]
    optimizers += [Optimizer([(str(i), p, MUON)]) for i, p in enumerate(alone)]
    for _ in range(3):
        for first, second in zip(together, alone, strict=True):
            first.grad = torch.randn(6, 4)
            second.grad = first.grad.clone()
        for optimizer in optimizers:
            optimizer.accumulate()
            optimizer.step(factor=0.5)
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", [(4, 4), (6, 2)])
def test_blocks_of_a_fused_parameter_are_orthogonalised_apart(blocks):
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(8, 5))
    parts = [nn.Parameter(part.detach().clone()) for part in fused.split(blocks)]
    first = Optimizer([("fused", fused, GroupSettings("muon", 0.1, blocks=blocks))])
    second = Optimizer([(str(i), part, GroupSettings("muon", 0.1)) for i, part in enumerate(parts)])
    fused.grad = torch.randn(8, 5)
    for part, gradient in zip(parts, fused.grad.clone().split(blocks), strict=True):
        part.grad = gradient
    for optimizer in (first, second):
        optimizer.accumulate()
        optimizer.step(factor=1.0)
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]), rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_in_float32():
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = Optimizer([("weight", weight, ADAMW)])
    for _ in range(300):  # a bfloat16 sum would stop at 256
        weight.grad = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert optimizer.gradient_norm(divisor=300).item() == pytest.approx(2.0)


def test_a_bfloat16_copy_follows_a_float32_master_too_small_to_see():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    slow = GroupSettings("adamw", learning_rate=1e-4)
    optimizer = Optimizer([("weight", weight, slow)])
    for _ in range(100):
        weight.grad = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.step(factor=1.0)
    assert optimizer.masters()["weight"][0, 0].item() == pytest.approx(0.99, abs=1e-4)
    assert weight[0, 0].item() == pytest.approx(0.99, abs=4e-3)


def test_state_dict_restores_exactly():
    def make():
        torch.manual_seed(1)
        parameters = {"a": nn.Parameter(torch.randn(4, 6)), "b": nn.Parameter(torch.randn(4, 6))}
        bias = nn.Parameter(torch.randn(3))
        return [*parameters.values(), bias], Optimizer(
            [(name, p, MUON) for name, p in parameters.items()] + [("bias", bias, ADAMW)]
        )

    def steps(parameters, optimizer, generator, count):
        for _ in range(count):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.accumulate()
            optimizer.step(factor=0.7)

    whole, first = make()
    steps(whole, first, torch.Generator().manual_seed(3), 6)
    generator = torch.Generator().manual_seed(3)
    halves, second = make()
    steps(halves, second, generator, 3)
    saved = {name: value.clone() for name, value in second.state_dict().items()}
    resumed, third = make()
    third.load_state_dict(saved)
    steps(resumed, third, generator, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_muon_refuses_a_vector():
    with pytest.raises(ValueError, match=r"gain: Muon needs a matrix, found shape \(4,\)"):
        Optimizer([("gain", nn.Parameter(torch.ones(4)), MUON)])


def test_factor_rises_stays_and_falls_to_the_end():
    schedule = Schedule(warmup_steps=4, decay_fraction=0.5, final_factor=0.1)
    factors = [schedule.factor(step, step / 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[20] == pytest.approx(0.1)
    assert sorted(factors[10:], reverse=True) == factors[10:]
