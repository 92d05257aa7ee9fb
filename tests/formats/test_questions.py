"""Question formats, and errors in records."""

from __future__ import annotations

import gzip
import json

import pytest

from llmkit.errors import UserError
from llmkit.formats.questions import Question, read_question, read_questions
from llmkit.io.records import Row

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Tower",
            "paragraphs": [
                {
                    "context": "The tower opened in 1889.",
                    "qas": [
                        {"id": "a", "question": "When did it open?", "answers": [{"text": "1889", "answer_start": 20}]},
                        {"id": "b", "question": "Who shut it?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def row(**value) -> Row:
    return Row(value, "q.jsonl", 3)


def only(*values) -> Question:
    (found,) = values
    assert isinstance(found, Question)
    return found


@pytest.mark.parametrize(
    "value",
    [
        {"question": "When did it open?", "answer": "1889"},
        {"question": " When did it open? ", "answer": 1889},
        {"question": "When did it open?", "answers": ["1889", " 1889"]},
        {"question": "When did it open?", "answers": [{"text": "1889", "answer_start": 3}]},
        {"question": "When did it open?", "answers": {"text": ["1889"], "answer_start": [3]}},
        {"context": "Question: When did it open?\nAnswer:", "answer": "1889", "aliases": ["1889"]},
        {"context": "When did it open?", "continuation": "1889"},
    ],
)
def test_every_format_is_the_same_question(value):
    assert read_question(row(**value)) == Question("When did it open?", ("1889",), kind="when", where="q.jsonl:3")


def test_answers_passage_and_language_are_kept():
    found = read_question(row(question="Wann?", answer=["1889", "das Jahr 1889"], context="Text.", id=7, language="de"))
    assert found == Question("Wann?", ("1889", "das Jahr 1889"), "Text.", "7", "other", "de", "q.jsonl:3")
    completed = only(read_question(row(context="The capital of France is", continuation="Paris", aliases=["Paname"])))
    assert (completed.answers, completed.kind) == (("Paris", "Paname"), "completion")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_squad_in_one_line_or_many_plain_or_packed(tmp_path, indent, pack):
    path = tmp_path / "squad.json"
    path.write_bytes(pack(json.dumps(SQUAD, indent=indent).encode()))
    (question,), left_out = read_questions([str(path)])
    assert left_out == {"no answer in the passage": 1}
    assert question == Question(
        "When did it open?", ("1889",), "The tower opened in 1889.", "Tower/1", "when", "", f"{path}:1.1, id a"
    )


def test_jsonl_arrays_and_a_limit(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": n, "data": [n]} for n in range(4)]
    lines, array = tmp_path / "q.jsonl", tmp_path / "q.json"
    lines.write_text("".join(json.dumps(one) + "\n\n" for one in rows))
    array.write_text(json.dumps(rows, indent=1))
    found, _ = read_questions([str(lines), str(array)], 6)
    assert [only(one).answers for one in found] == [("0",), ("1",), ("2",), ("3",), ("0",), ("1",)]
    assert only(found[1]).where == f"{lines}:3" and only(found[5]).where == f"{array}:2"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"question": "Why?"}, "q.jsonl:3: expected 'question' and 'answer', or .* found \\['question'\\]"),
        ({"answer": "a"}, "q.jsonl:3: expected 'question' and 'answer'"),
        ({"question": "Why?", "answer": " "}, "q.jsonl:3: expected 'answer' to be text, found an empty string"),
        ({"question": "Why?", "answers": []}, "q.jsonl:3: expected an answer in 'answers', found an empty list"),
        ({"question": "Why?", "answers": ["a", ""]}, "q.jsonl:3: expected 'answers' to be text"),
        ({"question": "", "answer": "a"}, "q.jsonl:3: expected 'question' to be text, found an empty string"),
        ({"question": ["Why?"], "answer": "a"}, "q.jsonl:3: expected 'question' to be text, found a list"),
        ({"question": "Why?", "answer": None}, "q.jsonl:3: expected 'question' and .*found .*answer: null"),
        ({"question": "Why?", "answer": True}, "q.jsonl:3: expected 'answer' to be text, found a boolean"),
        ({"question": "Why?", "answer": "a", "passage": " "}, "q.jsonl:3: expected 'passage' to be text"),
        ({"question": "Why?", "answer": "a", "language": 3}, "q.jsonl:3: expected 'language' to be a code"),
        ({"context": "Question: \nAnswer:", "answer": "a"}, "q.jsonl:3: expected 'context' to be text"),
    ],
)
def test_a_bad_record_is_named(value, message):
    with pytest.raises(UserError, match=message):
        read_question(row(**value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"title": "x"}]}', ":1: expected 'paragraphs' to be a list of objects, as in SQuAD, found none"),
        ('{"data": [{"paragraphs": [{"context": "", "qas": [{"question": "a"}]}]}]}', ":1.1, id None: expected"),
        ('{"data": "x"}', ": expected 'data' to be a list"),
        ('{\n"data": [', ":1: expected one JSON object per line"),
        ("[3]", ":1: expected an object in the array, found a number"),
        ('{"question": "Why?", "answer": "a"}\n{"question"', ":2: expected one JSON object per line"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_questions([str(path)])


def test_an_empty_file_has_no_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(UserError, match=r"q\.jsonl: expected questions with answers, found none"):
        read_questions([str(tmp_path / "q.jsonl")])


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"),
    [("xquad.en.json.gz", 899), ("xquad.ro.json.gz", 899), ("nq-open.dev.jsonl.gz", 2859),
     ("jeopardy_all.jsonl.gz", 1648), ("triviaqa_sm_sub.jsonl.gz", 2379), ("wikidata.jsonl.gz", 16208)],
)  # fmt: skip
def test_real_files_are_read_whole(shared_data, name, count):
    found, _ = read_questions([str(shared_data / "qa" / name)])
    assert len(found) == count and all(isinstance(one, Question) for one in found)
