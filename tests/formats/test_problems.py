"""Problem formats, and errors in records."""

from __future__ import annotations

import doctest
import gzip
import json
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.formats import problems
from llmkit.formats.problems import last_boxed, read_problem
from llmkit.io.jsonl import read_jsonl
from llmkit.io.records import Row


def problem(**value):
    return read_problem(Row(value, "p.jsonl", 3))


def test_the_examples_of_the_documentation_hold():
    assert doctest.testmod(problems).failed == 0


@pytest.mark.parametrize(
    ("value", "prompt", "answer"),
    [
        ({"question": "2 + 2?", "answer": 4}, "2 + 2?", "4"),
        ({"question": " 2 + 2? ", "answer": 4.0}, "2 + 2?", "4"),
        ({"problem": "2 + 2?", "solution": "It is $\\boxed{\\frac{8}{2}}$."}, "2 + 2?", "\\frac{8}{2}"),
        ({"problem": "2 + 2?", "solution": "\\boxed{4}", "answer": "4.0"}, "2 + 2?", "4.0"),
        ({"sQuestion": "2 + 2?", "lSolutions": [4.0], "lEquations": ["x=2+2"]}, "2 + 2?", "4"),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, "Add.\n\n2 + 2", "4"),
        ({"instruction": "Add 2 + 2.", "input": "", "answer": "4", "output": "It is 4."}, "Add 2 + 2.", "4"),
        ({"context": "2 + 2?", "continuation": "4"}, "2 + 2?", "4"),
        ({"prompt": "def f():\n    ", "test": "", "entry_point": "f"}, "def f():\n    ", None),
        ({"question": "Which?", "options": ["A)3", "B)4"], "correct": "B"}, "Which?\n\nA) 3\nB) 4", "B"),
        ({"query": "Question: Which?\nAnswer:", "choices": ["3", "4"], "gold": 1}, "Which?\n\nA) 3\nB) 4", "B"),
        ({"query": "Which?\nA. 3\nB. 4", "choices": ["A", "B"], "gold": 0}, "Which?\nA. 3\nB. 4", "A"),
        ({"question": "Which?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"},
         "Which?\n\nA) 3\nB) 4", "B"),
        ({"question": "Which?", "choices": ["three", "four"], "answer": "four"}, "Which?\n\nA) three\nB) four", "B"),
    ],
)  # fmt: skip
def test_every_format_is_a_prompt_and_an_answer(value, prompt, answer):
    found = problem(**value)
    assert (found.prompt, found.answer, found.where) == (prompt, answer, "p.jsonl:3")
    assert found.record == value and found.messages == ()


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ({"answers": ["4", "5"]}, ("4", "5")), ({"answer": ["4", 5.0, "4"]}, ("4", "5")), ({"target": ["a"]}, ("a",)),
        ({"answer": {"value": "Ada", "aliases": ["Ada L.", "Lovelace"]}}, ("Ada", "Ada L.", "Lovelace")),
        ({"answers": {"text": ["1889", "in 1889"], "answer_start": [0, 3]}}, ("1889", "in 1889")),
        ({"answers": [{"text": "1889"}]}, ("1889",)), ({"solution": ["\\boxed{1}", "2"]}, ("1", "2")),
    ],
)  # fmt: skip
def test_of_a_list_of_answers_each_is_right(value, answers):
    found = problem(question="?", **value)
    assert (found.answer, *found.alternatives) == answers


@pytest.mark.parametrize("name", ["messages", "prompt"])
def test_messages_are_a_prompt_whose_text_is_the_last_ones(name):
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]
    found = problem(**{name: asked, "answer": "4", "verifier": "number"})
    assert [one.role for one in found.messages] == ["system", "user"]
    assert (found.prompt, found.answer, found.verifier) == ("2 + 2?", "4", "number")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "2"}, "p.jsonl:3: expected field 'prompt', 'question' or 'messages' (a problem), found ['text']"),
        ({"prompt": " "}, "'prompt' to be text, found an empty string"),
        ({"prompt": 5}, "'prompt' to be text or messages, found a number"),
        ({"messages": [{"role": "user", "content": "2?"}, {"role": "model", "content": ""}]}, "found one of the"),
        ({"prompt": "2?", "answer": []}, "expected an answer in 'answer', found an empty list"),
        ({"prompt": "2?", "answers": ["4", ["5"]]}, "'answers' to be text or a number, found a list"),
        ({"prompt": "2?", "answer": {"x": 1}}, "'answer' to be text, found an object"),
        ({"prompt": "Is it?", "answer": True}, "found a boolean; write the correct word, such as \"yes\""),
        ({"prompt": "2?", "answer": "4", "verifier": 1}, "'verifier' to be a name, found a number"),
        ({"sQuestion": "2?", "lSolutions": [1, 2]}, "one solution"),
        ({"question": "2?", "choices": ["3", "4"], "answer": 2}, "one of 2 choices, found 2"),
        ({"question": "2?", "choices": ["3", "4"], "answer": True}, "one of 2 choices, found True"),
        ({"question": "2?", "choices": "AB", "answer": "A"}, "a list of strings"),
        ({"question": "2?", "choices": {"text": ["3"], "label": ["x"]}, "answerKey": "x"}, "labels"),
    ],
)  # fmt: skip
def test_an_invalid_problem_is_an_error_in_one_line(value, message):
    with pytest.raises(UserError) as caught:
        problem(**value)
    assert (
        message in str(caught.value) and str(caught.value).startswith("p.jsonl:3: ") and "\n" not in str(caught.value)
    )


def test_files_are_lines_arrays_or_an_object_of_examples_packed_or_not(tmp_path: Path):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    lines, array, examples = tmp_path / "a.jsonl", tmp_path / "b.json.gz", tmp_path / "c.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_bytes(gzip.compress(json.dumps(rows, indent=4).encode()))
    examples.write_text(json.dumps({"examples": rows}, indent=2))
    found = list(read_jsonl([str(lines), str(array), str(examples)], None, read_problem))
    assert [one.answer for one in found] == ["2", "4"] * 3
    assert found[4].where == f"{examples}:1"
    assert len(list(read_jsonl([str(lines), str(array)], 3, read_problem))) == 3
    examples.write_text('{\n "other": []\n}\n')
    with pytest.raises(UserError, match="found an object on several lines"):
        list(read_jsonl([str(examples)], None, read_problem))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("\\boxed{4", None),
        ("\\boxed{}", ""),
        ("\\fbox{3} \\boxed{ 4 } \\fbox{5}", "4"),
        ("\\boxed{{{5}}} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\frac{1}{2} and \\boxed{{{5}}}", "{{5}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed 7 and $\\boxed8$", "8"),
        ("\\boxed{1 \\boxed 2 \\boxed{3} 4}", "3"),
        ("\\boxed{" * 3, None),
        ("\\boxed{4\\}", None),
        ("\\boxed{" * 50_000, None),
        ("\\boxed{" + "4" * 1_000_000 + "}", "4" * 1_000_000),
        ("\\boxed{" * 100_000 + "5" + "}" * 100_001, "5"),
    ],
)
def test_the_last_boxed_expression(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("math/AddSub.json.gz", 395), ("math/SingleEq.questions.json.gz", 508), ("math/aqua.test.jsonl.gz", 254),
        ("math/coin_flip.json.gz", 500), ("math/math.test.jsonl.gz", 5000), ("eval/arc_easy.jsonl.gz", 2376),
        ("eval/mmlu.dev.jsonl.gz", 285), ("eval/siqa.jsonl.gz", 1954),
    ],
)  # fmt: skip
def test_public_files_are_read_as_they_are(shared_data: Path, name: str, count: int):
    found = list(read_jsonl([str(shared_data / name)], None, read_problem))
    assert len(found) == count
    assert all(one.prompt.strip() and one.answer for one in found)


def test_code_that_is_tested_has_no_answer_and_keeps_its_tests(shared_data: Path):
    found = list(read_jsonl([str(shared_data / "eval/HumanEval.jsonl.gz")], None, read_problem))
    assert len(found) == 164
    assert all(one.answer is None and {"test", "entry_point"} <= set(one.record) for one in found)
