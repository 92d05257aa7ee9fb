"""The tiles that the benchmark tuned on a GPU replace the tables, by the GPU's name."""

import json

import pytest
import torch
from llmkit.kernels.attention import scaled_dot_product_attention
from llmkit.kernels.dispatch import triton_module
from llmkit.kernels.logprobs import linear_logprobs

from llmkit.errors import UserError

FORWARD = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "specialize": 0}
PRODUCT = {"block_n": 16, "block_v": 32, "block_d": 16, "split": 3, "num_warps": 4, "num_stages": 1, "specialize": 0}


@pytest.fixture
def keep(interpreted, tmp_path, monkeypatch):
    """Write tiles for a GPU to the file in LLMKIT_TILES."""
    tiles = triton_module("tiles")
    path = tmp_path / "tiles.json"

    def write(gpu: str, kept: dict) -> None:
        path.write_text(json.dumps({gpu: {"tiles": kept}}))
        monkeypatch.setenv("LLMKIT_TILES", str(path))
        tiles.forget_tuned()

    yield write
    tiles.forget_tuned()


def block_sizes(monkeypatch, run) -> dict[str, dict]:
    """Return the block sizes that kernels are launched with."""
    seen = {}
    for name in ("attention", "logprobs"):
        module = triton_module(name)
        monkeypatch.setattr(
            module,
            "launch",
            lambda k, *a, _launch=module.launch, **d: seen.update({k.__name__: d}) or _launch(k, *a, **d),
        )
    run()
    return seen


def both():
    x = torch.randn(1, 1, 40, 32, generator=torch.Generator().manual_seed(0))
    target = torch.arange(40)
    return scaled_dot_product_attention(x, x, x, is_causal=True), linear_logprobs(x[0, 0], x[0, 0], target)


def test_kernels_start_with_the_tiles_of_their_gpu(keep, monkeypatch):
    usual = both()
    keep("interpreter", {"attention_forward 32 float32": FORWARD, "linear_logsumexp float32": PRODUCT})
    found = []
    seen = block_sizes(monkeypatch, lambda: found.extend(both()))
    assert (seen["attention_forward"]["BLOCK_M"], seen["attention_forward"]["BLOCK_N"]) == (16, 16)
    assert (seen["linear_logsumexp"]["BLOCK_V"], seen["linear_logsumexp"]["SPLIT"]) == (32, 3)
    for mine, theirs in zip(found, usual, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_another_gpus_tiles_and_other_sizes_change_nothing(keep, monkeypatch):
    keep("NVIDIA H200", {"attention_forward 32 float32": FORWARD})
    assert block_sizes(monkeypatch, both)["attention_forward"]["BLOCK_M"] == 64
    keep("interpreter", {"attention_forward 64 float32": FORWARD})
    assert block_sizes(monkeypatch, both)["attention_forward"]["BLOCK_M"] == 64


def test_tiles_on_trial_come_before_the_file(keep):
    tiles = triton_module("tiles")
    keep("interpreter", {"attention_forward 32 float32": FORWARD})
    tried = tiles.Tiles(32, 32, 4, 1)
    with tiles.trying("attention_forward 32 float32", tried):
        assert tiles.tiles("attention_forward", 32, torch.float32) is tried
    assert tiles.tiles("attention_forward", 32, torch.float32) == tiles.Tiles(**FORWARD)


@pytest.mark.parametrize("kept", [{"attention_forward 32 float32": {"block": 3}}, {"attention_forward 32 float32": 7}])
def test_a_file_of_something_else_is_refused(keep, kept):
    keep("interpreter", kept)
    with pytest.raises(UserError, match=r"tiles\.json: .*expected .*run "):
        both()


def test_a_named_file_has_to_be_there(keep, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMKIT_TILES", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="LLMKIT_TILES: no file"):
        both()
