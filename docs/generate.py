"""Write what is generated in the documentation: options.md, and the demo's short table in the README.

    python docs/generate.py            # `make docs` does this first

options.md has every option of every subcommand, from the classes that declare them; the README's table has some rows
of what `make demo` prints, from demo.md. tests/test_docs.py fails where a committed page differs.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

from llmkit.cli import COMMANDS
from llmkit.config import LARGEST_INTEGER, flag_of, option_fields, option_of, value_type

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
OWN_PAGE = {"sample": "sampling"}  # where a stage's page is not called as the stage is
INTRODUCTION = """# Options

<!-- written by docs/generate.py from the code -->

Every option of every subcommand. `llmkit COMMAND --help` prints the same.

- A value comes from its flag, then from `--config FILE.toml` (one line each, `vocab_size = 8192`), then from its
  default.
- An option without a default is off, or llmkit derives its value, as `[...]` in the last column says. The value `none`
  turns an option with a default off.
- A count may be written 20000, 20k or 1.5M, a number of bytes 1000000, 100MB or 2GiB, a duration 90, 90s, 10m or 2h.
- `--no-` before its name turns a switch off that is on by default or in the file.
"""
# (stage, figure) of the rows of what the demo prints that stand in the README
SHOWN = (
    ("crawl-filter", "good pages kept"),
    ("crawl-filter", "bad pages dropped"),
    ("train-bpe", "bytes per token"),
    ("pretrain", "bits per byte of held-out pages"),
    ("sft", "right about facts told often"),
    ("sft", "right with its calculator"),
    ("probe-knowledge", "refuses, told often"),
    ("probe-knowledge", "refuses, unseen"),
    ("train-reward", "accuracy, held out"),
    ("rl", "right, digits sorted"),
    ("rl, gamed", "gold reward at the end"),
    ("evaluate", "right of four, told sometimes"),
)
TABLE = re.compile(r"(<!-- from docs/demo.md -->\n\n).*?(\n\n)(?!\|)", re.DOTALL)


# ---- options.md


def options_page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([INTRODUCTION, *(section(name) for name in COMMANDS)])


def section(command: str) -> str:
    """A subcommand: its line, its page, and a table for each group of options."""
    module, config_name, line = COMMANDS[command]
    config_class = getattr(import_module(module), config_name)
    page = OWN_PAGE.get(command, command) + ".md"
    lines = [f"## {command}", "", line + (f" Details: [{command}]({page})." if (DOCS / page).exists() else ""), ""]
    groups: dict[str, list[Field]] = {}
    for item in sorted(option_fields(config_class), key=lambda item: not option_of(item).positional):
        groups.setdefault("Arguments" if option_of(item).positional else option_of(item).group, []).append(item)
    common = groups.pop("Common")
    hints = get_type_hints(config_class)
    for group, items in [*groups.items(), ("Common", common)]:
        rows = [row(item, hints[item.name]) for item in items]
        if group == "Common":
            rows.append(cells("`--config`", "`FILE.toml`", "", "Options from a TOML file; flags win."))
        lines += [f"**{group}**", "", "| option | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def row(item: Field, hint: object) -> str:
    """One option: its flags, what it takes, its default, its help."""
    details = option_of(item)
    flags = ", ".join(f"`{flag}`" for flag in (details.short, flag_of(item)) if flag)
    return cells(flags, taken(item, hint), default_of(item), escape(details.help))


def cells(*texts: str) -> str:
    """A row of a table."""
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)


def taken(item: Field, hint: object) -> str:
    """What an option takes: its choices, its form, or its type and bounds."""
    details = option_of(item)
    base, _, many = value_type(hint)
    if base is bool:
        return ""
    if details.positional:
        return "one or more" if many else ""
    if details.choices or details.metavar:
        words = details.choices or (details.metavar or "").split("|")
        text = ", ".join(f"`{word}`" for word in words)
    else:
        text = details.unit or {int: "integer", float: "number"}.get(base, "text")
        bounds = (("above", details.above), ("at least", details.at_least), ("at most", details.at_most))
        text += "".join(f", {word} {bound}" for word, bound in bounds if bound not in (None, LARGEST_INTEGER))
    return text + ("; repeatable" if many and "repeatable" not in details.help else "")


def default_of(item: Field) -> str:
    """A default as it would be given."""
    if item.default is MISSING:
        return "required"
    if item.default is None or item.default is False or item.default == ():
        return ""
    if item.default is True:
        return "on"
    shown = f"{item.default:g}" if isinstance(item.default, float) else item.default
    return f"`{', '.join(shown) if isinstance(shown, tuple) else shown}`"


def escape(text: str) -> str:
    """Help as Markdown in a cell: flags as code, and nothing else taken for markup."""
    for sign, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_")):
        text = text.replace(sign, safe)
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*[a-z]", lambda flag: f"`{flag[0]}`", text)


# ---- the demo's table in the README


def demo_rows() -> dict[tuple[str, str], list[str]]:
    """What the demo printed, from demo.md: (stage, figure) to its value, and what that is held against."""
    printed = (DOCS / "demo.md").read_text().split("```\nstage ")[1].split("```")[0].splitlines()[1:]
    found = {}
    for line in printed:
        stage, figure, *values = re.split(r"\s{2,}", line.strip())
        if not values:  # a figure as long as its column stands one space before its value
            figure, value = figure.rsplit(" ", 1)
            values = [value]
        found[stage, figure] = [values[0], " ".join(values[1:])]
    return found


def readme_page() -> str:
    """The README with the rows of its table as demo.md has them now."""
    rows, lines = demo_rows(), ["| stage | what | figure | beside |", "|---|---|--:|---|"]
    for stage, figure in SHOWN:
        if (stage, figure) not in rows:
            raise SystemExit(f"docs/demo.md: no row '{stage}: {figure}'; mend SHOWN in docs/generate.py")
        name, _, more = stage.partition(",")
        lines.append(cells(f"`{name}`" + ("," + more if more else ""), figure, *rows[stage, figure]))
    text, count = TABLE.subn(lambda found: found[1] + "\n".join(lines) + found[2], README.read_text())
    assert count == 1, "README.md: expected one table after <!-- from docs/demo.md -->"
    return text


if __name__ == "__main__":
    (DOCS / "options.md").write_text(options_page())
    README.write_text(readme_page())
