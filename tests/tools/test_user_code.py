"""User functions: errors are one line, in every command that uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.config import resolve
from llmkit.crawl.recipe import read_recipe
from llmkit.errors import UserError
from llmkit.stages import crawl_filter
from llmkit.stages.crawl_filter import CrawlFilterConfig
from llmkit.tools.toolbox import Toolbox, ToolResult
from llmkit.tools.user_code import UserFunction


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(body: str, name: str = "mine.py") -> None:
        Path(name).write_text(body)

    return write


@pytest.mark.parametrize(
    ("body", "spec", "message"),
    [
        ("def f(x): return x", "mine.py:f", r"^--own: expected py:FILE\.py:FUNCTION$"),
        ("def f(x): return x", "py:mine.py", r"^--own: expected py:FILE\.py:FUNCTION$"),
        ("def f(x): return x", "py:none.py:f", r"^--own: expected a file none\.py, found none$"),
        ("def f(x): return x", "py:mine.py:g", r"^--own: expected a function 'g' in mine\.py, found \['f'\]$"),
        ("def f(x:", "py:mine.py:f", r"^--own: .*mine\.py:1: SyntaxError: .*$"),
        ("\n1 / 0\ndef f(x): return x", "py:mine.py:f", r"mine\.py:2: ZeroDivisionError: division by zero$"),
        (
            "class E(Exception):\n    def __str__(self): return 1 / 0\ndef f(x):\n    raise E",
            "py:mine.py:f",
            r"mine\.py:4: E: its text raises ZeroDivisionError for pages",
        ),
        (
            "def f(x):\n    raise ValueError(f'no\\n{x}')",
            "py:mine.py:f",
            r"mine\.py:2: ValueError: no 5 for pages\.jsonl:7$",
        ),
        ("def f(x): raise ValueError", "py:mine.py:f", r"mine\.py:1: ValueError for pages\.jsonl:7$"),
    ],
)
def test_a_mistake_names_the_place(own, body, spec, message):
    own(body)
    with pytest.raises(UserError, match=message):
        UserFunction(spec, "--own")(5, "pages.jsonl:7")


def test_a_user_search(own):
    own("def find(query):\n    return query.upper() if query != 'odd' else 5\ndef never(query): return {}[query]")
    with Toolbox.parse(["calc", "search:py:mine.py:find"]) as tools:
        assert tools.names == ("calc", "search")
        assert tools.run("search", "comet") == ToolResult("COMET")
        with pytest.raises(UserError, match=r"^--tools search:py:mine\.py:find: expected a string, found a number"):
            tools.run("search", "odd")
    never = r"mine\.py:3: KeyError: 'comet' for 'comet'$"
    with Toolbox.parse(["search:py:mine.py:never"]) as tools, pytest.raises(UserError, match=never):
        tools.run("search", "comet")


PAGES = [{"id": name, "text": f"The {name} stands here. It is old."} for name in ("mill", "bridge", "well")]
RECIPE = 'steps = ["own"]\n[own]\nfilters = ["py:mine.py:short", "py:mine.py:wells"]\n'


@pytest.fixture
def filtered(own, llmkit, tmp_path):
    Path("pages.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PAGES))
    Path("mine.toml").write_text(RECIPE)

    def run(body: str, *more: str):
        own(body)
        return llmkit("crawl-filter", "pages.jsonl", "--recipe", "mine.toml", *more, cwd=tmp_path)

    return run


SHORT = "def short(document):\n    return 'short' if len(document['text']) < 10 else None\n"


def test_user_filters_in_any_process(filtered):
    body = SHORT + "def wells(document):\n    return 'well' if 'well' in document['text'] else None\n"
    alone = filtered(body, "--workers", "1")
    assert [json.loads(line)["id"] for line in alone.stdout.splitlines()] == ["mill", "bridge"]
    assert filtered(body, "--workers", "2").stdout == alone.stdout
    assert len(filtered(body, "--skip", "own").stdout.splitlines()) == 3
    explained = json.loads(filtered(body, "--explain", "well", "--quiet").stdout)
    assert (explained["step"], explained["reason"]) == ("own", "well")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def wells(document): return True", "py:mine.py:wells: expected None or a reason (str), found True"),
        ("def wells(document): return document['words']", "mine.py:3: KeyError: 'words' for mill\n"),
        ("def well(document): return None", "expected a function 'wells' in mine.py, found ['short', 'well']"),
    ],
)
def test_a_filter_that_fails_ends_the_run_in_one_line(filtered, body, message, tmp_path):
    for workers in "12":
        done = filtered(SHORT + body, "--workers", workers, "-o", "docs.jsonl")
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.startswith("llmkit: error: [own] filters: ") and done.stderr.count("\n") == 1
    assert not Path("docs.jsonl").exists()


def test_a_run_does_not_resume_with_a_changed_filter(filtered):
    body = SHORT + "def wells(document): return None\n"
    Path("mine.py").write_text(body)
    config = resolve(CrawlFilterConfig, {"inputs": ["pages.jsonl"], "recipe": "mine.toml", "out": "docs.jsonl"})
    assert crawl_filter._state(config, read_recipe("mine.toml")) is not None
    changed = filtered(body + "# another\n", "-o", "docs.jsonl", "--resume")
    assert changed.returncode == 2 and "mine.py was" in changed.stderr
