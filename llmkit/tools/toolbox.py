"""The tools that a model may use in a run, by name.

    with Toolbox.parse(["calc,python", "search:docs.jsonl", "py:weather.py:rain"]) as toolbox:
        toolbox.run("calc", "2 + 2")  ->  "4"
        toolbox.run("rain", '{"city": "Oslo"}')

A mistake by the model is not an error of the run: the result tells the model what went wrong.
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

RESULT_CHARACTERS = 4000  # longest result, because contexts are small
DESCRIPTIONS = {  # of the tool and its argument
    "calc": ("Calculate the value of an arithmetic expression.", "An expression, such as (783 - 389) * 2."),
    "python": ("Run a Python program and return what it prints.", "The program."),
    "search": ("Search documents and return the passages that fit best.", "What to look for."),
}


class ToolResult(NamedTuple):
    """A tool's answer to the model; `failed` if it is an error message."""

    text: str
    failed: bool = False


Tool = Callable[[str], str | ToolResult]


class Toolbox:
    """Tools by name, each a function from the model's text to a result. Thread-safe.

    schemas  an entry of OpenAI's `tools` for each tool
    """

    def __init__(self, tools: dict[str, Tool], stack: ExitStack, schemas: dict[str, dict[str, Any]]) -> None:
        self._tools, self._stack, self.schemas = tools, stack, schemas

    @classmethod
    def parse(cls, specs: Sequence[str], *, sandbox: str = "auto", timeout: float = 10.0) -> Toolbox:
        """Open the tools of `--tools calc,python,search:docs.jsonl,py:weather.py:rain`.

        `timeout` (seconds) bounds each call of python and of a search engine; `sandbox` is "auto" or "none". Raises
        UserError for unknown tools, unreadable documents or functions, and if the sandbox is not available.
        """
        tools: dict[str, Tool] = {}
        schemas: dict[str, dict[str, Any]] = {}
        stack = ExitStack()
        for spec in (word.strip() for text in specs for word in text.split(",")):
            name, _, source = spec.partition(":")
            if spec.startswith(PREFIX):
                name = check_spelling(spec, f"--tools {spec}")[1]
                if name in TOOL_OF_FUNCTION:
                    raise UserError(f"--tools {spec}: expected a name that is not a built-in tool's, found {name}")
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
            # the schema of a built-in tool, for models that were not trained on its special tokens
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
        """The names of the tools."""
        return tuple(self._tools)

    def run(self, tool: str, text: str) -> ToolResult:
        """Run a tool on the model's text. The model's mistakes never raise; raises UserError for errors of a user's
        search function, and if the sandbox fails."""
        try:
            answer = self._tools[tool](text)
        except UserError:
            raise
        except (CalculationError, SearchError) as error:
            answer = ToolResult(f"error: {error}", failed=True)
        except Exception as error:  # a bug in a tool fails the call, not the run
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
    """Wrap a user's function from text to text. Its exceptions are the user's mistakes, not the model's."""
    function = UserFunction(spec, where)

    def run(text: str) -> str:
        query = repr(text[:60])
        answer = function(text, query)
        if not isinstance(answer, str):
            raise UserError(f"{where}: expected a string, found {kind_of(answer)} for {query}")
        return answer

    return run
