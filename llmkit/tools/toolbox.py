"""The tools that a model may use in one run, by the name of their special tokens.

    with Toolbox.parse(["calc,python", "search:docs.jsonl", "py:weather.py:rain"]) as toolbox:
        toolbox.run("calc", "2 + 2")  ->  "4"
        toolbox.run("rain", '{"city": "Oslo"}')

A mistake of the model's is no error of ours: what went wrong is the result, for the model to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from llmkit.errors import UserError
from llmkit.formats.conversations import ARGUMENT, TOOL_OF_FUNCTION, TOOLS
from llmkit.io.progress import counted
from llmkit.io.records import kind_of
from llmkit.tools.calc import CalculationError, calculate
from llmkit.tools.python import Limits, check_sandbox, run_python
from llmkit.tools.search import SearchEngine, SearchError, SearchIndex
from llmkit.tools.user_code import PREFIX, UserFunction, answer_of, check_spelling, schema_of

RESULT_CHARACTERS = 4000  # of any result; a model's context is small
DESCRIPTIONS = {  # of a tool and of its argument
    "calc": ("Calculate the value of an arithmetic expression.", "An expression, such as (783 - 389) * 2."),
    "python": ("Run a Python program and return what it prints.", "The program."),
    "search": ("Search documents and return the passages that fit best.", "What to look for."),
}


class ToolResult(NamedTuple):
    """A tool's answer for the model to read; `failed` where it is the reason of a failure."""

    text: str
    failed: bool = False


Tool = Callable[[str], str | ToolResult]


class Toolbox:
    """Tools by name, each a function from what the model wrote to a result. Safe to use from several threads.

    schemas  of each tool, as OpenAI's `tools` describe it
    """

    def __init__(self, tools: dict[str, Tool], stack: ExitStack, schemas: dict[str, dict[str, Any]]) -> None:
        self._tools, self._stack, self.schemas = tools, stack, schemas

    @classmethod
    def parse(cls, specs: Sequence[str], *, sandbox: str = "auto", timeout: float = 10.0) -> Toolbox:
        """The tools of `--tools calc,python,search:docs.jsonl,py:weather.py:rain`.

        `timeout` in seconds bounds each call of python and of a search engine; `sandbox` is "auto" or "none". Raises
        UserError for a tool that there is not, documents and functions that cannot be read, and a machine without the
        sandbox.
        """
        tools: dict[str, Tool] = {}
        schemas: dict[str, dict[str, Any]] = {}
        stack = ExitStack()
        for spec in (word.strip() for text in specs for word in text.split(",")):
            name, _, source = spec.partition(":")
            if spec.startswith(PREFIX):
                name = check_spelling(spec, f"--tools {spec}")[1]
                if name in TOOL_OF_FUNCTION:
                    raise UserError(
                        f"--tools {spec}: expected another name than that of a tool of llmkit, found {name}"
                    )
            elif name not in TOOLS or (name == "search") != bool(source):
                expected = (
                    "calc, python, search:DOCS.jsonl, search:URL, search:py:FILE.py:FUNCTION or py:FILE.py:FUNCTION"
                )
                raise UserError(f"--tools: expected {expected}, found {spec or 'nothing'!r}")
            if name in tools:
                raise UserError(f"--tools: expected each tool once, found {name} twice")
            if spec.startswith(PREFIX):
                function = UserFunction(spec, f"--tools {spec}").function
                tools[name] = lambda text, function=function: ToolResult(*answer_of(function, text))
                schemas[name] = schema_of(function, f"--tools {spec}")
                continue
            # of a tool of llmkit, for a model that was not taught its tokens
            properties = {ARGUMENT[name]: {"type": "string", "description": DESCRIPTIONS[name][1]}}
            parameters = {"type": "object", "properties": properties, "required": [ARGUMENT[name]]}
            described = {"name": name, "description": DESCRIPTIONS[name][0], "parameters": parameters}
            schemas[name] = {"type": "function", "function": described}
            if name == "calc":
                tools[name] = calculate
            elif name == "python":
                if sandbox != "none":
                    check_sandbox()
                tools[name] = _python(sandbox != "none", timeout)
            elif source.startswith(PREFIX):
                tools[name] = _user_search(source, f"--tools {spec}")
            elif source.startswith(("http://", "https://")):
                tools[name] = SearchEngine(source, timeout).search
            else:
                tools[name] = stack.enter_context(closing(SearchIndex(source))).search
        return cls(tools, stack, schemas)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools there are."""
        return tuple(self._tools)

    def run(self, tool: str, text: str) -> ToolResult:
        """Let a tool work on what the model wrote. Never raises for what the model did; UserError for what a function
        of the user's did, and for a sandbox that cannot be closed."""
        try:
            answer = self._tools[tool](text)
        except UserError:
            raise
        except (CalculationError, SearchError) as error:
            answer = ToolResult(f"error: {error}", failed=True)
        except Exception as error:  # a defect of a tool is one failed call, not the end of the run
            answer = ToolResult(f"error: {tool} failed ({type(error).__name__})", failed=True)
        result = ToolResult(answer) if isinstance(answer, str) else answer
        cut = result.text[:RESULT_CHARACTERS]
        return result if len(cut) == len(result.text) else ToolResult(f"{cut} [cut]", result.failed)

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _python(sandbox: bool, seconds: float) -> Tool:
    limits = Limits(wall_seconds=seconds, cpu_seconds=max(1, round(seconds)))

    def run(text: str) -> ToolResult:
        result = run_python(text, limits, sandbox=sandbox)
        output = result.output.rstrip("\n")
        if result.ended in ("done", "error"):
            return ToolResult(output, failed=result.ended == "error")
        reason = {"timeout": f"stopped after {counted(seconds, 'second')}", "output": "stopped: too much output"}
        return ToolResult(f"{output}\nerror: {reason.get(result.ended, 'killed')}".lstrip("\n"), failed=True)

    return run


def _user_search(spec: str, where: str) -> Tool:
    """A function of the user's: text in, text out. What it raises is the user's mistake, not the model's."""
    function = UserFunction(spec, where)

    def run(text: str) -> str:
        query = repr(text[:60])
        answer = function(text, query)
        if not isinstance(answer, str):
            raise UserError(f"{where}: expected a string, found {kind_of(answer)} for {query}")
        return answer

    return run
