"""Data sets of the hub are read without options, as Parquet with the types that they have there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmkit.formats.conversations import read_conversation
from llmkit.formats.preferences import Comparison, read_comparison
from llmkit.formats.problems import read_problem
from llmkit.formats.questions import Question, read_question
from llmkit.io.jsonl import read_documents, read_jsonl

Q, A = "What is 2 + 2?", "It is 4."
ASKED, ANSWERED = {"content": Q, "role": "user"}, {"content": A, "role": "assistant"}
CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"expression": "2 + 2"}'}}
NO_PAGES = {name: [] for name in ("doc_source", "filename", "title", "wiki_context")}
HUMAN_EVAL = "def add(a, b):\n"


def sft(path: str) -> Any:
    conversation = next(read_jsonl([path], read=read_conversation))
    return conversation.document or [message.text for message in conversation.messages]


def rl(path: str) -> Any:
    problem = next(read_jsonl([path], read=read_problem))
    return problem.prompt, problem.answer


def probe(path: str) -> Any:
    question = next(read_jsonl([path], read=read_question))
    assert isinstance(question, Question)
    return question.question, question.answers


def prefer(path: str) -> Any:
    comparison = next(read_jsonl([path], read=read_comparison))
    assert isinstance(comparison, Comparison)
    return comparison.prompt[-1].text, [candidate[-1].text for candidate in comparison.candidates]


def pretrain(path: str) -> Any:
    return next(read_documents([path])).value["text"]


LAYOUTS: dict[str, tuple[dict[str, Any], dict[Callable[[str], Any], Any]]] = {
    "FineWeb": (
        {"text": A, "id": "<urn:uuid:1>", "dump": "CC-MAIN-2013-20", "url": "http://a.b/", "date": "2013-05-18",
         "file_path": "s3://commoncrawl/x", "language": "en", "language_score": 0.98, "token_count": 42},
        {pretrain: A, sft: A},
    ),
    "Wikipedia": ({"id": "1", "url": "https://x", "title": "Four", "text": A}, {pretrain: A, sft: A}),
    "OpenAI": ({"messages": [ASKED, ANSWERED]}, {sft: [Q, A]}),
    "OpenAI, tools": (
        {"messages": [{**ASKED, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "content": "4", "tool_call_id": "c1"}, ANSWERED]},
        {sft: [Q, A]},
    ),
    "OpenAI, parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]},
                      {"role": "assistant", "content": [{"type": "text", "text": A}]}]},
        {sft: [Q, A]},
    ),
    "UltraChat 200k": (
        {"prompt": Q, "prompt_id": "f0e3", "messages": [ASKED, ANSWERED]}, {sft: [Q, A], rl: (Q, None)}
    ),
    "UltraChat": ({"id": "0", "data": [Q, A, "And 3 + 3?", "6."]}, {sft: [Q, A, "And 3 + 3?", "6."]}),
    "LIMA": ({"conversations": [Q, A], "source": "stackexchange"}, {sft: [Q, A]}),
    "ShareGPT": (
        {"id": "a", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, {sft: [Q, A]}
    ),
    "OpenOrca": ({"id": "x", "system_prompt": "Be brief.", "question": Q, "response": A}, {sft: ["Be brief.", Q, A]}),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": A, "text": "Below is ..."}, {sft: ["Add.\n\n2 + 2", A]}
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "2 + 2", "response": A, "category": "qa"}, {sft: ["Add.\n\n2 + 2", A]}
    ),
    "GSM8K": (
        {"question": Q, "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {sft: [Q, "2 + 2 = <<2+2=4>>4\n#### 4"], rl: (Q, "4"), probe: (Q, ("4",))},
    ),
    "MATH": ({"problem": Q, "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{4}$"}, {rl: (Q, "4")}),
    "NuminaMath": (
        {"source": "x", "problem": Q, "solution": r"$\boxed{4}$", "messages": [ASKED, ANSWERED]},
        {sft: [Q, A], rl: (Q, "4")},
    ),
    "HH": (
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: 5."},
        {prefer: (Q, [A, "5."])},
    ),
    "UltraFeedback": (
        {"prompt": Q, "prompt_id": "x", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "5."}],
         "messages": [ASKED, ANSWERED], "score_chosen": 9.0, "score_rejected": 2.0},
        {prefer: (Q, [A, "5."]), sft: [Q, A], rl: (Q, None)},
    ),
    "SQuAD": (
        {"id": "1", "title": "F", "context": "It is 4", "question": Q, "answers": {"text": ["4"], "answer_start": [6]}},
        {sft: [Q, "4"], rl: (Q, "4"), probe: (Q, ("4",))},
    ),
    "TriviaQA": (
        {"question": Q, "question_id": "tc_1", "question_source": "http://x", "entity_pages": NO_PAGES,
         "search_results": {"description": ["d"], "filename": ["f"], "rank": [1], "title": ["t"], "url": ["u"]},
         "answer": {"aliases": ["four", "4"], "matched_wiki_entity_name": "", "normalized_aliases": ["four"],
                    "normalized_matched_wiki_entity_name": "", "normalized_value": "4", "type": "X", "value": "4"}},
        {sft: [Q, "4"], rl: (Q, "4"), probe: (Q, ("4", "four"))},
    ),
    "HumanEval": (
        {"task_id": "HumanEval/0", "prompt": HUMAN_EVAL, "canonical_solution": "    return a + b\n",
         "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"},
        {rl: (HUMAN_EVAL, None)},
    ),
    "MMLU": (
        {"question": Q, "subject": "algebra", "choices": ["3", "4"], "answer": 1},
        {sft: [Q, "4"], rl: (f"{Q}\n\nA) 3\nB) 4", "B"), probe: (Q, ("4",))},
    ),
    "ARC": (
        {"id": "1", "question": Q, "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {rl: (f"{Q}\n\nA) 3\nB) 4", "B")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_the_hub_needs_no_option(tmp_path: Path, name: str) -> None:
    row, expected = LAYOUTS[name]
    path = tmp_path / "d.parquet"
    parquet.write_table(pa.Table.from_pylist([row] * 3), path)
    assert {read.__name__: read(str(path)) for read in expected} == {read.__name__: expected[read] for read in expected}
