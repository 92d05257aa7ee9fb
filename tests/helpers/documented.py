"""The commands in the documentation, and sizes small enough to run them.

A command is a line of a code block (fenced as shell, or indented by four spaces) that calls llmkit, torchrun or python,
with the lines that a backslash joins to it. The examples in `llmkit STAGE --help` are commands, too.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llmkit.cli import COMMANDS

ROOT = Path(__file__).parents[2]
OURS = ("llmkit", "torchrun", "python", "python3")
SHELLS = ("", "sh", "bash", "shell", "console")
SETTING = re.compile(r"[A-Z_]+=")  # an environment variable before a command


@dataclass(frozen=True)
class Command:
    """A command as on the page, and the words of each program in its pipe."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place} {self.text}"

    @property
    def programs(self) -> list[list[str]]:
        return list(programs_of(self.text))

    @property
    def stages(self) -> list[list[str]]:
        """The arguments of each llmkit call in it: ["pretrain", "docs.jsonl", ...]."""
        return [words for program in self.programs if (words := arguments_of(program)) is not None]


def programs_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each program that a line of shell calls, without redirections."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    skip = False
    for token in lexer:
        if set(token) <= set("|&;"):
            yield words
            words = []
        elif set(token) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        elif words or not (SETTING.match(token) or token in ("do", "then", "time")):
            words.append(token)
    yield words


def arguments_of(program: list[str]) -> list[str] | None:
    """Return the words after `llmkit`, `python -m llmkit` or `torchrun ... -m llmkit`, None for other programs."""
    if program[:1] == ["llmkit"]:
        return program[1:]
    if program[:1] and program[0] in OURS and "-m" in program:
        module = program.index("-m") + 1
        return program[module + 1 :] if program[module : module + 1] == ["llmkit"] else None
    return None


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines of code blocks that may be shell, without prompts, comments and indentation."""
    fence: str | None = None
    shell = False
    for number, line in enumerate(text.splitlines(), 1):
        if mark := re.match(r"\s*(```|~~~)\s*(\w*)", line):
            fence, shell = (None, False) if fence else (mark[1], mark[2] in SHELLS)
        elif shell or (fence is None and line.startswith("    ")):
            yield number, re.sub(r"(^|\s)#\s.*$", "", re.sub(r"^\$ ", "", line.strip())).strip()


def commands_of(text: str, place: str) -> list[Command]:
    """Return all commands of a page."""
    found: list[Command] = []
    begun, start = "", 0
    for number, line in code_lines(text):
        start = start if begun else number
        begun += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if re.search(rf"(?:^|[|&;]\s*|\s)(?:{'|'.join(OURS)})\s", begun):
            command = Command(f"{place}:{start}", " ".join(begun.split()))
            if any(program[:1] and program[0] in OURS for program in command.programs):
                found.append(command)
        begun = ""
    return found


def all_commands() -> list[Command]:
    """Return the commands of the README, of the pages in docs/, and of every `--help`."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [command for page in pages for command in commands_of(page.read_text(), str(page.relative_to(ROOT)))]
    for name, (module, config_name, _) in COMMANDS.items():
        shown = inspect.cleandoc(getattr(import_module(module), config_name).examples)
        found += commands_of("\n".join("  " + line for line in shown.splitlines()), f"{name} --help")
    return found


# ---- small enough


TINY_RUN = {"--max-steps": "2", "--sequence-length": "384", "--batch-tokens": "384"}
OTHER_HORIZONS = ("--time-budget", "--tokens", "--flops", "--epochs")
# options of a stage whose values are replaced, or added if they are missing
SIZES = {
    "crawl-filter": {"--workers": "1"},
    "train-bpe": {"--vocab-size": "512"},
    "pretrain": {**TINY_RUN, "--depth": "1", "--hidden-size": "64", "--dtype": "float32"},
    "sft": {**TINY_RUN, "--sequence-length": "128"},
    "probe-knowledge": {"--samples": "2", "--max-tokens": "8", "--limit": "6"},
    "train-reward": {"--max-steps": "2"},
    "rl": {"--max-steps": "2", "--group": "4", "--batch-size": "2", "--max-tokens": "6"},
    "sample": {"--max-tokens": "8"},
}
SHORT = {"-n": "--samples", "-o": "--out"}


def made_small(arguments: list[str]) -> list[str]:
    """Replace the sizes in the arguments of an llmkit call by those of this module."""
    stage, *rest = arguments
    sizes = dict(SIZES.get(stage, {}))
    if stage == "train-reward" and "--score" in rest:
        sizes = {}
    if "--from" in rest:
        sizes = dict(TINY_RUN)
    kept: list[str] = []
    words = iter(rest)
    for word in words:
        flag = SHORT.get(word, word)
        if flag in OTHER_HORIZONS and "--max-steps" in sizes:
            next(words)
        elif flag in sizes:
            kept += [flag, sizes.pop(flag)]
            next(words)
        else:
            kept.append(word)
    added = [word for pair in sizes.items() for word in pair]
    force = ["--force"] if "--resume" not in rest and "--force" not in rest else []
    return [stage, *added, *force, *kept]
