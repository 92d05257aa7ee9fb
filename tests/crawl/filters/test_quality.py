"""The rules of Gopher, C4 and FineWeb: a page for each rule, and fast counting compared with a plain version."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.crawl.filters.quality import (
    C4,
    DUPLICATE_N_GRAMS,
    STOP_WORDS,
    TOP_N_GRAMS,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Verdict,
    c4,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
)
from llmkit.text.words import Split

SUBJECTS = "The keeper", "A sailor", "My aunt", "That doctor", "Her neighbour", "Every child"
VERBS = "painted", "carried", "found", "sold", "forgot", "mended", "described"
OBJECTS = "the old boat|a green door|three letters|some bread|an empty chair|two lamps|the map|a kite".split("|")  # noqa: SIM905
PLACES = "near the harbour", "with great care", "at noon", "and left", "before the storm", "to be safe", "in a dream"
FIVE = "The boat came in. Nobody saw it.\nIt was late! Was it?\nThe lamp went out."
LINE = "The {} boat came into the quiet harbour late at night."
PAGE = "\n".join(LINE.format(name) for name in ("red", "old", "last", "small", "long", "first", "grey", "next"))


def prose(sentences: int) -> str:
    """Return distinct sentences, one per line."""
    lines = []
    for number in range(sentences):
        subject, verb = SUBJECTS[number % 6], VERBS[(number * 3 + number // 6) % 7]
        lines.append(f"{subject} {verb} {OBJECTS[(number * 5) % 8]} {PLACES[(number * 2 + number // 7) % 7]}.")
    return "\n".join(lines)


def repetition(text: str, **thresholds) -> Verdict:
    return gopher_repetition(Split(text), replace(GopherRepetition(), **thresholds))


def quality(text: str, language: str = "en", **thresholds) -> Verdict:
    return gopher_quality(Split(text), replace(GopherQuality(), **thresholds), language)


def fineweb(text: str, **thresholds) -> Verdict:
    return fineweb_quality(Split(text), replace(FineWebQuality(), **thresholds))


def clean(text: str, **rules) -> tuple[str, Verdict]:
    return c4(Split(text), replace(C4(), **rules))


LINES = prose(10).split("\n")
FIFTEEN = ". These fifteen or sixteen repeated expressions stand together behind lines.\n"
BREAKING: dict[Any, dict[str, str]] = {
    repetition: {
        "max_duplicate_paragraph_fraction": "\n\n".join([*LINES[:6], *["Read more"] * 5]),
        "max_duplicate_paragraph_character_fraction": "\n\n".join([*LINES[:4], prose(2), prose(2)]),
        "max_duplicate_line_fraction": "\n".join([*LINES[:6], *["Share"] * 5]),
        "max_duplicate_line_character_fraction": "\n".join([prose(6), prose(2)]),
        "max_top_2_gram_character_fraction": " click here now ".join(LINES[:8]).replace(".", " click here now."),
        "max_top_4_gram_character_fraction": prose(6).replace(".", ". The same nine words stand behind all of them:"),
        "max_duplicate_5_gram_character_fraction": prose(4).replace(".\n", FIFTEEN, 2).replace("\n", " "),
    },
    quality: {
        "min_words": "Too short to be of use to anybody who has to read it.",
        "min_mean_word_length": " ".join(["a b c d e the of and to with"] * 10),
        "max_mean_word_length": "incomprehensibilities the internationalisation of " * 20,
        "max_hash_to_word_ratio": prose(10).replace(" ", " #"),
        "max_ellipsis_to_word_ratio": re.sub(" (the|a|and)", r"... \1", prose(10)).replace(" ", "… ", 40),
        "max_bullet_line_fraction": "\n".join(f"{mark} {line}" for mark, line in zip("-•" * 5, LINES, strict=True)),
        "max_ellipsis_line_fraction": prose(10).replace(".\n", " and so on...\n"),
        "min_alphabetic_word_fraction": "the of and to with be that have " + "12 345 6789 2024 " * 20,
        "min_stop_words": "house garden river mountain winter candle window mirror " * 10,
    },
    fineweb: {
        "min_terminal_line_fraction": PAGE.replace(".", ""),
        "max_short_line_fraction": "\n".join(f"Item number {n} is here." for n in range(20)),
        "max_duplicate_line_character_fraction": PAGE + "\n" + LINE.format("red"),
        "max_newline_to_word_ratio": "\n".join(f"{n:02}Donaudampfschifffahrtsgesellschaft." for n in range(20)),
    },
}


@pytest.mark.parametrize(("judged", "reason"), [(judged, reason) for judged in BREAKING for reason in BREAKING[judged]])
def test_a_page_that_breaks_a_rule_is_dropped_for_it(judged, reason: str) -> None:
    text = BREAKING[judged][reason]
    verdict = judged(text)
    assert (verdict.reason, verdict.score) == (reason, verdict.measures[reason[4:]])
    assert judged(text, **{reason: None}).reason != reason


@pytest.mark.parametrize("text", ["", " ", "\n\n", "...", "#", "\u0300", "_", "___"])
def test_next_to_nothing_is_measured_without_error(text: str) -> None:
    assert repetition(text).reason is None
    assert quality(text).reason == "min_words"
    assert quality(text, min_words=None).measures["words"] == 0
    if not text.strip():
        assert fineweb(text).reason == "min_terminal_line_fraction"
        assert clean(text)[1].reason == "min_sentences"


def test_prose_stays() -> None:
    assert (repetition(prose(20)).reason, quality(prose(20)).reason, fineweb(PAGE).reason) == (None, None, None)
    assert quality(prose(5)).reason == "min_words"
    assert quality(prose(5), min_words=10).reason is None


def test_stop_words_are_those_of_the_language() -> None:
    german = " ".join(["Der Leuchtturm stand in der Bucht und das Licht war nicht zu sehen."] * 5)
    assert quality(german).reason == "min_stop_words"
    assert quality(german, "de").reason is None
    assert quality(german, "xx").reason is None, "a language without a list is not held to the English one"
    assert quality("The House Of Stone And Mortar " * 20).reason is None, "a stop word with a capital is one"
    assert all(len(listed) >= 8 for listed in STOP_WORDS.values())


@settings(max_examples=150)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "ab", "b"]), max_size=60), st.sampled_from([" ", "\n"]))
def test_n_grams_are_counted_as_a_plain_loop_counts_them(words: list[str], space: str) -> None:
    text = space.join(words)
    measures = repetition(text).measures
    for n in TOP_N_GRAMS:
        grams = Counter(" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
        ranked = [(count, -place, len(gram) * count) for place, (gram, count) in enumerate(grams.items())]
        expected = max(ranked, default=(0,))[-1]
        assert measures[f"top_{n}_gram_character_fraction"] * max(1, len(text)) == pytest.approx(expected)
    for n in DUPLICATE_N_GRAMS:
        expected = duplicate_characters(words, n)
        assert measures[f"duplicate_{n}_gram_character_fraction"] * max(1, len(text)) == pytest.approx(expected)


def duplicate_characters(words: list[str], n: int) -> int:
    seen, characters, start = set(), 0, 0
    while start + n <= len(words):
        gram = tuple(words[start : start + n])
        characters += sum(map(len, gram)) if gram in seen else 0
        start += n if gram in seen else 1
        seen.add(gram)
    return characters


def test_ways_to_end_a_line() -> None:
    for end in (".", '."', ".)", "?\u201d", "!  ", "\u3002", "\u2026", "\u0964", ".\r"):
        assert fineweb(PAGE.replace(".", end)).reason is None, end
    for end in (",", ":", '"', ")", " -", ""):
        assert fineweb(PAGE.replace(".", end)).reason == "min_terminal_line_fraction", end
    assert fineweb(PAGE, short_line_length=60).reason == "max_short_line_fraction"


# ---- C4 line by line


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
    text, verdict = clean(f"{FIVE}\n{line}\nAnd then the rain began.")
    assert text == f"{FIVE}\nAnd then the rain began."
    assert verdict == (None, None, {counted: 1, "sentences": 6, "words": 27})
    off = False if rule.startswith("remove") else None
    assert clean(f"{FIVE}\n{line}\nAnd then the rain began.", **{rule: off})[0].split("\n")[3] == line


def test_lines_without_an_end_go_only_when_asked() -> None:
    text = f"{FIVE}\nA heading of four words\nIt trailed off...\nShe said “yes.”"
    assert clean(text)[0] == text
    assert clean(text, remove_unterminated_lines=True)[0] == f"{FIVE}\nShe said “yes.”"


def test_citations_go_and_their_line_stays() -> None:
    text = f"{FIVE}\nThe tower[12] fell[citation needed] in 1755.[3][edit]"
    assert clean(text)[0] == f"{FIVE}\nThe tower fell in 1755."
    assert clean(text, remove_citations=False)[0] == text
    assert clean(f"{FIVE}\n[1] [2] [3]")[0] == FIVE, "a line of citations is no line of three words"


@pytest.mark.parametrize(
    ("line", "reason"),
    [("Here stands Lorem ipsum dolor sit amet.", "lorem_ipsum"), ("function walk() { return it; }", "curly_bracket")],
)
def test_a_line_that_drops_its_page(line: str, reason: str) -> None:
    text, verdict = clean(f"{FIVE}\n{line}\nRead more")
    assert (text, verdict.reason) == (f"{FIVE}\n{line}\nRead more", reason)
    assert clean(f"{FIVE}\n{line}", **{f"drop_{reason}": False})[1].reason is None


def test_sentences_are_counted_after_the_lines_are_gone() -> None:
    _, verdict = clean("The boat came in. Nobody saw it.\nIt was late! Was it?\nTurn on JavaScript now.")
    assert (verdict.reason, verdict.score) == ("min_sentences", 4)
    assert clean("", min_sentences=None)[1].reason is None


@given(
    st.lists(
        st.sampled_from([*FIVE.split("\n"), "no end", "A line[1][2] of[edit] notes.", "[3]", "x", "JavaScript is on."])
    )
)
def test_the_words_left_are_those_of_the_text_left(lines: list[str]) -> None:
    text, verdict = clean("\n".join(lines))
    assert verdict.measures["words"] == Split(text).word_count


@pytest.mark.parametrize("unit", ["[", "[1", "{", ".", "a ", "javascript\n", "x" * 1001 + " ", "lorem "])
def test_an_adversarially_slow_text_returns(unit: str) -> None:
    clean(unit * (300_000 // len(unit)))
