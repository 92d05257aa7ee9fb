"""A page is cut into the blocks that a browser sets apart, with bounded work."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np
import pytest

from llmkit.crawl.extract.blocks import TAG_BITS, ElementKey, cut_blocks
from llmkit.crawl.extract.features import NameWeights, block_features, key_tokens, name_words
from llmkit.crawl.extract.markup import MAX_BYTES, MAX_DEPTH, MAX_NODES, PageLimitError


def texts(html: str) -> list[str]:
    return cut_blocks(html.encode()).blocks.text


def test_blocks_are_cut_where_a_browser_starts_a_new_line() -> None:
    html = "bare <b>bo</b>ld <i>it</i><p>one<p>two<ul><li>a<div>b</div>c<li>d</ul><table><tr><td>1<td>2</table>tail"
    assert texts(html) == ["bare bold it", "one", "two", "a", "b", "c", "d", "1", "2", "tail"]


def test_spaces_between_inline_elements_stay_and_none_are_made_up() -> None:
    assert texts("<p><b>W</b>ord\n <i>a</i>\t<i>b</i><span>c</span>\xa0d</p>") == ["Word a bc d"]


def test_one_br_is_a_line_and_two_are_a_new_block() -> None:
    assert texts("a<br>b<br>\n<br>c<br><br><br>d<br>") == ["a\nb", "c", "d"]


def test_preformatted_text_keeps_its_lines_and_indents() -> None:
    assert texts("<pre>\ndef f():\n\treturn <b>1</b>\n\n</pre><p>x\n y</p>") == ["def f():\n        return 1", "x y"]


def test_scripts_styles_and_form_choices_are_no_text_and_noscript_is() -> None:
    html = "<script>x</script><style>y</style><svg><text>z</text></svg><select><option>o</select><textarea>t</textarea>"
    assert texts(html + "<template><p>u</template><!-- c --><noscript><p>thread</noscript>") == ["thread"]


def test_a_consent_dialog_is_no_text() -> None:
    dialog = "<div id=onetrust-consent-sdk><div><p>We value your privacy</p><button>Accept</button></div></div>"
    assert texts(f"<main><p>a</p>{dialog}<p>b</p></main>{dialog}") == ["a", "b"]


def test_what_is_dropped_parts_no_text_and_ends_with_its_element() -> None:
    icon = "<svg><g><title>x</title><text>y</text></g></svg>"
    assert texts(f"<p>a{icon}b</p><div><p><b>c{icon}</b></p></div>d<div><select><option>o</select></div>") == [
        "ab",
        "c",
        "d",
    ]


def test_a_block_knows_its_elements() -> None:
    tree = cut_blocks(b'<title> A\n title </title><nav><a href=x>Home</a></nav><article class="post Body"><p>Text')
    nav, paragraph = (tree.elements.tags[leaf] for leaf in tree.blocks.leaf)
    assert tree.title == "A title"
    assert nav & TAG_BITS["nav"] and not paragraph & TAG_BITS["nav"]
    assert paragraph & TAG_BITS["article"] and paragraph & TAG_BITS["p"]
    assert list(tree.blocks.link_chars) == [4, 0]
    assert ElementKey("article", "post Body") in tree.elements.keys
    body = 0
    assert (tree.elements.first_block[body], tree.elements.end_block[body]) == (0, 2)


def test_short_text_that_is_not_displayed_is_dropped_and_a_folded_part_stays() -> None:
    folded = "What a click unfolds. " * 10
    html = (
        '<div style="display: none"><p>a<p>b</div><p hidden>c<p>d <span style="display:none">e</span>f'
        f"<div hidden><p>{folded}</div><p hidden=until-found>g"
    )
    assert texts(html) == ["d f", folded.strip(), "g"]
    tree = cut_blocks(b"<p aria-hidden=true>a<p>b")
    assert [bool(tree.elements.tags[leaf] & TAG_BITS["(hidden)"]) for leaf in tree.blocks.leaf] == [True, False]


XHTML = "<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'><head>"


@pytest.mark.parametrize("tag", ["script src='x'", "title", "style", "textarea", "iframe src='x'", "noscript"])
def test_self_closed_elements_of_xhtml_swallow_nothing(tag: str) -> None:
    html = f"{XHTML}<{tag}/></head><body><{tag}/><p>one</p><script>a = '<style/>'</script><p><![CDATA[a < b & c]]></p>"
    assert texts(html) == ["one", "a < b & c"]


def test_declarative_shadow_roots_are_read() -> None:
    html = "<div><template shadowrootmode=open><p>shadow</p><template><p>x</p></template></template><p>light</div>"
    assert texts(html) == ["shadow", "light"]


@pytest.mark.parametrize(
    "formula",
    [
        '<math alttext="E=mc^2"><mi>E</mi><mo>=</mo></math>',
        '<math><semantics><mi>E</mi><annotation encoding="application/x-tex">E=mc^2</annotation></semantics></math>',
        "<math><mi>E</mi><mo>=</mo><mi>m</mi><msup><mi>c</mi><mn>2</mn></msup></math>",
        '<span class=katex><span class=katex-mathml><math alttext="E=mc^2"></math></span>'
        "<span class=katex-html aria-hidden=true>E=mc2</span></span>",
        '<span class=MathJax_Preview>E</span><span class=MathJax>Emc2</span><script type="math/tex">E=mc^2</script>',
        '<span style="display: none;"><math alttext="{\\displaystyle E=mc^2}"></math></span><img src=x>',
    ],
)
def test_a_formula_comes_once_and_in_its_line(formula: str) -> None:
    assert texts(f"<p>We know {formula} to be true.") == ["We know E=mc^2 to be true."]


def test_presentation_of_mathml_is_written_flat() -> None:
    fraction = "<mfrac><mrow><mi>a</mi><mo>+</mo><mn>1</mn></mrow><msqrt><mi>x</mi></msqrt></mfrac>"
    assert texts(f"<p><math>{fraction}<mo>&lt;</mo><mfrac><mn>1</mn><mn>2</mn></mfrac></math>") == [
        "(a+1)/(sqrt(x))<1/2"
    ]


def test_characters_without_room_or_meaning_go_and_joiners_of_scripts_stay() -> None:
    assert texts("<p>\ufeffex&shy;am\u200bp\u2060le\u200c<p>\u200b<p>می\u200cروم \U0001f469\u200d\U0001f4bb") == [
        "example",
        "می\u200cروم \U0001f469\u200d\U0001f4bb",
    ]


def test_words_of_names() -> None:
    assert name_words("postBody-12_XMLView") == ["post", "body", "xml", "view"]
    assert name_words("post-body__item") == ["post", "body", "", "item"]
    assert key_tokens(ElementKey("p", "postBody nav")) == ["<p", "post", "body", "nav"]
    weights = NameWeights({"<p": 1.0, "post": 0.5, "nav": -2.0})
    assert weights.of([ElementKey("p", "postBody nav"), ElementKey("my-tag", "unknown")]) == [-0.5, 0.0]


@pytest.mark.parametrize("html", ["", "\0", "<", "</p>", "<frameset><frame></frameset>", "<!--", "&#0;&#xD800;"])
def test_nearly_nothing_is_cut_into_hardly_anything(html: str) -> None:
    assert len(texts(html)) <= 1


def test_deep_pages_are_refused_before_they_are_parsed() -> None:
    start = time.process_time()
    for tag in ("div", "b", "span"):
        with pytest.raises(PageLimitError, match="too_deep"):
            cut_blocks(f"<{tag}>".encode() * 100_000)
        with pytest.raises(PageLimitError, match="too_deep"):
            cut_blocks(f"<{tag}>".encode() * 100_000 + f"</{tag}>".encode() * 100_000)
    assert time.process_time() - start < 10  # the parser takes 20 s for one of them


def test_a_page_of_the_greatest_depth_is_cut() -> None:
    depth = MAX_DEPTH - 2
    tree = cut_blocks(b"<div>" * depth + b"deep" + b"</div>" * depth)
    assert tree.blocks.text == ["deep"]
    assert max(tree.elements.depth) == depth
    columns = block_features(tree, NameWeights({"<div": 1.0}))
    assert columns["path_weight"] == depth  # summed in 10 doublings, the body left out


@pytest.mark.parametrize("tag", ["p", "li", "br", "td", "img"])
def test_elements_that_close_themselves_are_not_deep(tag: str) -> None:
    assert len(texts(f"<{tag}>x" * 5000)) in (1, 5000)  # <td> outside a table is no element


def test_end_tags_without_start_do_not_hide_depth() -> None:
    with pytest.raises(PageLimitError, match="too_deep"):
        cut_blocks(b"<div></x>" * 100_000)


def test_markup_in_scripts_is_not_deep() -> None:
    assert texts("<script>" + "a='<div>';" * 5000 + "</script><p>text") == ["text"]


@pytest.mark.parametrize(
    "piece",
    [
        b"<!--",
        b'<p title="',
        b"<script>",
        b"<style",
        b"<div <",
        b"<p '>\"",
        b"&",
        b"</",
        b"<?xml <script ",
        b"<?xml <script/>",
        b"<?xml <![CDATA[",
        b"shadowroot<template ",
        b"shadowroot<template>",
        b"<math>",
        b"<math><mi>x</mi></math>",
        b"<div hidden>x",
    ],
)
def test_markup_without_end_takes_no_longer_than_other(piece: bytes) -> None:
    start = time.process_time()
    with suppress(PageLimitError):
        cut_blocks(piece * 100_000)
    assert time.process_time() - start < 5


def test_big_pages() -> None:
    with pytest.raises(PageLimitError, match="too_large"):
        cut_blocks(b"x" * (MAX_BYTES + 1))
    with pytest.raises(PageLimitError, match="too_many_nodes"):
        cut_blocks(b"<p>x" * (MAX_NODES + 1))
    with pytest.raises(PageLimitError, match="too_many_nodes"):
        cut_blocks(b'<p title=">" ' + b" ".join(b"a%d" % n for n in range(40_000)) + b">x")
    assert texts('<img src="data:' + "a b " * 50_000 + '"><p>x' + " y" * 50_000)[0][:5] == "x y y"
    assert [len(text) for text in texts("x" * 1_000_000)] == [1_000_000]


def test_features_do_not_depend_on_the_language() -> None:
    """Chinese, whose words no space parts, measures as prose like the English of the same length does."""
    english = "<p>" + "The council said on Monday that the bridge will close, for two weeks of repairs. " * 3
    chinese = "<p>" + "市议会周一表示、这座桥梁将关闭两周进行维修工作、请居民绕道而行。" * 3
    for html in (english, chinese):
        columns = block_features(cut_blocks(html.encode()), NameWeights({}))
        assert columns["words"] > np.log1p(40)
        assert columns["stops"] == np.log1p(3)
        assert columns["commas"] >= np.log1p(3)
        assert columns["half_inside"]


def test_all_features_are_finite_on_odd_text() -> None:
    html = "<p>\U0001f600\U0001f600</p><p>\u200b</p><table><tr><td>-</table><h1>\u202e</h1><p>" + "ก" * 50
    tree = cut_blocks(html.encode())
    for name, values in block_features(tree, NameWeights({})).items():
        assert np.isfinite(values).all(), name
