"""The loss against its formula on full logits, for any rows; and tokens that do not contribute."""

from __future__ import annotations

from copy import deepcopy
from itertools import count

import numpy as np
import pytest
import torch
from attempts import attempt
from tiny import make_model

from llmkit.rl import policy_loss
from llmkit.rl.algorithms import ALGORITHMS, token_weights
from llmkit.rl.policy_loss import PolicyLoss, policy_figures, reference_logprobs, target_logprobs
from llmkit.rl.rollouts import PolicyRows, pack_rollouts
from llmkit.training.loss import rows_of
from llmkit.training.optimizer import GroupSettings, Optimizer, Schedule
from llmkit.training.trainer import Trainer, TrainerSettings

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model():
    return make_model(context=256)


@pytest.fixture
def rollouts():
    """Two groups of three rollouts of different lengths, with log-probabilities of another policy."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(2):
        prompt = rng.integers(0, 256, 5 + 4 * group).tolist()
        for sample in range(3):
            tokens = rng.integers(0, 256, 2 + 3 * sample).tolist()
            logprobs = (-5.5 - rng.random(len(tokens))).tolist()
            one = attempt(prompt, tokens, group=group, advantage=float(rng.normal()), logprobs=logprobs)
            one.reference_logprobs = np.float32(-5.5 - rng.random(len(tokens)))
            made.append(one)
    return made


def logprobs_of(model, rollout):
    """Return log-probabilities from the full softmax, one rollout at a time."""
    ids = torch.tensor([rollout.token_ids])
    logits = model.logits(model(ids))[0] / TEMPERATURE
    made = len(rollout.completion.token_ids)
    return torch.log_softmax(logits.float(), -1)[-made - 1 : -1].gather(1, ids[0, -made:, None]).squeeze(1)


def formula(name, kl_coef, model, rollouts):
    """Return the loss of an algorithm by its paper's formula."""
    algorithm, losses = ALGORITHMS[name], []
    for one in rollouts:
        logprobs = logprobs_of(model, one)
        ratio = (logprobs - torch.tensor(one.completion.logprobs)).exp()
        if name == "gspo":
            ratio = ratio.log().mean().exp().expand(len(ratio))
        gain = ratio * one.advantage
        if algorithm.clip:
            low, high = algorithm.clip
            gain = torch.minimum(gain, ratio.clamp(1 - low, 1 + high) * one.advantage)
        if algorithm.kl == "loss":
            gap = torch.tensor(one.reference_logprobs) - logprobs
            gain = gain - kl_coef * (gap.exp() - gap - 1)
        losses.append(-gain)
    if algorithm.weighting == "token":
        return torch.cat(losses).mean()
    if algorithm.weighting == "sequence":
        return torch.stack([loss.mean() for loss in losses]).mean()
    sums = torch.stack([loss.sum() for loss in losses])
    return (sums / 16 if algorithm.weighting == "constant" else sums).mean()


def packed_loss(name, kl_coef, model, rollouts, share, rows_at_once=100):
    algorithm = ALGORITHMS[name]
    lengths = [sum(one.completion.sampled) for one in rollouts]
    rows, _ = pack_rollouts(rollouts, token_weights(algorithm.weighting, lengths, 16).tolist(), 0, share)
    loss = PolicyLoss(algorithm, TEMPERATURE, kl_coef, True)
    total, targets, figures = 0.0, 0, []
    for start in range(0, len(rows.token_ids), rows_at_once):
        summed = loss(model, rows_of(rows, start, start + rows_at_once))
        total, targets = total + summed.total, targets + summed.targets
        figures.append(summed.figures)
    return total / targets, policy_figures([figures], len(rollouts), True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_are_those_of_the_paper(name, share, model, rollouts):
    wanted = gradients(model, expected := formula(name, 0.3, model, rollouts))
    loss, _ = packed_loss(name, 0.3, model, rollouts, share)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradients(model, loss), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_rows_a_micro_batch_do_not_matter(model, rollouts):
    many = [one for _ in range(8) for one in rollouts]
    for number, one in enumerate(many):
        one.group = number // 3
    whole, figures = packed_loss("grpo", 0.1, model, many, True)
    parts, same = packed_loss("grpo", 0.1, model, many, True, rows_at_once=1)
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)
    assert figures == pytest.approx(same, rel=1e-4)


def figures_of_training(model, rollouts, folder, monkeypatch, out_of_memory_at=None):
    """Train two updates on one batch, two rows at a time, optionally out of memory at one model call."""
    model = deepcopy(model).train()
    rows, _ = pack_rollouts(rollouts, [1.0] * len(rollouts), 0, False)
    batch = PolicyRows(*(array[:4] for array in rows))
    assert len(batch.token_ids) == 4
    loss, calls = PolicyLoss(ALGORITHMS["grpo"], TEMPERATURE, 0.1, True), count(1)

    def computed(*given):
        if next(calls) == out_of_memory_at:
            raise torch.OutOfMemoryError("out of memory")
        return target_logprobs(*given)

    monkeypatch.setattr(policy_loss, "target_logprobs", computed)
    settings = GroupSettings("adamw", 1e-3)
    trainer = Trainer(
        model,
        Optimizer((name, parameter, settings) for name, parameter in model.named_parameters()),
        Schedule(0, 0.5),
        loss,
        folder=folder,
        settings=TrainerSettings(micro_batch_rows=2, updates_per_batch=2, quiet=True),
    )
    trainer.train_step(batch)
    return policy_figures(trainer.figures, len(rollouts), True)


@pytest.mark.parametrize("call", [2, 4])
def test_rows_repeated_after_out_of_memory_count_once(model, rollouts, tmp_path, monkeypatch, call):
    many = [one for _ in range(80) for one in rollouts]
    whole = figures_of_training(model, many, tmp_path, monkeypatch)
    again = figures_of_training(model, many, tmp_path, monkeypatch, out_of_memory_at=call)
    assert again == pytest.approx(whole, rel=1e-3)


def test_results_of_tools_do_not_contribute_to_the_loss(model):
    def loss_of(result_logprob: float):
        chosen, logprobs = [True, False, False, True], [-1.0, result_logprob, result_logprob, -2.0]
        one = attempt([1, 2, 3], [7, 100, 101, 9], advantage=1.0, sampled=chosen, logprobs=logprobs)
        rows, _ = pack_rollouts([one], [1.0], 0, False)
        assert rows.targets[0][rows.targets[0] >= 0].tolist() == [7, 9]
        return packed_loss("dapo", 0.0, model, [one], False)

    (first, figures), (second, same) = loss_of(0.0), loss_of(-9.0)
    assert first.item() == second.item() and figures == same
    only = packed_loss("dapo", 0.0, model, [attempt([1, 2, 3], [7], advantage=1.0, logprobs=[-1.0])], False)[0]
    assert first.item() != pytest.approx(only.item())  # the token after the result counts


def test_the_first_pass_tells_how_far_sampler_and_trainer_are_apart(model, rollouts):
    for one in rollouts:
        one.completion = one.completion.__class__(
            **{**one.completion.__dict__, "logprobs": logprobs_of(model, one).tolist()}
        )
    _, figures = packed_loss("grpo", 0.0, model, rollouts, True)
    assert figures["logprob_difference_max"] < 1e-4 and figures["ratio"] == pytest.approx(1, abs=1e-4)
    rollouts[0].completion.logprobs[0] += 0.5
    _, figures = packed_loss("grpo", 0.0, model, rollouts, True)
    assert figures["logprob_difference_max"] == pytest.approx(0.5, abs=1e-3)


def test_a_reference_gives_every_rollout_log_probabilities(model, rollouts):
    reference_logprobs(model, rollouts, TEMPERATURE, True)
    for one in rollouts:
        assert one.reference_logprobs == pytest.approx(logprobs_of(model, one).detach().numpy(), abs=1e-4)


def test_a_prompt_appears_once_before_its_rollouts(rollouts):
    shared, places = pack_rollouts(rollouts, [1.0] * 6, 0, True)
    apart, _ = pack_rollouts(rollouts, [1.0] * 6, 0, False)
    used = [int((rows.doc_ids > 0).sum()) for rows in (shared, apart)]
    saved = sum(2 * (len(group[0].prompt_ids) - 1) for group in (rollouts[:3], rollouts[3:]))
    assert used[1] - used[0] == saved
    for one, place in zip(rollouts, places, strict=True):
        assert shared.targets[place].tolist() == one.completion.token_ids


def test_a_group_larger_than_a_row_is_split(model):
    made = [attempt([1, 2, 3], [5] * 100, group=0, advantage=1.0) for _ in range(16)]
    rows, places = pack_rollouts(made, [1.0] * 16, 0, True)
    assert rows.token_ids.shape[1] == 512 and rows.tokens > 1600
    for place in places:
        assert rows.targets[place].tolist() == [5] * 100
