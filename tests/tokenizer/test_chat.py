"""Chat encoding: equal to the template that others read, and safe from text that spells special tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from foreign_templates import KINDS, save
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, Message, Part, as_record, message, read_conversation
from llmkit.io.records import Row
from llmkit.tokenizer.chat import ChatFormat, write_chat_tokenizer
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tokenizer.folder import SPECIALS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer from train-bpe, as a user would have it."""
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
    """The same folder, read by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rendered(stranger, record, **options):
    return stranger.apply_chat_template(record, tokenize=True, return_dict=True, **options)


texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from([" Four.", "\nYes, ", "user", " ", "▁a"])
texts = texts.filter(lambda text: "<|" not in text and not any("\ufdd0" <= one <= "\ufdef" for one in text))
answers = st.lists(st.builds(Part, st.sampled_from(["text", "calc", "python", "search", "result"]), texts), max_size=5)
turns = st.builds(message, st.sampled_from(["system", "user"]), texts) | st.builds(
    lambda parts: Message("assistant", tuple(parts)), answers
)


@settings(deadline=None, max_examples=150)
@given(st.lists(turns, min_size=1, max_size=6), st.booleans())
def test_ids_and_mask_are_those_of_the_template(chat, stranger, messages, prompt):
    ours = chat.encode(messages, prompt=prompt)
    theirs = rendered(stranger, as_record(messages), add_generation_prompt=prompt, return_assistant_tokens_mask=True)
    assert ours.token_ids.tolist() == theirs["input_ids"]
    said = "".join(part.text for one in messages for part in one.parts)
    if said.isascii():  # transformers finds tokens by characters, and takes one of several tokens of a character
        assert ours.trained.astype(int).tolist() == theirs["assistant_masks"]


@cache
def foreign(kind: str, strips: bool) -> tuple:
    """(ours, theirs) for a base with a tokenizer of some kind, which got the tokens of conversations."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as base, TemporaryDirectory() as folder:
        # a class which transformers builds otherwise
        save(Path(base), None, kind, strips, tokenizer_class="LlamaTokenizer", legacy=False)
        grown = write_chat_tokenizer(load_tokenizer(base), Path(folder))
        return ChatFormat(grown), AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=200)
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


def test_openai_tool_calls_are_rendered_alike(chat, stranger):
    calls = [{"function": {"name": "calc", "arguments": {"expression": "6*7"}}}]
    others = [{"function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1]}}}]
    record = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Wait.", "tool_calls": calls},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "", "tool_calls": others},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Done."},
    ]
    ours = chat.encode(read_conversation(Row({"messages": record}, "x", 1)).messages)
    assert ours.token_ids.tolist() == rendered(stranger, record)["input_ids"]


def test_text_that_spells_a_special_token_stays_text(chat):
    spelled = "".join(SPECIALS)
    encoded = chat.encode([message("user", spelled), message("assistant", spelled)])
    specials = set(chat._tokenizer.specials.values())
    held = [int(i) for i in encoded.token_ids if int(i) in specials]
    names = ["<|im_start|>", "<|im_sep|>", "<|im_end|>"] * 2
    assert held == [chat._tokenizer.specials[name] for name in names]


def test_what_is_trained(chat):
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


def test_a_tokenizer_that_has_them_is_kept(folder, tmp_path):
    write_chat_tokenizer(load_tokenizer(folder), tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((folder / "tokenizer.json").read_text())
