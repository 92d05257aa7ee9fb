"""Words, lines and sentences."""

# ruff: noqa: RUF001 -- letters of other scripts look like ours

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.text import words
from llmkit.text.words import Split, count_sentences, repeated


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't pay 3.50, or 10,000!", ["Don't", "pay", "3.50", ",", "or", "10,000", "!"]),
        ('He said: "No..."', ["He", "said", ":", '"', "No", '..."']),
        ("well-known snake_case café", ["well", "-", "known", "snake_case", "café"]),
        ("किताब पढ़ो", ["किताब", "पढ़ो"]),
        ("東京に行く go", ["東", "京", "に", "行", "く", "go"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("한국어 말", ["한국어", "말"]),
        ("e\u0301te\u0301 🙂", ["e\u0301te\u0301", "🙂"]),
        (" \n\t ", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert Split(text).words == expected


def test_the_parts_of_a_text() -> None:
    split = Split("\n Title \n\n\nFirst line.\nTitle\n  \nEnd\n")
    assert split.lines == ["Title", "First line.", "Title", "End"]
    assert split.paragraphs == ["Title", "First line.\nTitle", "End"]
    assert split.vocabulary == ["Title", "First", "line", ".", "End"]
    assert split.ids.tolist() == [0, 1, 2, 3, 0, 4]
    assert split.counts.tolist() == [2, 1, 1, 1, 1]
    assert split.lengths.tolist() == [5, 5, 4, 1, 3]
    assert repeated(split.lines) == (1, 5)


@given(st.text(max_size=200))
def test_nothing_visible_is_lost_and_both_patterns_agree(text: str) -> None:
    assert "".join(Split(text).words) == "".join(text.split())
    if not words._SPECIAL.search(text):
        assert words._ANY_WORD.findall(text) == words._WORD.findall(text)


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("", 0),
        ("  ", 0),
        ("No stop at the end", 1),
        ("One. Two! Three?", 3),
        ("It cost 3.50 at llmkit.org, e.g. on sale.", 1),
        ("Dr. Ann B. Hill met Mr. Ho. They spoke.", 2),
        ('"Stop!" he said. "Why?" (She left.) Then nothing...', 5),
        ("今日は。明日は？", 2),
        ("यह एक है। वह दो है।", 2),
        ("What?! No... Yes!!!", 3),
        ("「行く。」と言った。。", 2),
        ("." * 1_000_000, 1),
        ("." + ")" * 1_000_000, 1),
        ('!"' * 500_000, 1),
    ],
)
def test_sentences(line: str, sentences: int) -> None:
    assert count_sentences(line) == sentences


@pytest.mark.parametrize(
    ("text", "script", "letters"),
    [
        ("冬天的港口醒得很慢，住在这里的渔民不到天亮不会上船。", "chinese", 2),
        ("古い灯台がいつ建てられたのか、誰にも言えません。 LED, 2024", "chinese", 2),
        ("ท่าเรือเงียบสงบและไม่มีใครเห็นเรือเข้ามา", "thai", 4),
        ("ဆိပ်ကမ်းသည် တိတ်ဆိတ်သည်။", "burmese", 4),
        ("항구는 조용했고 아무도 배가 들어오는 것을 보지 못했다.", "hangul", 1),
        ("The harbour (港口) was quiet, and nobody had seen the boat.", None, 1),
        ("Гавань была тиха.", None, 1),
        ("", None, 1),
        ("。！", None, 1),
    ],
)
def test_the_script_is_that_of_most_words(text: str, script: str | None, letters: int) -> None:
    split = Split(text)
    assert (split.script, split.letters_per_word) == (script, letters)
