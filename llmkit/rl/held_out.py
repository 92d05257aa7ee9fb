"""A policy's own answers to held-out prompts of preferences, which show what its held-out loss does not.

A loss of preferences is lowest where answers are long, or odd, if those preferred were; so a policy's answers are
sampled at each evaluation, and their length, their divergence from the reference and what a gold reward gives them are
figures beside the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.conversations import message, said_in
from llmkit.formats.preferences import Comparison
from llmkit.formats.problems import Problem
from llmkit.io.records import Row
from llmkit.model.transformer import Transformer
from llmkit.rewards import Weighted
from llmkit.rewards.reward import ModelReward
from llmkit.rl.evaluation import HELD_OUT_GROUP, gold_figures, gold_rewards
from llmkit.rl.policy import OwnPolicy
from llmkit.rl.policy_loss import reference_logprobs
from llmkit.rl.problems import EncodedProblem
from llmkit.rl.rollouts import sample_attempts
from llmkit.training.finetuning import Tuning

PROMPTS = 64  # at most: a standard error of the mean length of an eighth of its deviation
LONGEST_ANSWER = 512  # tokens, where the context has room
JUDGED_SHARE = 4  # of a judge's context: for a byte that is no UTF-8 it sees U+FFFD, three tokens for one


class HeldOutAnswers:
    """Samples answers to the first prompts that it was shown, one each.

    read  reads a record, as `read_comparison` does
    """

    def __init__(self, read: Callable[[Row], Comparison | str]) -> None:
        self._read = read
        self._problems: dict[str, Problem] = {}

    def read(self, row: Row) -> Comparison | str:
        """Read a record, and remember its prompt."""
        comparison = self._read(row)
        if isinstance(comparison, Comparison) and comparison.prompt and len(self._problems) < PROMPTS:
            messages, text = comparison.prompt, comparison.prompt[-1].text
            alone = messages == (message("user", text),)  # rewards then see its text
            problem = Problem(() if alone else messages, text, None, None, row.value, comparison.where)
            self._problems.setdefault(said_in(messages), problem)
        return comparison

    def open(
        self, tuning: Tuning, reference: Transformer | None, gold: Sequence[Weighted], seed: int
    ) -> Callable[[], dict[str, float]] | None:
        """Return a function that gives the figures of the policy as it is; None where no prompt is known.

        `val_length` in tokens, `val_cut` (the share cut at the longest), with a reference `val_kl` in nats an answer,
        and with a gold reward `val_gold` and its standard error. Raises UserError for prompts that the reward cannot
        judge, and for a reward without any. All processes call the function together.
        """
        problems = []
        for weighted in gold:
            weighted.reward.check_policy(tuning.tokenizer)
        for problem in self._problems.values():
            for weighted in gold:
                weighted.reward.check(problem)
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
        longest = min(LONGEST_ANSWER, tuning.context - max(len(one.prompt_ids) for one in problems))
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
