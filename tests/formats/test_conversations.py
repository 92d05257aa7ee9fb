"""Every format of conversations becomes one; what is none is named with its place."""

from __future__ import annotations

import gzip
import json

import pytest

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, Part, as_record, message, read_conversation
from llmkit.io.jsonl import read_jsonl
from llmkit.io.records import Row

TEXT = {"type": "text", "text": "4"}
ASKED, ANSWERED = message("user", "2 + 2?"), message("assistant", "4")


def read(value):
    return read_conversation(Row(value, "chats.jsonl", 3))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": "human", "content": "2 + 2?"}, {"role": "gpt", "content": [TEXT]}]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 2?", "response": "4", "source": "x"},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
    ],
)  # fmt: skip
def test_every_format_says_the_same(record):
    assert read(record).messages == (ASKED, ANSWERED)


def test_instruction_with_input_and_system():
    conversation = read({"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "Be short."})
    assert conversation.messages == (message("system", "Be short."), message("user", "Add.\n\n2 + 2"), ANSWERED)


def test_plain_text_is_a_document():
    assert read({"text": "Once."}).document == "Once." and read({"text": "Once."}).messages == ()


def test_weights():
    def weights(**keys):
        entries = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]
        return [one.weight for one in read({"messages": entries}).messages]

    assert weights() == [1, 1] and weights(weight=0) == [1, 0] and weights(loss_weight=1.0) == [1, 1]
    with pytest.raises(UserError, match=r"chats.jsonl:3: expected a message's weight to be 0 or 1, found 0.5"):
        weights(weight=0.5)


def test_neighbours_of_one_role_are_merged():
    entries = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    conversation = read({"messages": [{"role": role, "content": text} for role, text in entries]})
    assert conversation.messages == (message("user", "a\n\nb"), message("assistant", "c\n\nd"))


def test_an_openai_tool_call_and_its_result_are_one_turn():
    call = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'}}
    entries = [
        {"role": "user", "content": "6 times 7?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Thanks."},
    ]
    parts = (Part("calc", "6*7"), Part("result", "42"), Part("text", "It is 42."))
    assert read({"messages": entries}).messages[1:] == (Message("assistant", parts), message("user", "Thanks."))


def test_a_call_of_another_function_is_written_in_json():
    call = {"name": "weather", "arguments": {"city": "Zürich"}}
    entries = [{"role": "assistant", "content": "Wait.", "tool_calls": [{"function": call}]}]
    assert read({"messages": entries}).messages[0].text == 'Wait.\n{"name": "weather", "arguments": {"city": "Zürich"}}'
    turns = [("human", "?"), ("function_call", json.dumps(call)), ("observation", "sunny"), ("gpt", "Sunny.")]
    conversation = read({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [part.kind for part in conversation.messages[1].parts] == ["text", "result", "text"]


def test_messages_are_written_as_they_were_read():
    parts = (Part("text", "See: "), Part("calc", "1+1"), Part("result", "2"))
    messages = (ASKED, Message("assistant", parts))
    assert read({"messages": as_record(messages)}).messages == messages


def test_what_is_lost_of_a_record_is_told():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call, ours = ({"name": name, "arguments": {"a": "b"}} for name in ("weather", "calculator"))
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": call}]}]
    both = ("tool definitions left out", "calls of unknown tools as text")
    assert read({"messages": asked, "tools": tools}).losses == both
    assert read({"messages": asked, "tools": []}).losses == both[1:]
    assert read({"prompt": "a", "completion": "b", "functions": tools}).losses == both[:1]
    known = [asked[0], {"role": "assistant", "tool_calls": [{"function": ours}]}]
    assert read({"messages": known}).losses == ()


@pytest.mark.parametrize("field", ["label", "kto_tag"])
def test_a_false_label_rejects_an_answer(field):
    pair = {"prompt": "a", "completion": "b"}
    assert [read({**pair, field: value}).rejected for value in (False, 0, 0.0, "False", True, 1, "yes", None)] == (
        [True] * 4 + [False] * 4
    )
    assert read({"messages": [{"role": "assistant", "content": "b"}], field: False}).rejected
    assert not read({"text": "a", field: False}).rejected  # a document of a classification


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"title": "x"}, "expected messages, conversations, prompt and completion"),
        ({"messages": []}, "expected at least one message"),
        ({"messages": "hello"}, "expected 'messages' to be a list of messages, found a string"),
        ({"messages": ["hello"]}, "expected each of 'messages' to be an object, found a string"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "found 'narrator'"),
        ({"messages": [{"content": "x"}]}, "no role in"),
        ({"messages": [{"role": "user"}]}, "expected a message with 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "expected a message with 'content', found null"),
        ({"messages": [{"role": "user", "content": 5}]}, "string or a list of parts, found a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of text, found type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "calc", "text": "1"}]}]}, "an assistant's message only"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "no assistant asked for"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "in an assistant's message"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "a lone surrogate"),
        ({"prompt": "x"}, "expected field 'completion' beside 'prompt'"),
        ({"instruction": "x"}, "expected field 'output' beside 'instruction'"),
        ({"text": 5}, "expected 'text' to be a string"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(record, reason):
    with pytest.raises(UserError) as caught:
        read(record)
    assert str(caught.value).startswith("chats.jsonl:3: ") and reason in str(caught.value)


def test_a_file_is_jsonl_or_one_array(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json.gz"
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    array.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    for path in (lines, array):
        found = list(read_jsonl([str(path)]))
        assert [row.value for row in found] == rows
        assert [row.value for row in read_jsonl([str(path)], limit=1)] == rows[:1]
    assert found[1].where == f"{array}:2"
    array.write_bytes(b"[{}, 3]")
    with pytest.raises(UserError, match=r":2: expected an object in the array, found a number"):
        list(read_jsonl([str(array)]))
    array.write_bytes(b"[{}, ")
    with pytest.raises(UserError, match="expected JSONL or one JSON array"):
        list(read_jsonl([str(array)]))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dolly_hhrlhf_train_small.jsonl.gz", 1000),
        ("gpteacher.roleplay-instruct.json.gz", 1923),
        ("llamafactory.alpaca_en_demo.json.gz", 999),
        ("llamafactory.c4_demo.jsonl.gz", 300),
        ("llamafactory.glaive_toolcall_en_demo.json.gz", 300),
        ("llamafactory.reason_tool_use_demo_50.jsonl.gz", 50),
        ("llamafactory.v1_sft_demo.jsonl.gz", 500),
        ("raschka.instruction-data.json.gz", 1100),
    ],
)
def test_real_files_are_read_whole(shared_data, name, count):
    found = [read_conversation(row) for row in read_jsonl([str(shared_data / "sft" / name)])]
    assert len(found) == count
    said = [any(one.role == "assistant" for one in each.messages) or each.document for each in found]
    assert all(said)
