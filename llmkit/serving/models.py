"""A model of the server: its names, its tokens, and the requests that bodies ask of it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, definitions_of, read_messages
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling, request_number, seed_of_repeat
from llmkit.generation.requests import Request
from llmkit.generation.tool_calls import ToolUse
from llmkit.io.records import THOUGHTS, Row, kind_of
from llmkit.serving.engine import Job
from llmkit.serving.fields import ApiError, Fields
from llmkit.tokenizer.chat import ChatFormat, Encoded
from llmkit.tokenizer.templates import chat_format, choose_thinking
from llmkit.tools.toolbox import Toolbox

MOST_SAMPLES, MOST_PROMPTS = 128, 1024  # of a request
MOST_TOP = 20  # alternatives at each position
LARGEST_SEED = 2**63 - 1
# fields of a message that are read; others are refused unless they are null
OF_MESSAGE = ("role", "content", "content_parts", "tool_calls", "tool_call_id", "refusal", *THOUGHTS)
SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as tokens, the tools that the client runs, and whether a thought has begun."""

    encoded: Encoded
    tools: ToolUse | None
    thinking: bool

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.encoded.token_ids.tolist()


class ServedModel:
    """A generator under a name.

    name      the folder's, and `path` the folder as it was given: requests may have either
    created   seconds since 1970
    """

    def __init__(self, name: str, path: str, generator: Generator, seed: int = 0) -> None:
        self.name, self.path, self.generator, self.created = name, path, generator, int(time.time())
        self.tokenizer, self.context = generator.tokenizer, generator.config.max_position_embeddings
        self._seed, self._unseeded = seed, itertools.count(1)  # requests without a seed of their own
        self._lock = threading.Lock()  # templates are rendered one at a time
        self._chats: dict[str, ChatFormat] = {}  # by --thinking
        self._bytes = self.tokenizer.token_bytes
        self._special_text = {number: text for text, number in self.tokenizer.specials.items()}

    def about(self) -> dict[str, Any]:
        """The model in the list of models."""
        generator = self.generator
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmkit",
            "max_model_len": self.context,
            "end_ids": sorted(generator.end_ids),
            "chat": generator.is_assistant,
            "tools": list(generator.tools.toolbox.names) if generator.tools else [],
            "dtype": generator.precision.name,
            "fingerprint": generator.identity.get("the model"),
        }

    # ---- tokens

    def token_text(self, token: int) -> str:
        """What a token says: the name of a special one; bytes that are no text as <0xE2><0x80>."""
        if token in self._special_text:
            return self._special_text[token]
        if self._bytes is None:
            return self.tokenizer.decode([token])
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; none for one that the tokenizer lacks."""
        if self._bytes is None:
            return self.tokenizer.decode([token]).encode()
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def is_special(self, token: int) -> bool:
        """True for a special token."""
        return token in self._special_text

    def check_ids(self, ids: Any, name: str) -> list[int]:
        """Return token ids. Raises ApiError for what is none of this model's."""
        whole = isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
        if not whole or not ids:
            raise ApiError(f"{name!r}: expected a list of token ids, one or more", name)
        if strange := [one for one in ids if not 0 <= one < self.generator.config.vocab_size]:
            raise ApiError(f"{name!r}: expected tokens of {self.name}, found {strange[0]}", name)
        return ids

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text to continue."""
        with _refusing("prompt"):
            return self.generator.encode(text) if add_special_tokens else self.tokenizer.encode(text)

    def encode_chat(self, fields: Fields) -> ChatPrompt:
        """The prompt of a conversation to answer, or whose last message is to go on."""
        entries, definitions, choice = fields.take("messages"), fields.take("tools"), fields.take("tool_choice", "auto")
        goes_on = fields.boolean("continue_final_message")
        begins = fields.boolean("add_generation_prompt", not goes_on)
        switches = fields.take("chat_template_kwargs", {})
        if goes_on and begins:
            raise ApiError("'add_generation_prompt': expected false beside 'continue_final_message'", "messages")
        if choice not in ("auto", "none"):
            raise ApiError("'tool_choice' is supported as 'auto' or 'none' alone", "tool_choice")
        with self._lock, _refusing("messages"):
            if not self.generator.is_assistant:
                raise ApiError(f"{self.name} is a base model, which answers nobody; use /v1/completions", "model")
            messages = read_entries(entries, "messages")
            chat = self._chat(switches)
            tools = self._tools(definitions, chat, choice)
            schemas = tools.schemas if tools else self.generator.tools.schemas if self.generator.tools else ()
            if not goes_on:
                encoded = chat.encode(messages, prompt=begins, tools=schemas)
                end = self.tokenizer.decode(encoded.token_ids[-8:].tolist())
                return ChatPrompt(encoded, tools, begins and end.rstrip().endswith("<think>"))
            if messages[-1].role != "assistant":
                raise ApiError("'continue_final_message': expected a last message of the assistant's", "messages")
            encoded, said = chat.encode(messages, tools=schemas), messages[-1].text
            if not messages[-1].parts or messages[-1].parts[-1].kind == "text":  # a call or a result is left open
                end = int(np.flatnonzero(encoded.token_ids == chat.end_id)[-1])
                encoded = replace(encoded, token_ids=encoded.token_ids[:end], trained=encoded.trained[:end])
            return ChatPrompt(encoded, tools, said.rfind("<think>") > said.rfind("</think>"))

    def _chat(self, switches: Any) -> ChatFormat:
        """The chat format, with thoughts switched on or off."""
        if not isinstance(switches, dict) or (strange := [name for name in switches if name not in SWITCHES]):
            found = strange[0] if isinstance(switches, dict) else kind_of(switches)
            raise ApiError(f"'chat_template_kwargs': expected enable_thinking, found {found}", "chat_template_kwargs")
        if not switches:
            return self.generator.chat
        (wanted, *_) = switches.values()
        if not isinstance(wanted, bool):
            raise ApiError("'chat_template_kwargs': expected true or false for enable_thinking", "chat_template_kwargs")
        word = "on" if wanted else "off"
        if word not in self._chats:
            before = self.tokenizer.template_values
            try:
                choose_thinking(self.tokenizer, word)
                self._chats[word] = chat_format(self.tokenizer)
            except UserError:
                raise ApiError(
                    f"the chat template of {self.name} has no switch for thoughts", "chat_template_kwargs"
                ) from None
            finally:
                self.tokenizer.template_values = before
        return self._chats[word]

    def _tools(self, given: Any, chat: ChatFormat, choice: str) -> ToolUse | None:
        """The functions that the client runs; None for the tools of the server."""
        if choice == "none" and self.generator.tools is not None:
            return ToolUse(Toolbox({}, ExitStack(), {}), self.tokenizer, chat=chat)
        if not given or choice == "none":
            return None
        definitions = definitions_of({"tools": given})
        named = {}
        for definition in definitions or ():
            function = definition.get("function")
            if definition.get("type") != "function" or not isinstance(function, dict):
                definitions = None
                break
            named[function.get("name")] = definition
        if definitions is None or not all(isinstance(name, str) and name for name in named):
            raise ApiError("'tools': expected a list of {type: function, function: {name, parameters}}", "tools")
        if not chat.shows_tools:
            raise ApiError(f"the chat template of {self.name} shows no tools", "tools")
        return ToolUse(Toolbox({}, ExitStack(), {}), self.tokenizer, MOST_SAMPLES, chat=chat).offering(
            [*named.values()]
        )

    # ---- requests

    def read_sampling(self, fields: Fields) -> dict[str, Any]:
        """The fields of a request that chats and completions share, as keywords of `Request`."""
        top_k = fields.integer("top_k", None, -1, 2**31)
        top_p = fields.number("top_p", None, 0, 1)
        if top_p == 0:
            top_p = 1e-9  # the likeliest token alone
        seed = fields.integer("seed", None, -(2**63), LARGEST_SEED)
        return {
            "samples": fields.integer("n", 1, 1, MOST_SAMPLES),
            "seed": seed_of_repeat(self._seed, next(self._unseeded)) if seed is None else seed,
            "sampling": Sampling(
                fields.number("temperature", 1.0, 0, 100),
                top_k if top_k is not None and top_k > 0 else None,
                top_p if top_p != 1 else None,
                fields.number("min_p", None, 0, 1),
            ),
            "stop": fields.texts("stop", 16),
        }

    def job(
        self,
        param: str,
        ids: Sequence[int],
        *,
        max_tokens: int | None,
        scored: int | None,
        job: Mapping[str, Any],
        **request: Any,
    ) -> Job:
        """Make the job of a prompt of the field `param`. Raises ApiError for one without room in the context."""
        if len(ids) + (max_tokens != 0) > self.context:
            raise ApiError(
                f"This model's maximum context length is {self.context} tokens, and the prompt has {len(ids)}",
                param,
                code="context_length_exceeded",
            )
        made = Request(ids, max_tokens=max_tokens, number=request_number(ids), **request)
        return Job(made, scored=scored, generates=max_tokens != 0, **job)


def read_entries(entries: Any, param: str) -> tuple[Message, ...]:
    """Read the messages of a field. Raises ApiError, also for a part of a message that would be ignored."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ApiError(f"{param!r}: expected a list of objects, found {kind_of(entries)}", param)
    for index, entry in enumerate(entries):
        for name, value in entry.items():
            if value not in (None, [], {}) and name not in OF_MESSAGE:
                place = f"{param}[{index}].{name}"
                raise ApiError(f"{place!r} is not supported; leave it out", place)
    entries = [{**entry, "content": entry.get("content_parts") or entry.get("content")} for entry in entries]
    with _refusing(param):
        return read_messages(Row({}, param, 0), entries)


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Tell a UserError as one of the request's."""
    try:
        yield
    except UserError as error:
        raise ApiError(str(error), param) from None
