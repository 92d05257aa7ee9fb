"""Rollouts: attempts at problems, the packed rows to train on, and their log.

`rollouts.jsonl` has a line per rollout, {"prompt", "completion", ...}, which sft and `train-reward --score` can read;
sft reads the `messages` of a rollout with tool calls.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llmkit.data.batches import IGNORED, best_fit
from llmkit.errors import SharedError, UserError
from llmkit.formats.conversations import Message, Part, as_record, message
from llmkit.formats.problems import Problem
from llmkit.generation.requests import Completion, Request, split_thoughts
from llmkit.generation.sampler import Sampler
from llmkit.generation.tool_calls import ToolUse
from llmkit.io.files import BLOCK, check_file
from llmkit.io.foreign import integer
from llmkit.io.jsonl import dump_json
from llmkit.io.metrics import trim_metrics
from llmkit.io.resume import read_sealed, write_sealed
from llmkit.rewards import Attempt, Weighted, judge
from llmkit.rl.problems import EncodedProblem
from llmkit.training.distributed import world

T = TypeVar("T")
R = TypeVar("R")
ROLLOUTS = "rollouts.jsonl"
SHORTEST_ROW, LONGEST_ROW = 128, 512  # tokens; attention is quadratic in the row, and short rows have more padding


@dataclass
class Rollout:
    """One attempt at a problem.

    step       training step, from 1; 0 in an evaluation
    group      number of its group in the run; the rollouts of a group answer one prompt
    rewards    by name, without weights
    reward     their weighted sum, minus the length penalty; NaN if a reward could not judge it
    judged     whether all rewards could judge it
    trained    whether it is in the loss
    parts      texts, calls and results, if it called a tool
    advantage  of each of its tokens
    reference_logprobs  float32, of each token of the completion under the reference; None without one
    """

    problem: Problem
    prompt_ids: Sequence[int]
    completion: Completion
    step: int
    group: int
    sample: int
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float = 0.0
    judged: bool = True
    reference_logprobs: np.ndarray | None = None
    advantage: float = 0.0
    trained: bool = True
    parts: tuple[Part, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """Token ids of prompt and completion."""
        return [*self.prompt_ids, *self.completion.token_ids]

    @property
    def token_count(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.completion.sampled)

    @property
    def divergence(self) -> float:
        """log(policy / reference) of the rollout, whose mean is the KL; 0 without a reference."""
        if self.reference_logprobs is None:
            return 0.0
        chosen = np.array(self.completion.sampled, bool)
        return float((np.array(self.completion.logprobs) - self.reference_logprobs)[chosen].sum())

    def as_attempt(self, max_tokens: int) -> Attempt:
        """Return the input of rewards."""
        text, reason, calls = self.completion.text, self.completion.finish_reason, self.completion.tool_calls
        return Attempt(self.problem, text, self.token_count, reason, max_tokens, calls)

    def record(self) -> dict[str, Any]:
        """Return the line of the log. With tool calls it has `messages`, from which sft can learn the calls."""
        problem, completion = self.problem, self.completion
        thought, answer = split_thoughts(completion.text)
        prompt: Any = problem.prompt
        if len(problem.messages) > 1:
            prompt = as_record(problem.messages)
        messages = (*(problem.messages or (message("user", problem.prompt),)), Message("assistant", self.parts))
        known = {name: problem.record[name] for name in ("id", "source") if name in problem.record}
        return {
            "step": self.step,
            "group": self.group,
            "sample": self.sample,
            **known,
            "prompt": prompt,
            "answer": problem.answer,
            "completion": answer,
            **({"reasoning_content": thought} if thought else {}),
            **({"messages": as_record(messages)} if self.parts else {}),
            "reward": round(self.reward, 6) if self.judged else None,
            "rewards": {name: None if value is None else round(value, 6) for name, value in self.rewards.items()},
            "advantage": round(self.advantage, 6),
            "trained": self.trained,
            "finish_reason": completion.finish_reason,
            "tool_calls": completion.tool_calls,
            "token_ids": completion.token_ids,
            "logprobs": [round(value, 6) for value in completion.logprobs],
            "sampled": completion.sampled if completion.tool_calls else None,
        }


def map_shares(items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """Have each rank work on its share of the items, and return all results on every rank.

    If a rank raises UserError, all raise SharedError.
    """
    if world().size == 1:
        return work(items)
    first, stop = world().share(len(items))
    own: list[R] | UserError
    try:
        own = work(items[first:stop])
    except UserError as error:  # the other ranks wait for this one's results
        own = error
    gathered = world().gather(own)
    if failed := next((part for part in gathered if isinstance(part, UserError)), None):
        raise SharedError(str(failed))
    return [result for part in gathered for result in part]


def sample_attempts(
    problems: Sequence[EncodedProblem],
    sampler: Sampler,
    group: int,
    max_tokens: int,
    seed: int,
    first: int,
    step: int = 0,
    tools: ToolUse | None = None,
) -> list[list[Rollout]]:
    """Sample a group of rollouts for each problem, numbered from `first`; each rank samples its share.

    Random numbers depend on the group and the sample only, not on the rank. Raises UserError if a prompt is too long.
    """
    requests = [
        Request(encoded.prompt_ids, group, max_tokens, seed, number, encoded.problem.where, tools=encoded.tools)
        for number, encoded in enumerate(problems, first)
    ]
    groups: list[list[Rollout]] = []
    sampled = map_shares(requests, lambda own: list(sampler.complete(own)))
    for number, (encoded, completions) in enumerate(zip(problems, sampled, strict=True), first):
        if not completions:
            raise UserError(f"{encoded.problem.where}: the prompt is longer than the context of the server's model")
        groups.append([])
        offered = encoded.tools or tools
        for sample, completion in enumerate(completions):
            parts: tuple[Part, ...] = ()
            if offered is not None and completion.tool_calls:
                parts = offered.parts(completion.token_ids, completion.sampled, completion.tool_calls)
            groups[-1].append(
                Rollout(encoded.problem, encoded.prompt_ids, completion, step, number, sample, parts=parts)
            )
    return groups


def set_rewards(rollouts: Sequence[Rollout], rewards: Sequence[Weighted], max_tokens: int) -> None:
    """Set the rewards of every rollout and their total; a rollout without a total is not trained on."""
    attempts = [rollout.as_attempt(max_tokens) for rollout in rollouts]
    judged = map_shares(attempts, partial(judge, weighted=rewards))
    for rollout, (by_name, total) in zip(rollouts, judged, strict=True):
        rollout.rewards, rollout.judged = by_name, total is not None
        rollout.trained, rollout.reward = rollout.judged, math.nan if total is None else total


def rewards_of(rollouts: Iterable[Rollout]) -> list[float]:
    """Return the rewards of the rollouts that could be judged."""
    return [rollout.reward for rollout in rollouts if rollout.judged]


class RolloutLog:
    """The log of a run. A step's lines are on disk before its update; state/ has their checksum."""

    def __init__(self, path: Path) -> None:
        self.path, self._note = path, path.parent / "state" / "rollouts.json"
        self._size, self._digest = 0, blake2b(digest_size=16)

    def trim(self, steps: int) -> int:
        """Drop lines of later steps, and a partial line, of a killed run; return the number of the next group.

        Raises UserError if the lines were changed.
        """
        if not world().leads:
            return world().broadcast(0)
        if self._note.exists():
            noted = read_sealed(self._note)
            if self.path.exists():
                check_file(self.path)
            self._read(noted["bytes"])
            if (self._size, self._digest.hexdigest()) != (noted["bytes"], noted["checksum"]):
                raise UserError(f"{self.path}: damaged or edited; restore it, or start over with --force")
            self._note.unlink()  # a kill from here on leaves a file without a note
        last = trim_metrics(self.path, steps)
        self._read()
        if self._size:
            self._write_note()
        return world().broadcast(0 if last is None else integer(last, "group", str(self.path), 0, at_least=0) + 1)

    def _read(self, most: int = sys.maxsize) -> None:
        """Set size and checksum to those of the file's first `most` bytes."""
        self._size, self._digest = 0, blake2b(digest_size=16)
        with suppress(FileNotFoundError), self.path.open("rb") as handle:
            while block := handle.read(min(BLOCK, most - self._size)):
                self._digest.update(block)
                self._size += len(block)

    def _write_note(self) -> None:
        self._note.parent.mkdir(exist_ok=True)
        write_sealed(self._note, {"bytes": self._size, "checksum": self._digest.hexdigest()})

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """Append the rollouts of a step, on rank 0."""
        if not world().leads:
            return
        lines = b"".join(dump_json(rollout.record()) + b"\n" for rollout in rollouts)
        with self.path.open("ab") as handle:
            handle.write(lines)
            handle.flush()
            os.fsync(handle.fileno())
        self._size += len(lines)
        self._digest.update(lines)
        self._write_note()


class PolicyRows(NamedTuple):
    """Rows of rollouts, each [B, T].

    token_ids, targets   int64; the target is the next token if the policy sampled it, else -100
    doc_ids, branch_ids  int32, for `Branching`: prompts from 1, 0 for padding; rollouts of a prompt from 1, 0 for the
                         shared prompt, which is all but its last token
    position_ids         int64, of each token in its rollout
    attempts             int32, number of the rollout in the batch, from 0
    logprobs             float32, of each target under the sampler
    advantages           float32
    weights              float32, of each target in the mean over all targets of the batch
    reference_logprobs   float32, under the reference; 0 without one
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
        """Number of tokens without padding."""
        return int((self.doc_ids > 0).sum())

    def nothing(self) -> PolicyRows:
        """Return one row without targets, for a rank that has run out of rows before the others."""
        row = PolicyRows(*(array[:1] for array in self))
        return row._replace(targets=np.full_like(row.targets, IGNORED))


class Place(NamedTuple):
    """Place of a rollout: its row, and the positions that predict its completion."""

    row: int
    completion: slice


def pack_rollouts(
    rollouts: Sequence[Rollout], weights: Sequence[float], pad: int, share_prompts: bool
) -> tuple[PolicyRows, list[Place]]:
    """Pack rollouts into rows; return the rows and the place of each rollout.

    weights        token weight of each rollout
    share_prompts  whether neighbouring rollouts of a group share one copy of their prompt
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
                spot = Place(row, slice(at, at + len(rollouts[index].completion.token_ids)))
                places[index] = spot
                rows.token_ids[row, at] = prompt[-1]
                rows.branch_ids[spot] = branch
                rows.position_ids[spot] = shared + np.arange(spot.completion.stop - at)
                rows.attempts[spot] = index
                completion = rollouts[index].completion
                ids, chosen = np.array(completion.token_ids, np.int64), np.array(completion.sampled, bool)
                rows.token_ids[row, at + 1 : spot.completion.stop] = ids[:-1]
                rows.targets[spot] = np.where(chosen, ids, IGNORED)
                rows.logprobs[spot] = completion.logprobs
                rows.advantages[spot] = rollouts[index].advantage
                rows.weights[spot] = weights[index]
                if (reference_logprobs := rollouts[index].reference_logprobs) is not None:
                    rows.reference_logprobs[spot] = reference_logprobs
                at = spot.completion.stop
            rows.doc_ids[row, begin:at] = document
    return rows, [places[index] for index in range(len(rollouts))]


def _units(rollouts: Sequence[Rollout], share_prompts: bool) -> tuple[list[list[int]], int]:
    """Return the indices of rollouts that share a copy of their prompt, and the length of a row."""
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
    """Return the tokens that rollouts with one copy of their prompt take."""
    shared = len(rollouts[0].prompt_ids) - 1
    return shared + sum(len(rollout.completion.token_ids) for rollout in rollouts)
