"""Rollouts: attempts at problems, and their log.

`rollouts.jsonl` has a line for each attempt, {"prompt", "completion", ...}, which sft and `train-reward --score` read
as they read any other file; sft reads the `messages` of an attempt that called tools.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, Part, as_record, message
from llmkit.formats.problems import Problem
from llmkit.generation.requests import Completion
from llmkit.io.files import BLOCK, check_file
from llmkit.io.foreign import integer
from llmkit.io.jsonl import dump_json
from llmkit.io.metrics import trim_metrics
from llmkit.io.resume import read_sealed, write_sealed
from llmkit.training.distributed import world

ROLLOUTS = "rollouts.jsonl"


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of rollouts.

    group_size   attempts at each problem
    max_tokens   of an attempt
    temperature  of sampling; nothing is truncated, so that log-probabilities are those of what was drawn from
    stop         strings that end an attempt, beside the model's end tokens
    seed         with a group's number and a sample's, of the random numbers
    """

    group_size: int
    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


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

    def record(self) -> dict[str, Any]:
        """The line of the log. Where a tool was called it has `messages`, which teach sft the call, as the text of
        the completion would not."""
        problem, completion = self.problem, self.completion
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
            "completion": completion.text,
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


class RolloutLog:
    """The log of a run. A step's lines are on disk before its update is, and their checksum stands in state/."""

    def __init__(self, path: Path) -> None:
        self.path, self._note = path, path.parent / "state" / "rollouts.json"
        self._size, self._digest = 0, blake2b(digest_size=16)

    def trim(self, steps: int) -> int:
        """Drop what a killed run has left of later steps, and half a line; the number of the next group. Raises
        UserError where lines are others than were written."""
        last = self._trim(steps) if world().leads else None
        return world().broadcast(0 if last is None else integer(last, "group", str(self.path), 0, at_least=0) + 1)

    def _trim(self, steps: int) -> dict[str, Any] | None:
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
        return last

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

    def write(self, rollouts: Iterable[Rollout]) -> None:
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
