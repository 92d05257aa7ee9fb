"""A reward model: a decoder with scores in place of logits, and its folder in Hugging Face's format.

The folder is a stock `Qwen3ForSequenceClassification` (or its family's) whose label i is head i: transformers reads the
score at the last token before the padding, and so do we.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.data.batches import splitmix64
from llmkit.kernels.attention import Branching
from llmkit.kernels.linear import linear
from llmkit.model.config import ModelConfig
from llmkit.model.families import FAMILIES
from llmkit.model.folder import SCORE, SavedTensors, load_config, save_tensors
from llmkit.model.transformer import Transformer, evaluating
from llmkit.model.transformers_backend import TransformersConfig, TransformersModel, TransformersReward
from llmkit.model.weights import export_state_dict, import_state_dict
from llmkit.reward_model.comparisons import Candidates, ComparisonRows, evaluated
from llmkit.training.distributed import is_sharded
from llmkit.training.loss import Summed

ARCHITECTURE = "ForSequenceClassification"
ROW_TOKENS = 512  # tokens per row, unless many comparisons are longer
FITTING = 0.9  # share of the comparisons that should fit a row; longer ones get their own
SCORED_TOKENS = 4096  # tokens per batch without gradients
POISSON = np.cumsum([0.36787944, 0.36787944, 0.18393972, 0.06131324, 0.01532831, 0.00306566])  # of mean 1, up to 5


class RewardModel(Transformer):
    """A transformer with `heads` scores per hidden state; several are an ensemble, whose mean is the reward.

    score  (heads, hidden), the only parameter that a language model does not have
    """

    def __init__(
        self,
        config: ModelConfig,
        heads: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        # no output head
        config = replace(config, tie_word_embeddings=True, logits_scaling=1.0)
        super().__init__(config, dtype=dtype, device=device)
        self.score = nn.Parameter(torch.empty(heads, config.hidden_size, dtype=dtype, device=device))

    @classmethod
    def of(cls, model: Transformer, heads: int = 1, seed: int = 0) -> "RewardModel":
        """Build one from a language model, with heads of standard deviation 1 / sqrt(hidden + 1), as in TRL.

        Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1: scores begin near 0.
        """

        def drawn(heads: int, hidden: int) -> Tensor:
            drawn = torch.randn(heads, hidden, generator=torch.Generator().manual_seed(seed))
            return drawn / math.sqrt(hidden + 1)

        if isinstance(model, TransformersModel):
            return cast(RewardModel, TransformersReward.of(model, heads, drawn))  # has its interface
        reward = cls(model.config, heads, dtype=model.embed_tokens.dtype, device="meta")
        for name in ("embed_tokens", "embed_positions", "layers", "norm", "norm_bias"):
            setattr(reward, name, getattr(model, name))
        reward.score = nn.Parameter(drawn(heads, model.config.hidden_size).to(model.embed_tokens))
        return reward.train(model.training)

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., heads), in float32."""
        return linear(hidden.float(), self.score.float())  # in bfloat16, close scores would be equal


def save_reward_model(model: RewardModel, folder: str | os.PathLike[str], pad_id: int | None) -> None:
    """Write the folder in float32; `pad_id` is transformers' padding token."""
    labels = {str(head): f"reward_{head}" if len(model.score) > 1 else "reward" for head in range(len(model.score))}
    described = {
        "id2label": labels,
        "label2id": {name: int(head) for head, name in labels.items()},
        "num_labels": len(labels),
        "pad_token_id": pad_id,
    }
    if isinstance(model, TransformersModel):
        model.module.config.update({**described, "id2label": dict(enumerate(labels.values()))})
        return model.save(Path(folder), torch.float32)
    family = FAMILIES[model.config.model_type]
    architecture = (family.scorer or family.architecture) + ARCHITECTURE
    config = model.config.to_hf("float32") | {"architectures": [architecture], **described}
    tensors = export_state_dict(model, torch.float32)
    tensors[SCORE] = model.score.detach().to("cpu", torch.float32, copy=True)
    save_tensors(Path(folder), config, {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__)


def load_reward_model(
    folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """Load a reward model with any number of heads. Raises UserError for another kind of model, or a damaged one."""
    config = replace(load_config(folder, "auto"), tie_word_embeddings=True)
    tensors = SavedTensors(folder)
    heads = tensors.rows(SCORE, "a reward model, as llmkit train-reward makes it")
    if isinstance(config, TransformersConfig):
        tensors.check_kind(scores=True)
        return cast(RewardModel, TransformersReward.load(config, tensors.name, tensors.read_all(), dtype, device))
    tensors.check(config, {SCORE: (heads, config.hidden_size)})
    model = RewardModel(config, heads, dtype=dtype, device=device)
    import_state_dict(model, tensors.read)
    model.score.data.copy_(tensors.read(SCORE))
    return model.eval()


def row_length(sizes: np.ndarray) -> int:
    """Return the row length that fits most comparisons of these sizes (N,), at most their sum."""
    most = int(np.quantile(sizes, FITTING, method="higher")) if len(sizes) else 0
    return max(min(ROW_TOKENS, int(sizes.sum())), most)


# weight of the squared sum of a pair's scores, to centre them: Eisenstein et al. 2023 (arXiv 2312.09244), section 2
CENTER = 0.01


class ComparisonLoss:
    """The summed loss of rows of comparisons, and the number of comparisons.

    seed    of the bootstrap weights of an ensemble: each head sees a comparison a Poisson number of times, which needs
            no copy of the data (Oza and Russell 2001)
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, model: Any, batch: ComparisonRows) -> Summed:
        # with FSDP all ranks must run the same number of forward passes
        batches = [batch] if is_sharded(model.embed_tokens) else batch.by_size()
        losses, count = [], 0
        for rows in batches:
            scores = answer_scores(model, rows)
            present = torch.from_numpy(rows.numbers >= 0)
            scores, heads = scores[present], scores.shape[-1]
            ranks = torch.from_numpy(rows.ranks)[present].to(scores.device)
            margins = torch.from_numpy(rows.margins)[present].to(scores.device)
            loss = plackett_luce(scores, ranks, margins)
            there = ranks.isfinite().unsqueeze(-1)
            mean = torch.where(there, scores, 0.0).sum(1) / there.sum(1)
            loss = loss + CENTER * (2 * mean).square()
            if heads > 1:
                weights = bootstrap_weights(rows.numbers[rows.numbers >= 0], heads, self.seed)
                loss = loss * torch.from_numpy(weights).to(loss)
            losses.append(loss.mean(-1).sum())
            count += len(scores)
        return Summed(torch.stack(losses).sum(), count)


def answer_scores(model: RewardModel, batch: ComparisonRows) -> Tensor:
    """Return the score at the last token of each answer, float32 (B, M, K, heads)."""
    device = model.embed_tokens.device
    ids, documents, branches, positions = (torch.from_numpy(array).to(device) for array in batch[:4])
    hidden = model(ids, doc_ids=Branching(documents, branches, positions))
    ends = torch.from_numpy(batch.ends).to(device).flatten(1).unsqueeze(-1)
    picked = hidden.gather(1, ends.expand(-1, -1, hidden.shape[-1]))
    return model.scores(picked).unflatten(1, batch.ends.shape[1:])


def plackett_luce(scores: Tensor, ranks: Tensor, margins: Tensor) -> Tensor:
    """Return the negative log-likelihood (N, heads) of ranks (N, K), infinite for padding, under scores (N, K, heads).

    The best is drawn from all with probability softmax(scores), the next from the rest, and so on (Plackett 1975); two
    answers give Bradley-Terry. Each of several answers of equal rank is drawn from all that are no better (Breslow
    1974), which is likeliest if their scores are equal. `margins` (N,) lower the score of the best.
    """
    best = ranks == ranks.amin(1, keepdim=True)
    scores = scores - (margins.unsqueeze(1) * best).unsqueeze(-1)
    there = ranks.isfinite()
    left = (ranks.unsqueeze(1) >= ranks.unsqueeze(2)) & there.unsqueeze(1)  # (N, i, j): j has not been drawn before i
    left = left | ~there.unsqueeze(2)  # padding: any finite sum, dropped below
    pool = torch.where(left.unsqueeze(-1), scores.unsqueeze(1), -torch.inf).logsumexp(2)
    return torch.where(there.unsqueeze(-1), pool - scores, 0.0).sum(1)


def bootstrap_weights(numbers: np.ndarray, heads: int, seed: int) -> np.ndarray:
    """Return how many times each head sees each comparison, float32 (N, heads), Poisson with mean 1."""
    keys = splitmix64(np.arange(heads, dtype=np.uint64) + splitmix64(np.array([seed], np.uint64)))
    drawn = splitmix64(numbers.astype(np.uint64)[:, None] + keys)
    return np.searchsorted(POISSON, drawn.astype(np.float64) / 2.0**64).astype(np.float32)


@torch.no_grad()  # not inference mode: FSDP could not train with buffers made in it
def score_comparisons(
    model: RewardModel, comparisons: Sequence[Candidates], row_tokens: int, pad: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, float32 (K, heads)) of each comparison, in any order."""
    with evaluating(model):
        yield from evaluated(
            comparisons, SCORED_TOKENS, row_tokens, pad, lambda batch: answer_scores(model, batch).cpu().numpy()
        )
