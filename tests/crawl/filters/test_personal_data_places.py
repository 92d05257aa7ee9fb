"""Personal data right beside letters of scripts without spaces, and inside URLs: the address alone is replaced."""

# ruff: noqa: RUF001 -- punctuation of other scripts looks like ours

from __future__ import annotations

import pytest

from llmkit.crawl.filters.personal_data import redact

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
