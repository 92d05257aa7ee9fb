"""Tool calls in the output of models: the formats of the model families, and detection of a template's format.

    form = form_of(template_text, call)             # the form that parses a call rendered by the template
    form.read('<tool_call>\\n{"name": "rain", "arguments": {"city": "Oslo"}}\\n</tool_call>')
    ->  [Call("rain", {"city": "Oslo"})]

Sources: the chat templates of Hermes 2 Pro, Qwen 2.5 and 3, SmolLM3, Granite 4 (JSON in tags), Qwen 3 Coder and 3.5,
Nemotron 3 (only tags), GLM 4.5 to 4.7 (keys and values in tags), Llama 3.1 (bare JSON), Mistral (`[TOOL_CALLS]`),
Granite 3 and Phi-4-mini (a list after a token), Apriel and Nemotron Nano 2 (a list in tags), OLMo 3 and LFM2 (Python
calls), DeepSeek V3 and R1, Kimi K2 and gpt-oss (a name and JSON between tokens), Gemma 4 and FunctionGemma
(`call:name{key:value}`).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A function call: its name and the values of its arguments."""

    name: str
    arguments: dict[str, Any]


Schemas = Sequence[Mapping[str, Any]]  # function schemas in OpenAI's format
Reader = Callable[["re.Match[str]", Schemas], list[Call]]  # returns no calls if one of them is malformed


@dataclass(frozen=True)
class CallForm:
    """A format of tool calls.

    openers  texts and special tokens with which calls begin
    stretch  matches calls in an answer, with their tags or tokens
    reader   parses a match of `stretch`
    writing  texts before, between and after JSON calls, for templates that show functions but render no calls:
             llmkit then writes the calls into the answer, followed by `closer` if the vocabulary has it
    """

    openers: tuple[str, ...]
    stretch: re.Pattern[str]
    reader: Reader
    writing: tuple[str, str, str] | None = None
    closer: str = ""

    def read(self, text: str, schemas: Schemas = ()) -> list[Call]:
        """Parse the calls in an answer without its end token; return none if one of them is malformed.

        `schemas` distinguish strings from numbers in formats without quotes.
        """
        calls: list[Call] = []
        for match in self.stretch.finditer(text):
            if not (stretch_calls := self.reader(match, schemas)):
                return []
            calls += stretch_calls
        return calls


def form_of(written: str, call: Call) -> CallForm | None:
    """Find the form that parses `call` from a template's rendering `written`; None if no known form does."""
    return next((form for form in FORMS if form.read(written) == [call]), None)


def response_form(template: dict[str, Any]) -> CallForm | None:
    """Make a form from transformers' `response_template`; None without transformers 5.13."""
    try:
        from transformers.utils.chat_parsing import parse_response
    except ImportError:
        return None

    def read(match: re.Match[str], schemas: Schemas) -> list[Call]:
        with suppress(ValueError, KeyError, TypeError):
            calls = parse_response(match[0], template, prefix="").get("tool_calls") or []
            return _calls([call.get("function", call) for call in calls])
        return []

    opener = template.get("fields", {}).get("tool_calls", {}).get("open", "")
    return CallForm(tuple(opener) if isinstance(opener, list) else (opener,), _pattern(r"\A.+\Z"), read)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.DOTALL)


def _calls(values: Any) -> list[Call]:
    """Convert JSON values to calls; return none if one of them is not a call."""
    calls = []
    for value in values if isinstance(values, list) else [values]:
        arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
        if isinstance(arguments, str):  # OpenAI's
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
            return []
        calls.append(Call(value["name"], arguments))
    return calls


def _json_calls(match: re.Match[str], schemas: Schemas) -> list[Call]:
    """Parse JSON calls separated by white space or semicolons."""
    decoder, text, calls = json.JSONDecoder(strict=False), match[1].strip(), []
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):  # RecursionError: a thousand nested brackets
            return []
        if not (value_calls := _calls(value)):
            return []
        calls += value_calls
        text = text[end:].lstrip("; \t\r\n")
    return calls


def _named(pattern: str) -> Reader:
    """Make a reader of a pattern whose groups are a name and its arguments in JSON."""
    inner = _pattern(rf"\s*{pattern}\s*")

    def read(match: re.Match[str], schemas: Schemas) -> list[Call]:
        call = inner.fullmatch(match[1])
        with suppress(ValueError, RecursionError):
            return [] if call is None else _calls({"name": call[1], "arguments": json.loads(call[2], strict=False)})
        return []

    return read


def _first(*readers: Reader) -> Reader:
    """Make a reader that returns the calls of the first of `readers` that finds any."""
    return lambda match, schemas: next((calls for read in readers if (calls := read(match, schemas))), [])


def _pairs(head: str, pair: str) -> Reader:
    """Make a reader of a name followed by unquoted keys and values in tags."""
    named, each = _pattern(rf"\s*{head}\s*"), _pattern(rf"\s*{pair}\s*")

    def read(match: re.Match[str], schemas: Schemas) -> list[Call]:
        call = named.fullmatch(match[1])
        if call is None or each.sub("", call[2]).strip():
            return []
        functions = [schema.get("function", schema) for schema in schemas]
        parameters = next((known.get("parameters") for known in functions if known.get("name") == call[1]), None) or {}
        properties = parameters.get("properties") or {}
        values = {key: _value(text, properties.get(key)) for key, text in each.findall(call[2])}
        return [Call(call[1], values)]

    return read


def _value(text: str, schema: Any) -> Any:
    """Parse an unquoted value: a string if the schema says so, else JSON or a Python literal."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return text if isinstance(value, str) else value
    return {"True": True, "False": False, "None": None}.get(text, text)


class _JSONWords(ast.NodeTransformer):
    """Replaces true, false and null by their values, and pairs of escaped surrogates by the character."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return node


def _python_calls(match: re.Match[str], schemas: Schemas) -> list[Call]:
    """Parse Python calls with keyword arguments, in a list or one per line; true, false and null are allowed."""
    for text in (match[1].strip(), match[1].strip().replace("\n", "\\n")):  # LFM2's template does not escape newlines
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about unknown escapes
            values = [line.value if isinstance(line, ast.Expr) else None for line in ast.parse(text).body]
            calls = [call for value in values for call in (value.elts if isinstance(value, ast.List) else [value])]
            if all(isinstance(call, ast.Call) and not call.args for call in calls):
                return _calls([_python_call(call) for call in calls])
    return []


def _python_call(call: Any) -> dict[str, Any]:
    values = {keyword.arg: ast.literal_eval(_JSONWords().visit(keyword.value)) for keyword in call.keywords}
    name = ast.unparse(call.func)
    return {"name": name if "(" not in name else None, "arguments": json.loads(json.dumps(values, allow_nan=False))}


def _gemma(match: re.Match[str], schemas: Schemas) -> list[Call]:
    """Parse `call:name{key:value}`, whose strings are enclosed by special tokens."""
    strings: list[str] = []

    def keep(quoted: re.Match[str]) -> str:
        strings.append(quoted[1] if quoted[1] is not None else quoted[2])
        return f'"\ufde0{len(strings) - 1}"'

    call = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", _GEMMA_STRING.sub(keep, match[1]), re.DOTALL)
    if call is None:
        return []
    body = re.sub(r"([{,]\s*)([\w-]+)(\s*:)", r'\1"\2"\3', call[2]).replace(":None", ":null")
    body = re.sub(r'"\ufde0(\d+)"', lambda number: json.dumps(strings[int(number[1])]), body)
    with suppress(ValueError, RecursionError):
        return _calls({"name": call[1], "arguments": json.loads(body, strict=False)})
    return []


def _between(begin: str, end: str, reader: Reader, or_cut: str = r"|\Z") -> CallForm:
    """Make a form of calls between two texts or tokens; the closing one may be missing at the end of the answer."""
    return CallForm((begin,), _pattern(f"{re.escape(begin)}(.*?)(?:{re.escape(end)}{or_cut})"), reader)


def _within(form: CallForm) -> Reader:
    """Make a reader of calls of another form, nested in this one."""
    return lambda match, schemas: form.read(match[1], schemas)


_GEMMA_STRING = _pattern(r'<\|"\|>(.*?)<\|"\|>|<escape>(.*?)<escape>')
_XML = _pairs(r"<function=([^>\n]+)>(.*)</function>", r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>")
_GLM = _pairs(r"([\w.-]+)((?:\s*<arg_key>.*)?)", r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>")
_MISTRAL = _named(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})")
_DEEPSEEK = _first(
    _named(r"function<\uff5ctool▁sep\uff5c>([\w.-]+)\s*```json\s*(\{.*\})\s*```"),
    _named(r"([\w.-]+)<\uff5ctool▁sep\uff5c>\s*(\{.*\})"),
)
_KIMI = _named(r"functions\.([\w.-]+):\d+\s*<\|tool_call_argument_begin\|>\s*(\{.*\})")
_HARMONY = _named(r"functions\.([\w.-]+)(?![\w.-])[^{]*<\|message\|>\s*(\{.*\})")
TAGGED = replace(  # also our own form
    _between("<tool_call>", "</tool_call>", _first(_json_calls, _XML)),
    writing=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
)
FORMS: Sequence[CallForm] = (
    TAGGED,
    replace(
        _between("<|tool_call|>", "<|/tool_call|>", _json_calls),
        writing=("<|tool_call|>[", ", ", "]"),
        closer="<|/tool_call|>",
    ),
    _between("<tool_call>", "</tool_call>", _GLM, or_cut=""),
    CallForm(("[TOOL_CALLS]",), _pattern(r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\Z)"), _first(_json_calls, _MISTRAL)),
    CallForm(("functools",), _pattern(r"functools(\[.*)\Z"), _json_calls),  # also Phi-4-mini's
    _between("<tool_calls>", "</tool_calls>", _json_calls),
    _between("<TOOLCALL>", "</TOOLCALL>", _json_calls),
    _between("<|tool_call>", "<tool_call|>", _gemma),
    _between("<start_function_call>", "<end_function_call>", _gemma),
    _between("<|tool_call_start|>", "<|tool_call_end|>", _python_calls),
    _between("<function_calls>", "</function_calls>", _python_calls),
    _between(
        "<\uff5ctool▁calls▁begin\uff5c>",
        "<\uff5ctool▁calls▁end\uff5c>",
        _within(_between("<\uff5ctool▁call▁begin\uff5c>", "<\uff5ctool▁call▁end\uff5c>", _DEEPSEEK)),
    ),
    _between(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        _within(_between("<|tool_call_begin|>", "<|tool_call_end|>", _KIMI)),
    ),
    CallForm(
        ("<|channel|>commentary to=", " to=functions."),
        _pattern(r"(?:<\|channel\|>commentary)? to=(functions\..*?)(?:<\|call\|>|\Z)"),
        _HARMONY,
    ),
    CallForm(("<|python_tag|>", "{"), _pattern(r"\A\s*(?:<\|python_tag\|>)?\s*(\{.*)\Z"), _json_calls),
)
