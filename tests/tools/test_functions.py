"""User-defined functions as tools: their descriptions for the model, and their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.tools.toolbox import Toolbox, ToolResult

FILE = '''
from typing import Literal

def rain(city: str, days: int = 1, unit: Literal["mm", "inch"] = "mm", also: list[str] | None = None) -> str:
    """Tell whether it rains.

    In cities alone.

    Args:
        city: Name of
            a city.
        days (int): How far ahead: in days.
        unit: Of the amount.
        also: Other cities.

    Returns:
        A sentence.
    """
    if city == "Atlantis":
        raise ValueError("no such city")
    return {"city": city, "days": days} if days > 1 else f"dry in {city}"

def bare(city): "Something."
def silent(city: str): pass
def many(*cities: str): "Something."
def odd(city: complex): "Something."
def unknown(city: "City"): "Something."
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weather.py"
    path.write_text(FILE)
    return path


def test_a_function_is_described_as_transformers_does(file: Path) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    from transformers.utils import get_json_schema

    spec = spec_from_file_location("weather", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = get_json_schema(module.rain)["function"]
    theirs.pop("return")
    with Toolbox.parse([f"calc,py:{file}:rain"]) as tools:
        assert tools.names == ("calc", "rain")
        found = tools.schemas["rain"]["function"]
        assert tools.schemas["calc"]["function"]["parameters"]["required"] == ["expression"]
    also = found["parameters"]["properties"].pop("also")
    assert also == {
        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
        "description": "Other cities.",
    }
    theirs["parameters"]["properties"].pop("also")  # has OpenAPI's "nullable", which is not in JSON Schema
    assert found == theirs


def test_results_for_the_model(file: Path) -> None:
    with Toolbox.parse([f"py:{file}:rain"]) as tools:
        assert tools.run("rain", '{"city": "Oslo"}') == ToolResult("dry in Oslo")
        assert json.loads(tools.run("rain", '{"city": "Oslo", "days": 2}').text) == {"city": "Oslo", "days": 2}
        failures = {
            '{"city": "Atlantis"}': "error: ValueError: no such city",
            '{"town": "Oslo"}': "error: missing a required argument: 'city'",
            "Oslo": "error: Expecting value: line 1 column 1 (char 0)",
        }
        for given, text in failures.items():
            assert tools.run("rain", given) == ToolResult(text, failed=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bare", "expected a type hint for city"),
        ("silent", "expected a docstring that tells the model what silent does"),
        ("many", "expected named arguments, found \\*cities"),
        ("odd", "city: expected str, int, float"),
        ("unknown", "cannot evaluate the type hints: name 'City' is not defined"),
        ("absent", "expected a function 'absent'"),
    ],
)
def test_a_function_that_no_schema_describes_is_one_line(file: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        Toolbox.parse([f"py:{file}:{name}"])
    assert str(raised.value).startswith(f"--tools py:{file}:{name}: ")


def test_names_of_tools_are_their_own(file: Path) -> None:
    file.write_text('def calc(text: str) -> str:\n    "A calculator."\n    return text\n')
    with pytest.raises(UserError, match="expected a name that is not a built-in tool's, found calc"):
        Toolbox.parse([f"py:{file}:calc"])
    with pytest.raises(UserError, match=r"expected py:FILE\.py:FUNCTION"):
        Toolbox.parse(["py:weather"])
