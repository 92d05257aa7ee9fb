"""Pieces and their counts equal those of Hugging Face's splitter, for any cuts and any number of processes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hf_trainer import hf_merges, hf_pieces
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UserError
from llmkit.io.jsonl import read_jsonl
from llmkit.tokenizer import corpus
from llmkit.tokenizer.corpus import END, PieceCounter, count_pieces
from llmkit.tokenizer.merges import train_merges
from llmkit.tokenizer.patterns import NAMES, PATTERNS, Pattern, find_pattern

GAPS = r"[a-z]+|\d"  # leaves gaps, which are pieces too
# Characters that the patterns treat differently, and similar ones.
FRAGMENTS = (
    *("a", "s", "Z", "the", "Word", "HTTPServer", "antidisestablishmentarianism", "x" * 17, "d", "ll"),
    *(" ", "  ", "\n", "\r\n", "\t", " \n ", "\v", "\x1c", "\x00", "\x7f", "\u00a0", "\u2003", "\u3000", "\u0085"),
    *("'", "'s", "'LL", "'\u017f", "\u2019s", "'re", "''", "d'", "/", "//\n", ".", "...", "-", "\u2014", "_", '"'),
    *("0", "12345", "\u0663", "\u2167", "\u00bd", "\u00e9", "\u00c9t\u00e9", "\u0301", "e\u0301", "\u02b0", "\u01c5"),
    *(
        "\u65e5\u672c",
        "\u3002",
        "\u041f\u0440\u0438",
        "\u0639\u0631",
        "\u0928\u092e",
        "\U0001f600",
        "\ufeff",
        "K\u212a",
    ),
)
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.characters(codec="utf-8")), max_size=40).map("".join)


def counted(texts: list[str], pattern: Pattern) -> Counter[bytes]:
    counter = PieceCounter(pattern)
    counter.add(b"".join(text.encode() + END for text in texts))
    pieces, counts = counter.result()
    return Counter(dict(zip(pieces, counts.tolist(), strict=True)))


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.sampled_from([*NAMES, GAPS]))
def test_pieces_are_those_of_hugging_face(texts: list[str], name: str) -> None:
    pattern = find_pattern(name)
    assert counted(texts, pattern) == hf_pieces(texts, pattern.regex)


@pytest.mark.parametrize("name", NAMES)
def test_every_two_and_three_ascii_characters(name: str) -> None:
    """All pairs, and all triples of characters that a pattern or a cut distinguishes."""
    pattern = PATTERNS[name]
    pairs = [f"{chr(a)}{chr(b)}" for a in range(128) for b in range(128)]
    kinds = "aZs0'/. \n\r\t\v\x00\x1c"
    texts = pairs + [f"{w}{a}{b}{c}" for w in ("", "x") for a in kinds for b in kinds for c in kinds]
    for i in range(0, len(texts), 512):  # in chunks, so that errors cannot cancel out
        assert counted(texts[i : i + 512], pattern) == hf_pieces(texts[i : i + 512], pattern.regex)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.sampled_from([*NAMES, GAPS]), st.integers(1, 60))
def test_slices_and_early_cutting_change_nothing(texts: list[str], name: str, size: int) -> None:
    pattern = find_pattern(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SLICE", size)
        patch.setattr(corpus, "KEPT_BYTES", size)
        patch.setattr(corpus, "PENDING", size)
        assert counted(texts, pattern) == hf_pieces(texts, pattern.regex)


@pytest.mark.parametrize("handed_over", [2_000_000, 5])
@pytest.mark.parametrize("name", ["qwen2", GAPS])
def test_several_processes_count_the_same(name: str, handed_over: int) -> None:
    pattern = find_pattern(name)
    texts = [f"{word} number {i}, \u65e5\u672c {'long' * 9}\n" for i in range(40) for word in ("One", "zw\u00f6lf")]
    blocks = [b"".join(text.encode() + END for text in texts[i : i + 8]) for i in range(0, 80, 8)]
    alone = count_pieces(blocks, pattern, processes=1)
    seen: list[int] = []
    shared = count_pieces(iter(blocks), pattern, 3, seen.append, alone=1, handed_over=handed_over)
    assert dict(zip(*alone, strict=True)) == dict(zip(*shared, strict=True)) == hf_pieces(texts, pattern.regex)
    assert sum(seen) == sum(map(len, blocks))


def test_a_bad_block_passes_through() -> None:
    def failing():
        yield from [b"a" + END] * 3
        raise UserError("docs.jsonl:4: no")

    with pytest.raises(UserError, match=r"docs\.jsonl:4"):
        count_pieces(failing(), PATTERNS["qwen2"], processes=2, alone=1)


def test_a_bad_regular_expression_is_a_user_error() -> None:
    with pytest.raises(UserError, match=re.escape("--pattern: expected qwen2, llama3, gpt2, o200k or a regular")):
        find_pattern("(unclosed")


@pytest.mark.parametrize("vocab_size, min_frequency", [(3000, 0), (8000, 3)])
@pytest.mark.parametrize("name", [*NAMES, r"\w+|[^\w\s]+|\s+"])
def test_real_text_gives_the_merges_of_hugging_face(
    shared_data: Path, name: str, vocab_size: int, min_frequency: int
) -> None:
    texts = [(shared_data / "corpus" / "tinyshakespeare.txt").read_text()[:200_000]]
    sentences = read_jsonl([str(shared_data / "lang" / "langid.sentences.jsonl.gz")])
    texts += ["".join(f"{row.value['text']}\n" for row in sentences)[:500_000]]  # many languages and scripts
    pattern = find_pattern(name)
    counter = PieceCounter(pattern)
    counter.add(b"".join(text.encode() + END for text in texts))
    found = train_merges(*counter.result(), vocab_size, min_frequency)
    assert len(found.pairs) > 300
    assert (found.tokens, found.pairs) == hf_merges(texts, pattern.regex, vocab_size, min_frequency)
