"""Evaluate a reward model: accuracy with its interval, calibration, and biases of its scores."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from llmkit.errors import UserError
from llmkit.reward_model.comparisons import Candidates, Comparisons
from llmkit.reward_model.head import ROW_TOKENS, RewardModel, score_comparisons
from llmkit.tokenizer.encoding import Tokenizer

STANDARD_ERRORS = 1.959964  # half width of a 95% interval
BINS = 10  # of confidence: Guo et al. 2017 use 15 for 10,000 answers, ours are fewer
MARKDOWN = re.compile(r"\*\*|__|`|^#{1,6} |^[^\S\n]*(?:[-*+]|\d+[.)]) |^\|", re.MULTILINE)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` trials (Wilson 1927)."""
    z2 = STANDARD_ERRORS**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = STANDARD_ERRORS / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidence: np.ndarray, right: np.ndarray, lowest: float = 0.0) -> float:
    """Return the expected calibration error of confidence (N,), `lowest` to 1, against outcomes (N,): the mean gap over
    bins of confidence (Guo et al. 2017, arXiv:1706.04599, section 2)."""
    bins = np.minimum(((confidence - lowest) / (1 - lowest) * BINS).astype(int), BINS - 1)
    gaps = (abs(float((confidence[bins == b] - right[bins == b]).sum())) for b in range(BINS))
    return sum(gaps) / len(confidence)


def correlation(first: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 if one of the two is constant."""
    if np.ptp(first) == 0 or np.ptp(other) == 0:
        return 0.0
    return round(float(np.corrcoef(_ranks(first), _ranks(other))[0, 1]), 4)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def judge(
    model: RewardModel,
    sources: Sequence[Comparisons],
    pad: int,
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a reward model on held-out comparisons: "overall" and "by_source".

    With a tokenizer, "baseline_length" evaluates the length of an answer in tokens (or its negative, if that is more
    accurate) as its score, and "biases" is that of `biases`. Raises UserError if no comparison has a better and a worse
    answer.
    """
    check_unequal(sources)
    shuffled = [shuffled_answers(source.candidates, seed) for source in sources]
    scores = []  # by source and comparison: (K,), the mean of the heads
    for part in shuffled:
        scored = dict(score_comparisons(model, part, ROW_TOKENS, pad))
        scores.append([scored[number].mean(-1) for number in range(len(part))])
    comparisons = [candidates for part in shuffled for candidates in part]
    rewards = [reward for part in scores for reward in part]
    figures: dict[str, Any] = {"overall": evaluate(rewards, comparisons), "by_source": {}}
    for source, part, its_scores in zip(sources, shuffled, scores, strict=True):
        if any(len(set(candidates.ranks)) > 1 for candidates in part):
            figures["by_source"][source.name] = evaluate(its_scores, part)
    if tokenizer is not None:
        lengths = [np.array([len(answer) for answer in candidates.answers], float) for candidates in comparisons]
        both = [evaluate([sign * length for length in lengths], comparisons) for sign in (1, -1)]
        figures["baseline_length"] = max(both, key=lambda scored: scored["accuracy"])
        figures["biases"] = biases(rewards, comparisons, tokenizer, seed)
    return figures


def check_unequal(sources: Sequence[Comparisons]) -> None:
    """Raise UserError unless some comparison has a better and a worse answer."""
    if not any(len(set(candidates.ranks)) > 1 for source in sources for candidates in source.candidates):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"{names}: nothing to evaluate on: no held-out comparison has a better and a worse answer")


def evaluate(scores: Sequence[np.ndarray], comparisons: Sequence[Candidates]) -> dict[str, Any]:
    """Accuracy on pairs of unequal rank, its 95% interval, and the calibration of its confidence.

    accuracy, accuracy_95  over comparisons
    loss                   Bradley-Terry loss over pairs, in nats, without margins and centring
    ece                    expected calibration error, over pairs
    temperature            fitted to these pairs, so `ece_at_temperature`, on the same pairs, is optimistic

    scores: (K,) for each comparison. A comparison of several answers counts once, by the share of its pairs in order;
    equal scores are half right. Comparisons with ties only are left out.
    """
    differences = []  # better minus worse score of each pair of unequal rank
    for values, group in zip(scores, comparisons, strict=True):
        ranks = np.array(group.ranks)
        pairs = np.subtract.outer(values, values)[np.less.outer(ranks, ranks)].astype(np.float64)
        differences += [pairs] if len(pairs) else []
    right = float(np.mean([np.mean((d > 0) + 0.5 * (d == 0)) for d in differences]))
    low, high = wilson(right, len(differences))
    every = np.concatenate(differences)
    temperature = fitted_temperature(every)
    return {
        "comparisons": len(differences),
        "accuracy": round(right, 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
        "loss": round(float(np.logaddexp(0, -every).mean()), 4),
        "ece": round(confidence_error(every), 4),
        "temperature": round(temperature, 3),
        "ece_at_temperature": round(confidence_error(every / temperature), 4),
    }


def confidence_error(differences: np.ndarray) -> float:
    """Return the calibration error of sigmoid(|difference|) as the probability of being right."""
    confidence, right = 1 / (1 + np.exp(-np.abs(differences))), (differences > 0) + 0.5 * (differences == 0)
    return calibration_error(confidence, right, lowest=0.5)


def fitted_temperature(differences: np.ndarray) -> float:
    """Return the maximum-likelihood temperature of sigmoid(difference / temperature), 0.01 to 100."""
    tried = np.logspace(-2, 2, 401)
    losses = [np.logaddexp(0, -differences / temperature).mean() for temperature in tried]
    return float(tried[int(np.argmin(losses))])


def shuffled_answers(comparisons: Sequence[Candidates], seed: int) -> list[Candidates]:
    """Shuffle the answers of each comparison: files put the better one first."""
    rng = np.random.default_rng(seed)
    mixed = []
    for candidates in comparisons:
        order = rng.permutation(len(candidates.answers))
        answers, ranks = tuple(candidates.answers[i] for i in order), tuple(candidates.ranks[i] for i in order)
        mixed.append(replace(candidates, answers=answers, ranks=ranks, trained=()))
    return mixed


def biases(
    scores: Sequence[np.ndarray], comparisons: Sequence[Candidates], tokenizer: Tokenizer, seed: int
) -> dict[str, Any]:
    """Correlate differences of scores with length and formatting (Spearman), over the pairs of unequal rank.

    `length` is in tokens, `formatting` counts Markdown marks in the text of an answer. Each comes with the same
    correlation of the labels, which a perfect judge would show. Position bias is impossible: an answer's score does not
    depend on the others.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[float, ...]] = []
    for scored, candidates in zip(scores, comparisons, strict=True):
        texts = [tokenizer.decode(ids.tolist(), skip_specials=True) for ids in candidates.answers]
        features = [
            (len(ids), len(MARKDOWN.findall(text))) for ids, text in zip(candidates.answers, texts, strict=True)
        ]
        for i, j in combinations(range(len(candidates.answers)), 2):
            if candidates.ranks[i] != candidates.ranks[j]:
                i, j = (i, j) if rng.random() < 0.5 else (j, i)  # else the first would always be the earlier one
                label = 1.0 if candidates.ranks[i] < candidates.ranks[j] else -1.0
                more = (first - second for first, second in zip(features[i], features[j], strict=True))
                rows.append((float(scored[i] - scored[j]), label, *more))
    score, label, *columns = np.array(rows).T
    return {
        name: {"score": correlation(score, column), "label": correlation(label, column)}
        for name, column in zip(("length", "formatting"), columns, strict=True)
    }
