"""One page's way through the steps, where parts come together, the funnel, the recipe and the scores."""

from __future__ import annotations

import pytest
from archives import http, record
from archives import page as page_record
from web import SENTENCES, prose

from llmkit.crawl import work_limit
from llmkit.crawl.funnel import Funnel
from llmkit.crawl.page import Page
from llmkit.crawl.recipe import STEPS, Recipe, as_json, read_recipe, recipe_toml
from llmkit.crawl.steps import Journey, Steps
from llmkit.errors import UserError

tomllib = pytest.importorskip("tomllib")  # Python 3.11


def journey(text: str, **record) -> Journey:
    return Journey(Page("in.jsonl", 3, None, None, None, text, record), text)


def follow(text: str, recipe: Recipe = Recipe()) -> Journey:  # noqa: B008
    page = journey(text)
    Steps(recipe).follow(page, {})
    return page


GOOD = "\n".join(prose(1))


def test_prose_stays():
    page = follow(GOOD)
    assert (page.step, page.reason, page.text, page.language) == (None, None, GOOD, "en")


@pytest.mark.parametrize(
    ("text", "step", "reason"),
    [
        ("Der alte Mann ging langsam durch den Wald und dachte an seine Kindheit.", "language", "other_language"),
        (" ".join(SENTENCES[:2]), "gopher_quality", "min_words"),
        ("\n".join([prose(2)[0]] * 8), "gopher_repetition", "max_duplicate_line_fraction"),
        (GOOD + "\nLorem ipsum dolor sit amet, said the printer.", "c4", "lorem_ipsum"),
    ],
)
def test_the_first_step_that_drops_a_page_is_told(text, step, reason):
    page = follow(text)
    assert page.step == step
    assert page.reason == reason


def test_each_page_is_identified_once_and_only_where_it_matters(monkeypatch):
    import llmkit.text.language as language

    asked = []
    monkeypatch.setattr(language, "identify", lambda text: asked.append(text) or ("en", 0.9))
    follow(GOOD)
    assert len(asked) == 1
    follow(GOOD, Recipe(steps=("c4", "fineweb")))
    assert len(asked) == 1


def test_a_document_keeps_what_it_came_with():
    page = journey(GOOD, id=7, source="books", title="Ours", deep={"a": [None]}, language="xx", empty=None)
    page.language, page.language_score = "en", 0.9
    document = page.document()
    assert document["language"] == "en" and page.document(tell_language=False)["language"] == "xx"
    assert {key: document[key] for key in ("id", "source", "title", "deep", "empty")} == {
        "id": 7,
        "source": "books",
        "title": "Ours",
        "deep": {"a": [None]},
        "empty": None,
    }
    assert next(iter(document)) == "text" and "url" not in document
    assert journey("x").document() == {"text": "x", "id": "in.jsonl:3", "source": "in.jsonl"}


# ---- the recipe


def test_a_recipe_goes_through_toml_unchanged(tmp_path):
    recipe = Recipe(steps=("url", "c4", "near_duplicates")).changed("c4", min_sentences=None, drop_curly_bracket=False)
    recipe = recipe.changed("url", blocklists=('a "list"', "ä\\ö\x7f\t"), banned_words=("x",))
    (tmp_path / "r.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    assert read_recipe(str(tmp_path / "r.toml")) == recipe
    assert as_json(recipe)["c4"]["min_sentences"] is None


def test_every_threshold_is_printed_and_explained():
    printed = recipe_toml(Recipe())
    tables = tomllib.loads(printed)
    assert tables["steps"] == list(STEPS)
    for name, table in as_json(Recipe()).items():
        if isinstance(table, dict):
            assert set(tables[name]) == set(table)
    assert "min_sentences = 5  # in the lines that are left" in printed


def test_steps_keep_their_order_whatever_order_they_are_named_in():
    assert Recipe(steps=("pii", "url", "c4")).steps == ("url", "c4", "pii")
    with pytest.raises(UserError, match="unknown step 'gopher'"):
        Recipe(steps=("gopher",))


# ---- the funnel


def test_the_funnel_adds_up():
    funnel = Funnel(["read", "c4", "pii"])
    for step, reason in [("read", "request"), (None, None), ("c4", "b"), ("c4", "a"), ("c4", "b"), (None, None)]:
        funnel.count(step, reason)
    funnel.spend({"c4": 1.5})
    rows = funnel.as_json()
    assert [(row["in"], row["kept"]) for row in rows] == [(6, 5), (5, 2), (2, 2)]
    assert rows[1]["dropped"] == {"b": 2, "a": 1} and list(rows[1]["dropped"]) == ["b", "a"]
    assert rows[1]["seconds"] == 1.5 and funnel.records == 6
    with pytest.raises(AssertionError, match="did not say why"):
        funnel.count("c4", None)
    funnel.kept += 1
    assert funnel.records == 7


def test_a_page_that_takes_for_ever_is_dropped_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(work_limit, "SECONDS", 0.1)
    (tmp_path / "mine.py").write_text(
        "import re\n\ndef slow(document):\n"
        "    try:\n        re.match('(a+)+b', 'a' * 40) if document['id'] == 'slow' else None\n"
        "    except Exception:\n        pass\n"
    )
    steps = Steps(Recipe(steps=("own",)).changed("own", filters=(f"py:{tmp_path}/mine.py:slow",)))
    stopped, next_one = journey(GOOD, id="slow"), journey(GOOD, id="good")
    steps.follow(stopped, {})
    steps.follow(next_one, {})
    assert (stopped.step, stopped.reason) == ("own", "too_slow")
    assert (next_one.step, next_one.reason) == (None, None)


def test_a_page_of_many_comments_does_not_stop_a_crawl(tmp_path, llmkit):
    comments = b"".join(b"<!-- widget %d -->\n" % number for number in range(40))
    body = comments + b"<center><p>" + " ".join(SENTENCES).encode() + b"</p></center>"
    (tmp_path / "a.warc").write_bytes(record(http(body, Content_Type="application/xml")) + page_record(b"fine"))
    out = llmkit("crawl-filter", tmp_path / "a.warc", "-o", tmp_path / "out.jsonl", "--only", "extract", timeout=120)
    assert out.returncode == 0, out.stderr


def test_the_recipe_of_our_own_keeps_documentation_and_drops_lists():
    page = GOOD + "\nconst port = { a: 1 };\nfor (item of list) { total += item.price; }"
    assert follow(page).reason == "curly_bracket"
    assert follow(page, read_recipe("llmkit")).reason is None
    menu = "\n".join(line.rstrip(".") if number % 4 else line for number, line in enumerate(prose(1)))
    assert follow(menu).reason is None
    assert follow(menu, read_recipe("llmkit")).reason == "min_terminal_line_fraction"
    assert read_recipe("fineweb") == Recipe()
