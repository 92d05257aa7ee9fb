"""Layers divided among processes compute what whole ones do, and their parameters come back as whole rows.

Threads stand for the processes here; tests/engine/test_distributed.py has real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from tiny import make_model

from llmkit.config import TuningConfig, resolve
from llmkit.engine import sharding
from llmkit.engine.distributed import World, join
from llmkit.errors import UserError
from llmkit.model import tensor_parallel
from llmkit.model.tensor_parallel import Cut, check_divides, cut_layers
from llmkit.stages.pretrain import PretrainConfig


class Group:
    """Some threads, as a group of torch.distributed is of processes, for the rank of each."""

    def __init__(self, size: int) -> None:
        self._here, self._mail, self._meet = threading.local(), [None] * size, threading.Barrier(size, timeout=60)

    def size(self) -> int:
        return len(self._mail)

    @property
    def rank(self) -> int:
        return self._here.rank

    def all_gather(self, value: object) -> list:
        self._mail[self.rank] = value
        self._meet.wait()
        found = list(self._mail)
        self._meet.wait()
        return found

    def run(self, work: Callable[[int], None]) -> None:
        def one(rank: int) -> None:
            self._here.rank = rank
            work(rank)

        with ThreadPoolExecutor(self.size()) as pool:
            for ended in [pool.submit(one, rank) for rank in range(self.size())]:
                ended.result()


def test_the_halves_of_every_layer_have_the_loss_and_the_gradients_of_the_whole(monkeypatch):
    monkeypatch.setattr(tensor_parallel, "_sum", lambda x, group: torch.stack(group.all_gather(x)).sum(0))
    whole = make_model(attention_bias=True, attention_out_bias=True, residual_scales=True).train()
    copies, group = [deepcopy(whole), deepcopy(whole)], Group(2)
    ids = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    loss = whole.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()

    def compute(rank: int) -> None:
        model = copies[rank]
        cuts = cut_layers(model, rank, group)
        own = model.loss(ids[:, :-1], ids[:, 1:])
        own.backward()
        torch.testing.assert_close(own, loss)
        parts = dict(model.named_parameters())
        for name, parameter in whole.named_parameters():
            cut, found = cuts[name], parts[name].grad
            expected = parameter.grad[None][cut.place(cut.rows(rank, 2), rank, 2)][0]
            assert expected.abs().max() > 0 and expected.numel() == parameter.numel() // (1 if cut.is_none else 2)
            torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")  # noqa: B023

    group.run(compute)


CUTS = [Cut((24, 5), (12, 6, 6)), Cut((24,), (12, 6, 6)), Cut((7, 12), columns=True), Cut((9, 4)), Cut((2,))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("size, tensor", [(2, 2), (4, 2), (6, 3), (6, 2), (8, 2)])
def test_whole_rows_come_from_the_parts_of_all_and_go_back(monkeypatch, cut, size, tensor):
    group = Group(size)
    whole = torch.arange(3.0 * torch.Size(cut.shape).numel()).view(3, *cut.shape)

    def exchange(parts: Sequence, shapes: Sequence) -> list:
        received = [sent[group.rank] for sent in group.all_gather(list(parts))]
        assert [tuple(part.shape) for part in received] == list(shapes)
        return received

    def come_and_go(rank: int) -> None:
        share, index = divmod(rank, tensor)
        held = whole[cut.place(cut.rows(index, tensor), index, tensor)]
        part = held[:, sharding._chunk(torch.arange(held.shape[1]), share, size // tensor)]
        rows = sharding.to_rows(part, cut)
        assert torch.equal(rows, whole[:, sharding._chunk(torch.arange(cut.shape[0]), rank, size)])
        assert torch.equal(sharding.from_rows(rows, cut), part)

    monkeypatch.setattr(sharding, "world", lambda: World(group.rank, size, tensor_parallel_size=tensor))
    monkeypatch.setattr(sharding, "_exchange", exchange)
    sharding._meeting.cache_clear()
    group.run(come_and_go)
    sharding._meeting.cache_clear()


def test_neighbours_take_the_same_rows_of_a_batch_and_count_once():
    ranks = [World(rank, 4, tensor_parallel_size=2) for rank in range(4)]
    assert [world.share(13) for world in ranks] == [(0, 6), (0, 6), (6, 13), (6, 13)]
    assert [world.own(8) for world in ranks] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [list(world.deal("abcd")) for world in ranks] == [["a", "c"], ["a", "c"], ["b", "d"], ["b", "d"]]
    ranks[0].check_rows(2, "rows")
    with pytest.raises(UserError, match="expected at least 2 in a batch, one for 2 processes, found 1"):
        ranks[0].check_rows(1, "rows")


def test_what_no_processes_can_divide_is_refused():
    with pytest.raises(UserError, match="--tensor-parallel: expected 2 processes at least, found one; start torchrun"):
        join(torch.device("cpu"), resolve(PretrainConfig, {"tensor_parallel": "2"}))
    assert (
        join(
            torch.device("cpu"), resolve(PretrainConfig, {"tensor_parallel": "2", "dry_run": True})
        ).tensor_parallel_size
        == 1
    )
    with pytest.raises(UserError, match="expected no --lora-rank beside it"):
        resolve(TuningConfig, {"tensor_parallel": "2", "lora_rank": "4", "dry_run": True})
    config = make_model(num_attention_heads=8, num_key_value_heads=8, intermediate_size=36).config
    check_divides(4, config)
    with pytest.raises(UserError, match=r"divides the 36 feed-forward units of a layer, found 8; give 1 or 2 or 4$"):
        check_divides(8, config)
    with pytest.raises(
        UserError, match=r"divides the 8 key-value heads .* found 3; .*, or another --num-key-value-heads"
    ):
        check_divides(3, config, new=True)
