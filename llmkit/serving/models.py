"""A served model: its tokens, prompts, and the jobs for a request."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import orjson

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, definitions_of, read_messages
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling, request_number, seed_of_repeat
from llmkit.generation.requests import Request
from llmkit.generation.tool_calls import ToolUse
from llmkit.io.progress import counted
from llmkit.io.records import THOUGHTS, Row
from llmkit.serving.engine import Delta, Job
from llmkit.serving.protocol import ApiError, ChatBody, CompletionBody, ConversationBody
from llmkit.tokenizer.chat import ChatFormat, Encoded
from llmkit.tokenizer.encoding import JsonConstraint, JsonSchemas
from llmkit.tokenizer.templates import chat_format, choose_thinking
from llmkit.tools.toolbox import Toolbox

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_FIELDS = ("role", "content", "content_parts", "tool_calls", "tool_call_id", "refusal", *THOUGHTS)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    text        the text of a completion's prompt, for `echo`
    encoded     the conversation, with its tokens that sft trains
    tools       functions that the client runs; None: the server's tools
    thinking    the prompt has an open <think>
    constraint  a grammar for the answer
    """

    token_ids: list[int]
    text: str = ""
    encoded: Encoded | None = None
    tools: ToolUse | None = None
    thinking: bool = False
    constraint: JsonConstraint | None = None


class ServedModel:
    """A generator; requests select it by `name` (of its folder) or `path` (as given to the command)."""

    def __init__(self, name: str, path: str, generator: Generator, seed: int = 0) -> None:
        self.name, self.path, self.generator, self.tokenizer = name, path, generator, generator.tokenizer
        self.context = generator.config.max_position_embeddings
        self.fingerprint = generator.identity.get("the model")
        self._created = int(time.time())
        self._seeds = (seed_of_repeat(seed, number) for number in itertools.count(1))  # for requests without a seed
        self._template_lock = threading.Lock()
        self._chats: dict[bool, ChatFormat] = {}  # with thinking on or off
        self._bytes = self.tokenizer.token_bytes
        # the largest JSON of a prompt that can fit the context: 8 times its text, for escapes and normalizers
        self._most_bytes = None if self._bytes is None else 8 * self.context * max(map(len, self._bytes))
        self._specials = {token: text for text, token in self.tokenizer.specials.items()}

    def info(self) -> dict[str, Any]:
        """Return the model's entry in `/v1/models`."""
        generator = self.generator
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "llmkit",
            "max_model_len": self.context,
            "end_ids": sorted(generator.end_ids),
            "chat": generator.is_assistant,
            "tools": list(generator.tools.toolbox.names) if generator.tools else [],
            "dtype": generator.precision.name,
            "fingerprint": self.fingerprint,
        }

    # ---- tokens

    def token_text(self, token: int) -> str:
        """Return a token's text; invalid UTF-8 as <0xE2><0x80>."""
        if token in self._specials:
            return self._specials[token]
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes; empty for an embedding row without a token."""
        if self._bytes is None:
            return self.tokenizer.decode([token]).encode()
        return self._bytes[token] if token < len(self._bytes) else b""

    def token_strings(self, token_ids: Sequence[int], strings: bool) -> dict[str, Any]:
        """Return response fields: which tokens are special and, with `strings`, their texts."""
        texts = list(map(self.token_text, token_ids)) if strings else None
        return {"token_strs": texts, "special": [token in self._specials for token in token_ids]}

    def check_ids(self, token_ids: list[int], param: str) -> None:
        """Raise ApiError for a token id outside the vocabulary."""
        size = self.generator.config.vocab_size
        if unknown := [token for token in token_ids if not 0 <= token < size]:
            raise ApiError(f"{param!r}: expected token ids from 0 to {size - 1}, found {unknown[0]}", param)

    # ---- prompts

    def prompts(self, body: ChatBody | CompletionBody) -> list[Prompt]:
        """Return the prompts of a request; a conversation has one, with the constraint of its `response_format`."""
        if isinstance(body, CompletionBody):
            for prompt in body.prompt:
                self._check_size(prompt if isinstance(prompt, str) else "", "prompt")
            return [self.encode_text(prompt, body.add_special_tokens) for prompt in body.prompt]
        prompt, wanted = self.encode_chat(body), body.response_format
        if wanted.type == "text":
            return [prompt]
        offered = body.tools and body.tool_choice != "none"
        if offered or prompt.thinking or body.continue_final_message:
            other = "'tools'" if offered else "thinking; see 'chat_template_kwargs'"
            other = "'continue_final_message'" if body.continue_final_message else other
            raise ApiError(f"'response_format': {wanted.type} cannot be combined with {other}", "response_format")
        with _api_errors("response_format"):
            schema = wanted.json_schema.of_answer if wanted.json_schema else {"type": "object"}
            return [replace(prompt, constraint=self._schemas.compile(schema))]

    def _check_size(self, content: Any, param: str) -> None:
        """Raise ApiError for input that cannot fit the model's context.

        Without tokenizing it: megabytes take seconds, during which no other client is served.
        """
        try:
            size = len(orjson.dumps(content))
        except TypeError as error:  # orjson reads deeper objects than it writes
            raise ApiError(f"{param!r}: {error}", param) from None
        if self._most_bytes is not None and size > self._most_bytes:
            message = f"maximum context length is {self.context} tokens, and the prompt has {counted(size, 'byte')}"
            raise ApiError(f"This model's {message}", param, code="context_length_exceeded")

    def encode_text(self, prompt: str | list[int], add_special_tokens: bool) -> Prompt:
        """Return the prompt for a text or token ids."""
        if isinstance(prompt, str):
            with _api_errors("prompt"):
                ids = self.generator.encode(prompt) if add_special_tokens else self.tokenizer.encode(prompt)
            return Prompt(ids, prompt)
        self.check_ids(prompt, "prompt")
        return Prompt(prompt, self.tokenizer.decode(prompt))

    def encode_chat(self, body: ConversationBody) -> Prompt:
        """Return the prompt that asks for an answer to a conversation, or that continues its last message."""
        if not self.generator.is_assistant:
            raise ApiError(f"{self.name} is a base model without a chat format; use /v1/completions", "model")
        self._check_size([body.messages, body.tools], "messages")
        messages = messages_of(body.messages, "messages")
        with self._template_lock, _api_errors("messages"):
            chat = self._chat(body)
            tools = self._client_tools(body, chat)
            used = tools or self.generator.tools
            schemas = used.schemas if used else ()
            begins, last = body.add_generation_prompt is not False, messages[-1]
            if not body.continue_final_message:
                encoded = chat.encode(messages, prompt=begins, tools=schemas)
                end = self.tokenizer.decode(encoded.token_ids[-8:].tolist())
                thinking = begins and end.rstrip().endswith("<think>")
            elif last.role != "assistant":
                raise ApiError("'continue_final_message' requires the last message to be the assistant's", "messages")
            else:
                encoded = chat.encode(messages, tools=schemas)
                if not last.parts or last.parts[-1].kind == "text":  # after a call or result the turn is open anyway
                    end = int(np.flatnonzero(encoded.token_ids == chat.end_id)[-1])
                    encoded = replace(encoded, token_ids=encoded.token_ids[:end], trained=encoded.trained[:end])
                thinking = last.text.rfind("<think>") > last.text.rfind("</think>")
        return Prompt(encoded.token_ids.tolist(), "", encoded, tools, thinking)

    @cached_property
    def _schemas(self) -> JsonSchemas:
        return JsonSchemas(self.tokenizer, self.generator.end_ids)

    def _chat(self, body: ConversationBody) -> ChatFormat:
        """Return the chat format, with thinking on, off or at the template's default."""
        switches = body.chat_template_kwargs
        thinking = switches.thinking if switches.enable_thinking is None else switches.enable_thinking
        if thinking is None:
            return self.generator.chat
        if thinking not in self._chats:
            before = self.tokenizer.template_values
            try:
                choose_thinking(self.tokenizer, "on" if thinking else "off")
                self._chats[thinking] = chat_format(self.tokenizer)
            except UserError:
                message = f"the chat template of {self.name} cannot switch thinking"
                raise ApiError(message, "chat_template_kwargs") from None
            finally:
                self.tokenizer.template_values = before
        return self._chats[thinking]

    def _client_tools(self, body: ConversationBody, chat: ChatFormat) -> ToolUse | None:
        """Return the functions that the client runs; None for the server's tools."""
        if body.tool_choice == "none":
            return ToolUse(Toolbox({}, ExitStack(), {}), self.tokenizer, chat=chat) if self.generator.tools else None
        if not body.tools:
            return None
        definitions = definitions_of({"tools": body.tools}) or ()
        if any(tool.get("type") != "function" for tool in definitions):
            raise ApiError("'tools': expected a list of {type: function, function: {name, parameters}}", "tools")
        if not chat.shows_tools:
            raise ApiError(f"the chat template of {self.name} does not support tools", "tools")
        with _api_errors("tools"):
            return ToolUse(Toolbox({}, ExitStack(), {}), self.tokenizer, 128, chat=chat).offering(definitions)

    # ---- requests

    def jobs(self, body: ChatBody | CompletionBody, prompts: Sequence[Prompt]) -> list[Job]:
        """Return a job for each prompt. Raises ApiError for a prompt that does not fit the context."""
        if isinstance(body, ChatBody):
            param, limit, echoed = "messages", body.max_completion_tokens or body.max_tokens, False
        else:
            param, limit, echoed = "prompt", body.max_tokens, body.echo
        top_p = 1e-9 if body.top_p == 0 else body.top_p  # greedy
        top_k = body.top_k if body.top_k is not None and body.top_k > 0 else None
        sampling = Sampling(body.temperature, top_k, None if top_p == 1 else top_p, body.min_p)
        seed = next(self._seeds) if body.seed is None else body.seed
        jobs = []
        for prompt in prompts:
            count = len(prompt.token_ids)
            if not count:
                raise ApiError(f"{param!r}: expected at least one token, found none", param)
            if count + (limit != 0) > self.context:
                message = f"This model's maximum context length is {self.context} tokens, and the prompt has {count}"
                message += ", including the tool definitions" if prompt.tools else ""
                raise ApiError(message, param, code="context_length_exceeded")
            request = Request(
                prompt.token_ids,
                samples=body.n,
                max_tokens=limit,
                seed=seed,
                number=request_number(prompt.token_ids),
                sampling=sampling,
                stop=body.stop,
                tools=prompt.tools,
                top_logprobs=body.alternatives or 0,
                constraint=prompt.constraint,
            )
            scored = body.alternatives is not None
            echo = Delta(None, prompt.text) if echoed else None
            jobs.append(Job(request, body.stream, body.return_token_ids or scored, echo, scored))
        return jobs


def messages_of(entries: Sequence[Mapping[str, Any]], param: str) -> tuple[Message, ...]:
    """Parse the messages of a field. Raises ApiError for invalid ones, and for fields that would be ignored."""
    for index, entry in enumerate(entries):
        if entry.get("role") not in ROLES:  # records may have others, such as ShareGPT's
            raise ApiError(f"'{param}[{index}].role': expected one of {', '.join(ROLES)}", param)
        for name, value in entry.items():
            if value not in (None, [], {}) and name not in MESSAGE_FIELDS:
                field = f"{param}[{index}].{name}"
                raise ApiError(f"{field!r} is not supported; omit it", field)
    with _api_errors(param):
        contents = [{**entry, "content": entry.get("content_parts") or entry.get("content")} for entry in entries]
        return read_messages(Row({}, param, 0), contents)


@contextmanager
def _api_errors(param: str) -> Iterator[None]:
    """Convert a UserError to an ApiError for the field `param`."""
    try:
        yield
    except UserError as error:
        raise ApiError(str(error), param) from None
