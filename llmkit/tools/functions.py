"""Functions of the user's own as tools, `py:FILE.py:FUNCTION`, described to a model by a JSON schema.

    def rain(city: str, days: int = 1) -> str:
        '''Tell whether it rains.

        Args:
            city: Name of a city.
            days: How far ahead.
        '''

The schema comes of the signature, with its type hints, and of the docstring, as transformers' `get_json_schema` makes
it.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llmkit.errors import UserError

_TYPES = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", dict: "object",
}  # fmt: skip
_ARGUMENT = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Examples?|Yields|Notes?):\s*$", re.MULTILINE)


def schema_of(function: Callable[..., Any], where: str) -> dict[str, Any]:
    """Describe a function as OpenAI's `tools` do. Raises UserError, which `where` names, for what no schema says."""
    doc, name = inspect.getdoc(function), getattr(function, "__name__", "function")
    if not doc:
        raise UserError(f"{where}: expected a docstring that tells the model what {name} does, found none")
    try:
        hints, signature = get_type_hints(function), inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"{where}: expected type hints that can be read, found {error}") from None
    about, properties, required = _descriptions(doc), {}, []
    for argument, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: expected arguments that have names, found {parameter}")
        if argument not in hints:
            raise UserError(f"{where}: expected a type hint for {argument}, as in '{argument}: str', found none")
        schema = _type_schema(hints[argument], f"{where}: {argument}")
        properties[argument] = schema | ({"description": about[argument]} if argument in about else {})
        required += [argument] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"name": name, "description": _SECTION.split(doc)[0].strip(), "parameters": parameters}
    return {"type": "function", "function": described}


def answer_of(function: Callable[..., Any], arguments: str) -> tuple[str, bool]:
    """Call a function with arguments in JSON; return its answer as text, and whether it failed, then the reason."""
    try:
        given = json.loads(arguments)
        inspect.signature(function).bind(**given)
    except (ValueError, TypeError) as error:  # the model's mistake
        return f"error: {error}", True
    try:
        answer = function(**given)
    except (Exception, SystemExit) as error:
        return f"error: {type(error).__name__}: {error}", True
    return (answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)), False


def _descriptions(doc: str) -> dict[str, str]:
    """Read what a docstring in Google's form says of arguments."""
    pieces = _SECTION.split(doc)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    found: dict[str, str] = {}
    last = indent = None
    for line in (sections.get("Args") or sections.get("Arguments") or sections.get("Parameters") or "").splitlines():
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None and line.strip() else indent
        match = _ARGUMENT.match(line) if depth == indent else None
        if match:
            last, found[match[1]] = match[1], match[2].strip()
        elif last and line.strip():
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal and all(type(value) in _TYPES for value in inner):
        kinds = list(dict.fromkeys(_TYPES[type(value)] for value in inner))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if origin in (Union, types.UnionType):
        schemas = [_type_schema(one, where) for one in inner]
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
