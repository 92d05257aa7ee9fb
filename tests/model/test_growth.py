"""Rows for new tokens: what the model knew stays, the new start from the mean, embedding and head in step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmkit.model.config import ModelConfig
from llmkit.model.transformer import Transformer, grow_vocabulary

CONFIG = ModelConfig(
    vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
)  # fmt: skip
TOKENS = torch.arange(90).view(3, 30)


def model(**changes):
    torch.manual_seed(0)
    made = Transformer(replace(CONFIG, **changes), seed=0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_known_tokens_keep_their_logits(tied):
    base = model(tie_word_embeddings=tied)
    before = base.logits(base(TOKENS))
    grown = grow_vocabulary(base, 100, 112)
    assert grown.config.vocab_size == 112 and (grown.lm_head is None) == tied
    torch.testing.assert_close(grown.logits(grown(TOKENS))[..., :100], before)
    for table in (grown.embed_tokens, grown.head_weight):
        torch.testing.assert_close(table[100:], table[:100].mean(0).expand(12, -1))


def test_rows_stay_a_multiple_of_64_where_they_were():
    assert grow_vocabulary(model(vocab_size=128), 128, 140).config.vocab_size == 192
    assert grow_vocabulary(model(vocab_size=100), 100, 140).config.vocab_size == 140


def test_rows_that_no_token_used_are_taken_first():
    base = model(vocab_size=128)
    grown = grow_vocabulary(base, 100, 112)
    assert grown is base
    torch.testing.assert_close(grown.embed_tokens[100:112], grown.embed_tokens[:100].mean(0).expand(12, -1))


def test_nothing_to_do():
    base = model()
    before = base.embed_tokens.clone()
    assert grow_vocabulary(base, 100, 100) is base
    assert torch.equal(base.embed_tokens, before)
