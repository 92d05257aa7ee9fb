"""Pages are decoded with the charset that browsers use, and rejected before they can hang the parser."""

from __future__ import annotations

import codecs
from contextlib import suppress

import pytest

from llmkit.crawl.extract.blocks import cut_blocks
from llmkit.crawl.extract.markup import MAX_DEPTH, PageLimitError, utf8_html

CYRILLIC = "Привет, как дела? Сегодня хорошая погода, и мы пойдём гулять в парк."
GERMAN = "<p>Die Übergröße der Bäume; schön, größer, später, für Märkte, Züge und Köpfe.</p>"


def decoded(html: bytes | str, content_type: str | None = None) -> str:
    return utf8_html(html, content_type).decode()


@pytest.mark.parametrize(
    ("label", "encoding", "text"),
    [
        ("windows-1251", "cp1251", CYRILLIC),
        ("koi8-r", "koi8-r", CYRILLIC),
        ("Shift_JIS", "cp932", "これは日本語の文章です①"),  # the circled digit is a Microsoft extension
        ("x-sjis", "cp932", "これは日本語の文章です"),
        ("EUC-JP", "euc_jp", "これは日本語の文章です"),
        ("gb2312", "gb18030", "這是中文的句子"),  # traditional characters are not in GB 2312
        ("big5", "big5hkscs", "這是中文的句子"),
        ("ks_c_5601-1987", "cp949", "이것은 한국어 문장입니다 똠"),
        ("iso-8859-1", "cp1252", "“Quoted” — it costs 5 €"),  # decoded as windows-1252
        ("latin1", "cp1252", "café"),
        ("iso-8859-9", "cp1254", "İstanbul'da güneş"),
        ("tis-620", "cp874", "นี่คือประโยคภาษาไทย"),
        ("utf-8", "utf-8", "naïve 日本"),
        ("csiso88598i", "iso8859-8", "שלום עולם"),  # unknown to Python
        ("x-mac-ukrainian", "mac-cyrillic", CYRILLIC),
    ],
)
def test_a_meta_tag_or_a_header_names_the_character_set(label: str, encoding: str, text: str) -> None:
    page = f"<html><head><meta charset='{label}'></head><body>{text}</body>"
    assert text in decoded(page.encode(encoding))
    assert text in decoded(text.encode(encoding), f"text/html; charset={label}")


@pytest.mark.parametrize(
    ("page", "header", "text"),
    [
        (codecs.BOM_UTF8 + "<meta charset=koi8-r>é".encode(), "text/html; charset=windows-1251", "é"),
        (codecs.BOM_UTF16_LE + "<p>héllo".encode("utf-16-le"), None, "<p>héllo"),
        (codecs.BOM_UTF16_BE + "<p>héllo".encode("utf-16-be"), None, "<p>héllo"),
        (f"<meta charset=koi8-r>{CYRILLIC}".encode("cp1251"), 'text/html; charset="windows-1251"', CYRILLIC),
        ('<meta http-equiv="Content-Type" content="text/html; charset=koi8-r">Привет'.encode("koi8-r"), None, "Привет"),
        ('<?xml version="1.0" encoding="windows-1251"?>Привет'.encode("cp1251"), None, "Привет"),
        (b" " * 1024 + "<meta charset=koi8-r>é".encode(), None, "é"),  # beyond the browsers' limit
        ("<!-- <meta charset=koi8-r> -->é".encode(), None, "é"),
        ("<meta charset=utf-16>é".encode(), None, "é"),  # a readable tag cannot be UTF-16
        (CYRILLIC.encode(), None, CYRILLIC),
        (CYRILLIC.encode("cp1251"), "text/html", CYRILLIC),
        ("déjà vu".encode("cp1252"), "text/html; charset=nonsense", "déjà vu"),
        (GERMAN.encode("cp1252"), None, GERMAN),
        (GERMAN.encode() + b"<p>caf\xe9</p>", None, GERMAN + "<p>caf\ufffd</p>"),  # one bad byte in UTF-8
        ("a\ud800b é", "text/html; charset=koi8-r", "a?b é"),  # already decoded
    ],
)
def test_a_declared_charset_precedes_a_guessed_one(page: bytes | str, header: str | None, text: str) -> None:
    assert decoded(page, header).endswith(text)


@pytest.mark.parametrize(
    "label",
    ["utf-7", "iso-2022-kr", "x-user-defined", "rot13", "hex", "idna", "punycode", "unicode_escape", "\0", "x" * 300],
)
def test_labels_that_browsers_do_not_know_are_not_obeyed(label: str) -> None:
    assert decoded("<p>é +AGE-".encode(), f"text/html; charset={label}") == "<p>é +AGE-"


@pytest.mark.parametrize("label", ["", "utf-8", "utf-16", "shift_jis", "iso-2022-jp", "gb18030", "windows-1252"])
def test_no_bytes_raise(label: str) -> None:
    assert decoded(bytes(range(256)) * 5, f"text/html; charset={label}")


# ---- limits


@pytest.mark.parametrize("html", ["<div>", "<b>", "<span>", "<div></x>"])
def test_deep_pages_are_refused_before_they_are_parsed(html: str) -> None:
    for end in ("", html.replace("<", "</")):
        with pytest.raises(PageLimitError, match="too_deep"):
            cut_blocks((html * 100_000 + end * 100_000).encode())  # the parser takes 20 s for one of them


@pytest.mark.parametrize(
    "html",
    [
        *(f"<{tag}>x" * 5000 for tag in ("p", "li", "br", "td", "img")),  # implicitly closed
        "<script>" + "a='<div>';" * 5000 + "</script><p>text",
        "<div>" * (MAX_DEPTH - 2) + "deep" + "</div>" * (MAX_DEPTH - 2),
        '<img src="data:' + "a b " * 50_000 + '"><p>x' + " y" * 50_000,
        "x" * 1_000_000,
    ],
)
def test_pages_that_only_look_deep_or_large_are_read(html: str) -> None:
    assert len(cut_blocks(html.encode()).text) in (1, 5000)  # <td> outside of a table is ignored


@pytest.mark.parametrize(
    "piece",
    [
        *(b"<!--", b'<p title="', b"<script>", b"<style", b"<div <", b"<p '>\"", b"&", b"</", b"<div hidden>x"),
        *(b"<?xml <script ", b"<?xml <script/>", b"<?xml <![CDATA[", b"shadowroot<template ", b"shadowroot<template>"),
        *(b"<math>", b"<math><mi>x</mi></math>"),
    ],
)
def test_markup_without_end_takes_no_longer_than_other(piece: bytes) -> None:
    with suppress(PageLimitError):
        cut_blocks(piece * 50_000)
