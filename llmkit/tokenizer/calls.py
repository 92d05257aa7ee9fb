"""Calls of functions in what models write: the forms that families were taught, and which of them a template has.

    form = form_of(template_text, call)             # the one that reads the call which a template has written
    form.read('<tool_call>\\n{"name": "rain", "arguments": {"city": "Oslo"}}\\n</tool_call>')
    ->  [Call("rain", {"city": "Oslo"})]

Sources are the chat templates of the families: Hermes 2 Pro and Qwen 2.5 and 3 (JSON in tags), Qwen 3 Coder and 3.5
(tags alone), Llama 3.1 (bare JSON), Mistral (`[TOOL_CALLS]`), Granite and Phi-4-mini (a list behind a token), Gemma 4
and FunctionGemma (`call:name{key:value}`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a function by its name, with the values of its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls.

    openers  texts and special tokens with which calls begin; "" where any answer may be one
    read     finds the calls in an answer without its end token; none where there is none, or one is not well formed
    """

    openers: tuple[str, ...]
    read: Callable[[str], list[Call]]


def form_of(written: str, call: Call) -> CallForm | None:
    """Find the form that reads a call as a template has written it; None for a template that has none known."""
    return next((form for form in FORMS if form.read(written) == [call]), None)


def response_form(template: dict[str, Any]) -> CallForm | None:
    """Make a form of transformers' `response_template`; None without transformers 5.13, or for one it refuses."""
    try:
        from transformers.utils.chat_parsing import parse_response
    except ImportError:
        return None

    def read(text: str) -> list[Call]:
        with suppress(ValueError, KeyError, TypeError):
            calls = parse_response(text, template, prefix="").get("tool_calls") or []
            return _calls([call.get("function", call) for call in calls])
        return []

    opener = template.get("fields", {}).get("tool_calls", {}).get("open", "")
    return CallForm(tuple(opener) if isinstance(opener, list) else (opener,), read)


def _calls(values: Any) -> list[Call]:
    """Read calls from JSON values; none where one of them is no call."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
        if isinstance(arguments, str):  # OpenAI's
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
            return []
        found.append(Call(value["name"], arguments))
    return found


def _json_calls(text: str) -> list[Call]:
    """Read JSON values one after the other, apart by white space or semicolons."""
    decoder, found, at = json.JSONDecoder(strict=False), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # the latter of a thousand brackets
            return []
        if not (calls := _calls(value)):
            return []
        found += calls
        while text[at : at + 1] in tuple("; \t\r\n"):
            at += 1
    return found


def _tagged(text: str) -> list[Call]:
    found = []
    for body in re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL):
        body = body.strip()
        function = re.fullmatch(r"<function=([^>\n]+)>(.*?)(?:</function>)?", body, re.DOTALL)
        if function is None:
            calls = _json_calls(body)
        else:
            pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", function[2], re.DOTALL)
            calls = [Call(function[1], {key: _value(value) for key, value in pairs})]
        if not calls:
            return []
        found += calls
    return found


def _value(text: str) -> Any:
    """Read a value that is written without quotes: a number, a list or an object as such, else the text."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return text if isinstance(value, str) else value
    return text


def _bare(text: str) -> list[Call]:
    text = text.strip().removeprefix("<|python_tag|>").lstrip()
    return _json_calls(text) if text.startswith("{") else []


def _mistral(text: str) -> list[Call]:
    _, opener, rest = text.partition("[TOOL_CALLS]")
    if not opener or rest.lstrip().startswith("["):
        return _json_calls(rest)
    found = []
    for piece in rest.split("[TOOL_CALLS]"):
        match = re.fullmatch(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})\s*", piece, re.DOTALL)
        if match is None:
            return []
        with suppress(ValueError, RecursionError):
            found.append(Call(match[1], json.loads(match[2], strict=False)))
    return found


def _listed(text: str) -> list[Call]:
    _, opener, rest = text.partition("<|tool_call|>")
    return _json_calls(rest.partition("<|/tool_call|>")[0]) if opener else []


_GEMMA = re.compile(
    r"(?:<\|tool_call>|<start_function_call>)call:([\w.-]+)(\{[^<]*\})(?=<|\Z)",  # the strings are gone
)


def _gemma(text: str) -> list[Call]:
    found = []
    quoted = re.compile(r'<\|"\|>(.*?)<\|"\|>|<escape>(.*?)<escape>', re.DOTALL)
    strings: list[str] = []

    def keep(match: re.Match[str]) -> str:
        strings.append(match[1] if match[1] is not None else match[2])
        return f'"\ufde0{len(strings) - 1}"'

    for name, body in _GEMMA.findall(quoted.sub(keep, text)):
        body = re.sub(r"([{,]\s*)([\w-]+)(\s*:)", r'\1"\2"\3', body)
        body = re.sub(r'"\ufde0(\d+)"', lambda match: json.dumps(strings[int(match[1])]), body)
        try:
            found.append(Call(name, json.loads(body, strict=False)))
        except (ValueError, RecursionError):
            return []
    return found


TAGGED = CallForm(("<tool_call>",), _tagged)  # ours, too
FORMS: Sequence[CallForm] = (
    TAGGED,
    CallForm(("[TOOL_CALLS]",), _mistral),
    CallForm(("<|tool_call|>",), _listed),
    CallForm(("<|tool_call>", "<start_function_call>"), _gemma),
    CallForm(("<|python_tag|>", "{"), _bare),
)
