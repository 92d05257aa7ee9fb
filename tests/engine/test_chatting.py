"""Conversations turn by turn: history, commands, an answer cut short, a context that is full."""

from __future__ import annotations

import json

import pytest
from tiny import make_model, save_tokenizer

from llmkit.conversations import Conversation, message
from llmkit.engine.chatting import Chat, talk
from llmkit.engine.generation import Generator
from llmkit.engine.sampling import Sampling
from llmkit.engine.shots import STOP, load_shots, shots_of, with_shots
from llmkit.errors import UserError
from llmkit.tokenizer.chat import ChatFormat, write_chat_tokenizer
from llmkit.tokenizer.encoding import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    save_tokenizer(folder)
    return write_chat_tokenizer(load_tokenizer(folder), folder)


def chat(tokenizer, *, context=256, max_tokens=8, **options):
    model = make_model(context=context, vocab_size=tokenizer.vocab_size)
    generator = Generator(model, tokenizer, Sampling(temperature=0.7), slots=1)
    return Chat(generator, ChatFormat(tokenizer), context=context, max_tokens=max_tokens, **options)


def held(one, *lines):
    """What a conversation writes and says."""
    written, said = [], []
    talk(one, iter(lines), written.append, said.append)
    return "".join(written), said


def test_the_history_is_kept_and_the_answer_streams(tokenizer):
    one, pieces = chat(tokenizer, system="Be brief."), []
    first = one.ask("Hello", pieces.append)
    assert "".join(pieces) == first
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
    _, said = held(one, "hello", f"/save {path}", "/system Be kind.", "hi", f"/save {path}", "/reset", "/what")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert rows[1]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert one.system == "Be kind." and len(one.turns) == 1
    assert said[-1].startswith("/system TEXT")
    written, _ = held(one, "/quit", "not asked")
    assert written == ""
    _, said = held(one, f"/save {path}/x.jsonl")
    assert said[0].startswith("error: ")


def test_the_oldest_turns_leave_a_full_context_and_that_is_said(tokenizer):
    one = chat(tokenizer, context=128, system="Sys.")
    _, said = held(one, *["a message of some length here"] * 4)
    assert any("longer than the context of 128 tokens: left out its oldest 2 turns" in line for line in said)
    assert one.system == "Sys." and one.turns[1].role == "user"


def test_a_message_longer_than_the_context_is_an_error_and_forgotten(tokenizer):
    one = chat(tokenizer, context=64)
    _, said = held(one, "x" * 100, "ok")
    assert said[0].startswith("error: the message is") and [turn.role for turn in one.turns][:1] == ["user"]
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


def test_a_rejected_answer_is_no_shot(tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_text(
        '{"prompt": "a?", "completion": "b", "label": false}\n{"prompt": "c?", "completion": "d", "label": true}\n'
    )
    assert load_shots(str(path), False) == [("c?", "d")]


def test_shots_make_a_document_of_questions_and_answers():
    conversations = [Conversation((message("system", "x"), message("user", "a?"), message("assistant", "b.")), "f:1")]
    prompt = with_shots(shots_of(conversations, "f"), "c?")
    assert prompt == "Question: a?\nAnswer: b.\n\nQuestion: c?\nAnswer:"
    assert STOP == "\nQuestion:"
    with pytest.raises(UserError, match="f:2: expected a question and an answer"):
        shots_of([Conversation((message("user", "a?"),), "f:2")], "f")
    with pytest.raises(UserError, match="f: expected examples, found none"):
        shots_of([], "f")
