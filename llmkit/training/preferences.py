"""Losses of preferences between answers, which tune a policy without a reward model.

Each is a function of the log-probabilities of whole answers, N comparisons of K answers, under the policy and, for dpo,
ipo and kto, under its reference: the model as it was before. `ranks` (N, K) say which answer is better, the smaller the
better, infinite where there is none. A comparison of several answers counts once, as the mean over its pairs of unequal
rank. With the implicit reward r = beta (log p(y|x) - log p_ref(y|x)), and |y| the tokens of an answer:

    dpo    -log sigmoid(r_w - r_l)                               Rafailov et al. 2023, arXiv 2305.18290, equation 7
    ipo    (r_w / (beta |y_w|) - r_l / (beta |y_l|) - 1 / (2 beta))^2    Azar et al. 2023, arXiv 2310.12036, equation 17
    kto    1 - sigmoid(r - z), or 1 - sigmoid(z - r) of an undesirable answer     Ethayarajh et al. 2024, arXiv
           2402.01306, equation 8; z = beta max(0, KL), by answers that belong to other prompts
    orpo   -beta log sigmoid(log odds_w - log odds_l)            Hong et al. 2024, arXiv 2403.07691, equation 7;
           odds = p / (1 - p) of p = p(y|x)^(1/|y|)
    simpo  -log sigmoid(r_w - r_l - margin)                      Meng et al. 2024, arXiv 2405.14734, equation 6;
           r = beta log p(y|x) / |y|

ipo's difference is per token, which its authors confirmed to TRL's, and not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.training.distributed import world

WITH_REFERENCE = ("dpo", "ipo", "kto")
BETA = {"simpo": 2.0}  # else 0.1, as the papers and TRL have it
MISMATCHED = 0.0  # rank of an answer that belongs to another prompt, by which kto estimates the divergence
SUMS = (
    *("pairs", "right", "tokens", "nll", "estimates", "kl"),
    *("chosen", "reward_chosen", "length_chosen", "rejected", "reward_rejected", "length_rejected"),
)
LARGEST_LOGPROB = -1e-7  # of a token in the mean: the odds of a certain answer would be infinite


@dataclass(frozen=True)
class Objective:
    """A loss and its settings; those of None are chosen for it by `of`.

    beta             how much a difference of log-probabilities weighs; for orpo the weight of its odds ratio
    label_smoothing  chance that a preference is the wrong way round: Mitchell 2023, "A note on DPO with noisy
                     preferences" (dpo, simpo)
    sft_weight       weight of the cross-entropy of the best answers, a mean over the tokens of a batch; for orpo, as in
                     its authors' code and TRL's, over those of their prompts, too
    margin           that rewards should differ by, at least (simpo)
    desirable, undesirable  weights of answers (kto)
    """

    loss: str
    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    margin: float = 0.0
    desirable: float = 1.0
    undesirable: float = 1.0

    @classmethod
    def of(
        cls,
        loss: str,
        beta: float | None = None,
        label_smoothing: float | None = None,
        sft_weight: float | None = None,
        margin: float | None = None,
    ) -> Objective:
        """The objective of these settings."""
        beta = BETA.get(loss, 0.1) if beta is None else beta
        sft_weight = float(loss == "orpo") if sft_weight is None else sft_weight
        margin = (beta / 2 if loss == "simpo" else 0.0) if margin is None else margin
        return cls(loss, beta, label_smoothing or 0.0, sft_weight, margin)

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares the policy with what it was."""
        return self.loss in WITH_REFERENCE


def pair_losses(
    objective: Objective, logprobs: Tensor, references: Tensor, lengths: Tensor, ranks: Tensor, margins: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), a mean over pairs, rewards (N, K), and which pairs (N, K, K) are of a better and a worse answer.

    logprobs, references, lengths, ranks (N, K) float32; margins (N,), of the data, by which rewards should differ, too
    """
    beta, smoothing = objective.beta, objective.label_smoothing
    per_token = logprobs / lengths.clamp(min=1)
    rewards = beta * (logprobs - references if objective.loss in WITH_REFERENCE else per_token)
    if objective.loss == "ipo":
        compared = rewards / (beta * lengths.clamp(min=1))
    elif objective.loss == "orpo":
        bounded = per_token.clamp(max=LARGEST_LOGPROB)
        compared = bounded - (-bounded.expm1()).log()
    else:
        compared = rewards
    pairs = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & ranks.isfinite().unsqueeze(1)
    differences = compared.unsqueeze(2) - compared.unsqueeze(1)
    if objective.loss == "ipo":
        losses = (differences - 1 / (2 * beta)).square()
    elif objective.loss == "orpo":
        losses = -beta * F.logsigmoid(differences)
    else:
        differences = differences - (margins + objective.margin).view(-1, 1, 1)
        losses = -F.logsigmoid(differences)
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * F.logsigmoid(-differences)
    means = torch.where(pairs, losses, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    return means, rewards, pairs


def kto_losses(
    objective: Objective, logprobs: Tensor, references: Tensor, ranks: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Losses and rewards (N, K), and the divergence in nats; ranks: 1 of a desirable answer, 2 of another, and
    `MISMATCHED`, whose loss is 0. All processes call it together."""
    ratios = logprobs - references
    with torch.no_grad():
        mismatched = ratios[ranks == MISMATCHED]
        total, count = world().sum(float(mismatched.sum()), len(mismatched))
        divergence = max(0.0, total / max(1, count))
    rewards = objective.beta * ratios
    gains = rewards - objective.beta * divergence
    desirable = objective.desirable * (1 - torch.sigmoid(gains))
    undesirable = objective.undesirable * (1 - torch.sigmoid(-gains))
    losses = torch.where(ranks == 1, desirable, torch.where(ranks == 2, undesirable, 0.0))
    return losses, rewards, divergence


@torch.no_grad()
def sums_of(rewards: Tensor, lengths: Tensor, chosen: Tensor, rejected: Tensor, pairs: Tensor) -> dict[str, float]:
    """Sums over the answers (N, K) of either side and pairs (N, K, K) of some comparisons, for `figures_of`."""
    differences = (rewards.unsqueeze(2) - rewards.unsqueeze(1))[pairs]
    sums = {"pairs": float(len(differences)), "right": float((differences > 0).sum() + 0.5 * (differences == 0).sum())}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        sums[name] = float(side.sum())
        sums[f"reward_{name}"], sums[f"length_{name}"] = float(rewards[side].sum()), float(lengths[side].sum())
    return sums


def figures_of(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of a step or an evaluation over all processes, which call this together.

    parts: those of the loss for each micro-batch of this process

    `reward_chosen`, `reward_rejected` and their difference `margin`; `accuracy`, the share of pairs in which the better
    answer has the higher reward; `length_chosen` and `length_rejected` in tokens; `nll` of the best answers, in nats a
    token, where that is trained; `kl` in nats an answer, with kto.
    """
    values = world().sum(*(sum(part.get(name, 0.0) for part in parts) for name in SUMS))
    sums = dict(zip(SUMS, values, strict=True))
    figures: dict[str, float] = {}
    for side in ("chosen", "rejected"):
        for name in (f"reward_{side}", f"length_{side}") if sums[side] else ():
            figures[name] = sums[name] / sums[side]
    if sums["chosen"] and sums["rejected"]:
        figures["margin"] = figures["reward_chosen"] - figures["reward_rejected"]
    if sums["pairs"]:
        figures["accuracy"] = sums["right"] / sums["pairs"]
    if sums["tokens"]:
        figures["nll"] = sums["nll"] / sums["tokens"]
    if sums["estimates"]:
        figures["kl"] = sums["kl"] / sums["estimates"]
    return {name: float(f"{value:.6g}") for name, value in figures.items()}
