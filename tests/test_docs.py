"""The documentation cannot lie: what is generated is as the code says."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from llmkit.cli import COMMANDS
from llmkit.config import flag_of, option_fields

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_what_the_code_says(generate):
    page = (DOCS / "options.md").read_text()
    assert page == generate.options_page(), "run python docs/generate.py (make docs does)"
    for name, (module, config_name, _) in COMMANDS.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        config_class = getattr(__import__(module, fromlist=[config_name]), config_name)
        assert all(f"`{flag_of(item)}` |" in section for item in option_fields(config_class))


def test_the_figures_of_the_readme_are_those_of_the_demo(generate):
    assert (ROOT / "README.md").read_text() == generate.readme_page(), "run python docs/generate.py (make docs does)"


def test_a_row_of_the_demo_is_read_as_it_was_printed(generate):
    rows = generate.demo_rows()
    printed = (DOCS / "demo.md").read_text()
    assert len(rows) == printed.split("```")[1].strip().count("\n")
    for (stage, figure), (value, beside) in rows.items():
        assert float(value) == float(value) and f"{stage} " in printed and f" {figure}" in printed
        assert not beside or float(beside.rsplit(" ", 1)[1]) is not None


def test_every_page_stands_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in navigation] == []
