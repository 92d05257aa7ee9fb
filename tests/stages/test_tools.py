"""Function calls of a third-party model in Qwen 3's format, in sample, rl and sft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_server import ChatServer
from foreign_templates import QWEN3
from tiny import certain, make_model, save_tokenizer

from llmkit.errors import UserError
from llmkit.formats.conversations import read_conversation
from llmkit.generation.chat import Chat
from llmkit.generation.next_token import Sampling
from llmkit.generation.sampler import open_sampler
from llmkit.io.records import Row
from llmkit.model.folder import save_model
from llmkit.stages import evaluate, rl, sample, sft
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tokenizer.templates import chat_format

CALLED = '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call>'
RAIN = {
    "type": "function",
    "function": {"name": "rain", "description": "Whether it rains.", "parameters": {"properties": {"city": {}}}},
}
ASKED = {"role": "user", "content": "Rain?"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A model that answers everything with a call of `rain`, a single token of its vocabulary."""
    folder = tmp_path_factory.mktemp("qwen")
    save_tokenizer(folder, "<|im_start|>", "<|im_end|>")
    spec = json.loads((folder / "tokenizer.json").read_text())
    last = spec["added_tokens"][-1]
    spec["added_tokens"].append({**last, "id": last["id"] + 1, "content": CALLED, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "add_bos_token": False}))
    (folder / "chat_template.jinja").write_text(QWEN3)
    end, (line,) = last["id"], load_tokenizer(folder).encode("\n")
    model = make_model(vocab_size=end + 2, eos_token_id=end, bos_token_id=None, context=2048)
    save_model(certain(model, line, end + 1, end), folder)
    return folder


@pytest.fixture(scope="module")
def weather(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("functions") / "weather.py"
    path.write_text('def rain(city: str) -> str:\n    "Whether it rains."\n    return f"no rain in {city}"\n')
    return f"py:{path}:rain"


def sampled(model: Path, out: Path, *rows: dict, **options: object) -> list[dict]:
    given = write(out.with_name("given.jsonl"), *rows)
    config = {"jsonl": True, "temperature": 0.0, "quiet": True, "force": True, "max_bad": "100%"}
    sample.run(sample.SampleConfig(model=str(model), inputs=(given,), out=str(out), **config | options))
    return read(out)


@pytest.mark.parametrize("tools", [[RAIN], json.dumps([RAIN]), [RAIN["function"]]])
def test_a_call_without_a_local_tool_is_returned(qwen, weather, tmp_path, tools) -> None:
    out = tmp_path / "out.jsonl"
    (record,) = sampled(qwen, out, {"messages": [ASKED], "tools": tools})
    assert record["tool_calls"] == [{"tool": "rain", "input": '{"city": "Oslo"}'}]
    assert (record["completion"], record["finish_reason"]) == ("", "tool_calls")
    # the caller continues with the result of the call; a record without functions is unchanged
    call = {"id": "a", "type": "function", "function": {"name": "rain", "arguments": record["tool_calls"][0]["input"]}}
    turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "no"}]
    again, plain = sampled(qwen, out, {"messages": turns, "tools": tools}, {"messages": [ASKED]})
    assert again["finish_reason"] == "tool_calls" and "tool_calls" not in plain and plain["completion"] == CALLED
    ids = load_tokenizer(qwen)
    (joined,) = sampled(
        qwen, out, {"messages": [ASKED], "tools": [{"name": "snow"}]}, tools=(weather,), max_tool_calls=1
    )
    assert joined["finish_reason"] == "tool_limit" and joined["tool_calls"][0]["result"] == "no rain in Oslo"
    shown = "<tool_response>\nno rain in Oslo\n</tool_response>"
    given = [token for token, own in zip(joined["token_ids"], joined["sampled"], strict=True) if not own]
    assert shown in ids.decode(given) and joined["sampled"].count(True) == 4


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([RAIN], "expected each function once in 'tools' and --tools, found rain twice"),
        ([{"name": "a"}, {"name": "a"}], "found a twice"),
        ([{"type": "function"}], "expected each of 'tools' to be a function with a name, found \\[None\\]"),
        ([{"function": "rain"}], "a function with a name"),
        ([{"name": 3}], "a function with a name, found \\[3\\]"),
    ],
)
def test_functions_of_a_record_that_cannot_be_offered_make_a_bad_record(qwen, weather, tmp_path, tools, said) -> None:
    given = {"messages": [ASKED], "tools": tools}
    with pytest.raises(UserError, match=f"given.jsonl:1: .*{said}"):
        sampled(qwen, tmp_path / "out.jsonl", given, tools=(weather,), max_bad="0")


def test_rollouts_with_functions_are_rewarded_and_trained_on(qwen, weather, tmp_path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(  # all rollouts are the same
        "import itertools\ncount = itertools.count()\ndef reward(record):\n"
        "    assert [call['tool'] for call in record['tool_calls']] == ['rain'] and record['completion'] == ''\n"
        "    return next(count) % 2\n"
    )
    quick = {
        "model": str(qwen), "reward": (f"py:{reward}:reward", "length"), "group": 2, "batch_size": 1, "max_steps": 1,
        "quiet": True, "max_tokens": 8, "temperature": 1.0, "max_tool_calls": 1, "algo": "reinforce++",
    }  # fmt: skip
    own = write(tmp_path / "own.jsonl", {"messages": [ASKED], "tools": [RAIN]})
    plain = write(tmp_path / "plain.jsonl", {"messages": [ASKED]})
    for data, tools, reason in ((own, (), "tool_calls"), (plain, (weather,), "tool_limit")):
        out = tmp_path / f"policy-{reason}"
        rl.run(rl.RlConfig(data=(data,), tools=tools, out=str(out), **quick))
        for row in read(out / "rollouts.jsonl"):
            assert row["finish_reason"] == reason and row["tool_calls"][0]["tool"] == "rain"
            parts = row["messages"][-1]["content"]
            assert [part["type"] for part in parts] == ["tool_call", "result"][: 1 if data == own else 2]


def test_conversations_with_functions_are_trained_on_except_for_results(qwen, tmp_path) -> None:
    """Functions and arguments as lists or as JSON, and four role names for results."""
    arguments, thought = {"city": 'Os"lo\n雨'}, {"reasoning_content": "Wet?"}
    rows = []
    for tools, given, role in (
        ([RAIN], arguments, "tool"),
        (json.dumps([RAIN]), json.dumps(arguments), "ipython"),
        ([RAIN["function"]], json.dumps(arguments), "observation"),
    ):
        call = {"type": "function", "function": {"name": "rain", "arguments": given}}
        turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call], **thought}]
        rows.append(
            {"messages": [*turns, {"role": role, "content": "RESULT"}, {"role": "assistant", "content": "Dry."}]}
        )
        rows[-1]["tools"] = tools
    named = {"from": "function_call", "value": json.dumps({"name": "rain", "arguments": arguments})}
    shared = [{"from": "human", "value": "Rain?"}, named, {"from": "observation", "value": "RESULT"}]
    rows.append({"conversations": [*shared, {"from": "gpt", "value": "Dry."}], "tools": json.dumps([RAIN])})
    tokenizer = load_tokenizer(qwen)
    chat = chat_format(tokenizer)
    conversations = [read_conversation(Row(row, "chats.jsonl", number)) for number, row in enumerate(rows, 1)]
    encoded = chat.encode_many(conversations)
    learnt = [tokenizer.decode(one.token_ids[one.trained]) for one in encoded]
    call = '<tool_call>\n{"name": "rain", "arguments": {"city": "Os\\"lo\\n雨"}}\n</tool_call><|im_end|>'
    said = "<think>\n\n</think>\n\nDry.<|im_end|>"
    assert learnt == [f"<think>\nWet?\n</think>\n\n{call}{said}"] * 3 + [f"{call}{said}"]
    encoded_answers = chat.encode_many(conversations, loss="answer")
    answers = [tokenizer.decode(one.token_ids[one.trained]) for one in encoded_answers]
    assert answers == [f"{call}Dry.<|im_end|>"] * 4
    assert all("# Tools" in tokenizer.decode(one.token_ids) for one in encoded)
    assert all(not conversation.losses for conversation in conversations)
    out = tmp_path / "chat"
    data = write(tmp_path / "chats.jsonl", *rows)
    config = {"model": str(qwen), "data": (data,), "out": str(out), "max_steps": 1, "quiet": True}
    summary = sft.run(sft.SftConfig(**config, sequence_length=1024, batch_tokens=2048, learning_rate=1e-3))
    assert summary is not None and not summary.bad_records and not summary.not_used


# ---- served models


def served(messages: list[dict]) -> dict:
    """Answer like a server of a reasoning model: a call, then a text after its result."""
    call = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Ask."}
    if messages[-1]["role"] == "tool":
        message = {"role": "assistant", "content": f"So: {messages[-1]['content']}", "reasoning": "Now I know."}
    reason = "tool_calls" if "tool_calls" in message else "stop"
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": usage,
    }


@pytest.fixture
def server():
    class Calling(ChatServer):
        def respond(self, path, body):
            return 200, served(body["messages"])

    with Calling(lambda prompt, seed: "") as running:
        yield running


def test_a_server_gets_the_functions_and_their_results(server, weather, tmp_path) -> None:
    out, given = tmp_path / "out.jsonl", write(tmp_path / "in.jsonl", {"messages": [ASKED]})
    config = {"engine": server.spec, "inputs": (given,), "out": str(out), "jsonl": True, "force": True, "quiet": True}
    sample.run(sample.SampleConfig(**config, tools=(weather,), thinking="on"))
    (record,) = read(out)
    assert (record["completion"], record["reasoning_content"]) == ("So: no rain in Oslo", "Ask.\n\nNow I know.")
    call = {"tool": "rain", "input": '{"city": "Oslo"}', "result": "no rain in Oslo"}
    assert (record["tool_calls"], record["finish_reason"]) == ([call], "stop")
    first, second = server.requests
    assert [tool["function"]["name"] for tool in first["tools"]] == ["rain"] and first["tools"] == second["tools"]
    assert first["chat_template_kwargs"] == {"enable_thinking": True}
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": "no rain in Oslo"}
    assert second["messages"][1]["tool_calls"][0]["id"] == "c1" and second["max_tokens"] == first["max_tokens"] - 4
    sample.run(sample.SampleConfig(**config, tools=(weather,), max_tool_calls=0))
    assert read(out)[0]["finish_reason"] == "tool_limit" and "chat_template_kwargs" not in server.requests[-1]
    sample.run(sample.SampleConfig(**config, tools=(weather,), max_tokens=4))
    assert read(out)[0]["finish_reason"] == "length"


def test_functions_of_a_record_go_to_a_server_and_their_calls_come_back(server, tmp_path) -> None:
    out, given = tmp_path / "out.jsonl", write(tmp_path / "in.jsonl", {"messages": [ASKED], "tools": [RAIN]})
    config = {"engine": server.spec, "inputs": (given,), "out": str(out), "jsonl": True, "quiet": True}
    sample.run(sample.SampleConfig(**config))
    (record,) = read(out)
    assert record["tool_calls"] == [{"tool": "rain", "input": '{"city": "Oslo"}'}]
    assert (record["finish_reason"], record["reasoning_content"]) == ("tool_calls", "Ask.")
    assert server.requests[0]["tools"] == [RAIN]
    turns = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"function": RAIN["function"] | {"arguments": "{}"}}]},
    ]
    write(tmp_path / "in.jsonl", {"messages": [*turns, {"role": "tool", "content": "yes"}], "tools": [RAIN]})
    sample.run(sample.SampleConfig(**config, force=True))
    assert read(out)[0]["completion"] == "So: yes"
    (asked,) = server.requests[1:]
    assert asked["messages"][1]["tool_calls"][0]["function"] == {"name": "rain", "arguments": "{}"}
    assert asked["messages"][2]["tool_call_id"] == asked["messages"][1]["tool_calls"][0]["id"]


def test_a_chat_with_a_server_streams_calls(server, weather) -> None:
    said: list[str] = []
    pieces: list[str] = []
    with open_sampler(server.spec, Sampling(), tools=sample.SampleConfig(model="x", tools=(weather,))) as sampler:
        Chat(sampler, max_tokens=99).ask("Rain?", pieces.append, said.append)
    assert "".join(pieces) == "So: no rain in Oslo\n" and len(pieces) > 5
    assert said == ['calls rain: {"city": "Oslo"}', "rain answers: no rain in Oslo", "thinks: Ask. |  | Now I know."]


def test_a_server_is_evaluated_with_functions_and_thoughts(server, weather, tmp_path) -> None:
    problems = write(tmp_path / "p.jsonl", {"prompt": "Rain?", "answer": "So: no rain in Oslo", "verifier": "exact"})
    config = {"engine": server.spec, "tasks": (problems,), "chat": True, "out": str(tmp_path / "s.json"), "quiet": True}
    evaluate.run(evaluate.EvaluateConfig(models=(), **config, tools=(weather,), thinking="off"))
    (scores,) = json.loads((tmp_path / "s.json").read_text())["models"]
    assert [task["score"] for task in scores["tasks"].values()] == [1.0]
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_tools_are_refused_with_a_server_and_a_folder(qwen, server, weather, tmp_path) -> None:
    given = write(tmp_path / "in.jsonl", {"messages": [ASKED]})
    config = sample.SampleConfig(model=str(qwen), engine=server.spec, inputs=(given,), jsonl=True, tools=(weather,))
    with pytest.raises(UserError, match="--tools: expected no MODEL with --engine"):
        sample.run(config)
