"""Gopher's rules: one page for each rule, and the quick counting beside a plain one."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.crawl.filters.quality import (
    DUPLICATE_N_GRAMS,
    STOP_WORDS,
    TOP_N_GRAMS,
    GopherQuality,
    GopherRepetition,
    gopher_quality,
    gopher_repetition,
)
from llmkit.text.words import Split

SUBJECTS = "The keeper", "A sailor", "My aunt", "That doctor", "Her neighbour", "Every child"
VERBS = "painted", "carried", "found", "sold", "forgot", "mended", "described"
OBJECTS = (
    "the old boat",
    "a green door",
    "three letters",
    "some bread",
    "an empty chair",
    "two lamps",
    "the map",
    "a kite",
)
PLACES = "near the harbour", "with great care", "at noon", "and left", "before the storm", "to be safe", "in a dream"


def prose(sentences: int) -> str:
    """Sentences of which no two are the same, a line each."""
    lines = []
    for number in range(sentences):
        subject, verb = SUBJECTS[number % 6], VERBS[(number * 3 + number // 6) % 7]
        lines.append(f"{subject} {verb} {OBJECTS[(number * 5) % 8]} {PLACES[(number * 2 + number // 7) % 7]}.")
    return "\n".join(lines)


def repetition(text: str) -> str | None:
    return gopher_repetition(Split(text), GopherRepetition()).reason


def quality(text: str, language: str = "en", **thresholds) -> str | None:
    return gopher_quality(Split(text), replace(GopherQuality(), **thresholds), language).reason


def test_prose_stays() -> None:
    assert repetition(prose(20)) is None
    assert quality(prose(20)) is None


def test_the_defaults_are_those_of_the_paper() -> None:
    tops = {f"max_top_{n}_gram_character_fraction": bound for n, bound in ((2, 0.20), (3, 0.18), (4, 0.16))}
    duplicates = {f"max_duplicate_{n}_gram_character_fraction": round(0.20 - n / 100, 2) for n in range(5, 11)}
    parts = {
        f"max_duplicate_{part}_{what}": bound
        for part in ("line", "paragraph")
        for what, bound in (("fraction", 0.30), ("character_fraction", 0.20))
    }
    assert asdict(GopherRepetition()) == tops | duplicates | parts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n\n".join([*prose(6).split("\n"), *["Read more"] * 5]), "max_duplicate_paragraph_fraction"),
        ("\n\n".join([*prose(4).split("\n"), prose(2), prose(2)]), "max_duplicate_paragraph_character_fraction"),
        ("\n".join([*prose(6).split("\n"), *["Share"] * 5]), "max_duplicate_line_fraction"),
        ("\n".join([prose(6), prose(2)]), "max_duplicate_line_character_fraction"),
        (prose(8).replace(".", " click here now.").replace("\n", " click here now "),
         "max_top_2_gram_character_fraction"),
        (prose(6).replace(".", ". The same nine words stand behind all of them:"),
         "max_top_4_gram_character_fraction"),
        (prose(4).replace(".\n", ". These fifteen or sixteen repeated expressions stand together behind lines.\n", 2)
         .replace("\n", " "),
         "max_duplicate_5_gram_character_fraction"),
    ],
)  # fmt: skip
def test_what_repeats_is_dropped(text: str, reason: str) -> None:
    found = gopher_repetition(Split(text), GopherRepetition())
    assert found.reason == reason
    assert found.score == found.measures[reason[4:]] > getattr(GopherRepetition(), reason)
    assert repetition(text) is not None
    assert gopher_repetition(Split(text), GopherRepetition(**dict.fromkeys(asdict(GopherRepetition())))).reason is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to be of use to anybody who has to read it.", "min_words"),
        (" ".join(["a b c d e the of and to with"] * 10), "min_mean_word_length"),
        (" ".join(["incomprehensibilities", "the", "internationalisation", "of"] * 20), "max_mean_word_length"),
        (prose(10).replace(" ", " #"), "max_hash_to_word_ratio"),
        (prose(10).replace(" the", "... the").replace(" a ", "… a ").replace(" and", "... and").replace(" ", "… ", 40),
         "max_ellipsis_to_word_ratio"),
        ("\n".join("- " + line for line in prose(10).split("\n")), "max_bullet_line_fraction"),
        ("\n".join("• " + line for line in prose(10).split("\n")), "max_bullet_line_fraction"),
        (prose(10).replace(".\n", " and so on...\n"), "max_ellipsis_line_fraction"),
        ("the of and to with be that have " + "12 345 6789 2024 " * 20, "min_alphabetic_word_fraction"),
        ("house garden river mountain winter candle window mirror " * 10, "min_stop_words"),
    ],
)  # fmt: skip
def test_what_is_no_prose_is_dropped(text: str, reason: str) -> None:
    found = gopher_quality(Split(text), GopherQuality())
    assert found.reason == reason
    assert found.text == text
    assert quality(text, **{reason: None}) != reason


def test_stop_words_are_those_of_the_language() -> None:
    german = " ".join(["Der Leuchtturm stand in der Bucht und das Licht war nicht zu sehen."] * 5)
    assert quality(german) == "min_stop_words"
    assert quality(german, "de") is None
    assert quality(german, "xx") is None, "a language without a list is not held to the English one"
    assert quality("The House Of Stone And Mortar " * 20) is None, "a stop word with a capital is one"
    assert all(len(listed) >= 8 for listed in STOP_WORDS.values())


@pytest.mark.parametrize("text", ["", " ", "\n\n", "...", "#", "\u0300", "_", "___"])
def test_next_to_nothing_is_measured_without_error(text: str) -> None:
    assert repetition(text) is None
    assert quality(text) == "min_words"
    quality(text, min_words=None)


@settings(max_examples=150)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "ab", "b"]), max_size=60), st.sampled_from([" ", "\n"]))
def test_n_grams_are_counted_as_a_plain_loop_counts_them(words: list[str], space: str) -> None:
    text = space.join(words)
    measures = gopher_repetition(Split(text), GopherRepetition()).measures
    for n in TOP_N_GRAMS:
        assert measures[f"top_{n}_gram_character_fraction"] * max(1, len(text)) == pytest.approx(_top(words, n))
    for n in DUPLICATE_N_GRAMS:
        expected = _duplicate(words, n)
        assert measures[f"duplicate_{n}_gram_character_fraction"] * max(1, len(text)) == pytest.approx(expected)


def _top(words: list[str], n: int) -> int:
    grams = Counter(" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
    return max(((count, -place, len(gram) * count) for place, (gram, count) in enumerate(grams.items())), default=(0,))[
        -1
    ]


def _duplicate(words: list[str], n: int) -> int:
    seen, characters, start = set(), 0, 0
    while start + n <= len(words):
        gram = tuple(words[start : start + n])
        characters += sum(map(len, gram)) if gram in seen else 0
        start += n if gram in seen else 1
        seen.add(gram)
    return characters


def test_thresholds_bound_what_is_measured() -> None:
    found = gopher_quality(Split(prose(5)), GopherQuality())
    assert (found.reason, found.score) == ("min_words", found.measures["words"])
    assert gopher_quality(Split(prose(5)), GopherQuality(min_words=10)).reason is None
    assert {f"{bound}{name}" for name in found.measures for bound in ("min_", "max_")} >= {
        f.name for f in fields(GopherQuality)
    } - {"max_hash_to_word_ratio"}
