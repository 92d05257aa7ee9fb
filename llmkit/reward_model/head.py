"""A reward model: a decoder whose head gives scores in place of words, and its folder in Hugging Face's form.

The folder is a stock `Qwen3ForSequenceClassification` (or its family's), whose label i is head i: transformers reads
the score at the last token that is no padding, and so do we.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmkit.kernels.linear import linear
from llmkit.model.config import ModelConfig
from llmkit.model.folder import SCORE, SavedTensors, load_config, save_tensors
from llmkit.model.transformer import Transformer
from llmkit.model.weights import export_state_dict, import_state_dict

ARCHITECTURE = "ForSequenceClassification"


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
        super().__init__(replace(config, tie_word_embeddings=True), dtype=dtype, device=device)  # no head for words
        self.score = nn.Parameter(torch.empty(heads, config.hidden_size, dtype=dtype, device=device))

    @classmethod
    def of(cls, model: Transformer, heads: int = 1, seed: int = 0) -> "RewardModel":
        """The parameters of a language model, and heads drawn with deviation 1 / sqrt(hidden + 1), as TRL draws one.

        Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1: scores then begin near 0.
        """
        reward = cls(model.config, heads, dtype=model.embed_tokens.dtype, device="meta")
        reward.embed_tokens, reward.layers, reward.norm = model.embed_tokens, model.layers, model.norm
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(heads, model.config.hidden_size, generator=generator)
        drawn /= math.sqrt(model.config.hidden_size + 1)
        reward.score = nn.Parameter(drawn.to(model.embed_tokens))
        return reward.train(model.training)

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., heads), in float32."""
        return linear(hidden.float(), self.score.float())  # in bfloat16 scores that are close would be the same


def save_reward_model(model: RewardModel, folder: str | os.PathLike[str], pad_id: int | None) -> None:
    """Write the folder in float32; `pad_id` is the token that transformers takes for padding."""
    config = model.config.to_hf("float32")
    family = config["architectures"][0].removesuffix("ForCausalLM")
    labels = {str(head): f"reward_{head}" if len(model.score) > 1 else "reward" for head in range(len(model.score))}
    config |= {
        "architectures": [family + ARCHITECTURE],
        "id2label": labels,
        "label2id": {name: int(head) for head, name in labels.items()},
        "num_labels": len(labels),
        "pad_token_id": pad_id,
    }
    tensors = export_state_dict(model, torch.float32)
    tensors[SCORE] = model.score.detach().to("cpu", torch.float32, copy=True)
    save_tensors(Path(folder), config, tensors)


def load_reward_model(
    folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """Load a folder of one or more scores. Raises UserError for one of another kind, or damaged."""
    config = replace(load_config(folder), tie_word_embeddings=True)
    tensors = SavedTensors(Path(folder))
    heads = tensors.rows(SCORE, "a reward model, as llmkit train-reward makes it")
    tensors.check(config, {SCORE: (heads, config.hidden_size)})
    model = RewardModel(config, heads, dtype=dtype, device=device)
    import_state_dict(model, tensors.read)
    model.score.data.copy_(tensors.read(SCORE))
    return model.eval()
