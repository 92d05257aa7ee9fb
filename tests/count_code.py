"""Count what makes code hard to read: `python tests/count_code.py [FOLDER]` prints the current figures.

A body is the lines of a function without its signature and docstring. A private helper is a function or method whose
name begins with one underscore; it counts as called once if the package has its name in one place besides the
definition. A vague binding is a parameter or variable with a name from VAGUE.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
VAGUE = frozenset(["found", "one", "told", "said", "held", "asked", "how", "place", "parts", "made", "kept"])
SHORT = 110  # lines; a shorter file may belong into another


def sources(root: Path, *folders: str) -> dict[str, str]:
    """Return the sources of all Python files in some folders, by path."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines from the first statement after the docstring to the end."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def vague(tree: ast.Module) -> int:
    """Count the parameters and assigned variables with a vague name."""
    names = Counter(node.arg for node in ast.walk(tree) if isinstance(node, ast.arg))
    names += Counter(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    return sum(names[name] for name in VAGUE)


def called_once(trees: list[ast.Module]) -> int:
    """Count the private helpers whose name occurs once besides their definition."""
    defined = {node.name for tree in trees for node in functions(tree)}
    private = {name for name in defined if name.startswith("_") and not name.startswith("__")}
    uses = Counter[str]()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                uses[node.id] += 1
            elif isinstance(node, ast.Attribute):
                uses[node.attr] += 1
    return sum(uses[name] == 1 for name in private)


def options() -> tuple[int, int]:
    """Count the options of all commands: in total, and distinct names."""
    from llmkit.cli import COMMANDS
    from llmkit.config import option_fields

    names = [
        item.name
        for module, config, _ in COMMANDS.values()
        for item in option_fields(getattr(import_module(module), config))
    ]
    return len(names), len(set(names))


def table(root: Path = ROOT) -> dict[str, int | float]:
    """Return the figures by name."""
    package = sources(root, "llmkit", "kernels")
    trees = [ast.parse(source) for source in package.values()]
    every = [node for tree in trees for node in functions(tree)]
    lines = {
        folder: sum(source.count("\n") for source in sources(root, folder).values())
        for folder in ("llmkit", "kernels", "tests")
    }
    summed, distinct = options()
    return {
        **{f"lines of {folder}/": count for folder, count in lines.items()},
        "files": len(package),
        f"files under {SHORT} lines": sum(source.count("\n") < SHORT for source in package.values()),
        "functions": len(every),
        "median body": statistics.median(map(body_lines, every)),
        "private helpers called once": called_once(trees),
        "vague bindings": sum(map(vague, trees)),
        "options of all commands": summed,
        "names of options": distinct,
    }


if __name__ == "__main__":
    for name, value in table(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT).items():
        print(f"{name:30} {value:>8}")
