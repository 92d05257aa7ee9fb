"""The laws of the house: imports go up one list, nothing heavy is imported at start, and files stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import itself and the rooms above it
ROOMS = (
    "errors",
    "display",
    "config",
    "kernels",
    "io",
    "formats",
    "text",
    "tokenizer",
    "model",
    "tools",
    "report",
    "crawl",
    "data",
    "generation",
    "training",
    "reward_model",
    "probing",
    "rewards",
    "rl",
    "export",
    "stages",
    "cli",
    "__main__",
)
AT_START = {
    "errors",
    "display",
    "config",
    "io",
    "formats",
    "stages",
    "cli",
    "__main__",
}  # `llmkit --help` imports these
LATER = {"stages", "cli", "__main__"}  # import the other rooms when a command runs
HEAVY = {"torch", "numpy", "triton", "transformers", "tokenizers", "safetensors"}
TOO_LONG: set[str] = set()  # files that may have more than 600 lines: none
# Imports that still go down the list
KNOWN = {"llmkit.io.resume imports llmkit.generation.served_models.ServerError, which stands below"}


def modules() -> dict[str, str]:
    """Module name to source, of everything that is installed."""
    found = {}
    for folder, package in ((ROOT / "llmkit", "llmkit"), (ROOT / "kernels", "llmkit.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path.read_text()
    return found


def imported(name: str, node: ast.AST) -> list[str]:
    """The full names of the modules that one import statement in module `name` asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        base = ".".join(name.split(".")[: -node.level] + ([node.module] if node.module else []))
    else:
        base = node.module or ""
    return [f"{base}.{alias.name}" for alias in node.names]  # `from llmkit import model` asks for llmkit.model


def at_start(tree: ast.Module) -> list[ast.AST]:
    """The import statements that run when the module is imported: not those in functions or for type checkers."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        found.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "llmkit" and len(parts) > 1 and parts[1] in ROOMS else None


def violations(sources: dict[str, str]) -> list[str]:
    """What in these modules (name to source) breaks the rules of the house."""
    wrong = []
    for name, source in sources.items():
        tree, room = ast.parse(source), room_of(name)
        if room is None:
            if name != "llmkit":
                wrong.append(f"{name}: stands in no room")
            continue
        for target in {target for node in ast.walk(tree) for target in imported(name, node)}:
            other = room_of(target)
            if target.split(".")[0] == "click":
                wrong.append(f"{name}: imports click, which typer carries itself")
            if other is None:
                continue
            another_stage = room == other == "stages" and target.split(".")[:3] != name.split(".")
            if ROOMS.index(other) > ROOMS.index(room) or another_stage:
                wrong.append(f"{name} imports {target}, which stands below")
        start = [target for node in at_start(tree) for target in imported(name, node)]
        if room in AT_START:
            wrong += [f"{name}: imports {package} at start" for package in {t.split(".")[0] for t in start} & HEAVY]
        if room in LATER:
            rooms = {room_of(target) for target in start} - {None}
            wrong += [f"{name}: imports llmkit.{other} at start" for other in rooms - AT_START]
    return sorted(wrong)


def test_imports_go_up_the_list() -> None:
    assert set(violations(modules())) == KNOWN


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llmkit.io.jsonl", "from llmkit.training import trainer"),
        ("llmkit.io.jsonl", "def f():\n    import llmkit.cli"),
        ("llmkit.model.rope", "from llmkit.generation.generator import Generator"),
        ("llmkit.model.rope", "from ..data import shards"),
        ("llmkit.kernels.attention", "from llmkit import model"),
        ("llmkit.stages.sample", "def run(config):\n    from llmkit.stages.pretrain import run"),
        ("llmkit.stages.sample", "def run(config):\n    from llmkit.stages import pretrain"),
        ("llmkit.stages.sample", "import torch"),
        ("llmkit.stages.sample", "class Config:\n    from numpy import array"),
        ("llmkit.stages.sample", "try:\n    import safetensors.torch\nexcept ImportError:\n    pass"),
        ("llmkit.stages.sample", "from llmkit.generation.generator import generate"),
        ("llmkit.io.run_folder", "import numpy as np"),
        ("llmkit.cli", "import click"),
        ("llmkit.cli", "def f():\n    from click.core import Context"),
        ("llmkit.utils", "import os"),
    ],
)
def test_a_planted_violation_is_caught(name: str, source: str) -> None:
    assert len(violations({name: source})) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llmkit.stages.sample", "def run(config):\n    import torch\n    from llmkit.generation import generator"),
        ("llmkit.stages.sample", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("llmkit.stages.sample", "from llmkit.config import option\nfrom llmkit.io.jsonl import read_jsonl"),
        ("llmkit.model.rope", "import torch\nfrom llmkit.kernels import dispatch\nfrom llmkit.model.config import X"),
        ("llmkit.training.trainer", "from llmkit.model import transformer\nfrom llmkit.training.schedule import Pace"),
        ("llmkit.io.run_folder", "from llmkit.io.jsonl import atomic_file"),
        ("llmkit.cli", "from llmkit import __version__"),
    ],
)
def test_what_is_allowed_is_not_reported(name: str, source: str) -> None:
    assert violations({name: source}) == []


def test_files_stay_under_600_lines() -> None:
    long = {name for name, source in modules().items() if source.count("\n") >= 600}
    assert long == TOO_LONG
