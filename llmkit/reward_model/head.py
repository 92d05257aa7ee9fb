"""A reward model: a decoder whose head gives scores in place of words, and its folder in Hugging Face's form.

The folder is a stock `Qwen3ForSequenceClassification` (or its family's), whose label i is head i: transformers reads
the score at the last token that is no padding, and so do we.
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
ROW_TOKENS = 512  # of a row, unless many comparisons are longer
FITTING = 0.9  # of the comparisons that should fit a row; each of the others has one of its own
SCORED_TOKENS = 4096  # of a batch without gradients
POISSON = np.cumsum([0.36787944, 0.36787944, 0.18393972, 0.06131324, 0.01532831, 0.00306566])  # of mean 1, up to 5


class RewardModel(Transformer):
    """A transformer with `heads` scores of each hidden state; several are an ensemble, whose mean is the reward.

    score  (heads, hidden), the only parameter that a language model lacks
    """

    def __init__(
        self,
        config: ModelConfig,
        heads: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        # no head for words
        config = replace(config, tie_word_embeddings=True, logits_scaling=1.0)
        super().__init__(config, dtype=dtype, device=device)
        self.score = nn.Parameter(torch.empty(heads, config.hidden_size, dtype=dtype, device=device))

    @classmethod
    def of(cls, model: Transformer, heads: int = 1, seed: int = 0) -> "RewardModel":
        """The parameters of a language model, and heads drawn with deviation 1 / sqrt(hidden + 1), as TRL draws one.

        Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1: scores then begin near 0.
        """

        def drawn(heads: int, hidden: int) -> Tensor:
            drawn = torch.randn(heads, hidden, generator=torch.Generator().manual_seed(seed))
            return drawn / math.sqrt(hidden + 1)

        if isinstance(model, TransformersModel):
            return cast(RewardModel, TransformersReward.of(model, heads, drawn))  # by its interface
        reward = cls(model.config, heads, dtype=model.embed_tokens.dtype, device="meta")
        for name in ("embed_tokens", "embed_positions", "layers", "norm", "norm_bias"):
            setattr(reward, name, getattr(model, name))
        reward.score = nn.Parameter(drawn(heads, model.config.hidden_size).to(model.embed_tokens))
        return reward.train(model.training)

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., heads), in float32."""
        return linear(hidden.float(), self.score.float())  # in bfloat16 scores that are close would be the same


def save_reward_model(model: RewardModel, folder: str | os.PathLike[str], pad_id: int | None) -> None:
    """Write the folder in float32; `pad_id` is the token that transformers takes for padding."""
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
    """Load a folder of one or more scores. Raises UserError for one of another kind, or damaged."""
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
    """Tokens of a row in which most comparisons of these sizes (N,) fit; not more than all of them take."""
    most = int(np.quantile(sizes, FITTING, method="higher")) if len(sizes) else 0
    return max(min(ROW_TOKENS, int(sizes.sum())), most)


# of the squared sum of a pair's scores, which holds them about 0: Eisenstein et al. 2023 (arXiv 2312.09244), section 2
CENTER = 0.01


class ComparisonLoss:
    """The summed loss of some rows of comparisons, and their number, as the trainer wants it.

    seed    of the weights by which the heads of an ensemble differ: each sees a comparison a Poisson number of times,
            a bootstrap that needs no copy of the data (Oza and Russell 2001)
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, model: Any, batch: ComparisonRows) -> Summed:
        # FSDP wants all processes to compute as often
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
    """float32 (B, M, K, heads): the score at the last token of each answer."""
    device = model.embed_tokens.device
    ids, documents, branches, positions = (torch.from_numpy(array).to(device) for array in batch[:4])
    hidden = model(ids, doc_ids=Branching(documents, branches, positions))
    ends = torch.from_numpy(batch.ends).to(device).flatten(1).unsqueeze(-1)
    picked = hidden.gather(1, ends.expand(-1, -1, hidden.shape[-1]))
    return model.scores(picked).unflatten(1, batch.ends.shape[1:])


def plackett_luce(scores: Tensor, ranks: Tensor, margins: Tensor) -> Tensor:
    """Negative log-likelihood of rankings, (N, heads), of scores (N, K, heads) and ranks (N, K), infinite for nothing.

    The best is drawn from all with probability softmax(scores), the next from those left, and so on (Plackett 1975);
    for two that is Bradley-Terry. Answers of equal rank are drawn each from all that are no better (Breslow 1974),
    which is likeliest when their scores are equal. `margins` (N,) lower the score of the best.
    """
    best = ranks == ranks.amin(1, keepdim=True)
    scores = scores - (margins.unsqueeze(1) * best).unsqueeze(-1)
    there = ranks.isfinite()
    left = (ranks.unsqueeze(1) >= ranks.unsqueeze(2)) & there.unsqueeze(1)  # (N, i, j): j is left when i is drawn
    left = left | ~there.unsqueeze(2)  # rows of nothing: any finite sum, dropped below
    pool = torch.where(left.unsqueeze(-1), scores.unsqueeze(1), -torch.inf).logsumexp(2)
    return torch.where(there.unsqueeze(-1), pool - scores, 0.0).sum(1)


def bootstrap_weights(numbers: np.ndarray, heads: int, seed: int) -> np.ndarray:
    """float32 (N, heads): how many times each head sees each comparison, Poisson of mean 1."""
    keys = splitmix64(np.arange(heads, dtype=np.uint64) + splitmix64(np.array([seed], np.uint64)))
    drawn = splitmix64(numbers.astype(np.uint64)[:, None] + keys)
    return np.searchsorted(POISSON, drawn.astype(np.float64) / 2.0**64).astype(np.float32)


@torch.no_grad()  # FSDP's buffers made in inference mode could not be trained with
def score_comparisons(
    model: RewardModel, comparisons: Sequence[Candidates], row_tokens: int, pad: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, float32 (K, heads)) of each comparison, as computed."""
    with evaluating(model):
        yield from evaluated(
            comparisons, SCORED_TOKENS, row_tokens, pad, lambda batch: answer_scores(model, batch).cpu().numpy()
        )
