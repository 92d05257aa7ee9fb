"""One page's way through the steps, the recipe and the funnel."""

from __future__ import annotations

import pytest
from archives import http, record
from archives import page as page_record
from web import SENTENCES, prose

from llmkit.crawl import page as page_module
from llmkit.crawl.judge import Judge, Worker
from llmkit.crawl.output import Funnel
from llmkit.crawl.page import Batch, Document, Dropped, Frame, Outcome, Page, Part
from llmkit.crawl.recipe import NAMED, STEPS, Recipe, as_json, read_recipe, recipe_toml
from llmkit.errors import UserError

tomllib = pytest.importorskip("tomllib")  # Python 3.11


def page_with(text: str, **record) -> Page:
    return Page("in.jsonl", 3, None, None, None, text, record)


def judged(text: str, recipe: Recipe = Recipe()) -> Document | Dropped:  # noqa: B008
    return Judge(recipe)(page_with(text))


GOOD = "\n".join(prose(1))


def test_prose_stays():
    document = judged(GOOD)
    assert isinstance(document, Document) and (document.text, document.language) == (GOOD, "en")


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
    dropped = judged(text)
    assert isinstance(dropped, Dropped) and (dropped.step, dropped.reason) == (step, reason)


def test_each_page_is_identified_once_and_only_where_it_matters(monkeypatch):
    import llmkit.text.language as language

    asked = []
    monkeypatch.setattr(language, "identify", lambda text: asked.append(text) or ("en", 0.9))
    judged(GOOD)
    assert len(asked) == 1
    judged(GOOD, Recipe(steps=("c4", "fineweb")))
    assert len(asked) == 1


def test_a_document_keeps_what_it_came_with():
    own = {"id": 7, "source": "books", "title": "Ours", "deep": {"a": [None]}, "empty": None}
    document = Document(page_with(GOOD, **own, language="xx"), GOOD, language="en", language_score=0.9)
    record = document.record()
    assert record["language"] == "en" and document.record(tell_language=False)["language"] == "xx"
    assert {key: record[key] for key in own} == own
    assert next(iter(record)) == "text" and "url" not in record
    assert Document(page_with("x"), "x").record() == {"text": "x", "id": "in.jsonl:3", "source": "in.jsonl"}


def test_a_part_comes_through_bytes_as_it_was():
    frames = [Frame("a.jsonl", "jsonl", number, b'{"text": "%d"}' % number) for number in (1, 2)]
    (part,) = Worker(Recipe(steps=("near_duplicates",)))(Batch(frames, 0, 0.5))
    assert [outcome.line for outcome in part.outcomes] == [
        b'{"text":"1","id":"a.jsonl:1","source":"a.jsonl"}\n',
        b'{"text":"2","id":"a.jsonl:2","source":"a.jsonl"}\n',
    ]
    skipped = Part([Outcome("read", "bad_json", "a.jsonl", 9)], seconds={"read": 0.25})
    for whole in (part, skipped, Part.joined([part, skipped, part])):
        back = Part.unpack(whole.pack())
        assert (back.outcomes, back.seconds) == (whole.outcomes, whole.seconds)
        assert (back.signatures is None) == (whole.signatures is None)
        assert whole.signatures is None or (back.signatures == whole.signatures).all()


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
