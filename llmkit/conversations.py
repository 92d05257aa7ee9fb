"""Conversations: every format that `sft` accepts, turned into one.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}   messages
    {"prompt": "2 + 2?", "completion": "4"}                     also "response"; either may be a list of messages
    {"instruction": "Add.", "input": "2 + 2", "output": "4"}    Alpaca; also "response"
    {"conversations": [{"from": "human", "value": "2 + 2?"}]}   ShareGPT
    {"text": "Once upon a time ..."}                            plain text, all of it trained on

A message's content is a string or a list of parts, {"type": "text", "text": ...}. What the assistant writes to a tool
is a part of type `calc`, `python` or `search`, what the tool answers one of type `result`; OpenAI's `tool_calls` and
messages of role `tool` become such parts. An assistant that calls a tool, reads its result and goes on is one turn.
`weight` (or `loss_weight`) 0 on a message keeps it out of the loss. A record whose `label` (or `kto_tag`) is false is
one whose answer was rejected, as in data for KTO; `tools` and `functions`, definitions of what may be called, are not
read.

Neighbours of the same role are merged, with a blank line between. An assistant may speak first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import UserError
from llmkit.records import Row, kind_of

TOOLS = ("calc", "python", "search")
RESULT = "result"
FOREIGN = "foreign call"  # while messages are read: a call of a function that is none of our tools, in JSON
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
    "function_call": "function_call",  # ShareGPT's: the assistant's, its value a call in JSON
}
TOOL_OF_FUNCTION = {"calc": "calc", "calculator": "calc", "python": "python", "search": "search"}
FORMATS = "messages, conversations, prompt and completion, instruction and output, or text"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a message: `kind` is "text", a tool that is called with `text`, or "result", what it answered."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says: `role` is "system", "user" or "assistant"; `weight` 0 keeps it out of the loss."""

    role: str
    parts: tuple[Part, ...]
    weight: int = 1

    @property
    def text(self) -> str:
        """What was said, without calls and results."""
        return "".join(part.text for part in self.parts if part.kind == "text")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, or the `document` of a record of plain text.

    where     its place in a file
    rejected  whether its record calls the answer a bad one
    losses    what of its record is not in the messages as it was meant, to be counted
    """

    messages: tuple[Message, ...]
    where: str = ""
    document: str | None = None
    rejected: bool = False
    losses: tuple[str, ...] = ()


def message(role: str, text: str, weight: int = 1) -> Message:
    """A message of one text."""
    return Message(role, (Part("text", text),), weight)


def as_record(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as JSON, in the form that chat templates read."""

    def content(parts: tuple[Part, ...]) -> Any:
        if all(part.kind == "text" for part in parts):
            return "".join(part.text for part in parts)
        return [{"type": part.kind, "text": part.text} for part in parts]

    return [{"role": one.role, "content": content(one.parts)} for one in messages]


def read_conversation(row: Row) -> Conversation:
    """The conversation in a record of any format. Raises UserError that names the place and what was expected."""
    value = row.value
    for name, read in FORMAT_OF_FIELD.items():
        if name in value:
            found = read(row)
            if found.document is not None:
                return found
            defined = ("tool definitions left out",) if value.get("tools") or value.get("functions") else ()
            rejected = value.get("label") is False or value.get("kto_tag") is False
            return replace(found, rejected=rejected, losses=defined + found.losses)
    raise UserError(f"{row.where}: expected {FORMATS}, found {sorted(value)}")


# ---- formats


def _messages(row: Row) -> Conversation:
    return _conversation(row, _listed(row, "messages"))


def _sharegpt(row: Row) -> Conversation:
    entries = _listed(row, "conversations")
    renamed = [
        {**entry, "role": entry.get("from", entry.get("role")), "content": entry.get("value", entry.get("content"))}
        for entry in entries
    ]
    system = [{"role": "system", "content": row.value["system"]}] if row.value.get("system") else []
    return _conversation(row, system + renamed)


def _prompt(row: Row) -> Conversation:
    answer = next((name for name in ("completion", "response") if name in row.value), None)
    if answer is None:
        raise UserError(f"{row.where}: expected field 'completion' beside 'prompt', found {sorted(row.value)}")
    sides = []
    for name, role in (("prompt", "user"), (answer, "assistant")):
        content = row.value[name]
        if content is None:
            raise UserError(f"{row.where}: expected {name!r} to be a string or messages, found null")
        sides += _listed(row, name) if isinstance(content, list) else [{"role": role, "content": content}]
    return _conversation(row, sides)


def _alpaca(row: Row) -> Conversation:
    answer = next((name for name in ("output", "response", "completion") if name in row.value), None)
    if answer is None:
        raise UserError(f"{row.where}: expected field 'output' beside 'instruction', found {sorted(row.value)}")
    system = [{"role": "system", "content": row.value["system"]}] if row.value.get("system") else []
    turns = [{"role": "user", "content": alpaca_request(row)}, {"role": "assistant", "content": row.value[answer]}]
    return _conversation(row, system + turns)


def alpaca_request(row: Row) -> str:
    """What a record of Alpaca's form asks: its instruction, and its input below."""
    asked = [row.value[name] for name in ("instruction", "input") if row.value.get(name)]
    if not all(isinstance(text, str) for text in asked):
        raise UserError(f"{row.where}: expected 'instruction' and 'input' to be strings")
    return "\n\n".join(asked)


def _plain_text(row: Row) -> Conversation:
    text = row.value["text"]
    if not isinstance(text, str):
        raise UserError(f"{row.where}: expected 'text' to be a string, found {kind_of(text)}")
    return Conversation((), row.where, _checked(row, text))


FORMAT_OF_FIELD: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "conversations": _sharegpt,
    "prompt": _prompt,
    "instruction": _alpaca,
    "text": _plain_text,
}


def _listed(row: Row, name: str) -> list[dict[str, Any]]:
    value = row.value[name]
    if not isinstance(value, list):
        raise UserError(f"{row.where}: expected '{name}' to be a list of messages, found {kind_of(value)}")
    return [_object(row, entry, name) for entry in value]


def _object(row: Row, entry: Any, name: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{row.where}: expected each of '{name}' to be an object, found {kind_of(entry)}")
    return entry


# ---- messages


def read_messages(row: Row, entries: list[dict[str, Any]]) -> tuple[Message, ...]:
    """Messages from entries of role and content, of one record. Raises UserError as `read_conversation` does."""
    return _conversation(row, entries).messages


def _conversation(row: Row, entries: list[dict[str, Any]]) -> Conversation:
    """Messages from entries of role and content: results and what follows them join the assistant's turn."""
    if not entries:
        raise UserError(f"{row.where}: expected at least one message, found none")
    messages: list[Message] = []
    after_result, foreign = False, False
    for entry in entries:
        role = ROLES.get(str(entry.get("role")))
        if role is None:
            raise UserError(f"{row.where}: expected a role among system, user, assistant, tool; found {_role(entry)}")
        parts = _parts(row, entry, role)
        if any(part.kind == FOREIGN for part in parts):
            foreign = True
            parts = _joined([Part("text", part.text) if part.kind == FOREIGN else part for part in parts])
        if role == "tool":
            if not messages or messages[-1].role != "assistant":
                raise UserError(f"{row.where}: a tool's result that no assistant asked for; put it after the call")
            _extend(messages, parts, "")
        elif role in ("assistant", "function_call") and after_result:
            _extend(messages, parts, "")
        else:
            role = "assistant" if role == "function_call" else role
            weight = _weight(row, entry)
            if messages and messages[-1].role == role and (messages[-1].weight == weight or role != "assistant"):
                _extend(messages, parts, "\n\n")
            else:
                messages.append(Message(role, parts, weight))
        after_result = role == "tool"
    losses = ("calls of unknown tools as text",) if foreign else ()
    return Conversation(tuple(messages), row.where, losses=losses)


def _extend(messages: list[Message], parts: tuple[Part, ...], between: str) -> None:
    last = messages[-1]
    glue = (Part("text", between),) if between and last.parts and parts else ()
    messages[-1] = Message(last.role, _joined([*last.parts, *glue, *parts]), last.weight)


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one; empty ones left out."""
    joined: list[Part] = []
    for part in parts:
        if part.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Part("text", joined[-1].text + part.text)
        elif part.text or part.kind != "text":
            joined.append(part)
    return tuple(joined)


def _role(entry: dict[str, Any]) -> str:
    return repr(entry["role"]) if entry.get("role") is not None else f"no role in {sorted(entry)}"


def _weight(row: Row, entry: dict[str, Any]) -> int:
    weight = entry.get("weight", entry.get("loss_weight", entry.get("train", 1)))
    if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
        raise UserError(f"{row.where}: expected a message's weight to be 0 or 1, found {weight!r}")
    return int(weight)


def _parts(row: Row, entry: dict[str, Any], role: str) -> tuple[Part, ...]:
    content, calls = entry.get("content"), entry.get("tool_calls") or []
    if role == "function_call":
        return (_call(row, content),)
    if content is None and not calls:
        found = "null" if "content" in entry else sorted(entry)
        raise UserError(f"{row.where}: expected a message with 'content', found {found}")
    kind = RESULT if role == "tool" else "text"
    if isinstance(content, list):
        parts = [_part(row, part, role) for part in content]
    elif isinstance(content, str):
        parts = [Part(kind, _checked(row, content))] if content else []
    elif content is None:
        parts = []
    else:
        raise UserError(f"{row.where}: expected 'content' to be a string or a list of parts, found {kind_of(content)}")
    if role == "tool":
        parts = [Part(RESULT, "".join(part.text for part in parts))]
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise UserError(f"{row.where}: expected 'tool_calls' to be a list, in an assistant's message")
    for call in calls:
        made = _call(row, call.get("function", call) if isinstance(call, dict) else call)
        parts += [Part("text", "\n"), made] if made.kind == FOREIGN and parts else [made]
    return _joined(parts)


def _part(row: Row, part: Any, role: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text", part.get("value")) if isinstance(part, dict) else part
    if kind == "tool_call" and role == "assistant":
        return _call(row, text)
    if kind in (*TOOLS, RESULT) and role != "assistant":
        raise UserError(
            f"{row.where}: expected a part of type {kind!r} in an assistant's message only, found one in {role}'s"
        )
    if kind not in ("text", "input_text", "output_text", "reasoning", *TOOLS, RESULT) or not isinstance(text, str):
        found = f"type {kind!r}" if isinstance(part, dict) else kind_of(part)
        raise UserError(f"{row.where}: expected content of text, found {found}; leave the record out")
    if kind == "reasoning":  # before the answer, and apart from it
        return Part("text", _checked(row, text) + "\n\n")
    return Part(kind if kind in (*TOOLS, RESULT) else "text", _checked(row, text))


def _call(row: Row, call: Any) -> Part:
    """A call {"name", "arguments"}: to a tool of ours with its only argument, else in JSON as a line of text."""
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            raise UserError(f"{row.where}: expected a tool call in JSON, found {call[:40]!r}") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f"{row.where}: expected a tool call with 'name' and 'arguments', found {kind_of(call)}")
    arguments = call.get("arguments", {})
    tool = TOOL_OF_FUNCTION.get(call["name"])
    if tool is None:
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(call["name"], ensure_ascii=False)
        return Part(FOREIGN, _checked(row, f'{{"name": {name}, "arguments": {written}}}'))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return Part(tool, _checked(row, arguments))
    if isinstance(arguments, dict) and len(arguments) == 1:
        (arguments,) = arguments.values()
    return Part(tool, _checked(row, arguments if isinstance(arguments, str) else json.dumps(arguments)))


def _checked(row: Row, text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{row.where}: a lone surrogate in the text, which is no character; mend or remove the record")
    return text
