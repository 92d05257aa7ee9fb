"""Scores of drafts: helpful, truthful and harmless by the guide, from a chat model; or from a reward model.

    with open_sampler("openai:http://localhost:8000/v1#big", Sampling(TEMPERATURE)) as sampler:
        Judge(ChatModel(sampler, seed=0), guide).scores(drafts)[0].values    # {"helpful": 4.0, "truthful": 5.0, ...}

The three are from InstructGPT's labelling instructions (Ouyang et al. 2022, arXiv 2203.02155, appendix B). A reply may
have any text around its JSON; if it has no readable JSON, the request is repeated once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmkit.errors import UserError
from llmkit.formats.conversations import as_record
from llmkit.generation.requests import Usage
from llmkit.generation.served_models import shortened
from llmkit.io.hub import local_folder
from llmkit.io.progress import counted
from llmkit.io.records import Row
from llmkit.io.resume import fingerprint
from llmkit.probing.judges import ChatModel, Missing
from llmkit.rewards.reward import ModelReward
from llmkit.writing.draft import Draft
from llmkit.writing.prompts import TEXTS

ASPECTS = ("helpful", "truthful", "harmless")
LONGEST = 20_000  # characters read at the end of a reply: "{{{..." takes quadratic time
PATIENCE = 20  # the first judgements, at least one of which must be readable


@dataclass(frozen=True)
class Scores:
    """Scores of a draft, higher is better, and reasons; empty if the judgement was unreadable."""

    values: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class Judge:
    """Gets scores from 1 to 5 from a chat model; `name`, `identity` and `usage` are those of its sampler."""

    def __init__(self, model: ChatModel, guide: str) -> None:
        self._model, self._guide, self._judged = model, guide, 0
        self.name, self.identity = model.sampler.name, dict(model.sampler.identity)
        self.usage: Usage | None = model.sampler.usage

    def scores(self, drafts: Sequence[Draft]) -> list[Scores]:
        """Return the scores of each draft. Raises UserError if no judgement is readable."""
        turns = [json.dumps(as_record(draft.messages), ensure_ascii=False, indent=1) for draft in drafts]
        prompts = ([TEXTS["judge"].format(guide=self._guide.strip(), conversation=text)] for text in turns)
        scores = [
            Scores() if isinstance(reply, Missing) else reply
            for _, (reply,) in self._model.ask(enumerate(prompts), read_scores)
        ]
        # negative: the number of unreadable judgements before the first readable one
        self._judged = 1 if self._judged > 0 or any(score.values for score in scores) else self._judged - len(scores)
        if self._judged <= -PATIENCE:
            unread, context = self._model.unread, self._model.sampler.context
            reply = (
                f"{shortened(unread)!r}" if unread is not None else f"prompts longer than its context, {context} tokens"
            )
            raise UserError(
                f"--judge: none of {counted(-self._judged, 'judgement')} of {self.name} could be read, expected JSON "
                f"with {', '.join(ASPECTS)}, found {reply}; use another judge"
            )
        return scores


class RewardJudge(Judge):
    """Scores the last reply with a reward model, without a guide."""

    def __init__(self, folder: str, device: str, dtype: str) -> None:
        self._reward = ModelReward(folder, device, dtype, flag="--judge")
        self.name, self.identity = folder, {"the judge": fingerprint(local_folder(folder, weights=True))}
        self.usage = None

    def scores(self, drafts: Sequence[Draft]) -> list[Scores]:
        """Return the reward of each draft; no scores if it does not fit the context."""
        import torch

        turns = [as_record(draft.messages) for draft in drafts]
        rows = [
            Row({"prompt": prompt, "completion": [reply]}, f"draft {draft.index}", 0)
            for draft, (*prompt, reply) in zip(drafts, turns, strict=True)
        ]
        with torch.inference_mode():
            rewards = [record["reward"] for record in self._reward.scorer.score(rows)]
        return [Scores() if reward is None else Scores({"reward": reward}) for reward in rewards]


def read_scores(reply: str) -> Scores | None:
    """Read the last JSON object with all scores from anywhere in a reply; None without one.

    >>> read_scores('Sure! {"helpful": 4, "truthful": "5", "harmless": 5.0, "reasons": "short"} Bye.')
    Scores(values={'helpful': 4.0, 'truthful': 5.0, 'harmless': 5.0}, reasons={'all': 'short'})
    """
    reply = reply[-LONGEST:]
    at, last = reply.find("{"), None
    while at >= 0:
        end = at + 1
        try:
            value, end = json.JSONDecoder().raw_decode(reply, at)
            scores = {name: float(value[name]) for name in ASPECTS}
            if all(1 <= score <= 5 for score in scores.values()):
                reasons = value.get("reasons", {})
                reasons = reasons if isinstance(reasons, dict) else {"all": reasons}
                last = Scores(scores, {str(name): str(reason) for name, reason in reasons.items()})
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        at = reply.find("{", end)
    return last


def best_and_worst(drafts: Sequence[Draft], scores: Sequence[Scores]) -> tuple[int, int | None]:
    """Return the indices of the best and the worst draft by mean score, the first of equals.

    Drafts without scores are ignored, unless none has scores. The worst is None if it is no worse, or the same.
    """
    means = {
        place: sum(score.values.values()) / len(score.values) for place, score in enumerate(scores) if score.values
    }
    best, worst = (choose(means, key=lambda place: means[place], default=0) for choose in (max, min))
    same = means.get(best) == means.get(worst) or drafts[best].messages[-1] == drafts[worst].messages[-1]
    return best, None if same else worst
