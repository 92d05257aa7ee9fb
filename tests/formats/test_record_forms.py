"""A table of record formats for all readers: used fields, and unused ones, which are counted by name."""

from __future__ import annotations

import json

import pytest
from scripted import ScriptedSampler

from llmkit.formats.conversations import message, read_conversation
from llmkit.formats.preferences import read_answers, read_comparison, read_prompt
from llmkit.formats.problems import read_problem
from llmkit.formats.questions import read_question
from llmkit.generation.prompts import Prompts
from llmkit.io.records import BadRecords, Row, check_document, good_records

ASKED, ANSWERED = message("user", "2 + 2?"), message("assistant", "4")
FRENCH = message("system", "Answer in French.")
EARLIER = (message("user", "What is 1 + 1?"), message("assistant", "2"))


def row(**value) -> Row:
    return Row(value, "d.jsonl", 3)


QUESTIONS = [
    {"prompt": "2 + 2?"},
    {"messages": None, "prompt": "2 + 2?"},
    {"prompt": [{"role": "User", "content": "2 + 2?"}]},
    {"question": "2 + 2?"},
    {"problem": "2 + 2?"},
    {"query": "2 + 2?"},
    {"instruction": "2 + 2?", "input": ""},
]


@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize("beside", [{}, {"system": "Answer in French."}, {"history": [["What is 1 + 1?", "2"]]}])
def test_every_reader_asks_the_same(asked, beside):
    before = (*([FRENCH] if "system" in beside else []), *(EARLIER if "history" in beside else []))
    expected = (*before, ASKED)
    assert read_conversation(row(**asked, **beside, response="4")).messages == (*expected, ANSWERED)
    compared = read_comparison(row(**asked, **beside, chosen="4", rejected="5"))
    assert compared.prompt == expected and compared.losses == ()
    assert read_prompt(row(**asked, **beside)) == expected
    problem = read_problem(row(**asked, **beside, answer="4"))
    assert (problem.messages or (ASKED,)) == expected and problem.prompt == "2 + 2?" and problem.losses == ()


@pytest.mark.parametrize(
    "answer",
    [{"completion": "4"}, {"response": "4"}, {"output": "4"}, {"solution": "4"}, {"answer": 4},
     {"answers": ["4", "four"]}, {"answer": {"value": "4", "aliases": ["four"], "type": "Number"}},
     {"completion": None, "response": "4"}],
)  # fmt: skip
def test_fields_with_the_answer(answer):
    found = read_conversation(row(question="2 + 2?", **answer))
    assert found.messages == (ASKED, ANSWERED) and found.losses == ()
    assert not any(name in answer for name in ("completion", "response")) or read_answers(row(prompt="?", **answer))


def test_a_system_message_goes_in_front_or_is_counted():
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert read_conversation(row(system="Answer in French.", messages=turns)).messages == (FRENCH, ASKED, ANSWERED)
    assert (
        read_conversation(row(system_prompt="Answer in French.", question="2 + 2?", response="4")).messages[0] == FRENCH
    )
    own = [{"role": "system", "content": "Be brief."}, *turns]
    found = read_conversation(row(system="Answer in French.", messages=own))
    assert len(found.messages) == 3 and found.losses == ("'system' not used",)
    pair = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "5"}]}
    assert read_comparison(row(system="Answer in French.", **pair)).prompt == (FRENCH, ASKED)
    assert read_comparison(row(system="Answer in French.", prompt="2 + 2?", **pair)).prompt == (FRENCH, ASKED)


def test_thoughts_come_before_the_answer():
    thought = "<think>\nTwo and two make four.\n</think>\n\n4"
    for name in ("reasoning_content", "reasoning", "thinking"):
        said = {"role": "assistant", name: "Two and two make four.\n", "content": "4"}
        turns = [{"role": "user", "content": "2 + 2?"}, said]
        assert read_conversation(row(messages=turns)).messages[1].text == thought
        flat = row(prompt="2 + 2?", completion="4", **{name: "Two and two make four."})
        assert read_conversation(flat).messages[1].text == thought and read_conversation(flat).losses == ()


TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    ("read", "value", "losses"),
    [
        (read_conversation, {"prompt": "a", "completion": "b", "text": "a b", "images": ["x"]}, "text images"),
        (read_conversation, {"messages": TURNS, "prompt": "2 + 2?", "answer": "4", "choices": ["3", "4"]}, "choices"),
        (read_conversation, {"text": "Once", "prompt": "Tell."}, "prompt"),
        (read_conversation, {"prompt": "a", "completion": "b", "label": "other"}, "label"),
        (check_document, {"text": "Once", "id": 3, "messages": [1]}, "messages"),
        (read_comparison, {"prompt": "a", "chosen": "b", "rejected": "c", "messages": [1]}, "messages"),
        (read_question, {"question": "Who?", "answer": "I", "prompt": "?"}, "prompt"),
        (read_question, {"question": "Who?", "answer": "I", "id": 3}, ""),
        (read_problem, {"prompt": "a", "answer": "b", "images": ["x.png"]}, "images"),
        (read_problem, {"question": "Who?", "context": "It was Ada.", "answer": "Ada"}, "context"),
        (read_problem, {"instruction": "Add.", "input": "2 + 2", "output": "4"}, ""),
    ],
)
def test_known_but_unused_fields_are_named(read, value, losses):
    assert read(row(**value)).losses == tuple(f"{name!r} not used" for name in losses.split())


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_definitions_of_tools_belong_to_a_conversation(name):
    bare = [TOOLS[0]["function"]]
    for given, expected in ((TOOLS, TOOLS), (json.dumps(TOOLS), TOOLS), (bare, TOOLS), ([], []), ("[]", [])):
        found = read_conversation(row(messages=TURNS, **{name: given}))
        assert list(found.tools) == expected and found.losses == ()
    for given in ("weather", ["weather"], {"name": "weather"}, "[1"):
        found = read_conversation(row(messages=TURNS, **{name: given}))
        assert found.tools == () and found.losses == (f"{name!r} not used",)


def test_other_forms_of_pairs_and_questions():
    pair = read_comparison(row(question="q", response_j="a", response_k="b"))
    assert not isinstance(pair, str) and pair.losses == ()
    assert [side[0].text for side in pair.candidates] == ["a", "b"]
    shared = [{"from": "human", "value": "2 + 2?"}]
    assert read_problem(row(conversations=shared, answer="4")).messages == (ASKED,)


MESSAGES = {  # unused parts of messages, for any command
    "'name' of a message not used": [{"role": "user", "content": "a?", "name": "Ada"}],
    "'reasoning_content' of another role than assistant not used": [
        {"role": "user", "content": "a?", "reasoning_content": "Hm."}
    ],
}


@pytest.mark.parametrize("loss", MESSAGES)
def test_unused_parts_of_messages_are_named_in_every_command(loss):
    asked, answer, other = MESSAGES[loss], *({"role": "assistant", "content": text} for text in "bc")
    assert read_conversation(row(messages=[*asked, answer])).losses == (loss,)
    assert read_conversation(row(prompt=asked, completion="b")).losses == (loss,)
    assert read_problem(row(messages=asked, answer="b")).losses == (loss,)
    pairs = [row(prompt=asked, chosen="b", rejected="c"), row(chosen=[*asked, answer], rejected=[*asked, other])]
    pairs.append(row(prompt=asked, completions=["b", "c"], ranking=[1, 2]))
    for pair in pairs:
        found = read_comparison(pair)
        assert not isinstance(found, str) and found.losses == (loss,)
    prompts = Prompts([row(prompt=asked)], ScriptedSampler(), max_tokens=1, samples=1, seed=0, own_seeds=False)
    assert len(list(prompts)) == 1 and prompts.left_out["not_used"] == {loss: 1}


def test_a_weight_in_a_comparison_and_options_of_a_server_are_named():
    sides = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text, "weight": 0}] for text in "bc"]
    found = read_comparison(row(chosen=sides[0], rejected=sides[1]))
    assert not isinstance(found, str) and found.losses == ("'weight' of a message not used",)
    given = {"prompt": "a", "temperature": 0.5, "choices": ["b", "c"], "images": ["x.png"], "tools": [{"name": "f"}]}
    prompts = Prompts([row(**given)], ScriptedSampler(), max_tokens=1, samples=1, seed=0, own_seeds=False)
    assert len(list(prompts)) == 1
    unused = ("choices", "images", "temperature", "tools")
    assert sorted(prompts.left_out["not_used"]) == [f"{name!r} not used" for name in unused]


def test_unused_parts_are_reported_and_counted(capsys):
    rows = [Row({"prompt": "a", "completion": "b", "text": "a b"}, "d.jsonl", line) for line in (1, 2)]
    bad = BadRecords("1%")
    assert len(list(good_records(rows, read_conversation, "d.jsonl", bad))) == 2
    assert "llmkit: d.jsonl: of 2 records: 'text' not used 2\n" in capsys.readouterr().err
    assert bad.results == {"bad_records": 0, "not_used": {"'text' not used": 2}}
