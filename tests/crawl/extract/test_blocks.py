"""A page is split into the blocks that a browser displays, and the features of each block are computed."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.crawl.extract.blocks import cut_blocks
from llmkit.crawl.extract.features import NameWeights, block_features
from llmkit.crawl.extract.markup import MAX_DEPTH

CONSENT = "<div id=onetrust-consent-sdk><div><p>We value your privacy</p><button>Accept</button></div></div>"
ICON = "<svg><g><title>x</title><text>y</text></g></svg>"
FOLDED = "What a click unfolds. " * 10
XHTML = "<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'><head>"


def texts(html: str) -> list[str]:
    return cut_blocks(html.encode()).text


@pytest.mark.parametrize(
    ("html", "blocks"),
    [
        # a block begins when a browser starts a new line
        (
            "bare <b>bo</b>ld <i>it</i><p>one<p>two<ul><li>a<div>b</div>c<li>d</ul><table><tr><td>1<td>2</table>tail",
            ["bare bold it", "one", "two", "a", "b", "c", "d", "1", "2", "tail"],
        ),
        # spaces between inline elements are kept, and none are added
        ("<p><b>W</b>ord\n <i>a</i>\t<i>b</i><span>c</span>\xa0d</p>", ["Word a bc d"]),
        # one <br> starts a line, two a block
        ("a<br>b<br>\n<br>c<br><br><br>d<br>", ["a\nb", "c", "d"]),
        # preformatted text keeps its lines and indents
        ("<pre>\ndef f():\n\treturn <b>1</b>\n\n</pre><p>x\n y</p>", ["def f():\n        return 1", "x y"]),
        # <noscript> is text, these are not
        (
            "<script>x</script><style>y</style><svg><text>z</text></svg><select><option>o</select><template><p>u"
            "</template><!-- c --><textarea>t</textarea><noscript><p>thread</noscript>",
            ["thread"],
        ),
        (f"<main><p>a</p>{CONSENT}<p>b</p></main>{CONSENT}", ["a", "b"]),
        # a dropped element does not split text, and ends with its tag
        (f"<p>a{ICON}b</p><div><p><b>c{ICON}</b></p></div>d<div><select><option>o</select></div>", ["ab", "c", "d"]),
        # short hidden text is dropped, collapsed text is kept
        (
            '<div style="display: none"><p>a<p>b</div><p hidden>c<p>d <span style="display:none">e</span>f'
            f"<div hidden><p>{FOLDED}</div><p hidden=until-found>g",
            ["d f", FOLDED.strip(), "g"],
        ),
        # declarative shadow roots are read
        (
            "<div><template shadowrootmode=open><p>shadow</p><template><p>x</p></template></template><p>light</div>",
            ["shadow", "light"],
        ),
        # MathML is flattened
        (
            "<p><math><mfrac><mrow><mi>a</mi><mo>+</mo><mn>1</mn></mrow><msqrt><mi>x</mi></msqrt></mfrac>"
            "<mo>&lt;</mo><mfrac><mn>1</mn><mn>2</mn></mfrac></math>",
            ["(a+1)/(sqrt(x))<1/2"],
        ),
        # zero-width and control characters are dropped, joiners of scripts are kept
        (
            "<p>\ufeffex&shy;am\u200bp\u2060le\u200c<p>\u200b<p>می\u200cروم \U0001f469\u200d\U0001f4bb",
            ["example", "می\u200cروم \U0001f469\u200d\U0001f4bb"],
        ),
    ],
)
def test_blocks_are_those_that_a_reader_sees(html: str, blocks: list[str]) -> None:
    assert texts(html) == blocks


@pytest.mark.parametrize("html", ["", "\0", "<", "</p>", "<frameset><frame></frameset>", "<!--", "&#0;&#xD800;"])
def test_nearly_empty_pages_have_at_most_one_block(html: str) -> None:
    assert len(texts(html)) <= 1


@pytest.mark.parametrize("tag", ["script src='x'", "title", "style", "textarea", "iframe src='x'", "noscript"])
def test_self_closed_elements_of_xhtml_swallow_nothing(tag: str) -> None:
    html = f"{XHTML}<{tag}/></head><body><{tag}/><p>one</p><script>a = '<style/>'</script><p><![CDATA[a < b & c]]></p>"
    assert texts(html) == ["one", "a < b & c"]


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


def test_a_page_of_the_greatest_depth_is_cut() -> None:
    depth = MAX_DEPTH - 2
    tree = cut_blocks(b"<div>" * depth + b"deep" + b"</div>" * depth)
    assert tree.text == ["deep"]
    assert max(tree.elements.depth) == depth
    columns = block_features(tree, NameWeights({"<div": 1.0}))
    assert columns["path_weight"] == depth  # summed by doubling 10 times, without the body


def test_features_do_not_depend_on_the_language() -> None:
    """Chinese, without spaces between words, has the same prose features as English of the same length."""
    english = "<p>" + "The council said on Monday that the bridge will close, for two weeks of repairs. " * 3
    chinese = "<p>" + "市议会周一表示、这座桥梁将关闭两周进行维修工作、请居民绕道而行。" * 3
    for html in (english, chinese):
        columns = block_features(cut_blocks(html.encode()), NameWeights({}))
        assert columns["words"] > np.log1p(40)
        assert columns["stops"] == np.log1p(3)
        assert columns["commas"] >= np.log1p(3)
        assert columns["half_inside"]
