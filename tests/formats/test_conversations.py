"""Every conversation format is converted to one; errors name the file and line."""

from __future__ import annotations

import json

import pytest

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, Part, as_record, message, read_conversation
from llmkit.io.jsonl import read_jsonl
from llmkit.io.records import Row

TEXT = {"type": "text", "text": "4"}
ASKED, ANSWERED = message("user", "2 + 2?"), message("assistant", "4")
USER = {"role": "user", "content": "2 + 2?"}


def read(value):
    return read_conversation(Row(value, "chats.jsonl", 3))


def turns(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def calling(name: object, arguments: object, **more: object) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}], **more}


@pytest.mark.parametrize(
    "record",
    [
        turns(("user", "2 + 2?"), ("assistant", "4")),
        turns(("human", "2 + 2?"), ("gpt", [TEXT])),
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "4"}]},
        {"prompt": "2 + 2?", "response": "4", "source": "x"},
        {"messages": [USER, {"role": "assistant", "content": "4", "weight": None, "tool_calls": None, "name": None}]},
    ],
)
def test_every_format_says_the_same(record):
    assert read(record).messages == (ASKED, ANSWERED)


WEATHER = {"city": "Zürich"}
WRITTEN = '{"name": "weather", "arguments": {"city": "Zürich"}}'


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "Be short."},
            (message("system", "Be short."), message("user", "Add.\n\n2 + 2"), ANSWERED),
        ),
        (  # consecutive messages of one role
            turns(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")),
            (message("user", "a\n\nb"), message("assistant", "c\n\nd")),
        ),
        (  # a call, its result and the answer are one turn
            {"messages": [USER, calling("calculator", '{"expression": "6*7"}', content=None),
                          {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}, USER]},
            (ASKED, Message("assistant", (Part("calc", "6*7"), Part("result", "42"), Part("text", "It is 42."))),
             ASKED),
        ),
        ({"messages": [USER, calling("calc", "2+2")]}, (ASKED, Message("assistant", (Part("calc", "2+2"),)))),
        (  # a call of another function
            {"messages": [USER, calling("weather", WEATHER, content="Wait.")]},
            (ASKED, Message("assistant", (Part("text", "Wait."), Part("tool_call", WRITTEN)))),
        ),
        (  # OpenAI's older form
            {"messages": [USER, {"role": "assistant", "content": "",
                                 "function_call": {"name": "weather", "arguments": json.dumps(WEATHER)}},
                          {"role": "function", "name": "weather", "content": "sunny"}]},
            (ASKED, Message("assistant", (Part("tool_call", WRITTEN), Part("result", "sunny")))),
        ),
        (  # ShareGPT's
            {"conversations": [
                {"from": role, "value": text} for role, text in [
                    ("human", "2 + 2?"), ("function_call", json.dumps({"name": "weather", "arguments": WEATHER})),
                    ("observation", "sunny"), ("gpt", "Sunny.")]]},
            (
                ASKED,
                Message("assistant", (Part("tool_call", WRITTEN), Part("result", "sunny"), Part("text", "Sunny."))),
            ),
        ),
    ],
)  # fmt: skip
def test_records_become_messages(record, expected):
    assert read(record).messages == expected


def test_plain_text_is_a_document():
    assert read({"text": "Once."}).document == "Once." and read({"text": "Once."}).messages == ()


def test_weights():
    def weights(**keys):
        entries = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]
        return [turn.weight for turn in read({"messages": entries}).messages]

    assert weights() == [1, 1] and weights(weight=0) == [1, 0] and weights(loss_weight=1.0) == [1, 1]
    with pytest.raises(UserError, match=r"chats.jsonl:3: expected a message's weight to be 0 or 1, found 0.5"):
        weights(weight=0.5)


def test_messages_are_written_as_they_were_read():
    parts = (Part("text", "See: "), Part("calc", "1+1"), Part("result", "2"))
    messages = (ASKED, Message("assistant", parts))
    assert read({"messages": as_record(messages)}).messages == messages


@pytest.mark.parametrize("field", ["label", "kto_tag"])
def test_a_false_label_rejects_an_answer(field):
    pair = {"prompt": "a", "completion": "b"}
    labels = (False, 0, 0.0, "False", True, 1, "yes", None)
    assert [read({**pair, field: value}).rejected for value in labels] == [True] * 4 + [False] * 4
    assert not read({"text": "a", field: False}).rejected  # a document of a classification data set


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"title": "x"}, "expected messages, conversations, prompt and completion"),
        ({"messages": []}, "expected at least one message"),
        ({"messages": "hello"}, "expected 'messages' to be a list of messages, found a string"),
        ({"messages": ["hello"]}, "expected each of 'messages' to be an object, found a string"),
        (turns(("narrator", "x")), "found 'narrator'"),
        ({"messages": [{"content": "x"}]}, "no role in"),
        ({"messages": [{"role": "user"}]}, "expected a message with 'content'"),
        (turns(("user", None)), "expected a message with 'content', found null"),
        (turns(("user", 5)), "string or a list of parts, found a number"),
        (turns(("user", [{"type": "image"}])), "text content, found type 'image'"),
        (turns(("user", [{"type": "calc", "text": "1"}])), "only in assistant messages"),
        (turns(("tool", "4")), "without a call before it"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "in an assistant's message"),
        ({"messages": [USER, calling("f", "{broken}")]}, "expected the arguments of 'f' in JSON, found '{broken}'"),
        ({"messages": [USER, calling("calculator", "{broken")]}, "expected the arguments of 'calculator' in JSON"),
        ({"messages": [USER, calling("calculator", "{}")]}, "expected an argument of 'calculator', found none"),
        (turns(("user", "a\ud800")), "a lone surrogate"),
        ({"prompt": "x"}, "expected field 'completion' with 'prompt'"),
        ({"instruction": "x"}, "expected field 'output' with 'instruction'"),
        ({"text": 5}, "expected 'text' to be a string"),
    ],
)
def test_an_invalid_conversation_is_named(record, reason):
    with pytest.raises(UserError) as caught:
        read(record)
    assert str(caught.value).startswith("chats.jsonl:3: ") and reason in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dolly_hhrlhf_train_small.jsonl.gz", 1000),
        ("gpteacher.roleplay-instruct.json.gz", 1923),
        ("llamafactory.glaive_toolcall_en_demo.json.gz", 300),
        ("llamafactory.reason_tool_use_demo_50.jsonl.gz", 50),
        ("llamafactory.v1_sft_demo.jsonl.gz", 500),
    ],
)
def test_real_files_are_read_whole(shared_data, name, count):
    found = [read_conversation(row) for row in read_jsonl([str(shared_data / "sft" / name)])]
    assert len(found) == count
    assert all(any(turn.role == "assistant" for turn in each.messages) for each in found)
