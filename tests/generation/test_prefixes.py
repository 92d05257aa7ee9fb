"""Prefill in pieces: prompts with a common prefix share its cache bit for bit, and do not block others."""

import random

import pytest
import torch
from tiny import END, make_model

from llmkit.generation import decode
from llmkit.generation.decode import PIECE, Decoder, PrefixCache
from llmkit.generation.generator import Generator, Pool
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.model.devices import threads

SHAPES = {
    "grouped heads": {},
    "windows": {"layer_windows": (None, 24), "head_dim": 10},
    "gemma2": {
        "model_type": "gemma2", "qk_norm": False, "post_norms": True, "activation": "gelu_tanh",
        "scale_embedding": True, "query_pre_attn_scalar": 24.0,
        "attention_softcap": 2.0, "logits_softcap": 3.0, "layer_windows": (24, None),
    },
}  # fmt: skip
LENGTHS = [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 70]


def text(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(END) for _ in range(length)]


def whole(cache: PrefixCache, decoder: Decoder, ids: list[int]) -> decode.Prefix:
    *_, prefix = cache.prefill(decoder, ids)
    return prefix


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of tokens of each computed piece."""
    pieces: list[int] = []
    real = Decoder.prefill_after

    def watched(self, known, ids):
        length = sum(map(len, known))
        for prefix in real(self, known, ids):
            if len(prefix) > length:
                pieces.append(len(prefix) - length)
            length = len(prefix)
            yield prefix

    monkeypatch.setattr(Decoder, "prefill_after", watched)
    return pieces


@pytest.mark.parametrize(
    ("shape", "packs", "count", "weights"),
    [
        *((shape, True, 1, "dense") for shape in SHAPES.values()),
        ({}, False, 1, "dense"),
        ({"head_dim": 64}, True, 2, "dense"),
        ({}, True, 1, "int8"),
    ],
)
def test_a_prompt_after_cached_pieces_has_the_same_bits_as_without_the_cache(shape, packs, count, weights, monkeypatch):
    if not packs:
        monkeypatch.setattr("llmkit.kernels.linear.can_pack", lambda dtype, device: False)
        monkeypatch.setattr(decode, "can_pack", lambda dtype, device: False)
    decoder = Decoder(make_model(context=2048, **shape), 2, weights)
    cache, ids = PrefixCache(), text(2 * PIECE + 70)
    with threads(count), torch.inference_mode():
        for length in LENGTHS:  # each after the pieces of the earlier ones
            kept, anew = whole(cache, decoder, ids[:length]), decoder.prefill(ids[:length])
            for name in ("keys_LKTD", "values_LKTD", "logits_1V"):
                assert torch.equal(getattr(kept, name), getattr(anew, name)), (length, name)


def test_only_pieces_outside_of_the_cache_are_computed(computed):
    decoder, cache, ids = Decoder(make_model(context=2048), 2), PrefixCache(), text(2 * PIECE + 70)
    for prompt, pieces in [
        (ids[: PIECE + 9], [PIECE, 9]),
        (ids[: PIECE + 9], []),  # an equal one
        (ids, [PIECE, 70]),
        (ids[: 2 * PIECE], []),
        ([*ids[:PIECE], *text(70, 1)], [70]),
        ([*text(1, 2), *ids[1:]], [PIECE, PIECE, 70]),  # another first token: nothing is shared
    ]:
        del computed[:]
        whole(cache, decoder, prompt)
        assert computed == pieces


def test_the_cache_is_bounded_and_keeps_beginnings_longest(computed):
    decoder, ids = Decoder(make_model(context=4096), 2), text(4 * PIECE)
    with torch.inference_mode():
        size = decoder.prefill(ids[:PIECE]).nbytes
        cache = PrefixCache(limit=3 * size)
        whole(cache, decoder, ids)
        del computed[:]
        whole(cache, decoder, ids)
        assert computed == [PIECE]  # the last one of four
        whole(cache, decoder, text(3 * PIECE, 1))
        del computed[:]
        whole(cache, decoder, ids)
        assert computed == [PIECE] * 4
        none = PrefixCache(limit=0)
        assert torch.equal(whole(none, decoder, ids).logits_1V, decoder.prefill(ids).logits_1V)


def requests() -> list[Request]:
    return [
        Request([END, 1, 2], max_tokens=40, number=0),
        Request(text(3 * PIECE + 5), samples=2, max_tokens=9, number=1),
        Request([END, 3], max_tokens=30, number=2),
    ]


def test_running_sequences_continue_during_a_long_prompt_with_the_texts_of_single_requests(tokenizer):
    model = make_model(context=2048)

    def generator() -> Generator:
        return Generator(model, tokenizer, Sampling(0.9), slots=4, end_ids=())

    alone = [next(generator().complete([request])) for request in requests()]
    pool = Pool(generator(), iter(requests()), None, None)
    lengths = []
    for _ in range(6):
        pool.advance()
        lengths.append({sequence.index: len(sequence.token_ids) for sequence in pool.running})
    # three pieces before the last, each followed by a step
    assert [step.get(0) for step in lengths] == [2, 3, 4, 5, 6, 7]
    assert [sorted(step) for step in lengths[:4]] == [[0], [0], [0], [0, 1, 2]]
    while pool.advance():
        pass
    assert [pool.done[index] for index in range(3)] == alone


def test_a_long_prompt_that_is_cancelled_is_not_computed_to_its_end(tokenizer, computed):
    generator = Generator(make_model(context=2048), tokenizer, Sampling(0.9), slots=4, end_ids=())
    pool = Pool(generator, iter(requests()), None, None)
    pool.advance()
    assert pool.busy and computed == [3, PIECE]
    pool.cancel(1)
    while pool.advance():
        pass
    assert computed == [3, PIECE, 2] and sorted(pool.done) == [0, 2] and pool.idle
