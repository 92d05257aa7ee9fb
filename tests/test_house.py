"""The laws of the source tree: layered imports without cycles, and limits for rooms, files, functions and options."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from llmkit.cli import COMMANDS
from llmkit.config import option_fields
from tests.count_code import options

ROOT = Path(__file__).parent.parent
# A room may import itself and the rooms above it; its ceiling in lines, and its present lines if it is above
ROOMS = {
    "errors": (60, 0),
    "display": (90, 0),
    "config": (420, 582),
    "kernels": (3000, 3006),
    "io": (2150, 4168),
    "formats": (950, 1130),
    "text": (530, 1210),
    "tokenizer": (1900, 2910),
    "model": (1700, 3008),
    "tools": (1100, 1490),
    "report": (1250, 1506),
    "crawl": (4640, 5065),
    "data": (1100, 1670),
    "generation": (2250, 3944),
    "training": (2500, 3237),
    "reward_model": (800, 1169),
    "probing": (970, 1020),
    "rewards": (1400, 2070),
    "writing": (800, 1232),
    "evaluation": (900, 1455),
    "rl": (1350, 1450),
    "export": (600, 708),
    "serving": (1100, 1580),
    "stages": (2480, 4395),
    "cli": (380, 0),
    "__main__": (40, 0),
}
ORDER = list(ROOMS)
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
LATER = {"stages", "cli", "__main__"}  # import other rooms only when a command runs
HEAVY = {"torch", "numpy", "triton", "transformers", "tokenizers", "safetensors"}
MOST_LINES, MOST_FILES = 600, 14  # per file; per folder
LONGEST = 60  # lines of a function in stages/
# Exceptions to the laws; each entry is removed with its cause
LONG = set[str]()
SPLATS = set[str]()
STARS = 55  # names and attributes unpacked into positional arguments; may only decrease
OPTIONS = {
    "crawl-filter": 27,
    "train-bpe": 14,
    "pretrain": 41,
    "sft": 49,
    "probe-knowledge": 31,
    "write-chats": 38,
    "train-reward": 36,
    "rl": 46,
    "sample": 37,
    "serve": 21,
    "evaluate": 33,
    "export": 9,
    "report": 10,
}
DISTINCT = 151


def modules() -> dict[str, str]:
    """Return the sources of all installed modules, by name."""
    found = {}
    for folder, package in ((ROOT / "llmkit", "llmkit"), (ROOT / "kernels", "llmkit.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path.read_text()
    return found


def imported(name: str, node: ast.AST) -> list[str]:
    """Return the full names of the modules that an import statement in module `name` may import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        base = ".".join(name.split(".")[: -node.level] + ([node.module] if node.module else []))
    else:
        base = node.module or ""
    return [f"{base}.{alias.name}" for alias in node.names]  # `from llmkit import model` imports llmkit.model


def at_start(tree: ast.Module) -> list[ast.AST]:
    """Return the import statements that run at import time: not those in functions or for type checkers."""
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
    """Return the violations of the laws in these modules (name to source)."""
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
            if ORDER.index(other) > ORDER.index(room) or another_stage:
                wrong.append(f"{name} imports {target}, which stands below")
        start = [target for node in at_start(tree) for target in imported(name, node)]
        if room in AT_START:
            wrong += [f"{name}: imports {package} at start" for package in {t.split(".")[0] for t in start} & HEAVY]
        if room in LATER:
            rooms = {room_of(target) for target in start} - {None}
            wrong += [f"{name}: imports llmkit.{other} at start" for other in rooms - AT_START]
    return sorted(wrong)


def test_imports_go_up_the_list() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llmkit.io.jsonl", "from llmkit.training import trainer"),
        ("llmkit.io.jsonl", "def f():\n    import llmkit.cli"),
        ("llmkit.model.transformer", "from llmkit.generation.generator import Generator"),
        ("llmkit.model.transformer", "from ..data import shards"),
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
        ("llmkit.model.transformer", "from llmkit.kernels import dispatch\nfrom llmkit.model.config import C"),
        ("llmkit.training.trainer", "from llmkit.model import transformer\nfrom llmkit.training.optimizer import Pace"),
        ("llmkit.io.run_folder", "from llmkit.io.jsonl import atomic_file"),
        ("llmkit.cli", "from llmkit import __version__"),
    ],
)
def test_allowed_imports_are_not_reported(name: str, source: str) -> None:
    assert violations({name: source}) == []


def test_imports_make_no_circle() -> None:
    sources = modules()
    asked = {
        name: {
            target if target in sources else target.rpartition(".")[0]
            for node in ast.walk(ast.parse(source))
            for target in imported(name, node)
        }
        & (sources.keys() - {name})
        for name, source in sources.items()
    }
    TopologicalSorter(asked).prepare()  # CycleError names the cycle


def test_rooms_stay_under_their_ceilings() -> None:
    lines = Counter[str]()
    for name, source in modules().items():
        lines[room_of(name) or ""] += source.count("\n")
    assert {room: lines[room] for room, most in ROOMS.items() if lines[room] > max(most)} == {}


def test_files_are_short_and_folders_are_small() -> None:
    assert [name for name, source in modules().items() if source.count("\n") >= MOST_LINES] == []
    folders = Counter(path.parent for path in (ROOT / "llmkit").rglob("*.py") if path.name != "__init__.py")
    assert [path.name for path, count in folders.items() if count > MOST_FILES] == []


def test_functions_of_stages_fit_a_screen() -> None:
    long = {
        f"{path.stem}.{node.name}"
        for path in (ROOT / "llmkit" / "stages").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST
    }
    assert long == LONG


def splats(source: str) -> bool:
    """True if options are splatted: `f(**{name: getattr(config, name) for ...})`, also by way of a variable."""
    nodes = list(ast.walk(ast.parse(source)))
    named = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.DictComp)
    }
    given = [
        keyword.value for node in nodes if isinstance(node, ast.Call) for keyword in node.keywords if not keyword.arg
    ]
    displays = [node for node in nodes if isinstance(node, ast.Dict)]
    given += [value for node in displays for key, value in zip(node.keys, node.values, strict=True) if key is None]
    values = [named.get(value.id, value) if isinstance(value, ast.Name) else value for value in given]
    return any(isinstance(value, ast.DictComp) and "getattr(config" in ast.unparse(value) for value in values)


def test_no_option_is_handed_on_by_its_name_alone() -> None:
    assert splats("f(**{name: getattr(config, name) for name in names})")
    assert splats("def f():\n    options = {name: getattr(config, name) for name in names}\n    g(1, **options)")
    assert splats("common = {name: getattr(config, name) for name in names}\nevery = {**common, 'seed': 1}")
    assert not splats("shown = {name: getattr(config, name) for name in names}\nprint(shown)")
    assert {name for name, source in modules().items() if splats(source)} == SPLATS


def test_fewer_and_fewer_tuples_are_unpacked_into_calls() -> None:
    """`f(*shape)` hides the order of the arguments. Removing one lowers the number in the same commit."""
    stars = Counter(
        name
        for name, source in modules().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        for argument in node.args
        if isinstance(argument, ast.Starred) and isinstance(argument.value, (ast.Name, ast.Attribute))
    )
    assert sum(stars.values()) <= STARS, stars


def test_the_options_of_a_command_are_counted() -> None:
    """Adding an option changes its number in the same commit, with the reason."""
    names = {
        command: [item.name for item in option_fields(getattr(import_module(module), config))]
        for command, (module, config, _) in COMMANDS.items()
    }
    assert {command: len(of_command) for command, of_command in names.items()} == OPTIONS
    assert len({name for of_command in names.values() for name in of_command}) == DISTINCT
    assert options() == (sum(OPTIONS.values()), DISTINCT)  # what tests/count_code.py prints
