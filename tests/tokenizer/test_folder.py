"""The report measures a bounded sample, and compares with tokenizers in other formats."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.tokenizer.folder import LEAST_MEASURED, MEASURED_BYTES, choose_sample, load_other


def test_a_sample_is_even_over_the_sources_and_within_its_bound() -> None:
    texts = {"big": ["x" * 3_000_000], "small": ["y" * 100], "middle": ["é" * 200_000] * 5}
    of_little = choose_sample(texts, dict.fromkeys(texts, 100_000))
    assert sum(len(text.encode()) for text in chain.from_iterable(of_little.values())) <= LEAST_MEASURED
    sample = choose_sample(texts, dict.fromkeys(texts, 100_000_000))
    sizes = {source: sum(len(text.encode()) for text in texts) for source, texts in sample.items()}
    assert sizes["small"] == 100 and abs(sizes["big"] - sizes["middle"]) < 400_000
    assert MEASURED_BYTES - 4 <= sum(sizes.values()) <= MEASURED_BYTES
    many = {f"source {i}": [f"text {i}"] for i in range(200)}
    sample = choose_sample(many, {source: i for i, source in enumerate(many)})
    assert len(sample) == 51 and sum(map(len, sample.values())) == 200


def test_other_tokenizers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "gpt2.encoder.json").write_text("{}")
    for name, message in (
        ("absent.json", "no such"),
        ("broken.json", "not a tokenizer"),
        ("gpt2.encoder.json", "merges"),
    ):
        with pytest.raises(UserError, match=message):
            load_other(str(tmp_path / name))


def test_known_tokenizers_are_read(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    text = ["The quick brown fox jumps over the lazy dog. <|endoftext|>"]
    neox, gpt2 = load_other(str(folder / "gpt-neox-20b.tokenizer.json")), load_other(str(folder / "gpt2.encoder.json"))
    assert neox.vocab_size == 50277 and gpt2.vocab_size == 50257
    assert list(gpt2.count(text)) == [10 + 7]  # " <", "|", "endo", "ft", "ext", "|", ">": text, not a special token


def test_sentencepiece_models_are_read_where_the_package_is_there(shared_data: Path) -> None:
    pytest.importorskip("sentencepiece")
    llama = load_other(str(shared_data / "tokenizers" / "llama2.tokenizer.model"))
    assert llama.vocab_size == 32000 and list(llama.count(["Hello world"])) == [2]
