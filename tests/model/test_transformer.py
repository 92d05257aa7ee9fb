"""The model: documents, cache, gradients, initialization, checkpointing, compilation."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from families import save, tokens

from llmkit.errors import UserError
from llmkit.model.config import ModelConfig, RopeScaling
from llmkit.model.transformer import Transformer, grow_vocabulary


def small(**options):
    options = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    ) | options  # fmt: skip
    return ModelConfig(**options)


def shaken(config, dtype=torch.float32):
    """Make a model in which no parameter is zero or one."""
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_give_the_loss_and_gradients_of_separate_ones(dtype):
    lengths = [5, 17, 1, 41]
    model = shaken(small(), dtype)
    ids = torch.randint(0, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    doc_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    packed = model.loss(ids, targets, doc_ids, reduction="sum")
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)
    alone = sum(model.loss(part, target, reduction="sum") for part, target in parts)
    alone.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(packed - alone) < tolerance * alone
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() < 2 * tolerance * parameter.grad.norm() + 1e-6, name


@pytest.mark.parametrize("name", ["gpt2", "olmo3-yarn", "gemma3", "phi3-longrope", "mistral-window"])
@torch.no_grad()
def test_documents_of_a_row_and_branches_are_as_if_alone(name, tmp_path):
    from llmkit.kernels.attention import Branching

    from llmkit.model.folder import load_model

    save(name, tmp_path)
    model, ids = load_model(tmp_path), tokens(1, 30)
    alone = torch.cat([model(ids[:, :12]), model(ids[:, 12:])], 1)
    doc_ids = torch.tensor([[0] * 12 + [1] * 18])
    assert (model(ids, doc_ids=doc_ids) - alone).abs().max() < 1e-4
    branches = torch.tensor([[0] * 12 + [1] * 9 + [2] * 9])
    positions = torch.tensor([[*range(21), *range(12, 21)]])
    both = model(ids, doc_ids=Branching(torch.zeros_like(ids), branches, positions))
    second = model(torch.cat([ids[:, :12], ids[:, 21:]], 1))[:, 12:]
    assert (both[:, :21] - model(ids[:, :21])).abs().max() < 1e-4
    assert (both[:, 21:] - second).abs().max() < 1e-4
    rows = torch.tensor([3, 3, 29, 0])
    assert (model(ids, rows=rows) - model(ids)[0, rows]).abs().max() < 1e-4


def test_activation_checkpointing_changes_no_gradient():
    model, ids = shaken(small(residual_scales=True)).train(), tokens(2, 20)
    model.loss(ids, ids.roll(-1, 1)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows = torch.tensor([3, 3, 29, 0])
    some = model(ids, rows=rows)
    model.checkpoint_layers = True
    assert some.shape == (4, 32) and torch.equal(model(ids, rows=rows), some)
    model.loss(ids, ids.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-7), name


@torch.no_grad()
def test_compiled_layers_ask_for_no_bounds_of_documents_where_torch_attends(monkeypatch):
    model, ids = shaken(small(layer_windows=(None, 5))), tokens(2, 20)
    expected = model(ids, doc_ids=ids // 30)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    monkeypatch.setattr("llmkit.kernels.attention.Packing.bounds", None)
    model.compile_layers()
    assert torch.equal(model(ids, doc_ids=ids // 30), expected)


def test_initialisation_depends_on_the_seed_alone():
    first, again, other = (Transformer(small(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens"], other["embed_tokens"])


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_tiny_model_learns_a_batch_by_heart(tied, dtype):
    extras = dict(normalize_embedding=True, residual_scales=True, norm_gains=False)
    model, ids = Transformer(small(tie_word_embeddings=tied, **extras), seed=0).to(dtype), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(97)) < 0.1 and losses[-1] < 0.5


@pytest.mark.parametrize(
    ("rows", "known", "wanted", "grown_to", "tied"),
    [
        (100, 100, 112, 112, False),
        (100, 100, 112, 112, True),
        (100, 100, 140, 140, False),
        (128, 128, 140, 192, False),  # a multiple of 64 remains one
        (128, 100, 112, 128, False),  # unused rows are taken first
        (100, 100, 100, 100, False),
    ],
)
def test_new_tokens_start_from_the_mean_and_known_ones_keep_their_logits(rows, known, wanted, grown_to, tied):
    base, ids = shaken(small(vocab_size=rows, tie_word_embeddings=tied)), torch.arange(90).view(3, 30)
    before = base.logits(base(ids)).detach()
    grown = grow_vocabulary(base, known, wanted)
    assert grown.config.vocab_size == grown_to and (grown.lm_head is None) == tied
    assert grown is base
    torch.testing.assert_close(grown.logits(grown(ids))[..., :known], before[..., :known])
    for table in (grown.embed_tokens, grown.head_weight):
        torch.testing.assert_close(table[known:wanted], table[:known].mean(0).expand(wanted - known, -1))


@pytest.mark.slow
def test_the_training_loss_compiles_into_one_graph():
    model, ids = shaken(small()), tokens(2, 24)
    doc_ids = torch.tensor([[0] * 10 + [1] * 14, [0] * 24])
    for documents in (None, doc_ids):
        expected = model.loss(ids, ids.roll(-1, 1), documents)
        compiled = torch.compile(model.loss, fullgraph=True)
        found = compiled(ids, ids.roll(-1, 1), documents)
        found.backward()
        assert abs(found - expected) < 1e-5


def test_configurations_survive_the_trip_through_a_dictionary():
    config = small(rope_scaling=RopeScaling("linear", 2.0), layer_windows=(None, 8), eos_token_id=(1, 2), qk_gain=1.2)
    assert ModelConfig.from_dict(asdict(config)) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(UserError, match="unknown fields"):
        ModelConfig.from_dict(asdict(config) | {"dropout": 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"qk_norm": False}, "qk_norm"),
        ({"model_type": "bloom"}, "model_type"),
        ({"layer_windows": (4,)}, "layer_windows"),
    ],
)
def test_impossible_configurations_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        small(**options)
