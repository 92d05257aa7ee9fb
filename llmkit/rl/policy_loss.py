"""The loss of `llmkit rl` for all algorithms: a clipped policy gradient with a KL penalty.

N targets, B rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.data.batches import IGNORED
from llmkit.kernels.attention import Branching
from llmkit.model.transformer import Transformer
from llmkit.rl.algorithms import Algorithm
from llmkit.rl.rollouts import PolicyRows, Rollout, map_shares, pack_rollouts
from llmkit.training.distributed import world
from llmkit.training.loss import Summed

TOKENS_AT_ONCE = 8192  # of the reference, without gradients
LARGEST_LOG_RATIO = 20.0  # exp of more would overflow a float32 sum


class PolicyLoss:
    """The summed loss of rows of rollouts, and the number of targets.

    temperature  of sampling: log-probabilities are those of the distribution that was sampled from
    kl_coef      KL coefficient, with the k3 estimator of Schulman 2020 ("Approximating KL divergence"), which is never
                 negative; ignored if the algorithm has the KL in the reward
    with_reference  whether the rollouts have log-probabilities under the reference

    Its figures are sums over the targets, for `policy_figures`.
    """

    def __init__(self, algorithm: Algorithm, temperature: float, kl_coef: float, with_reference: bool) -> None:
        self.algorithm, self.temperature, self.with_reference = algorithm, temperature, with_reference
        self.kl_coef = kl_coef if algorithm.kl == "loss" else 0.0

    def __call__(self, model: Any, batch: PolicyRows) -> Summed:
        logprobs, entropy, where = target_logprobs(model, batch, self.temperature)

        def picked(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[where]).to(logprobs)

        sampled, advantage, weight = picked(batch.logprobs), picked(batch.advantages), picked(batch.weights)
        log_ratio = (logprobs - sampled).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        by_sequence, clip = self.algorithm.ratio == "sequence", self.algorithm.clip
        ratio = (_sequence_means(log_ratio, batch, where) if by_sequence else log_ratio).exp()
        gain = ratio * advantage
        if clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
        loss = -gain
        divergence = torch.zeros_like(loss)
        if self.with_reference:
            divergence = _k3(picked(batch.reference_logprobs) - logprobs)
        if self.kl_coef:
            loss = loss + self.kl_coef * divergence
        with torch.no_grad():
            sums = {
                "entropy": entropy,
                "kl": divergence,
                "policy_kl": _k3(log_ratio),
                "clipped": (gain != ratio * advantage).float(),
                "ratio": ratio,
                "gap": log_ratio.abs(),
            }
            figures = {name: float(values.sum()) for name, values in sums.items()}
            figures["largest"] = float(log_ratio.abs().max()) if len(logprobs) else 0.0
        return Summed((weight * loss).sum(), len(logprobs), {"targets": len(logprobs), **figures})


def policy_figures(
    updates: Sequence[Sequence[Mapping[str, float]]], attempts: int, with_reference: bool
) -> dict[str, float]:
    """Return the metrics of a step over all ranks; collective.

    updates: figures of `PolicyLoss` for each micro-batch of each update; attempts: trained on, over all ranks

    Over all updates: `policy_kl` to the policy that sampled, `clipped` (share of tokens) and `ratio`. Of the first
    update: `entropy` (nats per token), `logprob_difference` and `logprob_difference_max` between sampler and trainer,
    and with a reference `kl` to it (nats per token) and `kl_per_attempt`.
    """
    every = [figures for update in updates for figures in update]
    own = [sum(figures[name] for figures in every) for name in ("policy_kl", "clipped", "ratio", "targets")]
    own += [sum(figures[name] for figures in updates[0]) for name in ("entropy", "gap", "kl", "targets")]
    policy_kl, clipped, ratio, targets, entropy, gap, kl, first = world().sum(*own)
    targets, first = max(1.0, targets), max(1.0, first)
    figures = {"policy_kl": policy_kl / targets, "clipped": clipped / targets, "ratio": ratio / targets}
    figures |= {"entropy": entropy / first, "logprob_difference": gap / first}
    if with_reference:
        figures |= {"kl": kl / first, "kl_per_attempt": kl / max(1, attempts)}
    largest = world().largest(max((figures["largest"] for figures in updates[0]), default=0.0))[0]
    figures["logprob_difference_max"] = largest
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def target_logprobs(model: Transformer, batch: PolicyRows, temperature: float) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return the log-probability and entropy of each target, (N,) float32, and the mask (B, T) of the targets."""
    device = model.embed_tokens.device
    where = batch.targets != IGNORED
    ids, *layout = (torch.from_numpy(array).to(device) for array in batch[:1] + batch[2:5])
    documents = Branching(*layout) if batch.branch_ids.max() > 1 else layout[0]
    hidden_BTC = model(ids, doc_ids=documents)
    hidden_NC = hidden_BTC[torch.from_numpy(where).to(device)]
    target_N = torch.from_numpy(batch.targets[where]).to(device)
    logprobs, entropy = model.logprobs(hidden_NC, target_N, temperature)
    return logprobs, entropy.detach(), where


def reference_logprobs(
    reference: Transformer, rollouts: Sequence[Rollout], temperature: float, share_prompts: bool
) -> None:
    """Set the log-probabilities of every rollout under the reference; each rank computes its share."""

    @torch.no_grad()
    def computed(own: Sequence[Rollout]) -> list[np.ndarray]:
        if not own:
            return []
        rows, places = pack_rollouts(own, [1.0] * len(own), 0, share_prompts)
        filled = np.zeros_like(rows.logprobs)
        rows_at_once = max(1, TOKENS_AT_ONCE // rows.token_ids.shape[1])
        for start in range(0, len(filled), rows_at_once):
            part = PolicyRows(*(array[start : start + rows_at_once] for array in rows))
            logprobs, _, where = target_logprobs(reference, part, temperature)
            filled[start : start + rows_at_once][where] = logprobs.float().cpu().numpy()
        return [filled[spot.row, spot.completion] for spot in places]

    for rollout, logprobs in zip(rollouts, map_shares(rollouts, computed), strict=True):
        rollout.reference_logprobs = logprobs


def _k3(log_ratio: Tensor) -> Tensor:
    """Return exp(x) - x - 1 of x = log(other / policy), an unbiased estimate of KL(policy || other), never negative."""
    bounded = log_ratio.clamp(max=LARGEST_LOG_RATIO)
    return bounded.expm1() - bounded


def _sequence_means(values_N: Tensor, batch: PolicyRows, where: np.ndarray) -> Tensor:
    """Replace each value by the mean of its sequence: (N,)."""
    _, inverse = np.unique(batch.attempts[where], return_inverse=True)
    sequence_N = torch.from_numpy(inverse).to(values_N.device)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    sums = values_N.new_zeros(count).index_add(0, sequence_N, values_N)
    sizes = values_N.new_zeros(count).index_add(0, sequence_N, torch.ones_like(values_N))
    return (sums / sizes)[sequence_N]
