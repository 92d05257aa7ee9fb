"""User functions, `py:FILE.py:FUNCTION`: rewards, page filters, tools, and search.

    reward = UserFunction("py:score.py:reward", "--reward py:score.py:reward")
    reward({"completion": "4"}, "problems.jsonl:5")

They run in llmkit's process. An exception becomes a one-line error with the last line of the user's file in the
traceback, and the record that the function was called with. A tool's JSON schema is derived from its type hints and its
Google-style docstring, as transformers' `get_json_schema` does.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llmkit.errors import UserError

PREFIX = "py:"
_TYPES = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", dict: "object",
}  # fmt: skip
_ARGUMENT = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Examples?|Yields|Notes?):\s*$", re.MULTILINE)


def check_spelling(spec: str, where: str) -> tuple[str, str]:
    """Split `py:FILE.py:FUNCTION` into file and function, without loading it.

    `where` is the option or key for error messages. Raises UserError if the spec is malformed or the file is missing.
    """
    path, separator, function = spec.removeprefix(PREFIX).rpartition(":")
    if not (spec.startswith(PREFIX) and separator and path.endswith(".py") and function.isidentifier()):
        raise UserError(f"{where}: expected py:FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UserError(f"{where}: expected a file {path}, found {'a folder' if Path(path).exists() else 'none'}")
    return path, function


class UserFunction:
    """A function in a Python file."""

    def __init__(self, spec: str, where: str) -> None:
        """Load the function. Raises UserError like `check_spelling`, if the code raises, or has no such function."""
        path, name = check_spelling(spec, where)
        self._where, self._path = where, os.path.realpath(path)
        module_spec = spec_from_file_location("llmkit_user_" + Path(path).stem, path)
        assert module_spec is not None and module_spec.loader is not None, "its name ends in .py"
        module = module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # where dataclasses and pickle look it up
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise self._failed(error) from None
        self._function: Any = getattr(module, name, None)
        if not callable(self._function):
            names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise UserError(f"{where}: expected a function {name!r} in {path}, found {names}")

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        return self._function

    def __call__(self, argument: Any, record: object) -> Any:
        """Call the function. If it raises, raises UserError with file and line of the user's code.

        record: the argument's name in errors, such as its id or `problems.jsonl:5`
        """
        try:
            return self._function(argument)
        except (Exception, SystemExit) as error:
            raise self._failed(error, f" for {record}") from None

    def _failed(self, error: BaseException, of_record: str = "") -> UserError:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == self._path]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"{self._path}:{lines[-1]}" if lines else self._path
        try:
            message = " ".join(str(error).split())[:300]
        except Exception as other:
            message = f"its text raises {type(other).__name__}"
        failure = f"{type(error).__name__}: {message}" if message else type(error).__name__
        return UserError(f"{self._where}: {where}: {failure}{of_record}")


# ---- as tools


def schema_of(function: Callable[..., Any], where: str) -> dict[str, Any]:
    """Describe a function as an entry of OpenAI's `tools`. Raises UserError, prefixed by `where`, if that fails."""
    doc, name = inspect.getdoc(function), getattr(function, "__name__", "function")
    if not doc:
        raise UserError(f"{where}: expected a docstring that tells the model what {name} does, found none")
    try:
        hints, signature = get_type_hints(function), inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot evaluate the type hints: {error}") from None
    descriptions, properties, required = _descriptions(doc), {}, []
    for argument, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: expected named arguments, found {parameter}")
        if argument not in hints:
            raise UserError(f"{where}: expected a type hint for {argument}, as in '{argument}: str', found none")
        schema = _type_schema(hints[argument], f"{where}: {argument}")
        properties[argument] = schema | ({"description": descriptions[argument]} if argument in descriptions else {})
        required += [argument] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"name": name, "description": _SECTION.split(doc)[0].strip(), "parameters": parameters}
    return {"type": "function", "function": described}


def answer_of(function: Callable[..., Any], arguments: str) -> tuple[str, bool]:
    """Call a function with JSON arguments; return its answer or error as text, and whether it failed."""
    try:
        values = json.loads(arguments)
        inspect.signature(function).bind(**values)
    except (ValueError, TypeError) as error:  # the model's mistake
        return f"error: {error}", True
    try:
        answer = function(**values)
    except (Exception, SystemExit) as error:
        return f"error: {type(error).__name__}: {error}", True
    return (answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)), False


def _descriptions(doc: str) -> dict[str, str]:
    """Return the descriptions of arguments in a Google-style docstring."""
    pieces = _SECTION.split(doc)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    descriptions: dict[str, str] = {}
    last = indent = None
    for line in (sections.get("Args") or sections.get("Arguments") or sections.get("Parameters") or "").splitlines():
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None and line.strip() else indent
        match = _ARGUMENT.match(line) if depth == indent else None
        if match:
            last, descriptions[match[1]] = match[1], match[2].strip()
        elif last and line.strip():
            descriptions[last] = f"{descriptions[last]} {line.strip()}".strip()
    return descriptions


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal and all(type(value) in _TYPES for value in inner):
        kinds = list(dict.fromkeys(_TYPES[type(value)] for value in inner))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if origin in (Union, types.UnionType):
        schemas = [_type_schema(member, where) for member in inner]
        if all(schema.keys() == {"type"} for schema in schemas):
            return {"type": [schema["type"] for schema in schemas]}
        return {"anyOf": schemas}
    if origin in (list, tuple) and inner and (origin is list or inner[1:] == (...,)):
        return {"type": "array", "items": _type_schema(inner[0], where)}
    if origin is dict and inner and inner[0] is str:
        return {"type": "object", "additionalProperties": _type_schema(inner[1], where)}
    if hint not in _TYPES:
        raise UserError(f"{where}: expected str, int, float, bool, list, dict, Literal or unions of them, found {hint}")
    return {"type": _TYPES[hint]}
