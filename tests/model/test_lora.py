"""LoRA adapters: zero effect at initialization, only adapters are trained, and merging preserves the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import save

from llmkit.model.config import ModelConfig
from llmkit.model.folder import load_model, save_model
from llmkit.model.lora import TARGETS, LoraAdapter
from llmkit.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
TOKENS = torch.arange(1, 21).view(1, 20)


@pytest.fixture
def folder(tmp_path):
    """A loaded model, whose output projections are not zero like those of a new one."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS))


def trained(folder, targets, dtype=torch.float32):
    adapter = LoraAdapter(load_model(folder, dtype=dtype).train(), rank=4, alpha=8, targets=targets, seed=3)
    optimizer = torch.optim.SGD([parameter for _, parameter in adapter.parameters()], lr=0.5)
    for _ in range(3):
        adapter.model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


def test_nothing_changes_at_first(folder):
    before = logits(load_model(folder))
    adapter = LoraAdapter(load_model(folder), rank=4, alpha=8)
    torch.testing.assert_close(logits(adapter.model), before, rtol=0, atol=0)
    count = sum(parameter.numel() for _, parameter in adapter.parameters())
    sides = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 48) + (48 + 32)  # q, k and v, o, gate and up, down
    assert count == 4 * 2 * sides


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("k", "up"), ("down",)])
def test_merged_it_is_the_model_that_was_trained(folder, targets):
    adapter = trained(folder, targets)
    before, base = logits(adapter.model), logits(load_model(folder))
    assert (before - base).abs().max() > 1e-3
    save_model(adapter.model, folder.parent / "merged")
    torch.testing.assert_close(logits(load_model(folder.parent / "merged")), before)
    stayed = dict(load_model(folder).named_parameters())
    for name, parameter in adapter.model.named_parameters():
        plain = name.replace("parametrizations.", "").replace(".original", "")
        assert plain not in stayed or (torch.equal(parameter, stayed[plain]) and parameter.grad is None)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_are_trained_alone_and_merged(tmp_path, tied):
    model = Transformer(replace(CONFIG, tie_word_embeddings=tied), seed=0)
    save_model(model, tmp_path / "base")
    adapter = LoraAdapter(load_model(tmp_path / "base").train(), rank=2, alpha=4, targets=("q",), token_ids=(5, 63))
    before = logits(load_model(tmp_path / "base"))
    torch.testing.assert_close(logits(adapter.model), before, rtol=0, atol=0)
    optimizer = torch.optim.SGD([parameter for _, parameter in adapter.parameters()], lr=0.5)
    tokens = torch.tensor([[1, 5, 63, 7, 5, 63]])
    for _ in range(3):
        adapter.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    values = {name: parameter.detach().clone() for name, parameter in adapter.parameters()}
    tables = {"embed_tokens.rows"} if tied else {"embed_tokens.rows", "lm_head.rows"}
    assert {name for name in values if name.endswith(".rows")} == tables
    again = LoraAdapter(load_model(tmp_path / "base"), rank=2, alpha=4, targets=("q",), token_ids=(5, 63))
    again.load(values)
    save_model(again.model, tmp_path / "merged")
    merged, base = load_model(tmp_path / "merged"), load_model(tmp_path / "base")
    torch.testing.assert_close(logits(merged), logits(adapter.model))
    for table in ("embed_tokens", "head_weight"):
        changed = (getattr(merged, table) != getattr(base, table)).any(1).nonzero().flatten().tolist()
        assert changed == [5, 63]
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3-window-and-part-of-the-head", "gemma3"])
def test_peft_puts_an_adapter_on_the_base_of_any_family(tmp_path, name):
    """Modules that are stacked in the checkpoint, stored as (in, out) or partly rotated get one adapter each."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    save(name, tmp_path / "base")
    adapter = LoraAdapter(load_model(tmp_path / "base").train(), rank=4, alpha=8, seed=3, token_ids=(5, 63))
    optimizer = torch.optim.SGD([parameter for _, parameter in adapter.parameters()], lr=0.5)
    for _ in range(2):
        adapter.model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    expected = logits(adapter.model)
    assert (expected - logits(load_model(tmp_path / "base"))).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-4)
