"""Attempts at problems by the policy as it is now, and what they are worth.

actor = Actor(model, tokenizer, rewards, Asking(group=8, max_tokens=64, seed=0), slots=64)
rollouts = actor.attempt([asked_problem], step=3, first_group=24)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmkit.engine.devices import is_small, one_thread
from llmkit.engine.generation import Generator, Request
from llmkit.engine.sampling import Sampling
from llmkit.engine.tool_calls import ToolUse
from llmkit.model.transformer import Transformer
from llmkit.rewards import Attempt, Weighted
from llmkit.rl.asking import AskedProblem
from llmkit.rl.rollouts import Rollout
from llmkit.tokenizer.encoding import Tokenizer


@dataclass(frozen=True)
class Asking:
    """How attempts are made.

    group        attempts at each problem
    max_tokens   of an attempt
    temperature  of sampling; nothing is truncated, so that log-probabilities are those of what was drawn from
    stop         strings that end an attempt, beside the model's end tokens
    seed         with a group's number and a sample's, of the random numbers
    """

    group: int
    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Actor:
    """Makes and judges attempts.

    slots  sequences decoded at a time
    name   of the model, in errors
    `tokens` and `seconds` tell what sampling has cost so far; `judging` are seconds of the rewards.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        rewards: Sequence[Weighted],
        *,
        slots: int,
        name: str = "the model",
        tools: ToolUse | None = None,
    ) -> None:
        self.model, self.tokenizer, self.rewards = model, tokenizer, list(rewards)
        self._slots, self._name, self._tools = slots, name, tools
        self._small = is_small(model.config.parameter_count, model.embed_tokens.device)
        self.tokens, self.seconds, self.judging = 0, 0.0, 0.0

    def attempt(
        self, asked: Sequence[AskedProblem], how: Asking, *, step: int, first_group: int
    ) -> list[list[Rollout]]:
        """The groups of attempts at some problems, judged. Raises UserError where a reward fails."""
        started = time.monotonic()
        requests = [
            Request(one.prompt_ids, how.group, how.max_tokens, how.seed, first_group + i, one.problem.where)
            for i, one in enumerate(asked)
        ]
        with torch.inference_mode(), one_thread(self._small):
            # a new decoder each time: it holds weights as they were when it was made
            generator = Generator(
                self.model,
                self.tokenizer,
                Sampling(how.temperature),
                slots=min(self._slots, how.group * len(asked)),
                stop=how.stop,
                name=self._name,
                tools=self._tools,
            )
            made = list(generator.complete(requests))
        groups = [
            [
                Rollout(one.problem, one.prompt_ids, completion, step, first_group + i, sample)
                for sample, completion in enumerate(completions)
            ]
            for i, (one, completions) in enumerate(zip(asked, made, strict=True))
        ]
        if self._tools is not None:
            for rollout in (rollout for group in groups for rollout in group if rollout.completion.tool_calls):
                made = rollout.completion
                rollout.parts = self._tools.parts(made.token_ids, made.sampled, made.tool_calls)
        self.tokens += generator.tokens
        self.seconds += time.monotonic() - started
        started = time.monotonic()
        judge([rollout for group in groups for rollout in group], self.rewards, how.max_tokens)
        self.judging += time.monotonic() - started
        return groups


def judge(rollouts: Sequence[Rollout], rewards: Sequence[Weighted], max_tokens: int) -> None:
    """Give every attempt its rewards, by name, and their weighted sum."""
    attempts = [as_attempt(rollout, max_tokens) for rollout in rollouts]
    for weighted in rewards:
        for rollout, value in zip(rollouts, weighted.reward.score(attempts), strict=True):
            rollout.rewards[weighted.reward.name] = value
            rollout.reward += weighted.weight * value


def as_attempt(rollout: Rollout, max_tokens: int) -> Attempt:
    """What a reward sees of an attempt."""
    made = rollout.completion
    return Attempt(rollout.problem, made.text, rollout.sampled, made.finish_reason, max_tokens)
