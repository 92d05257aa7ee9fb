"""Sources with shares: parsing, and every step keeps the shares on any world size."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.batches import Batches
from llmkit.data.shards import ShardInfo, ShardWriter, TokenShards
from llmkit.data.shares import parse_sources, shares_table
from llmkit.errors import UserError
from llmkit.training.distributed import World
from llmkit.training.loss import rows_of

START, END = 1, 2
FAR = 1000  # between the first tokens of two sources


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[TokenShards]:
    """Sources with distinct text tokens: 10, 11, 12 ... in the first, 1010 ... in the second."""
    return [
        source(tmp_path_factory.mktemp("source"), 10 + FAR * number, lengths)
        for number, lengths in enumerate(([30, 7, 19] * 9, [5] * 20, [40, 3]))
    ]


def source(folder: Path, first: int, lengths: list[int]) -> TokenShards:
    writer = ShardWriter(folder, ShardInfo(tokenizer_sha256="0" * 64, vocab_size=1 << 20, start=START, end=END))
    writer.add(np.arange(first, first + sum(lengths), dtype=np.uint32), np.array(lengths), np.array(lengths))
    writer.finish()
    return TokenShards(folder)


shares_of_three = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda shares: sum(shares) > 0.01)


@settings(max_examples=60, deadline=None)
@given(
    phases=st.dictionaries(st.integers(1, 30), shares_of_three, max_size=3),
    first=shares_of_three,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9)).filter(lambda shape: shape[0] * shape[1] >= 9),
    seed=st.integers(0, 2**40),
)
def test_every_step_keeps_the_shares_and_takes_each_token_in_turn(three, phases, first, shape, seed):
    shares = {step: np.array(values) / sum(values) for step, values in {0: first, **phases}.items()}
    batches, tokens = Batches(three, shape[0], shape[1], seed, shares), shape[0] * shape[1]
    seen = [Counter[int]() for _ in three]
    for step in range(40):
        begin = max(start for start in shares if start <= step)
        drawn = np.subtract(batches.taken(step + 1), batches.taken(begin))
        assert abs(drawn - shares[begin] * (step + 1 - begin) * tokens).max() <= 2  # a token per other source
        batch = batches.batch(step)
        counts = np.subtract(batches.taken(step + 1), batches.taken(step))
        assert counts.min() >= 0 and counts.sum() == tokens
        assert counts_of(batch.token_ids_BT, batch.targets_BT).tolist() == counts.tolist()
        text = batch.token_ids_BT[batch.token_ids_BT != START]
        for number, of_source in enumerate(seen):
            of_source.update(text[text // FAR == number].tolist())
        for ids, targets, documents in zip(*batch, strict=True):
            assert documents[0] == 0 and set(np.diff(documents)) <= {0, 1}
            same = np.diff(documents) == 0
            assert (targets[:-1][same] == ids[1:][same]).all()
            assert ((targets == END) | (ids == START) | (targets == ids + 1)).all()
    for shards, of_source, taken in zip(three, seen, batches.taken(40), strict=True):
        whole = int(taken / shards.tokens)
        assert whole - 1 <= min(of_source.values(), default=0) and max(of_source.values(), default=0) <= whole + 2


def test_the_tokens_of_a_source_are_those_that_it_has_alone(three):
    """Each source has its own order, independent of the others: every token once per epoch."""
    batches = Batches(three, 16, 4, 3, {0: [0.5, 0.3, 0.2]})
    alone = [Batches([shards], 16, 4, 3 + 7919 * number) for number, shards in enumerate(three)]
    steps = 30
    for number, (mine, taken) in enumerate(zip(alone, batches.taken(steps), strict=True)):
        ids = np.concatenate([mine.batch(step).token_ids_BT.reshape(-1) for step in range(steps)])[:taken]
        both = [batches.batch(step).token_ids_BT.reshape(-1) for step in range(steps)]
        text = np.concatenate(both)
        assert sorted(ids[ids != START]) == sorted(text[(text != START) & (text // FAR == number)])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_hold_at_any_step_in_any_number_of_processes(three, processes):
    shares, total = {0: [0.6, 0.3, 0.1], 5: [0.1, 0.1, 0.8]}, 64 * 33
    batches, counts = Batches(three, 64, 33, 7, shares), np.zeros(3)
    for step in range(10):
        resumed = Batches(three, 64, 33, 7, shares).batch(step)
        parts = [rows_of(resumed, *World(rank, processes).share(33)) for rank in range(processes)]
        for array, whole in zip(map(np.concatenate, zip(*parts, strict=True)), batches.batch(step), strict=True):
            np.testing.assert_array_equal(array, whole)
        begin = 5 if step >= 5 else 0
        drawn = sum(counts_of(part.token_ids_BT, part.targets_BT) for part in parts)
        counts = drawn if step == begin else counts + drawn
        assert abs(counts / (step + 1 - begin) / total - shares[begin]).max() < 0.001
        assert np.array_equal(drawn / total, np.subtract(batches.taken(step + 1), batches.taken(step)) / total)


def counts_of(token_ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Count the tokens of each source; a start token belongs to the source whose text it predicts."""
    return np.bincount((np.where(token_ids == START, targets, token_ids) // FAR).reshape(-1), minlength=3)


def test_late_steps_cost_no_more_and_stay_exact(three):
    batches = Batches(three, 64, 16, 0, {0: [0.7, 0.2, 0.1], 10**9: [0.1, 0.1, 0.8]})
    for step in (10**6, 10**9, 10**9 + 10**6):
        assert batches.batch(step).token_ids_BT.shape == (16, 64)
    np.testing.assert_allclose(batches.realised(10**9, 10**9 + 10**6), [0.1, 0.1, 0.8], atol=1e-6)


# ---- options


def parsed(inputs: str, *phases: str, sizes: tuple[int, ...] = (1, 3)) -> tuple[list[str], dict[float, list[float]]]:
    found = parse_sources(inputs.split(), phases)
    return found.names, {start: [round(x, 6) for x in shares] for start, shares in found.shares(sizes).items()}


@pytest.mark.parametrize(
    ("asked", "shares"),
    [
        (("a.jsonl b.jsonl",), {0.0: [1.0]}),
        (("a.jsonl:0.7 b.parquet:0.3",), {0.0: [0.7, 0.3]}),
        (("a.jsonl:7 s3://bucket/b.parquet:1",), {0.0: [0.875, 0.125]}),
        (("a.jsonl b.jsonl", "0.9:b=1"), {0.0: [0.25, 0.75], 0.9: [0, 1]}),
        (("a.jsonl:1 b.jsonl:0", "0.5:a=1,b=1", "0.75:b.jsonl=2"), {0.0: [1, 0], 0.5: [0.5, 0.5], 0.75: [0, 1]}),
        (("x/a.txt:1 y/a.txt:1", "0.5:x/a.txt=3,y/a.txt=1"), {0.0: [0.5, 0.5], 0.5: [0.75, 0.25]}),
        (("x/**/*.parquet:1 hf://datasets/org/y/:3", "0.9:x=1"), {0.0: [0.25, 0.75], 0.9: [1, 0]}),
        (("-:0.5 a.csv.gz:0.5", "0.9:stdin=1"), {0.0: [0.5, 0.5], 0.9: [1, 0]}),
    ],
)
def test_shares_are_read(asked, shares):
    assert parsed(*asked)[1] == shares


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("a.jsonl:1 b.jsonl",), "INPUT: expected weights on all files or on none, found both"),
        (("a.jsonl:-0.7 b.jsonl:0.3",), "INPUT a.jsonl:-0.7: expected a weight of at least 0, found -0.7"),
        (("a.jsonl:nan b.jsonl:0.3",), "expected a weight of at least 0, found nan"),
        (("a.jsonl:0 b.jsonl:0",), "INPUT: expected weights with a sum above 0, found 0"),
        (("a.jsonl:1 b.jsonl:0",), "b: its share is always 0; remove it, or name it in a --phase"),
        (("a.jsonl:1 a.jsonl:1",), "a.jsonl: expected each input once if there are shares; add up its weights"),
        (("a.jsonl:1 ./a.jsonl:1",), "a.jsonl: expected each input once if there are shares; add up its weights"),
        (("a.jsonl b.jsonl", "0.9"), "--phase 0.9: expected NAME=SHARE with a name of a, b, found ''"),
        (("a.jsonl b.jsonl", "a=1"), "expected START:NAME=SHARE,... with a start between 0 and 1, found 'a=1'"),
        (("a.jsonl b.jsonl", "1:a=1"), "with a start between 0 and 1, found '1'"),
        (("a.jsonl b.jsonl", "0.9:c=1"), "--phase 0.9:c=1: expected NAME=SHARE with a name of a, b, found 'c=1'"),
        (("a.jsonl b.jsonl", "0.9:a=1,"), "expected NAME=SHARE with a name of a, b, found ''"),
        (("a.jsonl b.jsonl", "0.9:a=x"), "--phase 0.9:a=x: expected a share of at least 0 for a, found 'x'"),
        (("a.jsonl b.jsonl", "0.9:a=-1,b=2"), "expected a share of at least 0 for a, found '-1'"),
        (("a.jsonl b.jsonl", "0.9:a=0,b=0"), "--phase 0.9:a=0,b=0: expected shares with a sum above 0, found 0"),
        (("a.jsonl b.jsonl", "0.9:a=1,a=2"), "--phase 0.9:a=1,a=2: expected each name once, found a twice"),
        (("x/a.txt y/a.txt", "0.9:a=1"), "expected one of the paths x/a.txt, y/a.txt, found the name 'a'"),
        (("a.jsonl b.jsonl", "0.9:a=1", "0.5:b=1"), "--phase 0.5:b=1: expected a start after 0.9, the previous one"),
        (("a.jsonl b.jsonl", "0.9:a=1", "0.9:b=1"), "expected a start after 0.9"),
    ],
)
def test_a_user_error_is_named(asked, reason):
    with pytest.raises(UserError) as caught:
        parsed(*asked)
    assert reason in str(caught.value)


def test_more_sources_than_a_step_has_tokens_for_are_refused(three):
    with pytest.raises(UserError, match="--batch-tokens: expected at least 9 for the shares of 3 inputs, found 8"):
        Batches(three, 8, 1, 0, {0: [0.5, 0.3, 0.2]})


def test_the_table_has_aligned_columns():
    names, shares = ["web", "a-longer-name"], {0: [0.7, 0.3], 12_345: [0.2, 0.8]}
    lines = shares_table(names, [10**10, 999], shares, [5 * 10**9, 2997]).splitlines()[1:]
    assert all(len(one) == len(other) for one, other in pairwise(lines))
    assert lines[2].split() == ["a-longer-name", "999", "30.0%", "80.0%", "2,997", "3.00"]
