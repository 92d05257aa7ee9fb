"""The toolbox: parsing `--tools`, and results that a model can read."""

import json

import pytest

from llmkit.errors import UserError
from llmkit.tools import toolbox
from llmkit.tools.toolbox import RESULT_CHARACTERS, Toolbox, ToolResult


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"text": "The comet Varrow returns every 76 years."}) + "\n")
    return path


def test_tools_by_name(documents):
    with Toolbox.parse([f"calc, search:{documents}"]) as tools:
        assert tools.names == ("calc", "search")
        assert tools.run("calc", "17 * 3") == ToolResult("51")
        assert tools.run("search", "comet") == ToolResult("[1] The comet Varrow returns every 76 years.")


def test_a_mistake_of_the_model_is_a_result():
    with Toolbox.parse(["calc", "python"], sandbox="none", timeout=2) as tools:
        assert tools.run("calc", "1 / 0") == ToolResult("error: division by zero", failed=True)
        failed = tools.run("python", "1 / 0")
        assert failed.failed and failed.text.endswith("ZeroDivisionError: division by zero")
        assert tools.run("python", "while True: pass") == ToolResult("error: stopped after 2 seconds", failed=True)
        assert tools.run("python", "print(6 * 7)") == ToolResult("42")


def test_a_defect_of_a_tool_is_one_failed_call(monkeypatch, documents):
    def broken(*given, **named):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(toolbox, "calculate", broken)
    monkeypatch.setattr(toolbox, "run_python", broken)
    monkeypatch.setattr(toolbox.SearchIndex, "search", broken)
    with Toolbox.parse([f"calc,python,search:{documents}"], sandbox="none") as tools:
        for name in tools.names:
            assert tools.run(name, "x") == ToolResult(f"error: {name} failed (ZeroDivisionError)", failed=True)


def test_a_long_result_is_cut():
    with Toolbox.parse(["python"], sandbox="none") as tools:
        text = tools.run("python", "print('x' * 10000)").text
    assert text == "x" * RESULT_CHARACTERS + " [cut]"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("clac", "search:py:FILE.py:FUNCTION or py:FILE.py:FUNCTION, found 'clac'"),
        ("", "found 'nothing'"),
        ("search", "found 'search'"),
        ("calc:x", "found 'calc:x'"),
        ("calc,calc", "found calc twice"),
        ("search:none.jsonl", "none.jsonl: expected a file of documents"),
    ],
)
def test_unknown_tools_are_refused(wanted, reason):
    with pytest.raises(UserError, match=reason.replace(".", r"\.")):
        Toolbox.parse([wanted])


def test_python_needs_the_sandbox_by_default(monkeypatch):
    def refuse():
        raise UserError("no Landlock here; --sandbox none runs without one")

    monkeypatch.setattr(toolbox, "check_sandbox", refuse)
    with pytest.raises(UserError, match="no Landlock here"):
        Toolbox.parse(["python"])
    with Toolbox.parse(["python"], sandbox="none") as tools:
        assert tools.names == ("python",)
