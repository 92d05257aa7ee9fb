"""The last line of `sample`: what was done, of what could have been."""

import pytest
from tiny import END, make_model, save_tokenizer

from llmkit.generation.generator import Generator, read_bandwidth
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.tokenizer.encoding import load_tokenizer


@pytest.mark.parametrize("weights", ["dense", "half"])
def test_it_counts_tokens_slots_and_bytes(tmp_path, monkeypatch, weights):
    save_tokenizer(tmp_path)
    model = make_model()
    generator = Generator(model, load_tokenizer(tmp_path), Sampling(1.0), slots=4, end_ids=(), weights=weights)
    list(generator.complete(Request([END], max_tokens=n, number=n) for n in (21, 11)))
    generator.seconds = 2.0
    (line,) = generator.describe()
    assert line.startswith("32 tokens at 16 tok/s, 38% of the slots in use, after")  # 30 rows in 20 steps of 4
    monkeypatch.setattr("llmkit.generation.generator.BEYOND_CACHES", 0)
    monkeypatch.setattr("llmkit.generation.generator.WORTH_MEASURING", 0.0)
    monkeypatch.setattr("llmkit.generation.generator.read_bandwidth", lambda: 4e9)
    decoder, matrices = generator.decoder, [p for p in model.parameters() if p.ndim > 1]
    decoder.seconds = decoder.bytes_read / 1e9
    (line,) = generator.describe()
    assert ", 1.0 GB/s: 25% of the memory's bandwidth, after" in line
    width = 4 if weights == "dense" else 2
    of_weights = 20 * width * (sum(p.numel() for p in matrices) - model.embed_tokens.numel())
    a_position = 4 * 2 * 2 * 2 * 16  # float32 keys and values of 2 layers of 2 heads of 16
    assert decoder.bytes_read == of_weights + 30 * 64 * a_position  # a lone row has no neighbour


def test_memory_is_read_at_a_plausible_rate():
    assert 1e8 < read_bandwidth(1 << 22) < 1e13
