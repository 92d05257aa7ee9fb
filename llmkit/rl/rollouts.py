"""Rollouts: attempts at problems, the rows in which they are trained on, and their log.

`rollouts.jsonl` has a line for each attempt, {"prompt", "completion", ...}, which sft and `train-reward --score` read
as they read any other file; sft reads the `messages` of an attempt that called tools.
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
SHORTEST_ROW, LONGEST_ROW = 128, 512  # tokens; attention costs the square of a row, and padding grows in short ones


@dataclass
class Rollout:
    """One attempt at a problem.

    step       of training that it is for, from 1; 0 in an evaluation
    group      number of the group, counted over the whole run; all attempts of a group answer one prompt
    rewards    by name, without their weights
    reward     their weighted sum, and what overlong handling takes away; NaN where one could not judge it
    judged     whether all could
    trained    whether it has a part in the loss
    parts      texts, calls and results, where a tool was called
    advantage  of every token of it
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
        """Prompt and completion."""
        return [*self.prompt_ids, *self.completion.token_ids]

    @property
    def token_count(self) -> int:
        """Tokens that the policy chose."""
        return sum(self.completion.sampled)

    @property
    def divergence(self) -> float:
        """log(policy / reference) of the whole attempt, whose mean is the divergence; 0 without a reference."""
        if self.reference_logprobs is None:
            return 0.0
        chosen = np.array(self.completion.sampled, bool)
        return float((np.array(self.completion.logprobs) - self.reference_logprobs)[chosen].sum())

    def as_attempt(self, max_tokens: int) -> Attempt:
        """Return what rewards take."""
        text, reason, calls = self.completion.text, self.completion.finish_reason, self.completion.tool_calls
        return Attempt(self.problem, text, self.token_count, reason, max_tokens, calls)

    def record(self) -> dict[str, Any]:
        """The line of the log. Where a tool was called it has `messages`, which teach sft the call, as the text of
        the completion would not."""
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
    """Have each process work on its share of the items; the results of all, in every process.

    A UserError that one raises is raised in all, as a SharedError.
    """
    if world().size == 1:
        return work(items)
    first, stop = world().share(len(items))
    own: list[R] | UserError
    try:
        own = work(items[first:stop])
    except UserError as error:  # the others wait for this process's results
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
    """Sample a group of attempts at each problem, numbered from `first`; each process samples its share of them.

    Random numbers are those of a group and a sample, whoever draws them. Raises UserError for a prompt without room.
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
    """Have every attempt judged: its rewards, and their total, without which it has no part in the loss."""
    attempts = [rollout.as_attempt(max_tokens) for rollout in rollouts]
    judged = map_shares(attempts, partial(judge, weighted=rewards))
    for rollout, (by_name, total) in zip(rollouts, judged, strict=True):
        rollout.rewards, rollout.judged = by_name, total is not None
        rollout.trained, rollout.reward = rollout.judged, math.nan if total is None else total


def rewards_of(rollouts: Iterable[Rollout]) -> list[float]:
    """The rewards of those attempts that could be judged."""
    return [rollout.reward for rollout in rollouts if rollout.judged]


class RolloutLog:
    """The log of a run. A step's lines are on disk before its update is, and their checksum stands in state/."""

    def __init__(self, path: Path) -> None:
        self.path, self._note = path, path.parent / "state" / "rollouts.json"
        self._size, self._digest = 0, blake2b(digest_size=16)

    def trim(self, steps: int) -> int:
        """Drop what a killed run has left of later steps, and half a line; the number of the next group. Raises
        UserError where lines are others than were written."""
        if not world().leads:
            return world().broadcast(0)
        if self._note.exists():
            noted = read_sealed(self._note)
            if self.path.exists():
                check_file(self.path)
            self._read(noted["bytes"])
            if (self._size, self._digest.hexdigest()) != (noted["bytes"], noted["checksum"]):
                raise UserError(f"{self.path}: damaged or edited; put back what was there, or start again with --force")
            self._note.unlink()  # a kill leaves a shorter file, of which nothing is noted
        last = trim_metrics(self.path, steps)
        self._read()
        if self._size:
            self._write_note()
        return world().broadcast(0 if last is None else integer(last, "group", str(self.path), 0, at_least=0) + 1)

    def _read(self, most: int = sys.maxsize) -> None:
        """Take the size and checksum of the file's beginning."""
        self._size, self._digest = 0, blake2b(digest_size=16)
        with suppress(FileNotFoundError), self.path.open("rb") as handle:
            while block := handle.read(min(BLOCK, most - self._size)):
                self._digest.update(block)
                self._size += len(block)

    def _write_note(self) -> None:
        self._note.parent.mkdir(exist_ok=True)
        write_sealed(self._note, {"bytes": self._size, "checksum": self._digest.hexdigest()})

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """Add the attempts of a step; the first process does."""
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
