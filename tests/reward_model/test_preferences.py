"""Preference losses compared with the papers' formulas, computed one answer at a time from full logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import make_model

from llmkit.reward_model.comparisons import Candidates, Comparisons, evaluation_rows, packed_comparisons
from llmkit.reward_model.head import row_length
from llmkit.reward_model.preferences import (
    PreferenceLoss,
    answer_logprobs,
    policy_comparisons,
    sequence_logprobs,
    with_references,
)
from llmkit.training.loss import rows_of
from llmkit.training.preferences import Objective, figures_of

BETA, SMOOTHING, WEIGHT, MARGIN = 0.7, 0.2, 0.3, 0.4
OBJECTIVES = {
    "dpo": Objective("dpo", BETA),
    "dpo, smoothed, with sft": Objective("dpo", BETA, SMOOTHING, WEIGHT),
    "ipo": Objective("ipo", BETA, sft_weight=WEIGHT),
    "kto": Objective("kto", BETA, desirable=1.5),
    "orpo": Objective("orpo", BETA, sft_weight=1.0),
    "simpo": Objective("simpo", BETA, SMOOTHING, WEIGHT, MARGIN),
}
RANKS = [(1, 2), (1, 2), (2, 1, 3), (1, 2)]
HEADER = 3  # untrained tokens at the beginning of all answers


def comparisons() -> list[Candidates]:
    """Return prompts and answers of different lengths; the third has three answers."""
    rng = np.random.default_rng(0)
    made = []
    for number, ranks in enumerate(RANKS):
        header = rng.integers(1, 250, HEADER).astype(np.int32)
        prompt = rng.integers(1, 250, 5 + 3 * number).astype(np.int32)
        answers = [rng.integers(1, 250, rng.integers(2, 9)).astype(np.int32) for _ in ranks]
        trained = [np.zeros(len(prompt), bool)]
        trained += [np.concatenate([np.zeros(HEADER, bool), np.ones(len(ids), bool)]) for ids in answers]
        answers = [np.concatenate([header, ids]) for ids in answers]
        made.append(Candidates(prompt, tuple(answers), ranks, 0.0, number, tuple(trained)))
    return made


def compared(source: Comparisons, model) -> Comparisons:
    return with_references(source, sequence_logprobs(source.candidates, model, 0, quiet=True))


def logprobs(model, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """Return the log-probability of each token of an answer after its prompt, or of a prompt after its first token."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64)).unsqueeze(0)
    every = torch.log_softmax(model.logits(model(ids)), -1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
    return every[len(prompt) - 1 :]


def expected(objective: Objective, policy, reference, source: Comparisons) -> torch.Tensor:
    """Return the papers' mean loss of all comparisons."""
    beta, losses, learnt = objective.beta, [], []
    log_sigmoid = F.logsigmoid
    ratios = []  # kto
    for one in source.candidates:
        own = [logprobs(policy, one.prompt, ids) for ids in one.answers]
        before = [logprobs(reference, one.prompt, ids).detach().sum() for ids in one.answers]
        own_sums = [values.sum() for values in own]
        means = [values.mean() for values in own]
        ratios.append([(a - b, rank) for a, b, rank in zip(own_sums, before, one.ranks, strict=True)])
        if objective.loss == "kto":
            continue
        pairs = []
        for w, better in enumerate(one.ranks):
            for r, worse in enumerate(one.ranks):
                if better >= worse:
                    continue
                log_ratio = (own_sums[w] - before[w]) - (own_sums[r] - before[r])
                if objective.loss == "dpo":
                    pair = -(1 - objective.label_smoothing) * log_sigmoid(beta * log_ratio)
                    pair = pair - objective.label_smoothing * log_sigmoid(-beta * log_ratio)
                elif objective.loss == "ipo":
                    per_token = (own_sums[w] - before[w]) / len(own[w]) - (own_sums[r] - before[r]) / len(own[r])
                    pair = (per_token - 1 / (2 * beta)) ** 2
                elif objective.loss == "orpo":
                    odds = [mean.exp() / (1 - mean.exp()) for mean in means]
                    pair = -beta * log_sigmoid((odds[w] / odds[r]).log())
                else:
                    gap = beta * means[w] - beta * means[r] - objective.margin
                    pair = -(1 - objective.label_smoothing) * log_sigmoid(gap)
                    pair = pair - objective.label_smoothing * log_sigmoid(-gap)
                pairs.append(pair)
        losses.append(torch.stack(pairs).mean())
        learnt.append(own[one.ranks.index(1)])
        if objective.loss == "orpo":
            learnt.append(logprobs(policy, one.prompt[:1], one.prompt[1:]))
    if objective.loss == "kto":
        flat = [pair for part in ratios for pair in part]
        kl = torch.stack([ratio for ratio, rank in flat if rank == 0]).mean().clamp(min=0).detach()
        good = [objective.desirable * (1 - torch.sigmoid(beta * (ratio - kl))) for ratio, rank in flat if rank == 1]
        bad = [1 - torch.sigmoid(beta * (kl - ratio)) for ratio, rank in flat if rank == 2]
        return torch.stack(good + bad).mean()
    return torch.stack(losses).mean() - objective.sft_weight * torch.cat(learnt).mean()


@pytest.fixture(scope="module")
def models():
    return make_model(spread=0.7, seed=1), make_model(spread=0.7, seed=2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_and_its_gradient_are_the_papers(name, models):
    objective, (policy, reference) = OBJECTIVES[name], models
    source = policy_comparisons(Comparisons("some", comparisons()), objective.loss, 512)
    assert all(one.trained[1].all() for one in source.candidates)  # the header is part of the prompt
    source = compared(source, reference)
    batch = packed_comparisons([source.candidates[:3], source.candidates[3:]], 128, 0)
    parameters = [value for value in policy.parameters() if value.requires_grad]
    summed = PreferenceLoss(objective)(policy, batch)
    loss = summed.total / summed.targets
    gradients = torch.autograd.grad(loss, parameters)
    wanted = expected(objective, policy, reference, source)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-5)
    for gradient, other in zip(gradients, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo"])
def test_micro_batches_add_up_to_the_batch(loss, models):
    policy, reference = models
    source = policy_comparisons(Comparisons("some", comparisons()), loss, 512)
    source = compared(source, reference)
    batch = packed_comparisons([[one] for one in source.candidates], 64, 0)
    of_loss = PreferenceLoss(Objective.of(loss, sft_weight=0.5))
    whole, parts = of_loss(policy, batch), [of_loss(policy, rows_of(batch, i, i + 1)) for i in range(4)]
    assert sum(part.targets for part in parts) == whole.targets == 4
    assert float(sum(part.total for part in parts)) == pytest.approx(float(whole.total), rel=1e-5)
    assert figures_of([part.figures for part in parts]) == pytest.approx(figures_of([whole.figures]), rel=1e-4)
    nothing = of_loss(policy, batch.nothing())
    assert nothing.targets == 0 and float(nothing.total) == 0.0
    nothing.total.backward()


def test_the_margin_of_a_pair_lowers_its_difference(models):
    policy, reference = models
    pair = replace(comparisons()[0], margin=2.0)
    losses = []
    for one in (pair, replace(pair, margin=0.0)):
        source = policy_comparisons(Comparisons("some", [one]), "dpo", 512)
        source = compared(source, reference)
        loss = PreferenceLoss(Objective("dpo", 1.0))(policy, packed_comparisons([source.candidates], 64, 0))
        losses.append(float(loss.total.detach()))
    (logit,) = [np.log(1 / (np.exp(losses[1]) - 1))]
    assert losses[0] == pytest.approx(np.log1p(np.exp(2.0 - logit)), rel=1e-4)


def test_a_verdict_next_to_a_pair_counts_for_its_own_side(models):
    pair, other = comparisons()[:2]
    verdict = replace(other, answers=other.answers[:1], ranks=(2,), trained=other.trained[:2])
    source = policy_comparisons(Comparisons("some", [pair, verdict]), "kto", 512)
    source = compared(source, models[1])
    summed = PreferenceLoss(Objective.of("kto"))(models[0], packed_comparisons([source.candidates], 64, 0))
    figures, lengths = figures_of([summed.figures]), [mask.sum() for mask in (*pair.trained[1:], verdict.trained[1])]
    assert summed.targets == 3 and figures["length_chosen"] == lengths[0]
    assert figures["length_rejected"] == np.mean(lengths[1:])


def test_an_answer_of_another_prompt_is_given_to_each_of_many_with_one_prompt():
    first, second = comparisons()[:2]
    source = policy_comparisons(Comparisons("some", [first] * 3000 + [second]), "kto", 512)  # squared: 9M steps
    mismatched = [one.answers[-1].tolist() for one in source.candidates]
    assert mismatched[:-1] == [source.candidates[-1].answers[0].tolist()] * 3000
    assert mismatched[-1] == source.candidates[0].answers[0].tolist()


def test_figures_of_a_step(models):
    policy, _ = models
    source = policy_comparisons(Comparisons("some", comparisons()[:2]), "dpo", 512)
    source = compared(source, policy)  # compared with itself
    (figures,) = [
        figures_of(
            [PreferenceLoss(Objective.of("dpo"))(policy, packed_comparisons([source.candidates], 64, 0)).figures]
        )
    ]
    assert figures["margin"] == pytest.approx(0, abs=1e-5) and figures["reward_chosen"] == pytest.approx(0, abs=1e-5)
    lengths = [[len(ids) for ids in one.answers] for one in source.candidates]
    assert figures["length_chosen"] == np.mean([two[0] for two in lengths])
    assert figures["length_rejected"] == np.mean([two[1] for two in lengths])


@pytest.mark.parametrize("held_out", [False, True])
def test_a_reference_in_bfloat16_is_rounded_as_the_policy(held_out):
    model = make_model(spread=0.5).bfloat16()
    source = Comparisons("made", comparisons())
    source = with_references(source, sequence_logprobs(source.candidates, model, 0, quiet=True, held_out=held_out))
    ((rows, _),) = evaluation_rows(source.candidates, 4096, row_length(source.sizes), 0)
    with torch.set_grad_enabled(not held_out):
        answers = answer_logprobs(model, rows)
    assert torch.equal(answers.logprobs, answers.references)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_an_error_leaves_the_model_as_it_was(training, monkeypatch):
    model = make_model().train(training)
    monkeypatch.setattr("llmkit.reward_model.preferences.answer_logprobs", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sequence_logprobs(comparisons(), model, 0, quiet=True)
    assert model.training == training and all(parameter.requires_grad for parameter in model.parameters())
