"""`--reward rm:FOLDER`: the score that a reward model of `train-reward` gives; `spread:FOLDER`: how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.errors import UserError
from llmkit.formats.conversations import as_record
from llmkit.io.records import Row
from llmkit.model.devices import choose_device, choose_dtype
from llmkit.reward_model.head import load_reward_model
from llmkit.reward_model.scoring import Scorer
from llmkit.rewards.reward import Attempt, Reward, finite
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import chat_format


class ModelReward(Reward):
    """The score of a reward model, the mean of its heads; a truncated completion is scored as it stands.

    spread  give minus the standard deviation over the heads instead: low where they have learnt nothing that holds
            (Coste et al. 2023, arXiv 2310.02743, take it for the uncertainty of a judge)
    """

    def __init__(self, folder: str, device: str = "auto", dtype: str = "auto", spread: bool = False) -> None:
        self.name, self.folder, self._spread = f"{'spread' if spread else 'rm'}:{folder}", folder, spread
        processor = choose_device(device)
        self.tokenizer = load_tokenizer(folder)
        model = load_reward_model(folder, dtype=choose_dtype(dtype, processor), device=processor)
        self.tokenizer.check_fits(model.config.vocab_size)
        if spread and len(model.score) < 2:
            raise UserError(
                f"--reward {self.name}: expected a reward model of several heads, found one; train it with "
                "llmkit train-reward --ensemble 4"
            )
        chat = chat_format(self.tokenizer)
        self.context = model.config.max_position_embeddings
        self._scorer = Scorer(model, chat, chat.end_id)

    def check_policy(self, tokenizer: Tokenizer) -> None:
        """Raise UserError where the policy's tokens are not the reward model's."""
        if not self.tokenizer.same_vocabulary(tokenizer):
            raise UserError(
                f"--reward {self.name}: expected the vocabulary of {tokenizer.path.parent} "
                f"({tokenizer.vocab_size} tokens), found another ({self.tokenizer.vocab_size}); train the judge from it"
            )

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """Return the reward of each. Raises UserError for a completion that does not fit the model's context."""
        problems = [attempt.problem for attempt in attempts]
        prompts = [as_record(problem.messages) if problem.messages else problem.prompt for problem in problems]
        rows = [
            Row({"prompt": prompt, "completion": attempt.completion}, attempt.problem.where, 0)
            for attempt, prompt in zip(attempts, prompts, strict=True)
        ]
        with torch.inference_mode():
            records = list(self._scorer.score(rows))
        for attempt, record in zip(attempts, records, strict=True):
            if record["reward"] is None:
                raise UserError(
                    f"--reward {self.name}: expected completions that fit its context of {self.context} tokens, found "
                    f"one of {attempt.token_count}; lower --max-tokens"
                )
        rewards = [-record["reward_std"] if self._spread else record["reward"] for record in records]
        return finite(rewards, f"--reward {self.name}")

    def close(self) -> None:
        """Let the model go."""
        del self._scorer
