"""Recorded decode steps: replays equal computation and do not depend on frozen values."""

import pytest
import torch
from recorder import Counting, Recorder
from tiny import END, make_model

from llmkit.generation import decode
from llmkit.generation.decode import Decoder
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request


def texts(tokenizer, record, **shape):
    """Complete 24 requests in 12 reused slots; one is long, so that the cache grows twice under the recordings."""
    model = make_model(context=900, spread=1.5, **shape)
    prompts = [[END, *(number * i % 256 for i in range(280 if number == 9 else number % 5))] for number in range(24)]
    lengths = [250 if number == 9 else 3 + 7 * number % 40 for number in range(24)]
    requests = [
        Request(ids, 1 + n % 2, length, 7, n) for n, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    generator = Generator(model, tokenizer, Sampling(0.9), slots=12, end_ids=(), record=record)
    return list(generator.complete(requests)), generator.steps


@pytest.mark.parametrize("shape", [{}, {"layer_windows": (None, 24), "residual_scales": True}], ids=str)
def test_replayed_steps_equal_computed_ones(tokenizer, shape):
    expected, steps = texts(tokenizer, None, **shape)
    record = Counting()
    assert texts(tokenizer, record, **shape) == (expected, steps)
    assert record.replayed == steps > 250 and 4 < record.recorded < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_callers_own_and_rows_beyond_those_in_use_do_no_harm(dtype, monkeypatch):
    monkeypatch.setattr(decode, "MOST_GRAPHS", 2)
    model = make_model().to(dtype)
    found = []
    for record in (None, counting := Counting()):
        decoder = Decoder(model, 5, record=record)
        rows = []
        for used in (5, 3, 1, 4, 5):
            for slot in range(used):
                decoder.load(slot, decoder.prefill([END, *range(slot)]))
            rows += [decoder.step([at] * used, [slot + at for slot in range(used)]) for at in (1, 2, 3)]
        found.append(torch.cat(rows))
    assert counting.recorded == 4  # for 5, 4 and 1 rows, and for 5 again
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0 if dtype == torch.float32 else 0.1)


def test_a_host_number_in_a_step_would_be_noticed(tokenizer, monkeypatch, capsys):
    """Check that the test above would fail if a step took its positions, or any number, from Python."""
    advance = Decoder._advance
    expected, _ = texts(tokenizer, None)

    def with_baked_positions(self, rows, seen, token_B, position_B):
        baked = [torch.full_like(token_B[0], position) for position in position_B.tolist()]
        return advance(self, rows, seen, token_B, torch.stack(baked))

    monkeypatch.setattr(Decoder, "_advance", with_baked_positions)
    assert texts(tokenizer, None)[0] == expected != texts(tokenizer, Recorder)[0]
    assert capsys.readouterr().err == ""


def test_memory_of_former_caches_is_not_read_again(monkeypatch):
    def grow():
        decoder = Decoder(make_model(), 2, record=Recorder)
        decoder.load(0, decoder.prefill([END]))
        first = decoder.step([1], [1])
        decoder.load(1, decoder.prefill([END] * 300))
        torch.testing.assert_close(decoder.step([1], [1]), first)

    grow()
    monkeypatch.setattr(decode.StepGraphs, "forget", lambda self: None)
    with pytest.raises(AssertionError, match="given back"):
        grow()


def test_a_step_that_cannot_be_recorded_is_computed_and_one_line_says_so(tokenizer, monkeypatch, capsys):
    advance = Decoder._advance
    expected, _ = texts(tokenizer, None)

    def reading(self, rows, seen, token_B, position_B):
        return advance(self, rows, seen, token_B, position_B + 0 * token_B[0].item())

    monkeypatch.setattr(Decoder, "_advance", reading)
    assert texts(tokenizer, Recorder)[0] == expected
    line = "llmkit: decoding without CUDA graphs, which is slower: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == line

    def out_of_memory(compute, beside):
        if beside is not None:  # the first recording is kept, the second exceeds the limit
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")
        return Recorder(compute, beside)

    monkeypatch.setattr(Decoder, "_advance", advance)
    assert texts(tokenizer, out_of_memory)[0] == expected
    assert capsys.readouterr().err.endswith(": CUDA out of memory. Tried to allocate 2 GiB.\n")


def test_rows_and_positions_are_rounded_to_few_sizes():
    assert [decode.rounded_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 100)] == [1, 2, 4, 8, 8, 16, 16, 24, 104]
    seen = {decode.rounded_seen(n, 5120) for n in range(1, 5121)}
    assert seen == {256, 512, 1024, 2048, 4096, 5120} and decode.rounded_seen(5121, 5120) == 8192
