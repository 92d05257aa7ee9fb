"""The character set of an HTML page, found as browsers find it."""

from __future__ import annotations

import codecs
import re

from webencodings import lookup

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_SNIFFED_BYTES = 1024  # how far browsers look for <meta charset>
_META = re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)
_XML = re.compile(rb"^\s*<\?xml\b[^>]*?\bencoding\s*=\s*[\"']([^\"'>]+)", re.IGNORECASE)
_HEADER = re.compile(r"\bcharset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)

# Python's codecs that read what browsers read under these names, which are supersets of what the names say
_SUPERSETS = {"gbk": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949", "big5": "big5hkscs"}
_NO_TEXT = ("replacement", "x-user-defined")
ASCII = frozenset(map(chr, range(128)))


def codec_of(label: str) -> str | None:
    """The Python codec that reads what browsers read under a label; None for a label that they do not know.

    https://encoding.spec.whatwg.org/#names-and-labels
    """
    codec = lookup(label)
    if codec is None or codec.name in _NO_TEXT:
        return None
    return _SUPERSETS.get(codec.name, codec.codec_info.name)


def declared_codec(html: bytes, content_type: str | None) -> str | None:
    """The codec that the byte order mark, the HTTP header or the page's first 1,024 bytes name, in this order."""
    for mark, codec in _BOMS:
        if html.startswith(mark):
            return codec
    named = _HEADER.search(content_type or "")
    if named and (codec := codec_of(named[1])):
        return codec
    start = _COMMENT.sub(b"", html[:_SNIFFED_BYTES])
    for pattern in (_META, _XML):
        inside = pattern.search(start)
        if inside and (codec := codec_of(inside[1].decode("latin-1"))):
            return "utf-8" if codec.startswith("utf-16") else codec  # one that was read as ASCII is not UTF-16
    return None


def decode_html(html: bytes | str, content_type: str | None = None) -> str:
    """Decode a page as browsers do: what is declared, else UTF-8 if it is, but for single bytes, else a guess.

    Bytes that the character set does not know become U+FFFD, as do lone surrogates of a `str`.
    """
    if isinstance(html, str):
        return html.encode("utf-8", "replace").decode("utf-8")
    codec = declared_codec(html, content_type)
    if codec is None:
        try:
            return html.decode("utf-8")
        except UnicodeDecodeError:
            text = html.decode("utf-8", "replace")
            bad = text.count("\ufffd")
            # text in another character set has next to no sequence of bytes that is UTF-8
            if sum(map(text.count, set(text) - ASCII)) - bad > 4 * bad:
                return text.removeprefix("\ufeff")
            codec = _guess(html)
    return html.decode(codec, "replace").removeprefix("\ufeff")


def utf8_html(html: bytes | str, content_type: str | None = None) -> bytes:
    """The page of `decode_html` in UTF-8, without recoding what is UTF-8 already."""
    if isinstance(html, bytes) and declared_codec(html, content_type) in ("utf-8", None):
        try:
            html.decode("utf-8")
        except UnicodeDecodeError:
            pass
        else:
            return html.removeprefix(codecs.BOM_UTF8)
    return decode_html(html, content_type).encode("utf-8")


def _guess(html: bytes) -> str:
    from resiliparse.parse.encoding import detect_encoding

    codec = codec_of(detect_encoding(html) or "")
    return codec if codec and codec != "utf-8" else "cp1252"  # it is not valid UTF-8
