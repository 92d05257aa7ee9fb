"""The verifier `tests`: a program passes its unit tests, in the sandbox of `--tools python` (llmkit/tools/jail.py).

    {"prompt": "def f(x):\\n ...", "test": "def check(candidate): ...", "entry_point": "f"}     HumanEval's
    {"prompt": ..., "tests": ["assert f(1) == 2"], "test_setup_code"?: ""}          also "test_list", or one text
    {"prompt": ..., "tests": [{"input": "1\\n", "output": "2\\n"}]}                  a program, by stdin and stdout

The program and the tests run in two processes, each in its own jail, joined by two pipes (sandboxed_calls.py). The
program never sees tests, expected values or the checker, so it can neither read nor patch them, and its exit, by status
0, os._exit, atexit or a signal, ends only itself. Success is reported by a word of 128 random bits that only the
process of the tests knows. One attack remains: a program may have memorised the inputs.

The program of a completion is chosen, among fenced blocks or in text without fences, by what it defines. It is never
parsed here, because a model's text can exhaust the stack of Python's parser.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.problems import Problem
from llmkit.io.records import kind_of
from llmkit.rewards.final_answer import after_thinking
from llmkit.tools.python import Limits, check_sandbox, room_for, run_python

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,9}|~{3,9})[ \t]*\{?\.?(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
MOST_BLOCKS = 32  # the last ones, which are compared
LANGUAGES = ("python", "python3", "py")
# code that reads standard input
READS = re.compile(r"\binput[ \t]*\(|\bstdin\b|\bopen[ \t]*\([ \t]*0\b|\bos\.read[ \t]*\([ \t]*0\b|\bfileinput\b")
# at the beginning of a line: the name of a function or class, of a variable, or imported names
DEFINED = re.compile(
    r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)"
    r"|^(?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+([^\n#]+)",
    re.MULTILINE,
)
# first line of a program between sentences
FIRST_LINE = re.compile(
    r"^(?:@|(?:async[ \t]+def|def|class)[ \t]+\w|import[ \t]+[\w., ]+$|from[ \t]+[\w.]+[ \t]+import\b)", re.MULTILINE
)
# a line that may be code: indented, blank, a bracket or string, a statement, an assignment or a call
CODE_LINE = re.compile(
    r"\s|\Z|[@#\])}\"']|(?:def|class|import|from|async|if|for|while|try|except|finally|else|elif|with|raise|assert)\b.*(?:[:(\[]|\bimport\b)"
    r"|[A-Za-z_][\w.]*(?:\[[^\]]*\])?\s*(?:[-+*/%|&]?=(?!=)|\()"
)
FIELDS = ("tests", "test_list")
# A program's standard input is a file, for `input`, sys.stdin, open(0) and os.read alike, and for /dev/stdin, which the
# sandbox lacks.
GIVEN = """
def give(data):
    import builtins, io, os, sys
    file = os.open(".stdin", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
    os.unlink(".stdin")
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    known = io.open
    io.open = builtins.open = lambda file, *rest, **named: known(0 if file == "/dev/stdin" else file, *rest, **named)
"""
CALLING = Path(__file__).with_name("sandboxed_calls.py").read_text(encoding="utf-8")


def code_of(completion: str, names: Sequence[str] = ()) -> str:
    r"""Return the program of a completion, which defines `names`, or reads standard input if there are none.

    Among fenced blocks it is the last that defines all names, else some of them; or the last that reads standard input;
    else the last Python block. Blocks in other languages do not count. Other blocks that define what it uses are put
    before it. Without fences it is the code between sentences, if that defines the names, else the whole text. A fence
    that is not closed extends to the end.

    >>> code_of("First:\n```python\nx = 1\n```\nDone."), code_of("    return 1")
    ('x = 1\n', '    return 1')
    >>> code_of("```python\ndef f(): pass\n```\nUsage:\n```python\nprint(f())\n```", ["f"])
    'def f(): pass\n'
    """
    fences = list(FENCE.finditer(completion))
    if not fences:
        start = FIRST_LINE.search(completion)
        if not names or not start:
            return completion
        lines = takewhile(CODE_LINE.match, completion[start.start() :].splitlines(keepends=True))
        code = "".join(lines)
        return code if all(defines(code, name) for name in names) else completion
    marked = [fence for fence in fences[-MOST_BLOCKS:] if fence["language"].lower() in LANGUAGES]
    blocks = [_code(fence) for fence in fences[-MOST_BLOCKS:] if fence in marked or not fence["language"]]
    if not blocks:
        return ""
    chosen = (
        [block for block in blocks if names and all(defines(block, name) for name in names)]
        or [block for block in blocks if any(defines(block, name) for name in names)]
        or [block for block in blocks if not names and READS.search(block)]
        or [_code(fence) for fence in marked]
        or blocks
    )[-1]
    return "".join(f"{block}\n" for block in _taken(chosen, blocks)) + chosen


def defines(code: str, name: str) -> bool:
    """True if code defines a name at top level."""
    return name in _defined(code)


def _defined(code: str) -> set[str]:
    names = set()
    for function, variable, imported in DEFINED.findall(code):
        pieces = [part.split() for part in imported.strip(" ()").split(",")]
        names |= {function or variable, *(part[-1].split(".")[0] for part in pieces if part)}
    return names - {""}


def _taken(chosen: str, blocks: Sequence[str]) -> list[str]:
    """Return the blocks that define what `chosen` or one of them uses; for each name, the last that defines it."""
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


def _code(fence: re.Match[str]) -> str:
    indent = fence["indent"]
    return re.sub(f"^{indent}", "", fence["code"], flags=re.MULTILINE) if indent else fence["code"]


class CodeTests:
    """Runs unit tests of problems on completions, with `seconds` for all tests of one completion."""

    def __init__(self, sandbox: bool = True, seconds: float = 10.0) -> None:
        self.sandbox = sandbox
        self.limits = Limits(wall_seconds=seconds, cpu_seconds=max(1, round(seconds)))

    def check(self, problem: Problem) -> None:
        """Raise UserError if the problem has no tests that call a function, or the machine has no sandbox."""
        _tests_of(problem)
        if self.sandbox:
            check_sandbox()

    def judge_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
        """Return whether each completion passes all tests of its problem; one runs per CPU core."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(lambda pair: self.passes(*pair), pairs))

    def passes(self, problem: Problem, completion: str) -> bool:
        """True if a completion passes all tests; never without code."""
        entry_point = problem.record["entry_point"] if _is_human_eval(problem.record) else None
        tests = _tests_of(problem)
        names = [entry_point] if entry_point else names_called(tests) if isinstance(tests, str) else []
        code = code_of(after_thinking(completion), names)
        if not code.strip():
            return False
        if isinstance(tests, list):
            return all(self._prints(code, test["input"], test["output"]) for test in tests)
        if entry_point is None:
            return self._passes(code, "", tests, names, None)
        given = _whole(code_of(problem.prompt, names))
        # the code continues the prompt, unless it defines the function again
        program = f"{given}\n\n{code}" if defines(code, entry_point) else problem.prompt + code
        return self._passes(program, given, tests, names, entry_point)

    def _passes(self, program: str, prompt: str, tests: str, names: list[str], entry_point: str | None) -> bool:
        word = secrets.token_hex(16)
        with room_for(self.limits, 2), ThreadPoolExecutor(1) as other:
            incoming, requests = os.pipe()  # (read end, write end)
            answered, replies = os.pipe()
            served = f"{CALLING}\nserve({program!r}, {incoming}, {replies})\n"
            serving = other.submit(self._run_with, served, (incoming, replies))
            arguments = f"{prompt!r}, {tests!r}, {names!r}, {entry_point!r}, {word!r}, {requests}, {answered}"
            result = self._run_with(f"{CALLING}\ntest({arguments})\n", (requests, answered))
            serving.result()
        return result.ended == "done" and result.output.endswith(f"\n{word}\n")

    def _run_with(self, code: str, ends: tuple[int, int]) -> Any:
        """Run one side, then close its ends of the pipes, so that the other side sees the end of file."""
        try:
            return run_python(code, self.limits, sandbox=self.sandbox, descriptors=ends)
        finally:
            for end in ends:
                os.close(end)

    def _prints(self, code: str, given: str, expected: str) -> bool:
        """True if a program that reads `given` prints `expected`, except for white space at line ends."""
        # compiled separately: a last expression is not printed, and line numbers start at 1
        result = run_python(
            f"{GIVEN}give({given.encode()!r})\n"
            f"exec(compile({code!r}, '<solution>', 'exec'), {{'__name__': '__main__'}})\n",
            self.limits,
            sandbox=self.sandbox,
        )
        return result.ended == "done" and _lines(result.output) == _lines(expected)


def names_called(tests: str) -> list[str]:
    """Return the functions that tests call but neither define nor import, which are the program's.

    >>> names_called("import math\\nfor x in [1, 2]:\\n    assert f(x) == math.sqrt(g(x))")
    ['f', 'g']
    """
    nodes = list(ast.walk(ast.parse(tests)))
    known = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    known |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {
        (alias.asname or alias.name).split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return sorted(name for name in used - known if not hasattr(builtins, name))


def _whole(prompt: str) -> str:
    """Return the code of a prompt as a valid program, with a body for an open function; "" if it is text."""
    for text in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        return text
    return ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


# ---- tests of a record


def has_tests(record: dict[str, Any]) -> bool:
    """True if a record has unit tests."""
    return _is_human_eval(record) or any(record.get(name) is not None for name in FIELDS)


def _is_human_eval(record: dict[str, Any]) -> bool:
    return record.get("test") is not None and record.get("entry_point") is not None


def _tests_of(problem: Problem) -> str | list[dict[str, str]]:
    """Return the tests of a problem, as one program or as inputs and outputs. Raises UserError for anything else."""
    record, where = problem.record, problem.where
    if _is_human_eval(record):
        for name in ("test", "entry_point"):
            if not isinstance(record[name], str):
                raise UserError(f"{where}: expected {name!r} to be text, found {kind_of(record[name])}")
        if not re.search(r"^def check\(", record["test"], re.MULTILINE):
            raise UserError(f"{where}: expected 'test' to define check(candidate), as HumanEval's do")
        return _parsed(record["test"], where, "test")
    field = next((name for name in FIELDS if record.get(name) is not None), None)
    if field is None:
        expected = "expected 'test' and 'entry_point', or 'tests', for the verifier 'tests'"
        raise UserError(f"{where}: {expected}, found {sorted(record)}")
    tests = record[field]
    is_list = isinstance(tests, list) and tests and all(isinstance(test, dict) for test in tests)
    if is_list and all(isinstance(test.get(name), str) for test in tests for name in ("input", "output")):
        return tests
    lines = [tests] if isinstance(tests, str) else tests
    if not isinstance(lines, list) or not lines or not all(isinstance(test, str) for test in lines):
        raise UserError(f"{where}: expected {field!r} to be assertions, or objects of input and output, all of text")
    setup = record.get("test_setup_code") or ""
    text = _parsed("\n".join([setup, *lines]), where, field)
    if "assert" not in text or not names_called(text):
        raise UserError(f"{where}: expected {field!r} to assert something about a function of the program")
    return text


def _parsed(text: str, where: str, field: str) -> str:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{where}: expected {field!r} to be Python: {error}") from None
    return text
