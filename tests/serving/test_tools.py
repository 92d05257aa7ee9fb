"""Tools in the API, run by the server or by the client; and thoughts separated from answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from served import Server, served

from llmkit.model.folder import load_model, save_model
from llmkit.serving.answers import ThinkSplitter, tool_calls_of
from llmkit.tokenizer.encoding import load_tokenizer

ASKED = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}]


def says(folder: Path, *chains: list[int]) -> Path:
    """Make a model generate chains of tokens; each token except a chain's first may be in only one chain."""
    model = load_model(folder)
    tiny.certain(model, *chains[0])
    with torch.no_grad():
        place = len(chains[0])
        for chain in chains[1:]:
            for token, following in itertools.pairwise(chain):
                model.embed_tokens[token, place] = 1.0
                model.lm_head[following, place] = 10.0
                place += 1
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant that says "So", calls the calculator with 1+2, and says "yeh" after the result."""
    folder = tiny.save_assistant(tmp_path_factory.mktemp("models") / "chat", context=2048)
    tokenizer = load_tokenizer(folder)
    special = tokenizer.specials
    call = [special["<|calc_start|>"], *tokenizer.encode("1+2"), special["<|calc_end|>"]]
    first = [special["<|im_sep|>"], *tokenizer.encode("So "), *call]
    return says(folder, first, [special["<|result_end|>"], *tokenizer.encode("yeh"), special["<|im_end|>"]])


@pytest.fixture(scope="module")
def server(folder: Path):
    with served(folder, "--tools", "calc") as server:
        yield server


PARTS = [
    {"type": "text", "text": "So "},
    {"type": "calc", "text": "1+2"},
    {"type": "result", "text": "3"},
    {"type": "text", "text": "yeh"},
]


def test_the_tools_of_the_server_are_called_and_shown(server: Server) -> None:
    request: dict[str, Any] = {"model": "chat", "messages": ASKED, "temperature": 0, "logprobs": True}
    (choice,) = server.client.chat.completions.create(**request).choices
    assert choice.message.content == "So yeh" and choice.message.content_parts == PARTS
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    masked = [entry.token for entry in choice.logprobs.content if getattr(entry, "sampled", True) is False]
    assert masked == ["<|result_start|>", "3", "<|result_end|>"]
    parts: list[dict[str, str]] = []
    for chunk in server.client.chat.completions.create(**request, stream=True):
        delta = chunk.choices[0].delta
        if delta.content:
            if not parts or parts[-1]["type"] != "text":
                parts.append({"type": "text", "text": ""})
            parts[-1]["text"] += delta.content
        parts += getattr(delta, "content_parts", None) or []
    assert parts == PARTS
    back = [*ASKED, choice.message.model_dump(exclude_none=True), *ASKED]
    tokens = server.post("/tokenize", {"model": "chat", "messages": back, "return_token_strs": True})[1]["token_strs"]
    assert "".join(tokens).count("<|calc_start|>1+2<|calc_end|><|result_start|>3<|result_end|>yeh<|im_end|>") == 1
    cut = server.client.chat.completions.create(**request, stop=["h"]).choices[0].message
    assert cut.content == "So ye" and cut.content_parts == [*PARTS[:-1], {"type": "text", "text": "ye"}]
    off = server.client.chat.completions.create(**request, tool_choice="none").choices[0]
    assert not hasattr(off.message, "content_parts")


@pytest.mark.parametrize("stream", [False, True])
def test_the_tools_of_a_client_are_given_back(folder: Path, server: Server, stream: bool) -> None:
    request: dict[str, Any] = {"model": "chat", "messages": ASKED, "temperature": 0, "tools": TOOLS, "stream": stream}
    answer = server.client.chat.completions.create(**request)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
        (call,) = [call for choice in choices for call in choice.delta.tool_calls or []]
        assert call.index == 0
    else:
        (choice,) = answer.choices
        text, reason, (call,) = choice.message.content, choice.finish_reason, choice.message.tool_calls
    assert (text, reason) == ("So ", "tool_calls")
    assert (call.type, call.function.name) == ("function", "calc")
    assert json.loads(call.function.arguments) == {"expression": "1+2"}
    called = {"role": "assistant", "content": text, "tool_calls": [call.model_dump(exclude={"index"})]}
    messages = [*ASKED, called, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
    final = server.client.chat.completions.create(**{**request, "messages": messages, "stream": False}).choices[0]
    assert (final.message.content, final.finish_reason) == ("yeh", "stop")


@pytest.mark.parametrize(
    "more", [{}, {"tools": TOOLS, "tool_choice": "none"}], ids=["of the server", "not to be called"]
)
def test_no_tool_is_called_if_json_is_requested(server: Server, more: dict) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [3]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "1+2?"}], "response_format": wanted, **more}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200 and json.loads(answer["choices"][0]["message"]["content"]) == {"sum": 3}
    assert "content_parts" not in answer["choices"][0]["message"]
    status, answer = server.post("/v1/chat/completions", {**body, "tools": TOOLS, "tool_choice": "auto"})
    assert status == 400 and answer["error"]["param"] in ("response_format", "tools")


def test_functions_of_a_client_are_shown_and_checked(tmp_path: Path) -> None:
    folder = tiny.save_assistant(tmp_path / "chat", context=2048)
    tokenizer = load_tokenizer(folder)
    named = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    request = {"model": "chat", "messages": ASKED, "tools": named, "max_tokens": 4}
    with served(folder) as server:
        shown = server.post("/tokenize", {name: request[name] for name in ("model", "messages", "tools")})[1]["tokens"]
        assert '"name": "f"' in tokenizer.decode(shown)
        assert server.post("/v1/chat/completions", request)[0] == 200
        for tools in ("f", [{"type": "function"}], [{"type": "web_search"}], [{"type": "function", "function": {}}]):
            status, content = server.post("/v1/chat/completions", {**request, "tools": tools})
            assert status == 400 and content["error"]["param"] == "tools", content
        status, content = server.post("/v1/chat/completions", {**request, "tool_choice": "required"})
        assert status == 400 and content["error"]["param"] == "tool_choice"


def test_a_call_of_a_client_s_function_has_its_arguments_as_they_were_written() -> None:
    (call,) = tool_calls_of([{"tool": "f", "input": '{"a": 1}'}])
    assert call["type"] == "function" and call["function"] == {"name": "f", "arguments": '{"a": 1}'}


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nTwo.\n</think>\n\nFour.", False, ("Two.", "Four.")),
        ("Two.\n</think>\n\nFour.", True, ("Two.", "Four.")),
        ("Two.", True, ("Two.", "")),
        ("a < b and <thin", False, ("", "a < b and <thin")),
        ("x<think>a\n\nb</think>y", False, ("a\n\nb", "xy")),
    ],
)
def test_thoughts_are_apart_however_a_text_is_cut(text: str, begun: bool, expected: tuple[str, str]) -> None:
    for size in (1, 2, 3, 5, 100):
        splitter = ThinkSplitter(begun)
        split = [splitter.push(text[at : at + size]) for at in range(0, len(text), size)] + [
            splitter.push("", last=True)
        ]
        assert tuple("".join(side) for side in zip(*split, strict=True)) == expected
