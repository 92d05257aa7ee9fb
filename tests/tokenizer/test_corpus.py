"""Text is read completely or up to the limit, from every kind of input, and errors name the line."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import orjson
import pytest
from hf_trainer import hf_pieces
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UserError
from llmkit.tokenizer.corpus import END, Corpus, plain_text
from llmkit.tokenizer.patterns import find_pattern

QWEN2 = find_pattern("qwen2")


def jsonl(path: Path, *texts: str) -> str:
    lines = b"".join(orjson.dumps({"text": text, "source": text[:1] or "?"}) + b"\n" for text in texts)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def read(*paths: str, **limits: int) -> tuple[list[str], Corpus]:
    corpus = Corpus(paths, QWEN2, **limits)
    return [text.decode() for text in b"".join(corpus.blocks()).split(END)[:-1]], corpus


def test_documents_of_several_files_in_order(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", "one", "", "zwölf")
    second = jsonl(tmp_path / "b.jsonl.gz", "drei")
    (tmp_path / "c.txt").write_text("\ufeffplain\n\ntext", encoding="utf-8")
    texts, corpus = read(first, second, str(tmp_path / "c.txt"))
    assert texts == ["one", "zwölf", "drei", "plain\n\ntext"]
    assert (corpus.documents, corpus.bytes) == (5, 3 + 6 + 4 + 11)
    assert set(corpus.sample) == {"o", "z", "d", "c.txt"}


def test_limits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "one", "zwölf", "drei")
    (tmp_path / "b.txt").write_text("more")
    assert read(path, str(tmp_path / "b.txt"), limit=2)[0] == ["one", "zwölf"]
    assert read(path, str(tmp_path / "b.txt"), limit=4)[0][3:] == ["more"]
    for limit, last in ((3, "one"), (5, "zw"), (6, "zw"), (7, "zwö"), (9, "zwölf"), (99, "more")):
        texts, corpus = read(path, str(tmp_path / "b.txt"), limit_bytes=limit)
        assert texts[-1] == last and corpus.bytes == len("".join(texts).encode()) <= limit


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["the ", "Word", " ", "\n", "\n\n ", "é ", "日本", "1 ", ". ", "\r\n"]), max_size=60),
    st.integers(1, 40),
    st.sampled_from(["qwen2", "gpt2", "o200k", r"[a-z]+|\n"]),
)
def test_parts_of_plain_text_have_the_pieces_of_the_whole(words: list[str], block: int, name: str) -> None:
    text, pattern = "".join(words), find_pattern(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkit.tokenizer.corpus.BLOCK", block)
        patch.setattr("llmkit.tokenizer.corpus.WHOLE_TEXT", block)
        handle = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
        parts = list(plain_text(handle, "a.txt", pattern))
    assert "".join(parts) == text
    assert hf_pieces(parts, pattern.regex) == hf_pieces([text], pattern.regex)


def test_bad_utf8_far_into_plain_text_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.tokenizer.corpus.BLOCK", 10)
    (tmp_path / "a.txt").write_bytes(b"a line of text\n" * 6 + b"caf\xe9 au lait\n")
    with pytest.raises(UserError, match=r"a\.txt:7: not UTF-8 at byte 93"):
        read(str(tmp_path / "a.txt"))


def test_the_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.tokenizer.corpus.SAMPLE", 60)
    monkeypatch.setattr("llmkit.tokenizer.corpus.SAMPLE_OF_SOURCE", 20)
    monkeypatch.setattr("llmkit.tokenizer.corpus.SAMPLE_OF_DOCUMENT", 8)
    path = jsonl(tmp_path / "a.jsonl", *[letter * 50 for letter in "abcdefgh" for _ in range(9)])
    _, corpus = read(path)
    assert {source: list(map(len, texts)) for source, texts in corpus.sample.items()} == dict.fromkeys("abc", [8] * 3)
    assert corpus.bytes_of_source == dict.fromkeys("abcdefgh", 450)
