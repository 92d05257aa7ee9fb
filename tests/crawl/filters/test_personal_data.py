"""Personal data: the labelled set next to this file, placeholders, and adversarially slow texts."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.crawl.filters.personal_data import PLACEHOLDERS, find, redact


def labelled(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(__file__).with_name(name).read_text("utf-8").splitlines()]


ROWS = labelled("personal_data.jsonl")
FLOORS = {"email": 0.95, "iban": 0.95, "card": 0.95, "ssn": 0.95, "ip": 0.95, "phone": 0.9}


def test_precision_and_recall_on_the_labelled_set(capsys: pytest.CaptureFixture[str]) -> None:
    """The people are invented, and the numbers are reserved for fiction, tests and examples, or invalid.

    A match counts if kind, start and end are right.
    """
    right, found, wanted = Counter(), Counter(), Counter()
    for row in ROWS:
        expected = Counter((kind, value) for kind, values in row["found"].items() for value in values)
        answer = Counter((kind, row["text"][start:stop]) for kind, start, stop in find(row["text"]))
        right.update(kind for kind, _ in (expected & answer).elements())
        found.update(kind for kind, _ in answer.elements())
        wanted.update(kind for kind, _ in expected.elements())
    with capsys.disabled():
        print(f"\npersonal data in {len(ROWS)} texts, {sum(not row['found'] for row in ROWS)} of them without any")
        print("  kind   labelled  precision  recall")
        for kind in PLACEHOLDERS:
            precision, recall = right[kind] / max(1, found[kind]), right[kind] / wanted[kind]
            print(f"  {kind:6}{wanted[kind]:9}{precision:11.3f}{recall:8.3f}")
    for kind, floor in FLOORS.items():
        assert right[kind] >= floor * found[kind], f"precision of {kind}"
        assert right[kind] >= floor * wanted[kind], f"recall of {kind}"
    assert len(ROWS) >= 150


def test_placeholders_replace_the_data_in_place() -> None:
    text, counts = redact("Ann (ann@example.org, +44 20 7946 0018) pays DE89 3704 0044 0532 0130 00 from 198.41.0.4.")
    assert text == "Ann (email@example.com, +1 202 555 0100) pays XX00 0000 0000 0000 from 192.0.2.1."
    assert counts == {"email": 1, "phone": 1, "iban": 1, "ip": 1}
    assert redact("ping 2001:503:ba3e::2:30")[0] == "ping 2001:db8::1"


def test_a_clean_text_comes_back_as_it_is() -> None:
    text = "Version 1.2.3.4 of 2024-01-02 costs $1,299.00 \x00 and\r\nnothing\u2028else."
    assert redact(text) == (text, {})


def test_redacted_data_is_not_found_again() -> None:
    once = [redact(row["text"])[0] for row in ROWS]
    assert [redact(text) for text in once] == [(text, {}) for text in once]


@given(st.text(alphabet="0123456789 +-.()@:aADE8/\n", max_size=80))
def test_any_text_is_cut_into_pieces_that_fit(text: str) -> None:
    found = find(text)
    assert all(0 <= item.start < item.stop <= len(text) for item in found)
    assert all(first.stop <= second.start for first, second in pairwise(found))
    assert found or redact(text) == (text, {})


HOSTILE = "1|.|1.|1 |@|a@|a@b.|:|2001:|+1|(1)|1-|DE89 |(|(at)|4111 |1)|a".split("|")  # noqa: SIM905


@pytest.mark.parametrize("unit", HOSTILE)
def test_an_adversarially_slow_text_returns(unit: str) -> None:
    """With a backtracking pattern, quadratic time at this length would take hours."""
    text = unit * (300_000 // len(unit))
    assert redact(text) == (text, {})


def test_an_address_in_a_url_or_next_to_a_script_without_spaces_is_found_alone() -> None:
    for row in labelled("personal_data_exact.jsonl"):
        answer: dict[str, list[str]] = {}
        for kind, start, stop in find(row["text"]):
            answer.setdefault(kind, []).append(row["text"][start:stop])
        assert answer == row["found"], row["text"]
