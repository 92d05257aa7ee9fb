"""Attempts at problems by the policy as it is now, and what they are worth.

actor = Actor(model, tokenizer, rewards, slots=64)
groups = actor.attempt([encoded_problem], RolloutSettings(group_size=8, max_tokens=64), step=3, first_group=24)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from llmkit.errors import SharedError, UserError
from llmkit.formats.conversations import Part
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Completion, Request
from llmkit.generation.served_sampler import ServedSampler
from llmkit.generation.tool_calls import ToolUse
from llmkit.model.devices import is_small, one_thread
from llmkit.model.transformer import Transformer
from llmkit.rewards import Attempt, Weighted, total
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import Rollout, RolloutSettings
from llmkit.rl.served_policy import ServedPolicy
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.training.distributed import whole_model, world


class Actor:
    """Makes and judges attempts.

    slots   sequences decoded at a time
    name    of the model, in errors
    served  a server that samples, in place of the model here
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
        served: ServedPolicy | None = None,
    ) -> None:
        self.model, self.tokenizer, self.rewards = model, tokenizer, list(rewards)
        self._slots, self._name, self._tools, self._served = slots, name, tools, served
        self._small = is_small(model.config.parameter_count, model.embed_tokens.device)
        self._generator: tuple[RolloutSettings, Generator | ServedSampler] | None = None
        self._changed = True  # since a server was given the weights
        self.tokens, self.seconds, self.judging = 0, 0.0, 0.0

    def renew(self) -> None:
        """Forget the weights: a decoder and a server hold them as they were when they were given them."""
        self._generator, self._changed = None, True

    def attempt(
        self, problems: Sequence[EncodedProblem], settings: RolloutSettings, *, step: int, first_group: int
    ) -> list[list[Rollout]]:
        """The groups of attempts at some problems, judged. Raises UserError where a reward fails.

        Each process of a job makes and judges its share of them, and all get all: random numbers are those of a group
        and a sample, whoever draws them.
        """
        first, stop = world().share(len(problems))
        own: list[list[Rollout]] | UserError
        try:
            own = self._attempt(problems[first:stop], settings, step, first_group + first)
        except UserError as error:  # the others wait for this process's attempts
            if world().size == 1:
                raise
            own = error
        gathered = world().gather(own)
        for part in gathered:
            if isinstance(part, UserError):
                raise SharedError(str(part))
        return [group for part in gathered for group in part]

    def _attempt(
        self, problems: Sequence[EncodedProblem], settings: RolloutSettings, step: int, first_group: int
    ) -> list[list[Rollout]]:
        started = time.monotonic()
        generator = self._generator_for(settings)
        if not problems:
            return []
        with torch.inference_mode(), one_thread(self._small):
            requests = (
                Request(
                    encoded.prompt_ids,
                    settings.group_size,
                    settings.max_tokens,
                    settings.seed,
                    first_group + i,
                    encoded.problem.where,
                )
                for i, encoded in enumerate(problems)
            )
            sampled = list(generator.complete(requests))
        for encoded, completions in zip(problems, sampled, strict=True):
            if not completions:
                raise UserError(f"{encoded.problem.where}: the prompt is longer than the context of {generator.name}")
            self.tokens += sum(sum(completion.sampled) for completion in completions)
        groups = [
            [
                Rollout(
                    encoded.problem,
                    encoded.prompt_ids,
                    completion,
                    step,
                    first_group + i,
                    sample,
                    parts=self._parts(completion),
                )
                for sample, completion in enumerate(completions)
            ]
            for i, (encoded, completions) in enumerate(zip(problems, sampled, strict=True))
        ]
        self.seconds += time.monotonic() - started
        started = time.monotonic()
        rollouts = [rollout for group in groups for rollout in group]
        scores = score(rollouts, self.rewards, settings.max_tokens)
        for rollout, rewards, reward in zip(rollouts, scores, total(scores, self.rewards), strict=True):
            rollout.rewards = rewards
            rollout.judged = rollout.trained = reward is not None
            rollout.reward = math.nan if reward is None else reward
        self.judging += time.monotonic() - started
        return groups

    def _generator_for(self, settings: RolloutSettings) -> Generator | ServedSampler:
        if self._generator is None or self._generator[0] != settings:
            self._generator = settings, self._served_sampler(settings) or self._own_generator(settings)
        return self._generator[1]

    def _served_sampler(self, settings: RolloutSettings) -> ServedSampler | None:
        if self._served is None:
            return None
        if self._changed:
            self._served.hand_over()
            self._changed = False
        return self._served.sampler(settings)

    def _own_generator(self, settings: RolloutSettings) -> Generator:
        details = {"slots": self._slots, "stop": settings.stop, "name": self._name, "tools": self._tools}
        model = whole_model(self.model)
        with torch.inference_mode():
            return Generator(model, self.tokenizer, Sampling(settings.temperature), **details)

    def _parts(self, completion: Completion) -> tuple[Part, ...]:
        if self._tools is None or not completion.tool_calls:
            return ()
        return self._tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)


def score(rollouts: Sequence[Rollout], rewards: Sequence[Weighted], max_tokens: int) -> list[dict[str, float | None]]:
    """Score attempts by each reward: for each attempt, values by the reward's name."""
    attempts = [as_attempt(rollout, max_tokens) for rollout in rollouts]
    columns = {weighted.reward.name: weighted.reward.score(attempts) for weighted in rewards}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def as_attempt(rollout: Rollout, max_tokens: int) -> Attempt:
    """Make a rollout the `Attempt` that rewards take."""
    completion = rollout.completion
    return Attempt(rollout.problem, completion.text, rollout.token_count, completion.finish_reason, max_tokens)
