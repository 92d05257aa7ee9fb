"""Markup that a parser of HTML alone gets wrong: XHTML's closed tags, shadow roots, formulas, and text in JSON-LD.

Each function looks for a few bytes first, so that the many pages without any of these cost next to nothing.
"""

from __future__ import annotations

import re

import orjson
from selectolax.lexbor import LexborHTMLParser, LexborNode

from llmkit.crawl.extract.limits import PageLimitError, check_size

# what has no end runs to the page's; attributes hold no "<", or every unclosed tag would look through the page
_RAW = rb"<!--.*?(?:-->|\Z)|<(?P<raw>script|style)\b[^<>]*(?<!/)>.*?(?:</(?P=raw)|\Z)"
_SWALLOWS = rb"script|style|title|textarea|iframe|noscript|noframes|template|object|canvas|select|audio|video|button"
_XHTML = re.compile(
    _RAW + rb"|<!\[CDATA\[(?P<cdata>.*?)(?:\]\]>|\Z)|<(?P<tag>" + _SWALLOWS + rb")(?P<attributes>\s[^<>]*)?/>",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(_RAW + rb"|<(?P<end>/?)template\b(?P<rest>[^<>]*)>", re.DOTALL | re.IGNORECASE)
_DISPLAY_STYLE = re.compile(r"\{\\(?:displaystyle|textstyle) (.*)\}", re.DOTALL)
_RENDERED = ".MathJax,.MathJax_Preview,.MathJax_Display,.MathJax_SVG,.MathJax_SVG_Display,.MathJax_CHTML,.mjx-chtml"


# zero-width spaces, soft hyphens, byte order marks, word joiners; joiners and non-joiners beside ASCII, where they join
# nothing: they stay in emoji, in Persian and in the scripts of India
_INVISIBLE = re.compile("[\u200b\u00ad\ufeff\u2060]|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])")
_PERHAPS_INVISIBLE = re.compile("[\u200b\u00ad\ufeff\u2060\u200c\u200d]")  # in a fifth of the time


def visible(text: str) -> str:
    """The text without characters that take no room and carry no meaning."""
    return text if text.isascii() or not _PERHAPS_INVISIBLE.search(text) else _INVISIBLE.sub("", text)


def plain_html(html: bytes) -> bytes:
    """The page with XHTML's self-closed elements closed, CDATA as text, and declarative shadow roots as elements."""
    head = html[:1000]
    if b"<?xml" in head or b"http://www.w3.org/1999/xhtml" in head:
        html = _XHTML.sub(_closed, html)
    if b"shadowroot" in html:
        roots: list[bool] = []  # of the open templates
        html = _TEMPLATE.sub(lambda tag: _root(tag, roots), html)
    return html


def _closed(match: re.Match[bytes]) -> bytes:
    if match["cdata"] is not None:
        return match["cdata"].replace(b"&", b"&amp;").replace(b"<", b"&lt;")
    if match["tag"] is None:
        return match[0]
    return b"<%s%s></%s>" % (match["tag"], match["attributes"] or b"", match["tag"])


def _root(match: re.Match[bytes], roots: list[bool]) -> bytes:
    if match["rest"] is None:
        return match[0]
    if match["end"]:
        return b"</div>" if roots and roots.pop() else match[0]
    roots.append(b"shadowroot" in match["rest"])
    return b"<div>" if roots[-1] else match[0]


def inline_formulas(tree: LexborHTMLParser, html: bytes) -> None:
    """Put each formula once, as a line of text, in its place: TeX where the page has it, else MathML written flat."""
    if b"math" not in html:  # to look through a page of 300 kB takes .1 ms
        return
    if b"math/" in html:
        scripts = [node for node in tree.css("script") if (node.attributes.get("type") or "").startswith("math/")]
        if scripts:
            for node in reversed(tree.css(_RENDERED)):  # what is within first
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
    for node in tree.css(".katex-html"):  # beside its MathML
        if node.prev is not None and node.prev.tag == "span":
            node.decompose()
    for node in reversed(tree.css("math")):
        element, text = node, _one_line(_formula(node))
        # Wikipedia's is for screen readers, hidden behind an image
        above = node.parent
        if above is not None and above.tag == "span" and "display" in (above.attributes.get("style") or ""):
            element = above if len(above.css("math")) == 1 else node
        element.replace_with(text)


def _parsed(html: str) -> LexborHTMLParser | None:
    """HTML that stands in a script or in JSON, where the page's own check has not seen it; None beyond the limits."""
    try:
        check_size(html.encode("utf-8", "replace"))
    except PageLimitError:
        return None
    return LexborHTMLParser(html)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    whole = _DISPLAY_STYLE.fullmatch(text)
    return whole[1].strip() if whole else text


def _formula(math: LexborNode) -> str:
    for note in math.css("annotation"):
        if "tex" in (note.attributes.get("encoding") or "").lower() and (text := note.text().strip()):
            return text
    return math.attributes.get("alttext") or _flat(math, 0)


def _flat(node: LexborNode, depth: int) -> str:
    """MathML in a line, such as `1/2`, `x^{n+1}` and `sqrt(x)`."""
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
    """The longest `articleBody` of the page's JSON-LD as text, a line a paragraph; "" where there is none."""
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
