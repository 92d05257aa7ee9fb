"""The model, the decoder and `llmkit pretrain` give the same results on Triton's kernels as on torch's."""

import json
import sys
from pathlib import Path

import pytest
import torch

from llmkit.generation.decode import Decoder

sys.path.insert(0, str(Path(__file__).parent.parent))
from recorder import Counting
from tiny import make_model, save_tokenizer


def kernels_run(monkeypatch) -> list[str]:
    """The names of the launched kernels."""
    from llmkit.kernels.dispatch import triton_module

    started = []
    for name in ("attention", "attention_backward", "decode"):
        module = triton_module(name)
        original = module.launch

        def launch(kernel, *arguments, original=original, **details):
            started.append(kernel.__name__)
            return original(kernel, *arguments, **details)

        monkeypatch.setattr(module, "launch", launch)
    return started


@pytest.fixture
def model():
    return make_model(layer_windows=(None, 24))


def test_training_gives_the_same_loss_and_gradients(interpreted, monkeypatch, model):
    ids = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(70) // 30).expand(2, 70)

    def loss_and_gradients():
        model.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:], documents[:, 1:])
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    started = kernels_run(monkeypatch)
    loss, gradients = loss_and_gradients()
    assert {"attention_forward", "attention_grad_query", "attention_grad_key_value"} <= set(started)
    monkeypatch.setenv("LLMKIT_KERNELS", "torch")
    expected_loss, expected = loss_and_gradients()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item() + 1e-9)


def test_replayed_steps_of_the_decoder_give_what_it_computes(interpreted, model):
    def logits(record):
        decoder = Decoder(model, 2, record=record)
        for slot, length in enumerate((3, 126)):
            decoder.load(slot, decoder.prefill(list(range(length))))
        return torch.cat([decoder.step([at, 2], [3 + at, 126 + at]) for at in (1, 2)])  # across a split

    record = Counting()
    torch.testing.assert_close(logits(record), logits(None), rtol=1e-5, atol=1e-5)
    assert (record.recorded, record.replayed) == (1, 2)


@torch.no_grad()
def test_the_decoder_gives_the_logits_of_the_whole_forward(interpreted, monkeypatch, model):
    prompts = [[1, 2, 3], list(range(30))]
    decoder = Decoder(model, 2)
    started = kernels_run(monkeypatch)
    for slot, prompt in enumerate(prompts):
        decoder.load(slot, decoder.prefill(prompt))
    found = [decoder.step([7, 9], [3, 30]), decoder.step([11, 13], [4, 31])][1]
    assert started.count("attention_decode") == 2 * 2
    monkeypatch.setenv("LLMKIT_KERNELS", "torch")
    for row, ids in enumerate(([1, 2, 3, 7, 11], [*range(30), 9, 13])):
        expected = model.logits(model(torch.tensor([ids])))[0, -1]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_pretraining_has_the_same_losses_and_says_what_computed_them(interpreted, llmkit, tmp_path, monkeypatch):
    save_tokenizer(tmp_path)
    texts = [json.dumps({"text": f"{n} and {n + 1} make {2 * n + 1}. " * (1 + n % 5)}) for n in range(60)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(texts) + "\n")

    def losses(kernels):
        monkeypatch.setenv("LLMKIT_KERNELS", kernels)
        out = tmp_path / kernels
        done = llmkit(
            "pretrain", tmp_path / "tiny.jsonl", "--tokenizer", tmp_path, "--depth", "1", "--tokens", "400",
            "--hidden-size", "64", "--num-attention-heads", "2", "--sequence-length", "64",
            "--dtype", "float32", "-o", out,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "manifest.json").read_text())["options"]["plan"]["kernels"] == kernels
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    found, expected = losses("interpret"), losses("torch")
    assert len(found) >= 2 and found == pytest.approx(expected, abs=1e-4)
