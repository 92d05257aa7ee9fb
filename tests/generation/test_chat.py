"""Conversations turn by turn: history, commands, truncated answers, a full context."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
from scripted import ScriptedSampler
from tiny import END, certain, make_model, save_tokenizer

from llmkit.config import ToolConfig
from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, Part, message, read_conversation
from llmkit.generation.chat import COMMANDS, Chat, talk
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.prompts import STOP, load_shots, shots_of, with_shots
from llmkit.generation.tool_calls import open_tools
from llmkit.io.records import Row
from llmkit.tokenizer.chat import write_chat_tokenizer
from llmkit.tokenizer.encoding import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    save_tokenizer(folder)
    return write_chat_tokenizer(load_tokenizer(folder), folder)


def chat(tokenizer, *, context=256, max_tokens=8, **options):
    model = make_model(context=context, vocab_size=tokenizer.vocab_size)
    generator = Generator(model, tokenizer, Sampling(temperature=0.7), slots=1, end_ids=ends(tokenizer))
    return Chat(generator, max_tokens=max_tokens, **options)


def ends(tokenizer):
    return END, tokenizer.specials["<|im_end|>"]


def held(one, *lines):
    """Run a conversation; return its stdout and stderr."""
    written, said = [], []
    talk(one, iter(lines), written.append, said.append)
    return "".join(written), said


def test_the_history_is_kept_and_the_answer_streams(tokenizer):
    one, pieces = chat(tokenizer, system="Be brief."), []
    first = one.ask("Hello", pieces.append)
    assert "".join(pieces) == first + "\n"
    one.ask("And now?", pieces.append)
    assert [turn.role for turn in one.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert one.turns[2].text == first


def test_a_conversation_can_be_held_again(tokenizer):
    lines = ["one", "two", "three"]
    assert held(chat(tokenizer, seed=3), *lines) == held(chat(tokenizer, seed=3), *lines)
    assert held(chat(tokenizer, seed=3), *lines)[0] != held(chat(tokenizer, seed=4), *lines)[0]


def test_lines_are_joined_and_empty_ones_passed_over(tokenizer):
    one = chat(tokenizer)
    held(one, "", "two\\", "lines", "  ")
    assert one.turns[0].text == "two\nlines" and len(one.turns) == 2


def test_commands(tokenizer, tmp_path):
    one = chat(tokenizer)
    path = tmp_path / "kept.jsonl"
    _, said = held(one, "hello", f"/save {path}", "/system Be kind.", "hi", f"/save {path}", "/reset", "/help")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert rows[1]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert one.system == "Be kind." and len(one.turns) == 1
    assert all(name in said[-1] for name in COMMANDS)
    written, _ = held(one, "/quit", "not asked")
    assert written == ""


@pytest.mark.parametrize("name", ["/quit", "/exit", "/retry", "/reset", "/tokens", "/help"])
def test_a_command_with_words_that_it_does_not_take_is_none(tokenizer, name):
    one = chat(tokenizer)
    _, said = held(one, "hello", f"{name} now", "asked")
    assert f"error: there is no command '{name} now', only {name}; a space before it sends it as a message" in said
    assert [turn.text for turn in one.turns[::2]] == ["hello", "asked"]


def test_help_lists_the_commands(tokenizer):
    """Every command that it lists exists and works."""
    for name in COMMANDS:
        _, said = held(chat(tokenizer), name)
        assert not any("there is no command" in line for line in said), name


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/save", "error: /save: expected a file name"),
        ("/what", "error: there is no command /what; /help lists them"),
        ("/edit", "error: /edit TEXT: expected the message"),
        ("/save {place}/tool.py/x.jsonl", "error: /save {place}/tool.py/x.jsonl: "),
        ("/save {place}", "error: /save {place}: Is a directory"),
        ("/save {place}/x.jsonl.gz", "error: /save {place}/x.jsonl.gz: expected a plain JSONL file"),
        ("/save {place}/tool.py", "error: /save {place}/tool.py: expected a JSONL file of conversations or a new file"),
        ("/save {place}/config.json", "error: /save {place}/config.json: expected a JSONL file of conversations"),
        ("/save {place}/docs.jsonl", "error: /save {place}/docs.jsonl: expected a JSONL file of conversations"),
        ("/save {place}/none/x.jsonl", "error: /save {place}/none/x.jsonl: expected a folder {place}/none, found none"),
        ("/WHAT", "error: there is no command /what; /help lists them"),
        ("/Save", "error: /save: expected a file name"),
    ],
)
def test_wrong_commands_are_reported_and_not_sent_to_the_model(tokenizer, tmp_path, line, told):
    (tmp_path / "tool.py").write_text("import os\n")
    (tmp_path / "config.json").write_text('{\n  "model_type": "llama"\n}')
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n')
    one = chat(tokenizer)
    _, said = held(one, "hello", line.format(place=tmp_path))
    assert told.format(place=tmp_path) in said[-1] and len(one.turns) == 2
    assert (tmp_path / "tool.py").read_text() == "import os\n" and (tmp_path / "docs.jsonl").stat().st_size == 14


def test_a_conversation_saved_again_is_one_record(tokenizer, tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"messages": [{"role": "user", "content": "old"}]}')
    one = chat(tokenizer)
    held(one, "hello", f"/save {kept}", f"/save {kept}", "more", f"/save {kept}")
    assert [len(json.loads(line)["messages"]) for line in kept.read_text().splitlines()] == [1, 4]
    held(one, "/reset", "hello", f"/save {kept}")
    assert [len(json.loads(line)["messages"]) for line in kept.read_text().splitlines()] == [1, 4, 2]


def test_another_try_at_temperature_0_says_that_it_is_the_same(tokenizer):
    for greedy in (False, True):
        _, said = held(chat(tokenizer, greedy=greedy), "/retry", "hello", "/retry")
        assert said[0] == "error: there is no message yet"
        assert sum("always the same" in line for line in said) == greedy


def test_commands_before_there_is_anything(tokenizer, tmp_path):
    _, said = held(chat(tokenizer), "/retry", "/edit x", f"/save {tmp_path}/x.jsonl", "/tokens")
    assert said[:2] == ["error: there is no message yet"] * 2 and "there is no answer to save yet" in said[2]
    assert said[3] == "0 of 256 tokens in 0 messages" and not list(tmp_path.iterdir())


def test_a_path_and_an_escaped_command_are_messages(tokenizer):
    one = chat(tokenizer)
    held(one, "/etc/passwd is what?", " /help")
    assert [turn.text for turn in one.turns if turn.role == "user"] == ["/etc/passwd is what?", " /help"]


def test_another_answer_and_another_message(tokenizer):
    one = chat(tokenizer)
    first, second = (one.ask("hello", lambda piece: None), one.retry(lambda piece: None, lambda line: None))
    assert first != second and [turn.text for turn in one.turns] == ["hello", second]
    held(one, "/edit bye")
    assert len(one.turns) == 2 and one.turns[0].text == "bye"
    assert one.ask("more", lambda piece: None) and len(one.turns) == 4
    talk(one, iter(["/edit"]), lambda piece: None, lambda line: None, lambda text: f"{text}!")
    assert [turn.text for turn in one.turns if turn.role == "user"] == ["bye", "more!"]
    talk(one, iter(["/edit"]), lambda piece: None, lambda line: None, lambda text: None)
    assert len(one.turns) == 4  # the edit was cancelled, so nothing is removed


def test_a_truncated_answer_is_reported(tokenizer):
    _, said = held(chat(tokenizer, max_tokens=4), "hello")
    assert said == ["cut after 4 tokens; --max-tokens allows more"]
    _, said = held(chat(tokenizer, max_tokens=None, context=64), "hello")
    assert said == ["cut: the context of 64 tokens is full"]
    shown = []
    talk(chat(tokenizer, max_tokens=4), iter(["hello"]), shown.append, shown.append)
    assert shown[-2:] == ["\n", "cut after 4 tokens; --max-tokens allows more"]  # on a separate line


# ---- tools


def calling(tokenizer, *tools, max_tool_calls=8, answers=True):
    """Make an assistant that calls the calculator for 7 and then says x, or calls it forever."""
    ids = tokenizer.specials
    sep, start, end, result = (ids[f"<|{name}|>"] for name in ("im_sep", "calc_start", "calc_end", "result_end"))
    ((seven,), (x,)) = tokenizer.encode("7"), tokenizer.encode("x")
    model = make_model(context=256, vocab_size=tokenizer.vocab_size, eos_token_id=(END, ids["<|im_end|>"]))
    chain = (sep, start, seven, end) if answers else (result, start, seven, end)
    model = certain(model, *chain)
    for last, following in ((result, x), (x, ids["<|im_end|>"])) if answers else ((sep, start),):
        model.embed_tokens.data[last, 20 + last % 16] = 1.0
        model.lm_head.data[following, 20 + last % 16] = 10.0
    use = open_tools(
        ToolConfig(tools=tools, max_tool_calls=max_tool_calls),
        tokenizer,
        ExitStack(),
        (tokenizer.specials["<|im_end|>"],),
        True,
    )
    generator = Generator(model, tokenizer, Sampling(temperature=0.0), slots=1, tools=use)
    return Chat(generator, max_tokens=60)


def test_calls_are_shown_kept_and_saved(tokenizer, tmp_path):
    one, path = calling(tokenizer, "calc"), tmp_path / "kept.jsonl"
    written, said = held(one, "go", f"/save {path}")
    assert written == "x\n" and said[:2] == ["calls calc: 7", "calc answers: 7"]
    parts = (Part("calc", "7"), Part("result", "7"), Part("text", "x"))
    assert one.turns[1].parts == parts
    (again,) = (read_conversation(Row(json.loads(line), str(path), 1)) for line in path.read_text().splitlines())
    assert again.messages == tuple(one.turns)
    held(one, "again")
    prompt = one._prompt(lambda line: None)
    assert prompt.count(tokenizer.specials["<|calc_start|>"]) == prompt.count(tokenizer.specials["<|result_end|>"]) == 2


def test_a_call_of_a_missing_tool_is_reported_and_is_not_an_answer(tokenizer):
    one = calling(tokenizer)
    written, said = held(one, "go")
    assert written == "\n" and said == ["calls calc, which is not enabled: 7; restart with --tools calc"]
    assert one.turns == [] and one.last_message == "go"


def test_a_call_beyond_the_limit_is_reported(tokenizer):
    one = calling(tokenizer, "calc", max_tool_calls=2, answers=False)
    _, said = held(one, "go")
    assert said[-1] == "stopped at tool call 3; --max-tool-calls allows more"
    assert [part.kind for part in one.turns[1].parts] == ["calc", "result"] * 2


# ---- the context


def test_the_oldest_turns_leave_a_full_context_and_that_is_said(tokenizer):
    one = chat(tokenizer, context=128, system="Sys.")
    _, said = held(one, *["a message of some length here"] * 4)
    assert any(
        "longer than the context of 128 tokens: the model no longer sees its oldest 2 messages" in line for line in said
    )
    assert len(one.turns) == 9  # /save writes them all
    assert "older messages not shown to the model" in one.tokens()


def test_a_message_longer_than_the_context_is_an_error_and_forgotten(tokenizer):
    one = chat(tokenizer, context=64)
    _, said = held(one, "x" * 100, "ok")
    assert said[0].startswith("error: the message is 1") and [turn.role for turn in one.turns][:1] == ["user"]
    assert one.turns[0].text == "ok"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(tokenizer):
    one, pieces, said = chat(tokenizer, max_tokens=60), [], []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    talk(one, iter(["hello", "/reset"]), write, said.append)
    assert said == ["stopped", "a new conversation"]


# ---- base models


def test_a_rejected_answer_is_not_an_example(tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_text(
        '{"prompt": "a?", "completion": "b", "label": false}\n{"prompt": "c?", "completion": "d", "label": true}\n'
    )
    assert load_shots(str(path), ScriptedSampler(), True) == [("c?", "d")]


def test_shots_make_a_document_of_questions_and_answers():
    conversations = [Conversation((message("system", "x"), message("user", "a?"), message("assistant", "b.")), "f:1")]
    prompt = with_shots(shots_of(conversations, "f"), "c?")
    assert prompt == "Question: a?\nAnswer: b.\n\nQuestion: c?\nAnswer:"
    assert STOP == "\nQuestion:"
    with pytest.raises(UserError, match="f:2: expected a question and an answer"):
        shots_of([Conversation((message("user", "a?"),), "f:2")], "f")
    with pytest.raises(UserError, match="f: expected examples, found none"):
        shots_of([], "f")
