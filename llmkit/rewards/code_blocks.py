"""Choose the program of a completion, among fenced blocks or in text without fences, by what it defines.

Nothing is parsed here: text of a model can exhaust the stack of Python's parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,9}|~{3,9})[ \t]*\{?\.?(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
MOST_BLOCKS = 32  # that are compared with one another
LANGUAGES = ("python", "python3", "py")
# what reads standard input
READS = re.compile(r"\binput[ \t]*\(|\bstdin\b|\bopen[ \t]*\([ \t]*0\b|\bos\.read[ \t]*\([ \t]*0\b|\bfileinput\b")
# at the beginning of a line: the name of a function or class, of a variable, or imported names
DEFINED = re.compile(
    r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)"
    r"|^(?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+([^\n#]+)",
    re.MULTILINE,
)
# begins a program between sentences
FIRST_LINE = re.compile(
    r"^(?:@|(?:async[ \t]+def|def|class)[ \t]+\w|import[ \t]+[\w., ]+$|from[ \t]+[\w.]+[ \t]+import\b)", re.MULTILINE
)
# a line that may be code: indented, blank, a bracket or string, a statement, an assignment or a call
CODE_LINE = re.compile(
    r"\s|\Z|[@#\])}\"']|(?:def|class|import|from|async|if|for|while|try|except|finally|else|elif|with|raise|assert)\b.*(?:[:(\[]|\bimport\b)"
    r"|[A-Za-z_][\w.]*(?:\[[^\]]*\])?\s*(?:[-+*/%|&]?=(?!=)|\()"
)


def code_of(completion: str, names: Sequence[str] = ()) -> str:
    r"""The program of a completion that is to define `names`, or to read standard input where there are none.

    Of fenced blocks the last that defines all names, else some of them; or the last that reads standard input; else
    the last of Python. Blocks in other languages, and so marked output, do not count. What the block takes from other
    blocks is set before it. Without fences all is code, or what stands between words if that defines the names. A fence
    that is not closed goes on to the end.

    >>> code_of("First:\n```python\nx = 1\n```\nDone."), code_of("    return 1")
    ('x = 1\n', '    return 1')
    >>> code_of("```python\ndef f(): pass\n```\nUsage:\n```python\nprint(f())\n```", ["f"])
    'def f(): pass\n'
    """
    found = list(FENCE.finditer(completion))
    if not found:
        return _without_words(completion, names)
    marked = [one for one in found[-MOST_BLOCKS:] if one["language"].lower() in LANGUAGES]
    blocks = [_code(one) for one in found[-MOST_BLOCKS:] if one in marked or not one["language"]]
    if not blocks:
        return ""
    chosen = (
        [block for block in blocks if names and all(defines(block, name) for name in names)]
        or [block for block in blocks if any(defines(block, name) for name in names)]
        or [block for block in blocks if not names and READS.search(block)]
        or [_code(one) for one in marked]
        or blocks
    )[-1]
    return "".join(f"{block}\n" for block in _taken(chosen, blocks)) + chosen


def defines(code: str, name: str) -> bool:
    """True if code defines a name, at its top."""
    return name in _defined(code)


def _defined(code: str) -> set[str]:
    names = set()
    for function, variable, imported in DEFINED.findall(code):
        parts = [part.split() for part in imported.strip(" ()").split(",")]
        names |= {function or variable, *(part[-1].split(".")[0] for part in parts if part)}
    return names - {""}


def _taken(chosen: str, blocks: Sequence[str]) -> list[str]:
    """The other blocks that define what the chosen one, or one of these, lacks; of a name the last."""
    known, taken, asking = _defined(chosen), [], [chosen]
    while asking:
        words = set(re.findall(r"(?<![\w.])\w+", asking.pop()))
        for block in reversed(blocks):
            new = _defined(block) - known
            if block != chosen and block not in taken and not _defined(block) & known and words & new:
                taken.insert(0, block)
                asking.append(block)
                known |= new
    return taken


def _code(found: re.Match[str]) -> str:
    indent = found["indent"]
    return re.sub(f"^{indent}", "", found["code"], flags=re.MULTILINE) if indent else found["code"]


def _without_words(text: str, names: Sequence[str]) -> str:
    """Text from its first definition to the last line of code behind it, where that defines all names."""
    start = FIRST_LINE.search(text)
    if not names or not start:
        return text
    lines = []
    for line in text[start.start() :].splitlines(keepends=True):
        if not CODE_LINE.match(line):
            break
        lines.append(line)
    code = "".join(lines)
    return code if all(defines(code, name) for name in names) else text
