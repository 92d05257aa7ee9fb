"""The extracted main text of pages."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llmkit.crawl.extract.main_text import FAVOURS, MODEL, BlockModel, Extractor, best_blocks
from llmkit.crawl.extract.markup import MAX_BYTES
from llmkit.errors import UserError

MENU = "<nav><ul>" + "".join(f"<li><a href=/{n}>Section {n}</a>" for n in range(12)) + "</ul></nav>"
STORY = [
    "The town council voted on Monday to rebuild the old stone bridge, which has been closed since the flood.",
    "Work is to begin in spring and will take two years, said the mayor, who thanked the engineers for their plan.",
    "Shop owners on the north bank, cut off from their customers, had asked for a temporary crossing until then.",
    "\u0413\u043e\u0440\u043e\u0434 will pay half of the cost; the rest comes from a fund set up after the last flood.",
]
RELATED = "<aside class=related><h3>Related stories</h3>" + "".join(
    f"<p><a href=/r{n}>Another headline about something else, number {n}</a>" for n in range(6)
)
FOOTER = "</aside><footer><p>Copyright 2026 The Daily Example. All rights reserved.<p><a href=/t>Terms</a></footer>"


def article(body: str) -> str:
    head = "<!doctype html><html><head><meta charset=utf-8><title>Bridge to be rebuilt</title></head><body>"
    story = f"<main><article><h1>Bridge to be rebuilt</h1>{body}</article></main>"
    return f"{head}<header>{MENU}</header>{story}{RELATED}{FOOTER}"


def story() -> str:
    return article("<p>" + "<p>".join(STORY))


@pytest.mark.parametrize("name", ["model", "fast"])
def test_an_article_is_kept_without_the_boilerplate_around_it(name: str) -> None:
    extractor = Extractor(name)
    extractor.extract("<p>something else</p>" * 50)  # earlier pages do not affect the text
    for page in (story(), story().replace("charset=utf-8", "charset=windows-1251").encode("cp1251")):
        text, title, reason = extractor.extract(page, "text/html", "http://example.org/bridge")
        assert (title, reason) == ("Bridge to be rebuilt", None)
        assert all(paragraph in text for paragraph in STORY)
        assert not any(boilerplate in text for boilerplate in ("Section 3", "Related stories", "Copyright"))


def test_trafilatura_extracts_or_says_how_to_install_it() -> None:
    try:
        import trafilatura  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install trafilatura"):
            Extractor("trafilatura")
    else:
        assert STORY[0] in Extractor("trafilatura").extract(story(), None, None).text


def test_blocks_come_in_order_on_lines_of_their_own() -> None:
    code = "<pre>def cross():\n    return 'north bank'</pre>"
    page = article(f"<p>{'<p>'.join(STORY)}<h2>Costs</h2>{code}<ul><li>one<li>two</ul>")
    text = Extractor(threshold=0.0).extract(page).text
    assert "\n".join([*STORY, "Costs", "def cross():", "    return 'north bank'", "one", "two\n"]) in text


DOSES = "<table><thead><tr><th>Drug<th>Dose<th>Taken<tbody>" + "".join(
    f"<tr><td><a href=/{drug}>{drug}</a><td>{dose}<td>{taken}"
    for drug, dose, taken in [("aspirin", "100 mg", "daily"), ("ibuprofen", "", "8 h"), ("insulin", "4 IU", "")]
)


ROWS = ["Drug | Dose | Taken", "aspirin | 100 mg | daily", "ibuprofen | | 8 h", "insulin | 4 IU"]


def test_a_table_stays_whole_with_its_cells_apart() -> None:
    last = "The nurses of the town hand these out in the hall, where a list of what they gave hangs on the wall."
    lines = Extractor().extract(article(f"<p>{'<p>'.join(STORY)}{DOSES}</table><p>{last}")).text.split("\n")
    assert lines[-6:] == [STORY[-1], *ROWS, last]


def test_a_layout_table_does_not_become_rows() -> None:
    """It has the columns of a page, one of which contains a table."""
    columns = f"<table><tr><td><p>{'<p>'.join(STORY)}{DOSES}</table><td>{MENU}</table>"
    lines = Extractor(threshold=0.0).extract(columns).text.split("\n")
    assert lines == [*STORY, *ROWS, *(f"Section {n}" for n in range(12))]


def test_lines_and_paragraphs_in_a_cell_share_its_row_and_an_empty_corner_has_a_place() -> None:
    table = "<table><tr><td><th>North<th>South<tr><th>First<br>crossing<td><p>one<p>two<td>three</table>"
    assert Extractor(threshold=0.0).extract(table).text == "| North | South\nFirst crossing | one two | three"


def test_the_text_of_json_ld_is_used_for_a_page_without_text() -> None:
    body = "<p>" + "</p><p>".join(STORY) + "</p>"
    told = json.dumps({"@graph": [{"@type": "NewsArticle", "articleBody": body}]}).replace("</", "<\\/")
    page = f'<title>Bridge</title><script type="application/ld+json">{told}</script><p>Please enable JavaScript.'
    assert Extractor().extract(page) == ("\n".join(STORY), "Bridge", None)
    assert STORY[0] not in Extractor().extract(page.replace(told, told[:-9])).text


def test_the_threshold_and_the_favoured_metric_change_how_much_is_kept() -> None:
    html = story()
    lengths = [len(Extractor(threshold=threshold).extract(html).text) for threshold in (0.0, 0.05, 0.5, 0.95, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0 and Extractor(threshold=1.0).extract(html).reason == "empty"
    probabilities = np.array([0.9, 0.6, 0.45, 0.2, 0.05])
    kept = {favour: int(best_blocks(probabilities, np.full(5, 10), beta).sum()) for favour, beta in FAVOURS.items()}
    assert kept["precision"] <= kept["balance"] <= kept["recall"]
    assert kept["precision"] < kept["recall"]


@pytest.mark.parametrize("tag", ["h1", "h2"])
def test_a_page_of_two_sentences_keeps_its_heading(tag: str) -> None:
    text = "Flour, water, salt, and a night of patience: that is all it takes. Write to the baker for the rest."
    menu, footer = "<nav>Home | Shop | About us | Log in</nav>", "<footer>\u00a9 2026 All rights reserved</footer>"
    page = f"{menu}<article><{tag}>Bread</{tag}> <p>{text}</p></article><h2>Newsletter</h2>{footer}"
    assert Extractor().extract(page).text == f"Bread\n{text}"


def test_blocks_are_chosen_for_the_best_f1_that_can_be_expected() -> None:
    """Compared with all subsets; for independent blocks the sums are exactly the F1 of expectations."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        probabilities, words = generator.random(8), generator.integers(1, 50, 8)
        relevant = (probabilities * words).sum()

        def score(keep: np.ndarray, p: np.ndarray = probabilities, w: np.ndarray = words, r: float = relevant) -> float:
            return float(2 * (p * w)[keep].sum() / (w[keep].sum() + r))

        subsets = [np.array([bool(code >> bit & 1) for bit in range(8)]) for code in range(1, 256)]
        assert score(best_blocks(probabilities, words, 1.0)) == pytest.approx(max(map(score, subsets)))


def test_the_model_is_small_and_scores_do_not_depend_on_the_batch() -> None:
    assert MODEL.stat().st_size < 1_000_000
    model = BlockModel.load()
    rows = np.random.default_rng(0).normal(size=(len(model.feature_names), 5000)).astype(np.float32)
    alone = np.concatenate([model.of_features(rows[:, at : at + 1]) for at in range(0, 5000, 500)])
    assert np.array_equal(alone, model.of_features(rows)[::500])


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        (b"", "empty"),
        ("", "empty"),
        (b"<frameset><frame src=a></frameset>", "empty"),
        (b"<script>only()</script>", "empty"),
        (b"x" * (MAX_BYTES + 1), "too_large"),
        (b"<p>word " * 600_000, "too_many_nodes"),
        (b"<div>" * 100_000 + b"deep", "too_deep"),
        (b"\0" * 1000, "empty"),
    ],
)
def test_pages_without_text_or_beyond_a_limit_have_a_reason(html: bytes | str, reason: str) -> None:
    for name in ("model", "fast"):
        assert Extractor(name).extract(html) == ("", None, reason)


def extracted(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield URL and main text of an archive's HTML pages."""
    from llmkit.crawl.page import Page
    from llmkit.crawl.read.frames import Reader
    from llmkit.crawl.read.pages import page_of

    extractor = Extractor()
    for page in map(page_of, Reader([str(archive)])):
        if isinstance(page, Page) and page.html is not None:
            yield page.url or "", extractor.extract(page.html, page.content_type, page.url).text


@pytest.mark.shared
def test_word_f1_on_the_development_pages(shared_data: Path) -> None:
    """The model was trained on these pages, so this tests the code; the training script evaluates the model."""
    with gzip.open(shared_data / "web" / "dev.truth.jsonl.gz", "rt", encoding="utf-8") as lines:
        truth = {row["url"]: row.get("main_content") for row in map(json.loads, lines)}
    scores = []
    for url, text in islice(extracted(shared_data / "web" / "dev-03.warc.gz"), 120):
        if truth.get(url):
            words, true = (Counter(re.findall(r"\w+", side.lower())) for side in (text, truth[url]))
            scores.append(2 * (words & true).total() / (words.total() + true.total()))
    assert len(scores) > 100
    assert np.mean(scores) > 0.87


@pytest.mark.shared
def test_pages_of_many_languages(shared_data: Path) -> None:
    """Strings inside and outside of the main text, on pages that were not trained on."""
    with (shared_data / "web" / "intl.labels.jsonl").open(encoding="utf-8") as lines:
        labels = {row["url"]: row for row in map(json.loads, lines)}
    pages = dict(extracted(shared_data / "web" / "intl.warc.gz"))
    assert len(pages) > 200 and sum(not text for text in pages.values()) < 0.03 * len(pages)

    def share(kind: str) -> float:
        wanted = [(url, string) for url in pages for string in labels.get(url, {}).get(kind, [])]
        return sum(" ".join(string.split()) in " ".join(pages[url].split()) for url, string in wanted) / len(wanted)

    assert share("with") > 0.93  # .967
    assert share("without") < 0.22  # .167; resiliparse leaks .320
