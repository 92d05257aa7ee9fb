"""FineWeb's rules: one page for each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmkit.crawl.filters.quality import FineWebQuality, fineweb_quality
from llmkit.text.words import Split

LINE = "The {} boat came into the quiet harbour late at night."
PAGE = "\n".join(LINE.format(name) for name in ("red", "old", "last", "small", "long", "first", "grey", "next"))


def reason(text: str, **thresholds) -> str | None:
    return fineweb_quality(Split(text), replace(FineWebQuality(), **thresholds)).reason


def test_prose_stays() -> None:
    assert reason(PAGE) is None


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (PAGE.replace(".", ""), "min_terminal_line_fraction"),
        ("\n".join(f"Item number {n} is here." for n in range(20)), "max_short_line_fraction"),
        (PAGE + "\n" + LINE.format("red"), "max_duplicate_line_character_fraction"),
        ("\n".join(f"{n:02}-Donaudampfschifffahrtsgesellschaft.".replace("-", "") for n in range(20)),
         "max_newline_to_word_ratio"),
    ],
)  # fmt: skip
def test_lists_menus_and_copies_are_dropped(text: str, broken: str) -> None:
    found = fineweb_quality(Split(text), FineWebQuality())
    assert found.reason == broken
    assert found.score == found.measures[broken[4:]]
    assert reason(text, **{broken: None}) is None


@pytest.mark.parametrize("end", [".", '."', ".)", "?\u201d", "!  ", "\u3002", "\u2026", "\u0964", ".\r"])
def test_ways_to_end_a_line(end: str) -> None:
    assert reason(PAGE.replace(".", end)) is None


@pytest.mark.parametrize("end", [",", ":", '"', ")", " -", ""])
def test_what_ends_no_sentence(end: str) -> None:
    assert reason(PAGE.replace(".", end)) == "min_terminal_line_fraction"


def test_the_length_of_a_short_line_can_be_set() -> None:
    assert reason(PAGE, short_line_length=60) == "max_short_line_fraction"


@pytest.mark.parametrize("text", ["", "\n", "   "])
def test_an_empty_page_is_dropped_without_error(text: str) -> None:
    assert reason(text) == "min_terminal_line_fraction"
    assert reason(text, min_terminal_line_fraction=None) in (None, "max_newline_to_word_ratio")
