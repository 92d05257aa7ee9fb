"""A model with more rows in its embedding and head, for tokens that its base did not have."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmkit.model.transformer import Transformer

MULTIPLE = 64  # of rows, where the base kept it: 16-byte loads of the output matrix


@torch.no_grad()
def grow_vocabulary(model: Transformer, known: int, wanted: int) -> Transformer:
    """A model in which ids `known` to `wanted` - 1 start from the mean of the ids below.

    A base may have rows for them already, that no token has used: they start from the mean as well. The mean makes a
    new token about as likely as an average one, whatever the context (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models"). The embedding and an untied head grow in step; the same model is returned where
    no token is new.
    """
    if wanted <= known:
        return model
    rows = model.embed_tokens.shape[0]
    if wanted > rows:
        multiple = MULTIPLE if rows % MULTIPLE == 0 else 1
        grown = Transformer(
            replace(model.config, vocab_size=-(-wanted // multiple) * multiple),
            dtype=model.embed_tokens.dtype,
            device=model.embed_tokens.device,
        )
        theirs = dict(grown.named_parameters())
        for name, parameter in model.named_parameters():
            theirs[name][: len(parameter)].copy_(parameter)
        model = grown.train(model.training)
    for table in {model.embed_tokens, model.head_weight}:
        table[known:] = table[:known].float().mean(0)
    return model
