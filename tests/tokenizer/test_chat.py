"""Chat encoding: equal to the exported template, and safe from text that spells special tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from foreign_templates import KINDS, as_templates_take, save
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UserError
from llmkit.formats.conversations import (
    Conversation,
    Message,
    Part,
    as_record,
    message,
    read_conversation,
)
from llmkit.generation.requests import split_thoughts
from llmkit.io.records import Row
from llmkit.tokenizer.chat import ChatFormat, has_own_template, write_chat_tokenizer
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tokenizer.folder import SPECIALS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer from train-bpe."""
    from llmkit.stages.train_bpe import TrainBpeConfig, run

    place = tmp_path_factory.mktemp("tokenizer")
    text = place / "docs.txt"
    text.write_text("user assistant system: the cat sat on the mat, 2 + 2 = 4, wasn't it? " * 50)
    run(TrainBpeConfig(inputs=(str(text),), out=str(place / "tok"), vocab_size=448, quiet=True))
    return place / "tok"


@pytest.fixture(scope="module")
def chat(folder):
    return ChatFormat(load_tokenizer(folder))


@pytest.fixture(scope="module")
def stranger(folder):
    """The same folder, loaded by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rendered(stranger, record, **options):
    return stranger.apply_chat_template(record, tokenize=True, return_dict=True, **options)


texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from([" Four.", "\nYes, ", "user", " ", "▁a"])
texts = texts.filter(lambda text: "<|" not in text and not any("\ufdd0" <= one <= "\ufdef" for one in text))
kinds = st.sampled_from(["text", "calc", "python", "search", "result", "tool_call"])
answers = st.lists(st.builds(Part, kinds, texts), max_size=5)
turns = st.builds(message, st.sampled_from(["system", "user"]), texts) | st.builds(
    lambda parts: Message("assistant", tuple(parts)), answers
)


TOOLS = ({"type": "function", "function": {"name": "rain", "parameters": {"properties": {"city": "Zürich"}}}}, {"a": 1})


@settings(deadline=None, max_examples=100)
@given(st.lists(turns, min_size=1, max_size=6), st.booleans())
def test_ids_and_mask_are_those_of_the_template(chat, stranger, messages, prompt):
    ours = chat.encode(messages, prompt=prompt)
    (with_tools,) = chat.encode_many([Conversation(tuple(messages), tools=TOOLS)])
    assert with_tools.token_ids.tolist() == rendered(stranger, as_record(messages), tools=list(TOOLS))["input_ids"]
    theirs = rendered(stranger, as_record(messages), add_generation_prompt=prompt, return_assistant_tokens_mask=True)
    assert ours.token_ids.tolist() == theirs["input_ids"]
    said = "".join(part.text for one in messages for part in one.parts)
    if said.isascii():  # transformers maps characters to tokens, and picks one of a character's several tokens
        assert ours.trained.astype(int).tolist() == theirs["assistant_masks"]


@cache
def foreign(kind: str, strips: bool) -> tuple:
    """Return (ours, theirs) for a base with some kind of tokenizer and added chat tokens."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as base, TemporaryDirectory() as folder:
        # a class that transformers builds differently
        save(Path(base), None, kind, strips, tokenizer_class="LlamaTokenizer", legacy=False)
        grown = write_chat_tokenizer(load_tokenizer(base), Path(folder))
        return ChatFormat(grown), AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(KINDS), st.booleans(), st.lists(turns, min_size=1, max_size=6), st.booleans())
def test_ids_are_those_of_the_template_for_other_tokenizers(kind, strips, messages, prompt):
    chat, theirs = foreign(kind, strips)
    ours = chat.encode(messages, prompt=prompt)
    assert ours.token_ids.tolist() == rendered(theirs, as_record(messages), add_generation_prompt=prompt)["input_ids"]
    (many,) = chat.encode_many([Conversation(tuple(messages))])
    assert many.token_ids.tolist() == rendered(theirs, as_record(messages))["input_ids"]
    documents = chat.encode_many([Conversation((), "", text) for text in (" Four. ", "")] * 20)
    start, end = chat._tokenizer.document_bounds()
    assert documents[0].token_ids.tolist() == [start, *chat._tokenizer.encode(" Four. "), end]
    assert documents[1].token_ids.tolist() == [start, end]


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_a_tool_becomes_the_tokens_that_are_trained_on(kind):
    chat, _ = foreign(kind, False)
    parts = (Part("calc", "2+2"), Part("result", "Four. Yes"), Part("text", "4"))
    ids = chat.encode([Message("assistant", parts)]).token_ids.tolist()
    start, end = (chat._tokenizer.specials[f"<|result_{edge}|>"] for edge in ("start", "end"))
    assert ids[ids.index(start) + 1 : ids.index(end)] == chat.encode_result("Four. Yes")


def read_back(entry):
    """Convert an assistant's message to `parse_response`'s format: separate thoughts, named arguments of our tools."""
    thought, content = split_thoughts(entry["content"])
    for call in [call["function"] for call in entry.get("tool_calls", ())]:
        if call["name"] in ("calc", "python", "search"):
            call["arguments"] = {call["name"]: next(iter(call["arguments"].values()))}
    return {**entry, "content": content} | ({"reasoning_content": thought} if thought else {})


values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda some: st.lists(some, max_size=3))
names = st.sampled_from(["rain", "sum-up"])
objects = st.dictionaries(st.sampled_from("abc"), values | st.dictionaries(texts, values, max_size=2), max_size=3)
calls = st.builds(
    lambda name, given: Part("tool_call", json.dumps({"name": name, "arguments": given}, ensure_ascii=False)),
    names,
    objects,
)
# transformers' parser uses two control characters internally
readable = texts.filter(lambda text: not {"\x01", "\x02"} & set(text))
own_calls = st.builds(Part, st.sampled_from(["calc", "python", "search"]), readable)
said = texts.filter(lambda text: "<" not in text)
called = st.lists(calls | own_calls, min_size=1, max_size=3)
segments = st.lists(st.builds(lambda text, calls: [Part("text", text), *calls], said, called), max_size=2)


@settings(deadline=None, max_examples=80)
@given(segments, called | st.just([]), said.filter(bool), st.booleans())
def test_conversations_in_openais_format_have_the_same_beginning_and_answers_are_parsed_back(
    chat, stranger, segments, called, said, more
):
    parts = [part for one in segments for part in (*one, Part("result", "42"))]
    parts = [part for part in parts if part.text or part.kind != "text"]
    parts = (*parts, Part("text", said), *called)
    messages = [message("user", "hi"), Message("assistant", parts), *([message("user", "so?")] if more else [])]
    entries = as_templates_take(messages)
    whole = stranger.apply_chat_template(entries, tools=list(TOOLS), tokenize=False)
    assert rendered(stranger, entries)["input_ids"] == chat.encode(messages).token_ids.tolist()
    for count, entry in enumerate(entries[1:], 1):
        asked, answered = (
            stranger.apply_chat_template(
                entries[:end], tools=list(TOOLS), add_generation_prompt=end == count, tokenize=False
            )
            for end in (count, count + 1)
        )
        assert whole.startswith(answered)
        if entry["role"] == "assistant" and answered.startswith(asked):
            assert stranger.parse_response(answered[len(asked) :], prefix=asked) == read_back(entry)


def test_thoughts_and_tool_results_are_separated(stranger):
    thought = {"role": "assistant", "reasoning_content": "Two\nand two.", "content": "Four."}
    for name in ("reasoning_content", "reasoning", "thinking"):
        entry = {"role": "assistant", name: "\nTwo\nand two.\n", "content": "Four."}
        said = stranger.apply_chat_template([entry], tokenize=False)
        assert said.endswith("<think>\nTwo\nand two.\n</think>\n\nFour.<|im_end|>")
        assert stranger.parse_response(said.removeprefix("<|im_start|>assistant<|im_sep|>"), prefix="") == thought
    for kind in ("reasoning", "thinking"):
        parts = [{"type": kind, "text": "Two\nand two."}, {"type": "text", "text": "Four."}]
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": parts}]
        read = read_conversation(Row({"messages": turns}, "x", 1)).messages
        assert as_templates_take(read)[1]["content"] == "<think>\nTwo\nand two.\n</think>\n\nFour."
        assert stranger.apply_chat_template(turns, tokenize=False).endswith(said.partition("<|im_sep|>")[2])
    turn = "It is <|calc_start|> 6*7 <|calc_end|><|result_start|>42\n<|result_end|>42.<|im_end|>"
    call = {"type": "function", "function": {"name": "calc", "arguments": {"calc": " 6*7 "}}}
    expected = {"content": "It is 42.", "tool_calls": [call], "tool_responses": ["42\n"]}
    assert stranger.parse_response(turn, prefix="") == {"role": "assistant", **expected}


def test_an_older_folder_of_ours_is_read_and_gets_the_template_of_today(folder, tmp_path):
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["response_template"], config["extra_special_tokens"]
    older = "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": older}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == older and not has_own_template(tokenizer)
    write_chat_tokenizer(tokenizer, tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.im_end_token == "<|im_end|>" and set(SPECIALS) == set(found.all_special_tokens)


@pytest.mark.parametrize(
    ("name", "count"),
    [("glaive_toolcall_en_demo.json", 300), ("reason_tool_use_demo_50.jsonl", 50), ("v1_sft_demo.jsonl", 150)],
)
def test_real_conversations_are_those_of_transformers_and_read_back(chat, stranger, shared_data, name, count):
    from itertools import islice

    from llmkit.io.jsonl import read_jsonl

    path = str(shared_data / "sft" / f"llamafactory.{name}.gz")
    conversations = [read_conversation(row) for row in islice(read_jsonl([path]), count)]
    assert len(conversations) == count
    for conversation, ours in zip(conversations, chat.encode_many(conversations), strict=True):
        entries, tools = as_templates_take(conversation.messages), list(conversation.tools) or None
        assert ours.token_ids.tolist() == rendered(stranger, entries, tools=tools)["input_ids"]
        whole = stranger.apply_chat_template(entries, tools=tools, tokenize=False)
        for end in [end for end, entry in enumerate(entries) if entry["role"] == "assistant"]:
            asked = stranger.apply_chat_template(entries[:end], tools=tools, add_generation_prompt=True, tokenize=False)
            answered = stranger.apply_chat_template(entries[: end + 1], tools=tools, tokenize=False)
            assert answered.startswith(asked) and whole.startswith(answered)
            assert stranger.parse_response(answered[len(asked) :], prefix=asked) == read_back(entries[end])


def test_text_that_spells_a_special_token_stays_text(chat):
    spelled = "".join(SPECIALS)
    encoded = chat.encode([message("user", spelled), message("assistant", spelled)])
    specials = set(chat._tokenizer.specials.values())
    held = [int(i) for i in encoded.token_ids if int(i) in specials]
    names = ["<|im_start|>", "<|im_sep|>", "<|im_end|>"] * 2
    assert held == [chat._tokenizer.specials[name] for name in names]


def test_trained_tokens_of_a_conversation(chat):
    parts = (Part("text", "See "), Part("calc", "1+1"), Part("result", "2"), Part("text", "so 2"))
    messages = [message("user", "a"), message("assistant", "b"), message("user", "c"), Message("assistant", parts)]

    def trained(loss, messages=messages):
        encoded = chat.encode(messages, loss=loss)
        return chat._tokenizer.decode(encoded.token_ids[encoded.trained].tolist())

    last = "See <|calc_start|>1+1<|calc_end|>so 2<|im_end|>"
    assert trained("assistant") == "b<|im_end|>" + last
    assert trained("last") == last
    assert trained("all").startswith("<|im_start|>user<|im_sep|>a<|im_end|>")
    assert trained("assistant", [message("user", "a"), message("assistant", "b", weight=0)]) == ""


def test_a_document_and_the_end_of_a_turn_are_trained_on(chat):
    encoded = chat.encode([message("user", "a"), message("assistant", "b")])
    assert encoded.token_ids[-1] == chat.end_id and encoded.trained[-1]
    assert [encoded.token_ids[end - 1] for end in encoded.turn_ends] == [chat.end_id] * 2
    (document,) = chat.encode_many([Conversation((), "", "the cat sat")])
    assert document.trained.tolist() == [False] + [True] * (len(document) - 1)


def test_many_are_encoded_as_one_by_one(chat):
    many = [Conversation((message("user", f"the cat {i}"), message("assistant", "sat " * (i % 5)))) for i in range(60)]
    for one, encoded in zip(many, chat.encode_many(many), strict=True):
        alone = chat.encode(one.messages)
        np.testing.assert_array_equal(alone.token_ids, encoded.token_ids)
        np.testing.assert_array_equal(alone.trained, encoded.trained)


def test_a_tokenizer_without_the_tokens_is_refused(folder, tmp_path):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|im_sep|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"found no <\|im_sep\|>; fine-tune"):
        ChatFormat(load_tokenizer(tmp_path))
