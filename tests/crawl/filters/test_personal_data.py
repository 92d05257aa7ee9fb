"""Personal data: the labelled set beside this file, placeholders, and texts made to be slow."""

# ruff: noqa: RUF001 -- punctuation of other scripts looks like ours

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.crawl.filters.personal_data import PLACEHOLDERS, find, redact

ROWS = [json.loads(line) for line in (Path(__file__).parent / "personal_data.jsonl").read_text("utf-8").splitlines()]
FLOORS = {"email": 0.95, "iban": 0.95, "card": 0.95, "ssn": 0.95, "ip": 0.95, "phone": 0.9}


def test_precision_and_recall_on_the_labelled_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Invented people, and numbers that are set aside for fiction, tests and examples or are void.

    A find counts when kind, begin and end are right.
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


def test_the_placeholders_stand_where_the_data_stood() -> None:
    text, counts = redact("Ann (ann@example.org, +44 20 7946 0018) pays DE89 3704 0044 0532 0130 00 from 198.41.0.4.")
    assert text == "Ann (email@example.com, +1 202 555 0100) pays XX00 0000 0000 0000 from 192.0.2.1."
    assert counts == {"email": 1, "phone": 1, "iban": 1, "ip": 1}
    assert redact("ping 2001:503:ba3e::2:30")[0] == "ping 2001:db8::1"


def test_a_clean_text_comes_back_as_it_is() -> None:
    text = "Version 1.2.3.4 of 2024-01-02 costs $1,299.00 \x00 and\r\nnothing\u2028else."
    assert redact(text) == (text, {})


def test_what_was_redacted_is_not_found_again() -> None:
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
def test_a_text_made_to_be_slow_comes_back(unit: str) -> None:
    """Of a pattern that goes back over the text, the square of this length would take hours."""
    text = unit * (300_000 // len(unit))
    assert redact(text) == (text, {})


# ---- beside letters of scripts without spaces, and inside URLs

MAIL, PHONE, IP = "email@example.com", "+1 202 555 0100", "192.0.2.1"


@pytest.mark.parametrize(
    ("text", "found", "placeholder"),
    [
        ("联系邮箱wei.test@foo.example.cn或者直接来办公室找我们谈谈合作的事情", "wei.test@foo.example.cn", MAIL),
        ("メールはtest@foo.example.jpまでお送りください", "test@foo.example.jp", MAIL),
        ("메일은test@foo.example.kr로 보내세요", "test@foo.example.kr", MAIL),
        ("อีเมลtest@foo.example.thได้เลย", "test@foo.example.th", MAIL),
        ("邮箱wei [at] foo [dot] example [dot] cn", "wei [at] foo [dot] example [dot] cn", MAIL),
        ("ご連絡は03-1234-5678まで", "03-1234-5678", PHONE),
        ("电话号码13800138000联系我", "13800138000", PHONE),
        ("请拨打+86 10 6552 9988咨询", "+86 10 6552 9988", PHONE),
        ("전화번호02-312-3456으로", "02-312-3456", PHONE),
        ("请访问服务器81.2.69.160查看", "81.2.69.160", IP),
        ("服务器2001:503:ba3e::2:30上", "2001:503:ba3e::2:30", "2001:db8::1"),
        ("卡号4111 1111 1111 1111已", "4111 1111 1111 1111", "0000 0000 0000 0000"),
        ("号码078-05-1120是", "078-05-1120", "000-00-0000"),
        ("https://foo.example.org/unsubscribe?e=test@foo.example.org&id=77", "test@foo.example.org", MAIL),
        ("https://foo.example.org/?e%3Dtest@foo.example.org&id=77", "test@foo.example.org", MAIL),
        ("https://foo.example.org/users/test@foo.example.org/profile is the page.", "test@foo.example.org", MAIL),
        ("Write to one.test/two.test@foo.example.org please.", "two.test@foo.example.org", MAIL),
        ("<a href=mailto:test@foo.example.org?subject=x>", "test@foo.example.org", MAIL),
    ],
)  # fmt: skip
def test_the_address_alone_is_replaced(text: str, found: str, placeholder: str) -> None:
    assert redact(text)[0] == text.replace(found, placeholder)


@pytest.mark.parametrize(
    "text",
    [
        "Read https://medium.com/@some.author/a-title today.",
        "See https://www.tiktok.com/@some.maker/video/123456 for it.",
        "She is on https://www.threads.net/@first.last now.",
        "https://mastodon.example/@user@host.social/123",
        "价格是12345678元，版本1.92.168.40发布",
        "2024年11月28日，注册资本1234567890円",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == (text, {})
