"""`--help` answers at once: it imports nothing heavy, leads with an example and ends with the next command."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import MISSING
from importlib import import_module
from typing import get_type_hints

import pytest

from llmkit.cli import COMMANDS
from llmkit.config import Option, option_fields, option_of, resolve, value_type
from tests.test_house import modules

HEAVY = ["torch", "numpy", "triton", "transformers", "tokenizers", "safetensors", "selectolax", "fasttext"]
HEAVY += ["prompt_toolkit"]
LIST_MODULES = f"""
import sys
from llmkit.cli import run_command_line
code = run_command_line(sys.argv[1:])
print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=lambda a: " ".join(a) or "llmkit")
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_imports_nothing_heavy_and_guides(arguments: list[str], columns: str) -> None:
    command = [sys.executable, "-c", LIST_MODULES, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns})
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "\x1b" not in done.stdout and "╭" not in done.stdout  # plain without a terminal
    usage, example, options = (done.stdout.index(word) for word in ("Usage:", "Example", "Options:"))
    assert usage < example < options
    last = done.stdout.split("\n\n")[-1].strip()
    assert last.startswith("Next: llmkit ")


def test_help_on_a_terminal_is_drawn_by_rich(on_terminal) -> None:
    shown = on_terminal(sys.executable, "-m", "llmkit", "--help")
    assert "╭─" in shown and "train-bpe" in shown


def configs() -> list[type]:
    return [getattr(import_module(module), config) for module, config, _ in COMMANDS.values()]


def test_an_option_means_the_same_in_every_command() -> None:
    kinds: dict[str, set[tuple[object, ...]]] = {}
    for config_class in configs():
        for item in option_fields(config_class):
            details: Option = option_of(item)
            if not details.positional and item.name != "engine":  # Ray for a crawl, a server for a model
                # decoding and export allow lower precision than training, and an answer cannot be split
                own = ("int8", "float16", "q8_0", "split")
                choices = details.choices and tuple(name for name in details.choices if name not in own)
                kind = value_type(get_type_hints(config_class)[item.name])[0], details.unit, choices
                kinds.setdefault(item.name, set()).add(kind)
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}


def test_the_defaults_of_every_command_are_values_that_it_accepts() -> None:
    for config_class in configs():
        defaults = {item.name: item.default for item in option_fields(config_class)}
        required = {name: "x" for name, value in defaults.items() if value is MISSING}
        given = {name: value for name, value in defaults.items() if value is not None and value != ()}
        assert resolve(config_class, given | required) == config_class(**required)


IMPORT_ALL = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
rare = ("torch._dynamo", "transformers", "triton", "scipy", "pyarrow", "openai")
print(*(name for name in rare if name in sys.modules))
"""


def test_no_module_imports_what_few_runs_need() -> None:
    """torch._dynamo alone adds 1.2 s to the start of each command, and a decorator of torch.compiler imports it."""
    names = [name for name in modules() if not name.endswith(("__main__", ".jail")) and ".kernels." not in name]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
