"""Preference losses, which tune a policy without a reward model.

Each is a function of the log-probabilities of complete answers, N comparisons of K answers, under the policy and, for
dpo, ipo and kto, under the reference: the policy before training. `ranks` (N, K) order the answers: lower is better,
infinite is a missing answer. A comparison of several answers counts once, as the mean over its pairs of unequal rank.
With the implicit reward r = beta (log p(y|x) - log p_ref(y|x)), and |y| the number of tokens of an answer:

    dpo    -log sigmoid(r_w - r_l)                               Rafailov et al. 2023, arXiv 2305.18290, equation 7
    ipo    (r_w / (beta |y_w|) - r_l / (beta |y_l|) - 1 / (2 beta))^2    Azar et al. 2023, arXiv 2310.12036, equation 17
    kto    1 - sigmoid(r - z), or 1 - sigmoid(z - r) for an undesirable answer    Ethayarajh et al. 2024, arXiv
           2402.01306, equation 8; z = beta max(0, KL), estimated on answers to other prompts
    orpo   -beta log sigmoid(log odds_w - log odds_l)            Hong et al. 2024, arXiv 2403.07691, equation 7;
           odds = p / (1 - p) of p = p(y|x)^(1/|y|)
    simpo  -log sigmoid(r_w - r_l - margin)                      Meng et al. 2024, arXiv 2405.14734, equation 6;
           r = beta log p(y|x) / |y|

ipo's difference is per token, as its authors confirmed to TRL's; this is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.training.distributed import world

WITH_REFERENCE = ("dpo", "ipo", "kto")
BETA = {"simpo": 2.0}  # 0.1 for the others, as in the papers and TRL
MISMATCHED = 0.0  # rank of an answer to another prompt, on which kto estimates the KL
SUMS = (
    *("pairs", "right", "tokens", "nll", "estimates", "kl"),
    *("chosen", "reward_chosen", "length_chosen", "rejected", "reward_rejected", "length_rejected"),
)
LARGEST_LOGPROB = -1e-7  # upper bound of the mean per token: a certain answer would have infinite odds


@dataclass(frozen=True)
class Objective:
    """A loss and its settings; `of` replaces None by the loss's defaults.

    beta             scale of the log-probability differences; for orpo the weight of its odds ratio
    label_smoothing  probability that a preference is the wrong way round: Mitchell 2023, "A note on DPO with noisy
                     preferences" (dpo, simpo)
    sft_weight       weight of the cross-entropy of the best answers, a mean over the tokens of a batch; for orpo, as in
                     its authors' code and TRL's, their prompts' tokens count too
    margin           minimum difference of rewards (simpo)
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
        """Return the objective, with the loss's defaults for None."""
        beta = BETA.get(loss, 0.1) if beta is None else beta
        sft_weight = float(loss == "orpo") if sft_weight is None else sft_weight
        margin = (beta / 2 if loss == "simpo" else 0.0) if margin is None else margin
        return cls(loss, beta, label_smoothing or 0.0, sft_weight, margin)

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares the policy with a reference."""
        return self.loss in WITH_REFERENCE


def pair_losses(
    objective: Objective, logprobs: Tensor, references: Tensor, lengths: Tensor, ranks: Tensor, margins: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses (N,), each a mean over pairs, rewards (N, K), and the mask (N, K, K) of pairs (better, worse).

    logprobs, references, lengths, ranks (N, K) float32; margins (N,): minimum differences of rewards, from the data
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
    """Return losses and rewards (N, K), and the KL in nats. `ranks` are 1 for a desirable answer, 2 for an undesirable
    one, and `MISMATCHED`, whose loss is 0. Collective."""
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
    """Return sums over the chosen and the rejected answers (N, K) and the pairs (N, K, K), for `figures_of`."""
    differences = (rewards.unsqueeze(2) - rewards.unsqueeze(1))[pairs]
    sums = {"pairs": float(len(differences)), "right": float((differences > 0).sum() + 0.5 * (differences == 0).sum())}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        sums[name] = float(side.sum())
        sums[f"reward_{name}"], sums[f"length_{name}"] = float(rewards[side].sum()), float(lengths[side].sum())
    return sums


def figures_of(micro_batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the figures of a step or an evaluation over all ranks. Collective.

    micro_batches: the sums of the loss for each micro-batch of this rank

    `reward_chosen`, `reward_rejected` and their difference `margin`; `accuracy`, the fraction of pairs in which the
    better answer has the higher reward; `length_chosen` and `length_rejected` in tokens; `nll` of the best answers, in
    nats per token, if it is trained; `kl` in nats per answer, for kto.
    """
    values = world().sum(*(sum(rows.get(name, 0.0) for rows in micro_batches) for name in SUMS))
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
