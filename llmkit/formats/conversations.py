"""Conversations: read every format that `sft` accepts as messages.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}   messages
    {"prompt": "2 + 2?", "completion": "4"}                     also "response"; either may be a list of messages
    {"instruction": "Add.", "input": "2 + 2", "output": "4"}    Alpaca; also "response"
    {"conversations": [{"from": "human", "value": "2 + 2?"}]}   ShareGPT
    {"text": "Once upon a time ..."}                            plain text, all of it trained on

A message's content is a string or a list of parts, {"type": "text", "text": ...}. A call of a built-in tool is a part
of type `calc`, `python` or `search`, a call of another function one of type `tool_call`, and a tool's answer one of
type `result`; OpenAI's `tool_calls` and messages of role `tool` become such parts. A tool call, its result and the text
after it are one turn of the assistant. Consecutive messages of the same role are merged, with a blank line in between.
Other names of the fields are listed in io/records.py and explained in docs/records.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.questions import answers_of, chosen, placed
from llmkit.io.records import (
    ANSWERS,
    ASKING,
    CONVERSATIONS,
    SYSTEM,
    THOUGHTS,
    Row,
    fields_of,
    first_of,
    kind_of,
    not_used,
)

EMPTY = "empty answers, trained as such"  # counted with the unused parts of a record
TOOLS = ("calc", "python", "search")
TOOL_FIELDS = ("tools", "functions")  # fields of a record that list callable functions
CALL, RESULT = "tool_call", "result"
REASONING = ("reasoning", "thinking")  # types of parts
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
    "function_call": "function_call",  # ShareGPT's: a message of the assistant whose value is a call in JSON
}
ARGUMENT = {"calc": "expression", "python": "code", "search": "query"}  # name of each tool's argument
TOOL_OF_FUNCTION = {"calc": "calc", "calculator": "calc", "python": "python", "search": "search"}
FORMATS = "messages, conversations, prompt and completion, instruction and output, or text"
ANSWERED_BY = {"instruction": ("output", *(name for name in ANSWERS if name != "output"))}  # others: ANSWERS
REJECTED = ("false", "0", "0.0", "no", "bad", "undesirable")  # labels, as in data for KTO
ACCEPTED = ("true", "1", "1.0", "yes", "good", "desirable")
VERDICTS = ("label", "kto_tag")  # fields with these labels


Definitions = Sequence[dict[str, Any]]  # JSON schemas of functions


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message.

    kind  "text"; a tool of TOOLS, called with `text`; "tool_call", a call of another function as {"name", "arguments"}
          in JSON; or "result", the answer of a tool
    """

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message: `role` is "system", "user" or "assistant"; `weight` 0 excludes it from the loss."""

    role: str
    parts: tuple[Part, ...]
    weight: int = 1

    @property
    def text(self) -> str:
        """Text of the message, without calls and results."""
        return "".join(part.text for part in self.parts if part.kind == "text")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, or the `document` of a plain-text record.

    where     FILE:LINE
    rejected  True if the record's label rejects the answer
    losses    parts of the record that are unused or used otherwise than intended, to be counted
    tools     JSON schemas of the functions that the assistant may call
    """

    messages: tuple[Message, ...]
    where: str = ""
    document: str | None = None
    rejected: bool = False
    losses: tuple[str, ...] = ()
    tools: Definitions = ()

    @property
    def said(self) -> str:
        """Text without the system message, which many conversations share."""
        return said_in(self.messages) if self.document is None else self.document


def with_system(conversation: Conversation, text: str | None) -> Conversation:
    """Add a system message to a conversation that has none."""
    messages = conversation.messages
    if text is None or conversation.document is not None or messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(message("system", text), *messages))


def said_in(messages: Sequence[Message]) -> str:
    """Join the texts of all messages except system messages."""
    return "\n".join(message.text for message in messages if message.role != "system")


def message(role: str, text: str, weight: int = 1) -> Message:
    """Make a message from a text."""
    return Message(role, (Part("text", text),), weight)


def as_record(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages to JSON, in the form that chat templates expect."""
    entries = []
    for message in messages:
        parts = [{"type": part.kind, "text": part.text} for part in message.parts]
        is_text = all(part.kind == "text" for part in message.parts)
        entries.append({"role": message.role, "content": message.text if is_text else parts})
    return entries


@dataclass(frozen=True, slots=True)
class RecordPrompt:
    """The prompt of a record: `entries` of role and content, from the field `name`; `used` lists all its fields."""

    name: str
    entries: list[dict[str, Any]]
    used: tuple[str, ...]


@placed
def find_prompt(row: Row, fields: Sequence[str] = ASKING) -> RecordPrompt | None:
    """Read the prompt of a record, with system message and history, from the first of `fields`; None if there is none.

    Raise UserError with file, line and what was expected.
    """
    value = row.value
    name = first_of(value, fields) or ("data" if _are_turns(value.get("data")) else None)
    if name is None:
        return None
    used, prompt = [name], value[name]
    if name == "instruction" and not isinstance(prompt, list):
        texts = [value[field] for field in ("instruction", "input", "context") if value.get(field)]  # Dolly has context
        if not all(isinstance(text, str) for text in texts):
            raise UserError("expected 'instruction' and 'input' to be strings")
        entries = [{"role": "user", "content": "\n\n".join(texts)}]
        used += ["input", "context"]
    else:
        entries = entries_of(name, prompt, "user")
    if name not in CONVERSATIONS and (history := value.get("history")):
        earlier: list[dict[str, Any]] = []
        for pair in history if isinstance(history, list) else [None]:
            if isinstance(pair, dict):
                earlier.append(pair)
            elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
                earlier += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
            else:
                raise UserError(f"expected 'history' to be a list of pairs of strings, found {kind_of(history)}")
        entries = [*earlier, *entries]
        used.append("history")
    system = next((field for field in SYSTEM if value.get(field)), None)
    if system is not None and (not entries or _role(_named(entries[0])) != "system"):
        entries = [{"role": "system", "content": value[system]}, *entries]
        used.append(system)
    return RecordPrompt(name, entries, tuple(used))


@placed
def read_conversation(row: Row) -> Conversation:
    """Read a conversation from a record of any format. Raise UserError with file, line and what was expected."""
    value = row.value
    prompt = find_prompt(row)
    answered_by = ANSWERED_BY.get(prompt.name if prompt is not None else "", ANSWERS)
    answer = None if prompt is None else first_of(value, answered_by)
    if value.get("text") is not None and (prompt is None or (answer is None and prompt.name not in CONVERSATIONS)):
        if not isinstance(value["text"], str):
            raise UserError(f"expected 'text' to be a string, found {kind_of(value['text'])}")
        _check_unicode(value["text"])
        return Conversation((), row.where, value["text"], losses=not_used(value, ("text",)))
    if prompt is None:
        raise UserError(f"expected {FORMATS}, found {fields_of(value)}")
    entries, used = prompt.entries, [*prompt.used]
    if prompt.name not in CONVERSATIONS:
        if answer is None:
            raise UserError(f"expected field {answered_by[0]!r} with {prompt.name!r}, found {fields_of(value)}")
        reply = chosen(value, answer)
        turns = reply if isinstance(reply, list) else [None]
        are_messages = all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)
        may_be_right = answer in ("answer", "answers", "target", "continuation", "output")  # a number, or alternatives
        if may_be_right and not are_messages and not isinstance(reply, str):
            reply = answers_of(reply, answer)[0]
        answering = entries_of(answer, reply, "assistant")
        thoughts = {name: value[name] for name in THOUGHTS if value.get(name)}
        entries = [*entries, *([{**answering[0], **thoughts}] if isinstance(reply, str) else answering)]
        used += [answer, *thoughts]
    lost, tools = list[str](), definitions_of(value)
    of_messages: list[str] = []
    messages = read_messages(row, entries, of_messages)
    if any(turn.role == "assistant" and not any(part.text.strip() for part in turn.parts) for turn in messages):
        lost.append(EMPTY)
    rejected, label = _label(value)
    used += TOOL_FIELDS if tools is not None else ()
    losses = (*lost, *of_messages, *not_used(value, used, shown_text=said_in(messages)), *label)
    return Conversation(messages, row.where, rejected=rejected, losses=losses, tools=tools or ())


def definitions_of(value: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """Read the functions of a record: a list of JSON schemas, or a JSON string of one; None for anything else.

    Schemas are wrapped in OpenAI's {"type", "function"} if necessary, which some templates require.
    """
    tools = value.get(first_of(value, TOOL_FIELDS) or "")
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return None
    return tuple(
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    )


# ---- formats


def entries_of(name: str, value: Any, role: str) -> list[dict[str, Any]]:
    """Return entries of role and content from the field `name`: a text of `role`, or a list of messages.

    Raise UserError for other values.
    """
    if isinstance(value, str) and name not in CONVERSATIONS:
        return [{"role": role, "content": value}]
    if name in CONVERSATIONS and _are_turns(value):
        return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(value)]
    if not isinstance(value, list):
        expected = "a list of messages" if name in CONVERSATIONS else "text or messages"
        raise UserError(f"expected {name!r} to be {expected}, found {kind_of(value)}")
    for entry in value:
        if not isinstance(entry, dict):
            raise UserError(f"expected each of {name!r} to be an object, found {kind_of(entry)}")
    return value


def _are_turns(value: Any) -> bool:
    """Return True for a list of texts by user and assistant in turn, as in UltraChat and LIMA."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _label(value: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a record's label rejects its answer, as in data for KTO, and a loss for an unclear label."""
    for name in VERDICTS:
        label = value.get(name)
        text = str(label).strip().lower()
        if text in REJECTED:
            return True, ()
        if label is not None and text not in ACCEPTED:
            return False, (f"{name!r} not used",)
    return False, ()


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    """Rename ShareGPT's "from" and "value" of an entry to role and content."""
    if "role" in entry and "content" in entry:
        return entry
    role, content = first_of(entry, ("role", "from")), first_of(entry, ("content", "value"))
    text = {"content": entry[content]} if content else {"content": None} if {"content", "value"} & entry.keys() else {}
    return {**entry, **({"role": entry[role]} if role else {}), **text}


def _role(entry: dict[str, Any]) -> str | None:
    return ROLES.get(str(entry.get("role")).strip().lower())


# ---- messages


@placed
def read_messages(row: Row, entries: list[dict[str, Any]], lost: list[str] | None = None) -> tuple[Message, ...]:
    """Read messages from a record's entries of role and content; add their unused parts to `lost`.

    A tool's results and the text after them join the assistant's turn. Raise UserError as `read_conversation` does.
    """
    if not entries:
        raise UserError("expected at least one message, found none")
    messages: list[Message] = []
    losses: list[str] = []
    after_result = False
    for entry in map(_named, entries):
        role = _role(entry)
        if role is None:
            instead = repr(entry["role"]) if entry.get("role") is not None else f"no role in {sorted(entry)}"
            raise UserError(f"expected a role among system, user, assistant, tool; found {instead}")
        parts = _parts(entry, role)
        for part in parts:
            _check_unicode(part.text)
        if role != "assistant":
            losses += (f"{name!r} of another role than assistant not used" for name in THOUGHTS if entry.get(name))
        if role in ("system", "user", "assistant") and entry.get("name"):  # a speaker's name, which no template shows
            losses.append("'name' of a message not used")
        if role == "tool" and (not messages or messages[-1].role != "assistant"):
            raise UserError("a tool's result without a call before it; put it after the call")
        if role == "tool" or (after_result and role in ("assistant", "function_call")):
            _extend(messages, parts)
        else:
            named = first_of(entry, ("weight", "loss_weight", "train"))
            weight = 1 if named is None else entry[named]
            if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
                raise UserError(f"expected a message's weight to be 0 or 1, found {weight!r}")
            speaker = "assistant" if role == "function_call" else role
            if messages and messages[-1].role == speaker and (messages[-1].weight == weight or speaker != "assistant"):
                blank_line = (Part("text", "\n\n"),) if messages[-1].parts and parts else ()
                _extend(messages, (*blank_line, *parts))
            else:
                messages.append(Message(speaker, parts, int(weight)))
        after_result = role == "tool"
    if lost is not None:
        lost += (loss for loss in dict.fromkeys(losses) if loss not in lost)
    return tuple(messages)


def _extend(messages: list[Message], parts: tuple[Part, ...]) -> None:
    messages[-1] = replace(messages[-1], parts=_joined([*messages[-1].parts, *parts]))


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Join consecutive texts and drop empty ones."""
    joined: list[Part] = []
    for part in parts:
        if part.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Part("text", joined[-1].text + part.text)
        elif part.text or part.kind != "text":
            joined.append(part)
    return tuple(joined)


def _parts(entry: dict[str, Any], role: str) -> tuple[Part, ...]:
    content, calls = entry.get("content"), entry.get("tool_calls") or []
    if role == "function_call":
        return (_call(content),)
    if entry.get("function_call") and not calls:  # OpenAI's former name for a single call
        calls = [entry["function_call"]]
    if content is None and role == "assistant":
        content = entry.get("refusal")
    if content is None and not calls:
        instead = "null" if "content" in entry else sorted(entry)
        raise UserError(f"expected a message with 'content', found {instead}")
    if isinstance(content, list):
        parts = [_part(part, role) for part in content]
    elif content is None or isinstance(content, str):
        parts = [Part("text", content)] if content else []
    else:
        raise UserError(f"expected 'content' to be a string or a list of parts, found {kind_of(content)}")
    if role == "tool":
        parts = [Part(RESULT, "".join(part.text for part in parts))]
    thoughts = first_of(entry, THOUGHTS) if role == "assistant" else None
    if thoughts is not None and not any("</think>" in part.text for part in parts):
        if not isinstance(entry[thoughts], str):
            raise UserError(f"expected {thoughts!r} to be a string, found {kind_of(entry[thoughts])}")
        parts = [Part("text", _thought(entry[thoughts])), *parts]
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise UserError("expected 'tool_calls' to be a list, in an assistant's message")
    parts += (_call(call.get("function", call) if isinstance(call, dict) else call) for call in calls)
    return _joined(parts)


def _part(part: Any, role: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text", part.get("value", part.get("thinking"))) if isinstance(part, dict) else part
    if kind == CALL and role == "assistant":
        return _call(text)
    if kind in (*TOOLS, RESULT) and role != "assistant":
        raise UserError(f"expected parts of type {kind!r} only in assistant messages, found one in {role}'s")
    if kind not in ("text", "input_text", "output_text", *REASONING, *TOOLS, RESULT) or not isinstance(text, str):
        instead = f"type {kind!r}" if isinstance(part, dict) else kind_of(part)
        raise UserError(f"expected text content, found {instead}")
    if kind in REASONING:
        return Part("text", _thought(text))
    return Part(kind if kind in (*TOOLS, RESULT) else "text", text)


def _thought(text: str) -> str:
    """Format a thought before an answer, as the templates of Qwen and DeepSeek do."""
    return f"<think>\n{text}\n</think>\n\n" if (text := text.strip("\n")) else ""


def _call(call: Any) -> Part:
    """Read a call {"name", "arguments"}: for a built-in tool its only argument, for another function JSON."""
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            raise UserError(f"expected a tool call in JSON, found {call[:40]!r}") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f"expected a tool call with 'name' and 'arguments', found {kind_of(call)}")
    name, arguments = call["name"], call.get("arguments", {})
    tool = TOOL_OF_FUNCTION.get(name)
    if isinstance(arguments, str) and (arguments or tool is not None):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            if tool is not None and arguments.lstrip()[:1] != "{":
                return Part(tool, arguments)
            instead = f"found {arguments[:40]!r}"
            raise UserError(f"expected the arguments of {name!r} in JSON, {instead}") from None
    if tool is None:
        return Part(CALL, json.dumps({"name": name, "arguments": arguments or {}}, ensure_ascii=False))
    if not arguments:
        raise UserError(f"expected an argument of {name!r}, found none")
    if isinstance(arguments, dict) and len(arguments) == 1:
        (arguments,) = arguments.values()
    return Part(tool, arguments if isinstance(arguments, str) else json.dumps(arguments))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("a lone surrogate in the text, invalid in UTF-8; fix or remove the record") from None
