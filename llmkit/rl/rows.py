"""Attempts in rows of tokens, as the trainer wants them; those of one group share its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from llmkit.data.batches import IGNORED
from llmkit.data.mixture import best_fit
from llmkit.rl.rollouts import Rollout

SHORTEST_ROW, LONGEST_ROW = 128, 512  # tokens; attention costs the square of a row, and padding grows in short ones


class PolicyRows(NamedTuple):
    """Rows of attempts, each [B, T].

    token_ids, targets   int64; the target is the next token where the policy has chosen it, else -100
    doc_ids, branch_ids  int32, for `Branching`: prompts from 1, 0 for padding; attempts of a prompt from 1, 0 for what
                         they share of it, which is all but its last token
    position_ids         int64, of each token in its attempt
    attempts             int32, the number of the attempt in the batch, from 0
    logprobs             float32, of each target as it was sampled
    advantages           float32
    weights              float32, of each target in the mean over all targets of the batch
    reference_logprobs   float32, under the reference; 0 where there is none
    """

    token_ids: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray
    branch_ids: np.ndarray
    position_ids: np.ndarray
    attempts: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    reference_logprobs: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that are computed, without padding."""
        return int((self.doc_ids > 0).sum())

    def nothing(self) -> PolicyRows:
        """One row that predicts nothing, for a process that has no more rows where others have."""
        row = PolicyRows(*(array[:1] for array in self))
        return row._replace(targets=np.full_like(row.targets, IGNORED))


class Place(NamedTuple):
    """Where an attempt stands: its row, and where the tokens of its completion are predicted."""

    row: int
    completion: slice


def pack_rollouts(
    rollouts: Sequence[Rollout], weights: Sequence[float], pad: int, share_prompts: bool
) -> tuple[PolicyRows, list[Place]]:
    """Whole attempts in rows, and the place of each; `weights` of the tokens of each.

    With `share_prompts` a prompt stands once before neighbouring attempts at it, else before each of them.
    """
    units, length = _units(rollouts, share_prompts)
    bins = best_fit([_size([rollouts[i] for i in unit]) for unit in units], length)
    shape = len(bins), length
    integers = (np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.int64, np.int32))
    rows = PolicyRows(
        np.full(shape, pad, np.int64),
        np.full(shape, IGNORED, np.int64),
        *integers,
        *(np.zeros(shape, np.float32) for _ in range(4)),
    )
    places: dict[int, Place] = {}
    for row, members in enumerate(bins):
        at = 0
        for document, unit in enumerate((units[member] for member in members), 1):
            prompt = np.array(rollouts[unit[0]].prompt_ids, np.int64)
            shared, begin = len(prompt) - 1, at
            rows.token_ids[row, at : at + shared] = prompt[:-1]
            rows.position_ids[row, at : at + shared] = np.arange(shared)
            at += shared
            for branch, index in enumerate(unit, 1):
                place = Place(row, slice(at, at + len(rollouts[index].completion.token_ids)))
                places[index] = place
                rows.token_ids[row, at] = prompt[-1]
                rows.branch_ids[place] = branch
                rows.position_ids[place] = shared + np.arange(place.completion.stop - at)
                rows.attempts[place] = index
                _fill(rows, place, rollouts[index], weights[index])
                at = place.completion.stop
            rows.doc_ids[row, begin:at] = document
    return rows, [places[index] for index in range(len(rollouts))]


def _fill(rows: PolicyRows, place: Place, rollout: Rollout, weight: float) -> None:
    """Write the tokens of a completion, and the values of each, at their place in the rows."""
    ids, chosen = np.array(rollout.completion.token_ids, np.int64), np.array(rollout.completion.sampled, bool)
    row, where = place
    rows.token_ids[row, where.start + 1 : where.stop] = ids[:-1]
    rows.targets[place] = np.where(chosen, ids, IGNORED)
    rows.logprobs[place] = rollout.completion.logprobs
    rows.advantages[place] = rollout.advantage
    rows.weights[place] = weight
    if rollout.reference_logprobs is not None:
        rows.reference_logprobs[place] = rollout.reference_logprobs


def _units(rollouts: Sequence[Rollout], share_prompts: bool) -> tuple[list[list[int]], int]:
    """Attempts by number that stand behind one prompt, and the length of a row."""
    longest = max(_size([rollout]) for rollout in rollouts)
    if not share_prompts:
        return [[index] for index in range(len(rollouts))], max(longest, LONGEST_ROW)
    groups = [list(group) for _, group in groupby(range(len(rollouts)), key=lambda index: rollouts[index].group)]
    largest = max(_size([rollouts[i] for i in group]) for group in groups)
    length = max(longest, SHORTEST_ROW, min(2 * largest, LONGEST_ROW))
    units: list[list[int]] = []
    for group in groups:
        unit: list[int] = []
        for index in group:
            if unit and _size([rollouts[i] for i in (*unit, index)]) > length:
                units.append(unit)
                unit = []
            unit.append(index)
        units.append(unit)
    return units, length


def _size(rollouts: Sequence[Rollout]) -> int:
    """Tokens of a row that attempts at one prompt take."""
    shared = len(rollouts[0].prompt_ids) - 1
    return shared + sum(len(rollout.completion.token_ids) for rollout in rollouts)
