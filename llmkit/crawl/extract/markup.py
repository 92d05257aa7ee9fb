"""Prepare the bytes of a page for parsing: character set, limits, and markup that HTML parsers get wrong.

    html = utf8_html(body, "text/html; charset=koi8-r")
    check_size(html)    # raises PageLimitError
    tree = LexborHTMLParser(plain_html(html))
    inline_formulas(tree, html)

Parsing time is quadratic in what the limits bound, so all HTML is checked before it is parsed, including HTML in JSON
or scripts. Fixes that few pages need first search for a marker, and cost other pages almost nothing.
"""

from __future__ import annotations

import codecs
import re
from contextlib import suppress

import numpy as np
import orjson
from selectolax.lexbor import LexborHTMLParser, LexborNode
from webencodings import lookup

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_SNIFFED_BYTES = 1024  # how far browsers look for <meta charset>
_HEADER = re.compile(r"\bcharset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
_META = re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)
_XML = re.compile(rb"^\s*<\?xml\b[^>]*?\bencoding\s*=\s*[\"']([^\"'>]+)", re.IGNORECASE)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
# browsers decode these names as supersets of the named encodings: the Python codecs that do the same
_SUPERSETS = {"gbk": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949", "big5": "big5hkscs"}
MAX_BYTES = 16_000_000  # Common Crawl cuts pages at 5 MiB
MAX_NODES = 500_000
MAX_DEPTH = 1_000  # parsing time is quadratic in the depth: 100,000 nested <div> take 20 s
MAX_ATTRIBUTES = 5_000  # per element; quadratic too: 40,000 take 3 s
_MANY_TAGS = 20_000
# void elements, and those that browsers close implicitly or ignore: they add no depth
_FLAT_TAGS = (
    b"area base body br col colgroup dd dt embed frame head hr html img input li link meta option optgroup p param "
    b"rp rt source tbody td tfoot th thead tr track wbr"
)
_FLAT = frozenset(_FLAT_TAGS.split())
# unclosed ones extend to the end of the page, as in browsers; without "|\Z", 20,000 "<!--" took 10 s
_RAW_TEXT = re.compile(rb"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1|\Z)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(rb"<(/?)([a-zA-Z][^\s/<>]*)")
_QUOTED = re.compile(rb"\"[^\"]*\"|'[^']*'")
_WHOLE_TAG = re.compile(rb"<(?:[^>\"']+|\"[^\"]*\"|'[^']*')*")
# unclosed ones extend to the end of the page; no "<" in attributes, or every unclosed tag would scan the page
_RAW = rb"<!--.*?(?:-->|\Z)|<(?P<raw>script|style)\b[^<>]*(?<!/)>.*?(?:</(?P=raw)|\Z)"
_SWALLOWS = rb"script|style|title|textarea|iframe|noscript|noframes|template|object|canvas|select|audio|video|button"
_XHTML = re.compile(
    _RAW + rb"|<!\[CDATA\[(?P<cdata>.*?)(?:\]\]>|\Z)|<(?P<tag>" + _SWALLOWS + rb")(?P<attributes>\s[^<>]*)?/>",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(_RAW + rb"|<(?P<end>/?)template\b(?P<rest>[^<>]*)>", re.DOTALL | re.IGNORECASE)
_DISPLAY_STYLE = re.compile(r"\{\\(?:displaystyle|textstyle) (.*)\}", re.DOTALL)
_RENDERED = ".MathJax,.MathJax_Preview,.MathJax_Display,.MathJax_SVG,.MathJax_SVG_Display,.MathJax_CHTML,.mjx-chtml"


# zero-width spaces, soft hyphens, byte order marks, word joiners; also zero-width (non-)joiners next to ASCII, where
# they have no effect: they are needed in emoji, Persian and Indic scripts
_INVISIBLE = re.compile("[\u200b\u00ad\ufeff\u2060]|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])")
_PERHAPS_INVISIBLE = re.compile("[\u200b\u00ad\ufeff\u2060\u200c\u200d]")  # a quick check, in a fifth of the time


# ---- character sets


def codec_of(label: str) -> str | None:
    """Return the Python codec for the encoding that browsers use for a label; None for unknown labels.

    https://encoding.spec.whatwg.org/#names-and-labels
    """
    codec = lookup(label)
    if codec is None or codec.name in ("replacement", "x-user-defined"):
        return None
    return _SUPERSETS.get(codec.name, codec.codec_info.name)


def declared_codec(html: bytes, content_type: str | None) -> str | None:
    """Return the codec declared by byte order mark, HTTP header or the page's first 1,024 bytes, in this order."""
    for mark, codec in _BOMS:
        if html.startswith(mark):
            return codec
    match = _HEADER.search(content_type or "")
    if match and (codec := codec_of(match[1])):
        return codec
    start = _COMMENT.sub(b"", html[:_SNIFFED_BYTES])
    for pattern in (_META, _XML):
        inside = pattern.search(start)
        if inside and (codec := codec_of(inside[1].decode("latin-1"))):
            return "utf-8" if codec.startswith("utf-16") else codec  # it was readable as ASCII, so not UTF-16
    return None


def utf8_html(html: bytes | str, content_type: str | None = None) -> bytes:
    """Recode a page to UTF-8: from its declared encoding, else from UTF-8 if mostly valid, else by detection.

    Undecodable bytes become U+FFFD, lone surrogates in a `str` question marks.
    """
    if isinstance(html, str):
        return html.encode("utf-8", "replace")
    codec = declared_codec(html, content_type)
    if codec in ("utf-8", None):
        with suppress(UnicodeDecodeError):
            html.decode("utf-8")
            return html.removeprefix(codecs.BOM_UTF8)
    if codec is None:
        from resiliparse.parse.encoding import detect_encoding

        text = html.decode("utf-8", "replace")
        bad = text.count("\ufffd")
        # text in another encoding has almost no valid multi-byte UTF-8 sequences
        if sum(text.count(character) for character in set(text) if not character.isascii()) - bad > 4 * bad:
            codec = "utf-8"
        elif (codec := codec_of(detect_encoding(html) or "")) in (None, "utf-8"):
            codec = "cp1252"
    return html.decode(codec, "replace").removeprefix("\ufeff").encode("utf-8")


# ---- limits


class PageLimitError(Exception):
    """The page exceeds a limit; the message is the reason in the funnel."""


def check_size(html: bytes) -> None:
    """Raise PageLimitError ("too_large", "too_many_nodes" or "too_deep") for a page that is too expensive to parse."""
    if len(html) > MAX_BYTES:
        raise PageLimitError("too_large")
    data = np.frombuffer(html + b" ", np.uint8)
    at = np.flatnonzero(data[:-1] == ord("<"))
    if len(at) > MAX_NODES:
        raise PageLimitError("too_many_nodes")
    following = data[at + 1]
    starts = ((following | 32) >= ord("a")) & ((following | 32) <= ord("z"))
    room = np.diff(at, append=len(html))
    for start in at[starts & (room > 2 * MAX_ATTRIBUTES)].tolist():
        tag = _WHOLE_TAG.match(html, start, start + (1 << 20))
        if tag and len(_QUOTED.sub(b"", tag[0]).split()) > MAX_ATTRIBUTES:
            raise PageLimitError("too_many_nodes")
    # the largest rise of start tags minus end tags bounds the depth from above, unless some end tags have no start;
    # _MANY_TAGS nested in that way take 0.6 s
    level = np.cumsum(starts.astype(np.int64) - (following == ord("/")))
    climb = (level - np.minimum(np.minimum.accumulate(level), 0)).max(initial=0)
    if (climb > MAX_DEPTH or len(at) > _MANY_TAGS) and _nesting(html) > MAX_DEPTH:
        raise PageLimitError("too_deep")


def _nesting(html: bytes) -> int:
    """Return the approximate maximum nesting depth."""
    stack: list[bytes] = []
    opened: dict[bytes, int] = {}
    deepest = 0
    for closing, name in _TAG.findall(_RAW_TEXT.sub(b"", html)):
        name = name.lower()
        if name in _FLAT:
            continue
        if not closing:
            stack.append(name)
            opened[name] = opened.get(name, 0) + 1
            deepest = max(deepest, len(stack))
        elif opened.get(name):  # browsers ignore an end tag without a start
            while (last := stack.pop()) != name:
                opened[last] -= 1
            opened[name] -= 1
    return deepest


# ---- markup


def visible(text: str) -> str:
    """Remove invisible characters that carry no meaning."""
    return text if text.isascii() or not _PERHAPS_INVISIBLE.search(text) else _INVISIBLE.sub("", text)


def plain_html(html: bytes) -> bytes:
    """Close XHTML's self-closed elements, turn CDATA into text, and declarative shadow roots into elements."""
    open_roots: list[bool] = []  # for each open <template>: is it a shadow root

    def closed(match: re.Match[bytes]) -> bytes:
        if match["cdata"] is not None:
            return match["cdata"].replace(b"&", b"&amp;").replace(b"<", b"&lt;")
        if match["tag"] is None:
            return match[0]
        return b"<%s%s></%s>" % (match["tag"], match["attributes"] or b"", match["tag"])

    def without_root(match: re.Match[bytes]) -> bytes:
        if match["rest"] is None:
            return match[0]
        if match["end"]:
            return b"</div>" if open_roots and open_roots.pop() else match[0]
        open_roots.append(b"shadowroot" in match["rest"])
        return b"<div>" if open_roots[-1] else match[0]

    head = html[:1000]
    if b"<?xml" in head or b"http://www.w3.org/1999/xhtml" in head:
        html = _XHTML.sub(closed, html)
    return _TEMPLATE.sub(without_root, html) if b"shadowroot" in html else html


def inline_formulas(tree: LexborHTMLParser, html: bytes) -> None:
    """Replace each formula by one line of text: its TeX source if the page has it, else linearized MathML."""
    if b"math" not in html:  # the search takes .1 ms in a page of 300 kB
        return
    if b"math/" in html:
        scripts = [node for node in tree.css("script") if (node.attributes.get("type") or "").startswith("math/")]
        if scripts:
            for node in reversed(tree.css(_RENDERED)):  # innermost first
                if not node.css("script"):
                    node.decompose()
        for node in scripts:
            source = node.text() or ""
            if "mml" in (node.attributes["type"] or ""):
                inner = _parsed(source)
                formula = inner.css_first("math") if inner is not None else None
                source = _formula(formula) if formula is not None else ""
            node.replace_with(_one_line(source))
    if b"<math" not in html:
        return
    for node in tree.css("mjx-math"):
        node.decompose()
    for node in tree.css(".katex-html"):  # next to its MathML
        if node.prev is not None and node.prev.tag == "span":
            node.decompose()
    for node in reversed(tree.css("math")):
        element, text = node, _one_line(_formula(node))
        # on Wikipedia it is hidden, for screen readers, next to an image
        above = node.parent
        if above is not None and above.tag == "span" and "display" in (above.attributes.get("style") or ""):
            element = above if len(above.css("math")) == 1 else node
        element.replace_with(text)


def _parsed(html: str) -> LexborHTMLParser | None:
    """Parse HTML from a script or JSON, which the check of the page did not cover; None if it exceeds the limits."""
    try:
        check_size(html.encode("utf-8", "replace"))
    except PageLimitError:
        return None
    return LexborHTMLParser(html)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    match = _DISPLAY_STYLE.fullmatch(text)
    return match[1].strip() if match else text


def _formula(math: LexborNode) -> str:
    for note in math.css("annotation"):
        if "tex" in (note.attributes.get("encoding") or "").lower() and (text := note.text().strip()):
            return text
    return math.attributes.get("alttext") or _flat(math, 0)


def _flat(node: LexborNode, depth: int) -> str:
    """Linearize MathML, as in `1/2`, `x^{n+1}` and `sqrt(x)`."""
    if node.tag == "-text":
        return (node.text_content or "").strip()
    if depth > 50:
        return node.text().strip()
    children = [child for child in node.iter() if child.tag not in ("annotation", "annotation-xml")]
    if not children:
        return "".join((node.text() or "").split()) if node.tag != "mtext" else node.text()
    texts = [_flat(child, depth + 1) for child in children]
    script = {"msup": "^", "msub": "_", "mover": "^", "munder": "_"}.get(node.tag or "")
    if script and len(texts) == 2:
        return texts[0] + script + _group(texts[1], "{}")
    if node.tag in ("msubsup", "munderover") and len(texts) == 3:
        return f"{texts[0]}_{_group(texts[1], '{}')}^{_group(texts[2], '{}')}"
    if node.tag == "mfrac" and len(texts) == 2:
        return f"{_group(texts[0], '()')}/{_group(texts[1], '()')}"
    if node.tag == "msqrt":
        return f"sqrt({''.join(texts)})"
    if node.tag == "mroot" and len(texts) == 2:
        return f"root({texts[0]}, {texts[1]})"
    if node.tag == "mtr":
        return ", ".join(texts)
    return ("; " if node.tag == "mtable" else "").join(texts)


def _group(text: str, brackets: str) -> str:
    return text if len(text) < 2 or (text.isalnum() and brackets == "()") else brackets[0] + text + brackets[1]


def article_body(html: bytes) -> str:
    """Return the longest `articleBody` in the page's JSON-LD as text, one line per paragraph; "" if there is none."""
    if b"articleBody" not in html:
        return ""
    longest = ""
    for node in LexborHTMLParser(html).css('script[type="application/ld+json"]'):
        try:
            todo = [orjson.loads(node.text())]
        except ValueError:
            continue
        while todo:
            value = todo.pop()
            if isinstance(value, dict):
                body = value.get("articleBody")
                if isinstance(body, str) and len(body) > len(longest):
                    longest = body
            if isinstance(value, (dict, list)):
                todo.extend(value.values() if isinstance(value, dict) else value)
    if "<" in longest or "&" in longest:
        tree = _parsed(longest)
        longest = tree.body.text(separator="\n") if tree is not None and tree.body is not None else ""
    return "\n".join(line for part in longest.splitlines() if (line := " ".join(part.split())))
