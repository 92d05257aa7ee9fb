"""Matrices in 4 and 8 bits: nearest codes, layers equal to those with rounded matrices, and correct gradients."""

from __future__ import annotations

import pytest
import torch
from families import save

from llmkit.model.folder import load_model
from llmkit.model.lora import LoraAdapter
from llmkit.model.quantized import NF4, Quantized, is_quantized, quantize
from llmkit.model.transformer import MATRICES

TOKENS = torch.arange(1, 41).view(2, 20)
KINDS = ("nf4", "int8")


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    codes, scales = quantize(weight, kind)
    return Quantized(weight.shape, scales, torch.float32)(codes)


def test_nf4_are_the_quantiles_of_the_paper():
    """Dettmers et al. 2023, section 3: 8 quantiles below zero, 9 from zero on, one zero, the largest scaled to 1."""
    # 0.9677083 is the mean of 1 - 1/30 and 1 - 1/32, half a quantile from the end on both sides
    end = (2 - 1 / 30 - 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64))[:-1]
    codes = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), codes / codes.max(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 64), (5, 13), (1, 1), (3, 200)])
def test_each_number_becomes_the_nearest_of_its_block(kind, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 3
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    levels = torch.tensor(NF4) if kind == "nf4" else torch.arange(-127, 128) / 127
    possible = blocks.abs().amax(1)[:, None, None] * levels
    nearest = (possible - blocks.unsqueeze(-1)).abs().amin(-1).flatten()[: weight.numel()].view(shape)
    torch.testing.assert_close((rounded(weight, kind) - weight).abs(), nearest, rtol=0, atol=1e-6)
    codes, scales = quantize(weight, kind)
    assert (codes.nbytes, scales.numel()) == (len(blocks) * (32 if kind == "nf4" else 64), len(blocks))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_nan_is_visible_in_its_scale(kind):
    assert not rounded(torch.zeros(2, 64), kind).any()
    for bad in (float("nan"), float("inf")):
        scales = quantize(torch.tensor([[1.0] * 64, [bad] + [1.0] * 63]), kind)[1]
        assert scales.isfinite().flatten().tolist() == [True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2"])
def test_an_adapter_learns_as_with_rounded_float32_matrices(tmp_path, name, kind):
    """Logits and adapter gradients equal those of a float32 model with the rounded matrices, also with activation
    checkpointing."""
    save(name, tmp_path)
    dense, small = load_model(tmp_path).train(), load_model(tmp_path, quantize=kind).train()
    assert is_quantized(small) and not is_quantized(dense)
    for layer in dense.layers:
        for matrix in MATRICES:
            getattr(layer, matrix).data = rounded(getattr(layer, matrix), kind)
    adapters = [LoraAdapter(model, rank=4, alpha=8, seed=3, token_ids=(5, 63)) for model in (dense, small)]
    for adapter in adapters:
        torch.manual_seed(1)
        for _, parameter in adapter.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    found = []
    for adapter, again in ((adapters[0], False), (adapters[1], False), (adapters[1], True)):
        adapter.model.checkpoint_layers = again
        loss = adapter.model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for _, parameter in adapter.parameters())])
        adapter.model.zero_grad()
    expected = found[0]
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    for others in found[1:]:
        for one, other in zip(others, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_backward_makes_matrices_again_and_none_is_kept_for_it(tmp_path, monkeypatch):
    save("llama", tmp_path)
    model = load_model(tmp_path, quantize="nf4").train()
    LoraAdapter(model, rank=2, alpha=4)
    made, kept = [], []

    def counted(self, codes, forward=Quantized.forward):
        made.append(self.shape)
        return forward(self, codes)

    def watched(pack, unpack, hooks=torch.autograd.graph.saved_tensors_hooks):
        def noted(tensor):
            packed = pack(tensor)
            kept.extend([packed.shape] if packed is tensor else [])
            return packed

        return hooks(noted, unpack)

    monkeypatch.setattr(Quantized, "forward", counted)
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    assert len(made) == len(model.layers) * len(MATRICES)
    assert kept and not {tuple(sorted(shape)) for shape in kept} & {tuple(sorted(shape)) for shape in made}
    loss.backward()
    assert len(made) == 2 * len(model.layers) * len(MATRICES)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_quantized_one_at_a_time_in_the_given_precision(tmp_path, kind):
    save("qwen2", tmp_path)
    whole, small = load_model(tmp_path), load_model(tmp_path, dtype=torch.bfloat16, quantize=kind)
    for layer, other in zip(small.layers, whole.layers, strict=True):
        assert layer.down.dtype == layer.input_norm.dtype == layer.qkv_bias.dtype == torch.bfloat16
        assert torch.equal(layer.down, rounded(other.down, kind).bfloat16())
    assert torch.equal(small.embed_tokens, whole.embed_tokens.bfloat16())
