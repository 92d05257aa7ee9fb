"""Metrics of rollouts of a step or an evaluation, by the rewards and by a gold reward that is never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config import MICRO_BATCH_TOKENS
from llmkit.errors import UserError
from llmkit.formats.conversations import message, said_in
from llmkit.formats.preferences import Comparison
from llmkit.formats.problems import Problem
from llmkit.io.jsonl import open_output
from llmkit.io.progress import counted, duration, quantity
from llmkit.io.records import Row
from llmkit.model.transformer import Transformer
from llmkit.rewards import Weighted, judge
from llmkit.rewards.reward import ModelReward
from llmkit.rl.algorithms import Algorithm, is_informative, penalise_length, teaches
from llmkit.rl.policy import OwnPolicy
from llmkit.rl.policy_loss import PolicyLoss, reference_logprobs
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import Rollout, map_shares, pack_rollouts, rewards_of, sample_attempts
from llmkit.training.finetuning import Tuning
from llmkit.training.speed import batch_seconds

Groups = Sequence[Sequence[Rollout]]
HELD_OUT_GROUP = 1 << 62  # number of the first group of an evaluation; training never gets there
PROMPTS = 64  # at most: the mean length has a standard error of an eighth of the deviation
LONGEST_ANSWER = 512  # tokens, if the context has room
JUDGED_SHARE = 4  # inverse share of a judge's context: a byte of invalid UTF-8 becomes U+FFFD, three tokens
CURVES = {
    "reward.svg": {"training": "reward", "held out": "val_reward", "gold": "val_gold"},
    "success.svg": {"training": "success", "held out": "val_success", "calling": "called"},
    "length.svg": {"training": "length", "held out": "val_length"},
}


def describe(groups: Groups, rewards: Sequence[Weighted]) -> dict[str, float]:
    """Return the metrics of groups of rollouts: the mean `reward` and its parts, `length` in tokens, `cut` (share
    truncated), with tool calls `called` (share of rollouts with one) and `calls_failed` (share of failed calls), and
    with a verifier `success` and `pass_at_group` (share of groups with a right rollout). Rollouts that a reward could
    not judge, if any, count only in `length`, `cut` and `unjudged`, their share.

    Raises UserError if none could be judged.
    """
    every = [rollout for group in groups for rollout in group]
    judged = [rollout for rollout in every if rollout.judged]
    if not judged:
        names = [
            weighted.reward.name
            for weighted in rewards
            if None in (rollout.rewards[weighted.reward.name] for rollout in every)
        ]
        raise UserError(
            f"--reward {' and '.join(names)}: expected a number for some of {counted(len(every), 'attempt')}, found "
            "None, not judged, for all"
        )
    figures: dict[str, Any] = {
        "reward": np.mean(rewards_of(every)),
        "length": np.mean([rollout.token_count for rollout in every]),
        "cut": np.mean([rollout.completion.finish_reason == "length" for rollout in every]),
    }
    if len(judged) < len(every):
        figures["unjudged"] = 1 - len(judged) / len(every)
    called = [bool(rollout.completion.tool_calls) for rollout in every]
    if any(called):
        figures["called"] = np.mean(called)
        calls = [call for rollout in every for call in rollout.completion.tool_calls]
        figures["calls_failed"] = np.mean([call.get("failed", False) for call in calls])
    for weighted in rewards:
        name = weighted.reward.name
        figures[f"reward/{name}"] = np.mean([rollout.rewards[name] or 0.0 for rollout in judged])
    verifier = next((weighted.reward.name for weighted in rewards if weighted.reward.verifies), None)
    if verifier is not None:
        right = [[(rollout.rewards[verifier] or 0.0) >= 1.0 for rollout in group if rollout.judged] for group in groups]
        figures["success"] = np.mean([solved for group in right for solved in group])
        figures["pass_at_group"] = np.mean([any(group) for group in right])
    return {name: round(float(value), 5) for name, value in figures.items()}


def nothing_to_learn(groups: Groups, rewards: Sequence[Weighted], algorithm: Algorithm) -> str:
    """Return why a run without different rewards ends, and what would help."""
    figures = describe(groups, rewards)
    advice = "harder problems, or more attempts (--group)"
    lowest = min(reward for group in groups for reward in rewards_of(group))
    if figures["reward"] <= lowest and figures.get("success", 0.0) < 0.5:
        advice = "problems that are sometimes solved, or more attempts (--group)"
    if figures["cut"] > 0:
        advice += ", or more --max-tokens"
    each = "each of " if algorithm.compares_within_groups else ""
    return (
        f"nothing left to learn: all attempts at {each}{counted(len(groups), 'problem')} had the same reward "
        f"(the mean is {figures['reward']:.3g}); give {advice}"
    )


def costs(groups: Groups, algorithm: Algorithm, spent: Mapping[str, float]) -> dict[str, float]:
    """Count sampled groups, those without a signal, tokens, and the seconds of sampling and judging."""
    tokens = sum(rollout.token_count for group in groups for rollout in group)
    return {
        "groups": len(groups),
        "groups_without_signal": sum(not teaches(algorithm, group) for group in groups),
        "sampled_tokens": tokens,
        "sampled_tokens_per_second": round(tokens / max(spent["sampling"], 1e-9), 1),
        "sampling_seconds": round(spent["sampling"], 3),
        "judging_seconds": round(spent["judging"], 3),
    }


def gold_rewards(rollouts: Sequence[Rollout], gold: Weighted, max_tokens: int) -> list[float]:
    """Return the gold reward of each rollout; NaN if it cannot judge."""
    attempts = [rollout.as_attempt(max_tokens) for rollout in rollouts]
    judged = map_shares(attempts, partial(judge, weighted=[gold]))
    return [math.nan if reward is None else reward for _, reward in judged]


def gold_figures(rewards: Sequence[float], groups: int, name: str) -> dict[str, float]:
    """Return `val_gold`, the mean gold reward, and `val_gold_se`, its standard error over problems.

    Raises UserError if nothing was judged.
    """
    by_group = np.array(rewards).reshape(groups, -1)
    counts = (~np.isnan(by_group)).sum(1)
    means = np.nansum(by_group[counts > 0], 1) / counts[counts > 0]
    if not len(means):
        raise UserError(f"--gold {name}: expected a number for some attempt, found None for all")
    error = float(means.std() / math.sqrt(len(means)))
    return {"val_gold": round(float(means.mean()), 5), "val_gold_se": round(error, 5)}


def write_disagreements(folder: Path, rollouts: Sequence[Rollout], gold: Sequence[float], count: int = 20) -> None:
    """Write disagreements.jsonl: the rollouts that the rewards overrate most, compared with the gold reward.

    Both are standardised, and the records are ordered by the difference.
    """

    def standardised(values: Sequence[float]) -> np.ndarray:
        array = np.array(values, np.float64)
        return (array - np.nanmean(array)) / max(float(np.nanstd(array)), 1e-9)

    difference = standardised([rollout.reward for rollout in rollouts]) - standardised(gold)
    order = np.argsort(-difference, kind="stable")[:count]  # NaN, not judged, comes last
    with open_output(str(folder / "disagreements.jsonl"), force=True) as write:
        for i in order[~np.isnan(difference[order])].tolist():
            record = rollouts[i].record()
            brief = {name: record[name] for name in ("prompt", "completion", "reward", "rewards", "finish_reason")}
            write({**brief, "gold": gold[i], "difference": round(float(difference[i]), 3)})


def rehearse(
    groups: Groups,
    rewards: Sequence[Weighted],
    tuning: Tuning,
    loss: PolicyLoss,
    max_tokens: int,
    sampling_seconds: float,
    updates: int,
    steps: int | None,
) -> Iterator[str]:
    """Compute the gradient of a step and change nothing; yield lines for --dry-run with its rewards and costs.

    sampling_seconds: of its rollouts, with judging
    """
    rollouts = [rollout for group in groups for rollout in group]
    if loss.algorithm.penalises_length:
        for rollout in rollouts:
            penalise_length(rollout, max_tokens)
    model = tuning.model
    batch, _ = pack_rollouts(rollouts, [1.0] * len(rollouts), 0, tuning.device.type == "cpu")
    rows_at_once = max(1, MICRO_BATCH_TOKENS // batch.token_ids.shape[1])
    training_seconds = updates * batch_seconds(model, loss, batch, rows_at_once, tuning.device)
    memory = sum(tuning.training_memory(MICRO_BATCH_TOKENS))
    copies = loss.with_reference and tuning.adapter is None  # with adapters the base weights are the reference
    memory += copies * model.embed_tokens.dtype.itemsize * model.config.parameter_count
    figures = describe(groups, rewards)
    solved = ""
    if "success" in figures:
        solved = (
            f"; {figures['success']:.1%} of the attempts are right, and {figures['pass_at_group']:.1%} of the "
            "problems are solved by one of them"
        )
    compared = groups if loss.algorithm.compares_within_groups else [rollouts]
    informative = sum(is_informative(rewards_of(group)) for group in compared)
    seconds = sampling_seconds + training_seconds
    whole = "" if steps is None else f", {duration(steps * seconds)} or more for {counted(steps, 'step')}"
    lengths = f"length {figures['length']:.1f} tokens, {figures['cut']:.0%} cut"
    yield f"one step: mean reward {figures['reward']:.3g}, {lengths}{solved}"
    yield f"{informative} of {counted(len(compared), 'group')} have different rewards"
    yield (
        f"about {memory / 1e9:.2f} GB of memory for training; a step takes {sampling_seconds:.1f} s of sampling and "
        f"judging and {training_seconds:.1f} s of training on {quantity(batch.tokens)} tokens{whole}"
    )


# ---- held-out prompts of preferences


class HeldOutAnswers:
    """Samples a policy's answers to the first held-out prompts, one each.

    A preference loss can fall because answers become long or odd; the length of the policy's own answers, their KL to
    the reference and their gold reward show it.

    read  reads a record, like `read_comparison`
    """

    def __init__(self, read: Callable[[Row], Comparison | str]) -> None:
        self._read = read
        self._problems: dict[str, Problem] = {}

    def read(self, row: Row) -> Comparison | str:
        """Read a record, and remember its prompt."""
        comparison = self._read(row)
        if isinstance(comparison, Comparison) and comparison.prompt and len(self._problems) < PROMPTS:
            messages, text = comparison.prompt, comparison.prompt[-1].text
            alone = messages == (message("user", text),)  # rewards then see the text only
            problem = Problem(() if alone else messages, text, None, None, row.value, comparison.where)
            self._problems.setdefault(said_in(messages), problem)
        return comparison

    def open(
        self, tuning: Tuning, reference: Transformer | None, gold: Sequence[Weighted], seed: int
    ) -> Callable[[], dict[str, float]] | None:
        """Return a function that evaluates the current policy; None without prompts.

        Its metrics: `val_length` in tokens, `val_cut` (share truncated), with a reference `val_kl` in nats per answer,
        with a gold reward `val_gold` and `val_gold_se`. The function is collective. Raises UserError if the reward
        cannot judge a prompt, or has none.
        """
        problems = []
        for weighted in gold:
            weighted.reward.check_policy(tuning.tokenizer)
            for problem in self._problems.values():
                weighted.reward.check(problem)
        for problem in self._problems.values():
            messages = problem.messages or (message("user", problem.prompt),)
            ids = tuning.chat.encode(messages, prompt=True).token_ids.tolist()
            if 2 * len(ids) < tuning.context:
                problems.append(EncodedProblem(problem, ids))
        if not problems and gold:
            raise UserError(
                f"--gold {gold[0].reward.name}: expected prompts in --val of less than half the context of "
                f"{tuning.context} tokens, found none"
            )
        if not problems:
            return None
        longest = min(LONGEST_ANSWER, tuning.context - max(len(problem.prompt_ids) for problem in problems))
        for weighted in gold:
            if isinstance(weighted.reward, ModelReward):
                longest = min(longest, weighted.reward.context // JUDGED_SHARE)
        policy = OwnPolicy(tuning.model, tuning.tokenizer, (), tuning.folder, None)

        def figures() -> dict[str, float]:
            groups = sample_attempts(problems, policy.sampler(1.0), 1, longest, seed, HELD_OUT_GROUP)
            answers = [answer for group in groups for answer in group]
            scores = {
                "val_length": float(np.mean([answer.token_count for answer in answers])),
                "val_cut": float(np.mean([answer.completion.finish_reason == "length" for answer in answers])),
            }
            if reference is not None:
                reference_logprobs(reference, answers, 1.0, tuning.device.type == "cpu")
                scores["val_kl"] = float(np.mean([answer.divergence for answer in answers]))
            if gold:
                rewards = gold_rewards(answers, gold[0], longest)
                scores |= gold_figures(rewards, len(answers), gold[0].reward.name)
            return {name: round(value, 5) for name, value in scores.items()}

        return figures
