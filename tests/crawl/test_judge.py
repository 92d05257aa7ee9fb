"""A single page in the pipeline: steps, recipe and funnel."""

from __future__ import annotations

import pytest
from archives import http, record
from archives import page as page_record
from web import SENTENCES, prose

from llmkit.crawl import page as page_module
from llmkit.crawl.judge import Judge
from llmkit.crawl.page import Document, Dropped, Page
from llmkit.crawl.recipe import NAMED, Recipe, as_json, read_recipe, recipe_toml

tomllib = pytest.importorskip("tomllib")  # Python 3.11


def page_with(text: str, **record) -> Page:
    return Page("in.jsonl", 3, None, None, None, text, record)


def judged(text: str, recipe: Recipe = Recipe()) -> Document | Dropped:  # noqa: B008
    return Judge(recipe)(page_with(text))


GOOD = "\n".join(prose(1))


def test_a_document_keeps_its_other_fields():
    own = {"id": 7, "source": "books", "title": "Ours", "deep": {"a": [None]}, "empty": None}
    document = Document(page_with(GOOD, **own, language="xx"), GOOD, language="en", language_score=0.9)
    record = document.record()
    assert record["language"] == "en" and document.record(tell_language=False)["language"] == "xx"
    assert {key: record[key] for key in own} == own
    assert next(iter(record)) == "text" and "url" not in record
    assert Document(page_with("x"), "x").record() == {"text": "x", "id": "in.jsonl:3", "source": "in.jsonl"}


# ---- the recipe


def test_a_recipe_goes_through_toml_unchanged(tmp_path):
    recipe = Recipe(steps=("url", "c4", "near_duplicates")).changed("c4", min_sentences=None, drop_curly_bracket=False)
    recipe = recipe.changed("url", blocklists=('a "list"', "ä\\ö\x7f\t"), banned_words=("x",))
    (tmp_path / "r.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    assert read_recipe(str(tmp_path / "r.toml")) == recipe
    assert as_json(recipe)["c4"]["min_sentences"] is None


# ---- slow pages


def test_a_page_that_takes_for_ever_is_dropped_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "SECONDS", 0.1)
    (tmp_path / "mine.py").write_text(
        "import re\n\ndef slow(document):\n"
        "    try:\n        re.match('(a+)+b', 'a' * 40) if document['id'] == 'slow' else None\n"
        "    except Exception:\n        pass\n"
    )
    judge = Judge(Recipe(steps=("own",)).changed("own", filters=(f"py:{tmp_path}/mine.py:slow",)))
    stopped = judge(page_with(GOOD, id="slow"))
    assert isinstance(stopped, Dropped) and (stopped.step, stopped.reason) == ("own", "too_slow")
    assert isinstance(judge(page_with(GOOD, id="good")), Document)


def test_a_page_of_many_comments_does_not_stop_a_crawl(tmp_path, llmkit):
    comments = b"".join(b"<!-- widget %d -->\n" % number for number in range(40))
    body = comments + b"<center><p>" + " ".join(SENTENCES).encode() + b"</p></center>"
    (tmp_path / "a.warc").write_bytes(record(http(body, Content_Type="application/xml")) + page_record(b"fine"))
    out = llmkit("crawl-filter", tmp_path / "a.warc", "-o", tmp_path / "out.jsonl", "--only", "extract", timeout=120)
    assert out.returncode == 0, out.stderr


def test_the_recipe_of_our_own_keeps_documentation_and_drops_lists():
    code = GOOD + "\nconst port = { a: 1 };\nfor (item of list) { total += item.price; }"
    menu = "\n".join(line.rstrip(".") if number % 4 else line for number, line in enumerate(prose(1)))
    reasons = [getattr(judged(text, read_recipe(name)), "reason", None) for name in NAMED for text in (code, menu)]
    assert reasons == ["curly_bracket", None, None, "min_terminal_line_fraction"]
    assert read_recipe("fineweb") == Recipe()
