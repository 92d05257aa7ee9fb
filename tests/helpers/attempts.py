"""Rollouts with chosen tokens, rewards and log-probabilities."""

from __future__ import annotations

from llmkit.formats.problems import Problem
from llmkit.generation.requests import Completion
from llmkit.rl.rollouts import Rollout


def problem(prompt: str = "2 + 2?", answer: str = "4") -> Problem:
    return Problem((), prompt, answer, None, {"prompt": prompt, "answer": answer}, "problems.jsonl:1")


def attempt(
    prompt_ids: list[int],
    token_ids: list[int],
    *,
    group: int = 0,
    reward: float = 0.0,
    advantage: float = 0.0,
    logprobs: list[float] | None = None,
    sampled: list[bool] | None = None,
    finish_reason: str = "stop",
) -> Rollout:
    completion = Completion(
        text="".join(map(chr, token_ids)),
        token_ids=token_ids,
        finish_reason=finish_reason,
        logprobs=logprobs or [-1.0] * len(token_ids),
        truncated_logprobs=logprobs or [-1.0] * len(token_ids),
        sampled=sampled or [True] * len(token_ids),
        tool_calls=[],
    )
    return Rollout(problem(), prompt_ids, completion, 0, group, 0, {"verifier": reward}, reward, advantage=advantage)
