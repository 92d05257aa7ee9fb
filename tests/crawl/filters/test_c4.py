"""C4's rules, line by line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.crawl.filters.quality import C4, Verdict, c4
from llmkit.text.words import Split

FIVE = "The boat came in. Nobody saw it.\nIt was late! Was it?\nThe lamp went out."


def clean(text: str, **rules) -> Verdict:
    return c4(Split(text), replace(C4(), **rules))


def test_a_page_of_five_sentences_stays_as_it_is() -> None:
    found = clean(FIVE)
    assert (found.reason, found.text, found.measures) == (None, FIVE, {"sentences": 5, "words": 21})


@pytest.mark.parametrize(
    ("line", "rule", "counted"),
    [
        ("Please enable JavaScript to read this page.", "remove_javascript_lines", "javascript_lines"),
        ("By going on you accept our Privacy Policy today.", "remove_policy_lines", "policy_lines"),
        ("This site uses cookies for your comfort.", "remove_policy_lines", "policy_lines"),
        ("Read more", "min_words_per_line", "short_lines"),
        ("", "min_words_per_line", "short_lines"),
        ("one two " + "x" * 1001, "max_word_length", "long_word_lines"),
    ],
)
def test_lines_that_go(line: str, rule: str, counted: str) -> None:
    found = clean(f"{FIVE}\n{line}\nAnd then the rain began.")
    assert found.text == f"{FIVE}\nAnd then the rain began."
    assert found.measures == {counted: 1, "sentences": 6, "words": 27}
    off = False if rule.startswith("remove") else None
    assert clean(f"{FIVE}\n{line}\nAnd then the rain began.", **{rule: off}).text.split("\n")[3] == line


def test_lines_without_an_end_go_only_when_asked() -> None:
    text = f"{FIVE}\nA heading of four words\nIt trailed off...\nShe said “yes.”"
    assert clean(text).text == text
    assert clean(text, remove_unterminated_lines=True).text == f"{FIVE}\nShe said “yes.”"


def test_citations_go_and_their_line_stays() -> None:
    text = f"{FIVE}\nThe tower[12] fell[citation needed] in 1755.[3][edit]"
    assert clean(text).text == f"{FIVE}\nThe tower fell in 1755."
    assert clean(text, remove_citations=False).text == text
    assert clean(f"{FIVE}\n[1] [2] [3]").text == FIVE, "a line of citations is no line of three words"


@pytest.mark.parametrize(
    ("line", "reason", "rule"),
    [
        ("Here stands Lorem ipsum dolor sit amet.", "lorem_ipsum", "drop_lorem_ipsum"),
        ("function walk() { return home; }", "curly_bracket", "drop_curly_bracket"),
    ],
)
def test_pages_that_go(line: str, reason: str, rule: str) -> None:
    assert clean(f"{FIVE}\n{line}").reason == reason
    assert clean(f"{FIVE}\n{line}", **{rule: False}).reason is None


def test_too_few_sentences_are_counted_after_the_lines_are_gone() -> None:
    found = clean("The boat came in. Nobody saw it.\nIt was late! Was it?\nTurn on JavaScript now.")
    assert (found.reason, found.score) == ("min_sentences", 4)
    assert clean("", min_sentences=None).reason is None
    assert clean("").reason == "min_sentences"


@given(
    st.lists(
        st.sampled_from([*FIVE.split("\n"), "no end", "A line[1][2] of[edit] notes.", "[3]", "x", "JavaScript is on."])
    )
)
def test_the_words_left_are_those_of_the_text_left(lines: list[str]) -> None:
    found = clean("\n".join(lines))
    assert found.measures["words"] == Split(found.text).word_count


@pytest.mark.parametrize("unit", ["[", "[1", "{", ".", "a ", "javascript\n", "x" * 1001 + " ", "lorem "])
def test_a_text_made_to_be_slow_comes_back(unit: str) -> None:
    clean(unit * (300_000 // len(unit)))
