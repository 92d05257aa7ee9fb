"""Character sets are found as browsers find them."""

from __future__ import annotations

import codecs

import pytest

from llmkit.crawl.extract.markup import codec_of, decode_html, utf8_html

CYRILLIC = "Привет, как дела? Сегодня хорошая погода, и мы пойдём гулять в парк."


def page(text: str, label: str, encoding: str) -> bytes:
    return f"<html><head><meta charset='{label}'></head><body>{text}</body>".encode(encoding)


@pytest.mark.parametrize(
    ("label", "encoding", "text"),
    [
        ("windows-1251", "cp1251", CYRILLIC),
        ("koi8-r", "koi8-r", CYRILLIC),
        ("Shift_JIS", "cp932", "これは日本語の文章です①"),  # the circled digit is Microsoft's
        ("x-sjis", "cp932", "これは日本語の文章です"),
        ("EUC-JP", "euc_jp", "これは日本語の文章です"),
        ("gb2312", "gb18030", "這是中文的句子"),  # traditional characters, which GB 2312 does not have
        ("big5", "big5hkscs", "這是中文的句子"),
        ("ks_c_5601-1987", "cp949", "이것은 한국어 문장입니다 똠"),
        ("iso-8859-1", "cp1252", "“Quoted” — it costs 5 €"),  # read as windows-1252
        ("latin1", "cp1252", "café"),
        ("iso-8859-9", "cp1254", "İstanbul'da güneş"),
        ("tis-620", "cp874", "นี่คือประโยคภาษาไทย"),
        ("utf-8", "utf-8", "naïve 日本"),
        ("csiso88598i", "iso8859-8", "שלום עולם"),  # names that Python does not know
        ("x-mac-ukrainian", "mac-cyrillic", CYRILLIC),
    ],
)
def test_a_meta_tag_or_a_header_names_the_character_set(label: str, encoding: str, text: str) -> None:
    assert text in decode_html(page(text, label, encoding), None)
    assert text in decode_html(text.encode(encoding), f"text/html; charset={label}")


def test_the_byte_order_mark_comes_before_the_header_and_the_header_before_the_meta_tag() -> None:
    marked = codecs.BOM_UTF8 + "<meta charset=koi8-r>é".encode()
    assert decode_html(marked, "text/html; charset=windows-1251") == "<meta charset=koi8-r>é"
    assert CYRILLIC in decode_html(page(CYRILLIC, "koi8-r", "cp1251"), 'text/html; charset="windows-1251"')
    for encoding, mark in (("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)):
        assert decode_html(mark + "<p>héllo".encode(encoding), None) == "<p>héllo"


def test_only_the_first_1024_bytes_are_searched_and_comments_are_not() -> None:
    late = b" " * 1024 + b"<meta charset=koi8-r>" + "é".encode()
    assert decode_html(late, None).endswith("é")
    assert decode_html("<!-- <meta charset=koi8-r> -->é".encode(), None).endswith("é")
    assert (
        decode_html('<meta http-equiv="Content-Type" content="text/html; charset=koi8-r">Привет'.encode("koi8-r"))[-6:]
        == "Привет"
    )
    assert decode_html('<?xml version="1.0" encoding="windows-1251"?>Привет'.encode("cp1251")).endswith("Привет")


def test_what_declares_nothing_is_utf8_if_valid_and_guessed_otherwise() -> None:
    assert decode_html(CYRILLIC.encode(), None) == CYRILLIC
    assert decode_html(CYRILLIC.encode("cp1251"), "text/html") == CYRILLIC
    assert decode_html("déjà vu".encode("cp1252"), "text/html; charset=nonsense") == "déjà vu"


def test_a_meta_tag_that_could_be_read_does_not_mean_utf16() -> None:
    assert decode_html(page("é", "utf-16", "utf-8"), None).endswith("é</body>")


@pytest.mark.parametrize(
    "label",
    [
        "utf-7",
        "iso-2022-kr",
        "x-user-defined",
        "rot13",
        "hex",
        "idna",
        "punycode",
        "unicode_escape",
        "\0",
        "",
        "x" * 300,
    ],
)
def test_labels_that_browsers_do_not_know_are_not_obeyed(label: str) -> None:
    assert codec_of(label) is None
    assert decode_html(b"<p>plain", f"text/html; charset={label}") == "<p>plain"


@pytest.mark.parametrize("label", [None, "utf-8", "utf-16", "shift_jis", "iso-2022-jp", "gb18030", "windows-1252"])
def test_no_bytes_raise(label: str | None) -> None:
    every = bytes(range(256)) * 5
    header = f"text/html; charset={label}" if label else None
    assert isinstance(decode_html(every, header), str)
    assert utf8_html(every, header).decode("utf-8") == decode_html(every, header)


def test_text_that_is_decoded_already_loses_only_lone_surrogates() -> None:
    assert decode_html("a\ud800b é", None) == "a?b é"
    assert utf8_html("<p>é", "text/html; charset=koi8-r") == "<p>é".encode()


def test_bytes_in_utf8_are_not_recoded() -> None:
    html = "<p>é".encode()
    assert utf8_html(html, None) is html


def test_utf8_with_a_bad_byte_is_utf8():
    text = "<p>Die Übergröße der Bäume; schön, größer, später, für Märkte, Züge und Köpfe.</p>"
    page = text.encode() + b"<p>caf\xe9</p>"
    assert decode_html(page) == text + "<p>caf\ufffd</p>"
    assert decode_html(text.encode("cp1252")) == text
