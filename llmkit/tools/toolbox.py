"""The tools that a model may use in one run, by the name of their special tokens.

    with Toolbox.parse(["calc,python", "search:docs.jsonl"]) as toolbox:
        toolbox.run("calc", "2 + 2")  ->  "4"

A mistake of the model's is no error of ours: what went wrong is the result, for the model to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from llmkit.errors import UserError
from llmkit.formats.conversations import TOOLS
from llmkit.io.progress import counted
from llmkit.io.records import kind_of
from llmkit.tools.calc import CalculationError, calculate
from llmkit.tools.python import Limits, check_sandbox, run_python
from llmkit.tools.search import SearchEngine, SearchError, SearchIndex
from llmkit.tools.user_code import PREFIX, UserFunction

RESULT_CHARACTERS = 4000  # of any result; a model's context is small


@dataclass(frozen=True)
class ToolResult:
    """Answer of a tool.

    text    for the model
    failed  whether it is the reason of a failure
    """

    text: str
    failed: bool = False


class Toolbox:
    """Tools by name, each a function from what the model wrote to a result. Safe to use from several threads."""

    def __init__(self, tools: dict[str, Callable[[str], ToolResult]], closing: ExitStack | None = None) -> None:
        self._tools, self._closing = tools, closing or ExitStack()

    @classmethod
    def parse(cls, wanted: Sequence[str], *, sandbox: str = "auto", timeout: float = 10.0) -> Toolbox:
        """The tools of `--tools calc,python,search:docs.jsonl`.

        `timeout` in seconds bounds each call of python and of a search engine; `sandbox` is "auto" or "none". Raises
        UserError for a tool that there is not, documents and functions that cannot be read, and a machine without the
        sandbox.
        """
        tools: dict[str, Callable[[str], ToolResult]] = {}
        closing = ExitStack()
        for word in (part.strip() for text in wanted for part in text.split(",")):
            name, _, source = word.partition(":")
            if name not in TOOLS or (name == "search") != bool(source):
                expected = "calc, python, search:DOCS.jsonl, search:URL or search:py:FILE.py:FUNCTION"
                raise UserError(f"--tools: expected {expected}, found {word or 'nothing'!r}")
            if name in tools:
                raise UserError(f"--tools: expected each tool once, found {name} twice")
            if name == "calc":
                tools[name] = _calc
            elif name == "python":
                if sandbox != "none":
                    check_sandbox()
                tools[name] = _python(sandbox != "none", timeout)
            elif source.startswith(PREFIX):
                tools[name] = _own(source, f"--tools {word}")
            elif source.startswith(("http://", "https://")):
                tools[name] = _search(SearchEngine(source, timeout))
            else:
                tools[name] = _search(closing.enter_context(SearchIndex.open(source)))
        return cls(tools, closing)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools there are."""
        return tuple(self._tools)

    def run(self, tool: str, text: str) -> ToolResult:
        """Let a tool work on what the model wrote. Never raises for what the model did; UserError for what a function
        of the user's did, and for a sandbox that cannot be closed."""
        try:
            result = self._tools[tool](text)
        except UserError:
            raise
        except Exception as error:  # a defect of a tool is one failed call, not the end of the run
            result = ToolResult(f"error: {tool} failed ({type(error).__name__})", failed=True)
        cut = result.text[:RESULT_CHARACTERS]
        return result if len(cut) == len(result.text) else ToolResult(f"{cut} [cut]", result.failed)

    def close(self) -> None:
        """Release files."""
        self._closing.close()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _calc(text: str) -> ToolResult:
    try:
        return ToolResult(calculate(text))
    except CalculationError as error:
        return ToolResult(f"error: {error}", failed=True)


def _python(sandbox: bool, seconds: float) -> Callable[[str], ToolResult]:
    limits = Limits(wall_seconds=seconds, cpu_seconds=max(1, round(seconds)))

    def run(text: str) -> ToolResult:
        result = run_python(text, limits, sandbox=sandbox)
        output = result.output.rstrip("\n")
        if result.ended in ("done", "error"):
            return ToolResult(output, failed=result.ended == "error")
        reason = {"timeout": f"stopped after {counted(seconds, 'second')}", "output": "stopped: too much output"}
        return ToolResult(f"{output}\nerror: {reason.get(result.ended, 'killed')}".lstrip("\n"), failed=True)

    return run


def _search(engine: SearchIndex | SearchEngine) -> Callable[[str], ToolResult]:
    def run(text: str) -> ToolResult:
        try:
            return ToolResult(engine.search(text))
        except SearchError as error:
            return ToolResult(f"error: {error}", failed=True)

    return run


def _own(spec: str, where: str) -> Callable[[str], ToolResult]:
    """A function of the user's: text in, text out. What it raises is the user's mistake, not the model's."""
    function = UserFunction(spec, where)

    def run(text: str) -> ToolResult:
        query = repr(text[:60])
        answer = function(text, query)
        if not isinstance(answer, str):
            raise UserError(f"{where}: expected a string, found {kind_of(answer)} for {query}")
        return ToolResult(answer)

    return run
