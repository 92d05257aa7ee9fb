"""Questions written by a model: parsing its replies, and rejected questions."""

from __future__ import annotations

import doctest

import pytest

from llmkit.probing import judges, model_questions
from llmkit.probing.model_questions import read_pairs, unfit, written_questions
from llmkit.probing.question_rules import Passage

MILL = Passage("The mill of Arden opened in 1889. It has 1,200 windows, and Ada Roe built it.", "d1/1", "docs.jsonl:1")


def test_the_examples_of_the_documentation_hold():
    assert doctest.testmod(model_questions).failed == 0 and doctest.testmod(judges).failed == 0


@pytest.mark.parametrize(
    "reply",
    [
        '{"questions": [{"question": "Who built the mill of Arden?", "answer": "Ada Roe"}]}',
        'Here you are:\n```json\n{"questions":[{"question":"Who built the mill of Arden?","answer":"Ada  Roe "}]}\n```',
        '{"questions": [{"question": "Who built the mill of Arden?", "answer": "Ada Roe"}, {"question": "When?"}, 3]}',
    ],
)
def test_the_questions_of_a_reply(reply):
    assert read_pairs(reply) == [("Who built the mill of Arden?", "Ada Roe")]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot do that.",
        "{}",
        "}{",
        '{"questions": []}',
        '{"questions": {"question": "a", "answer": "b"}}',
        '{"questions": [{"question": "", "answer": "b"}]}',
        '{"questions": [{"question": "a", "answer": null}]}',
        '{"questions": [{"question": "a", "answer": true}]}',
        '{"questions": [{"question": "a", "answer": "b"}',
        '[{"question": "a", "answer": "b"}]}',
    ],
)
def test_a_reply_that_cannot_be_read(reply):
    assert read_pairs(reply) is None


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("How many windows does the mill of Arden have?", "1200", None),
        ("Who built the mill of Arden?", "ada roe", None),
        ("When did the mill of Arden open?", "1898", "answer not in the passage"),
        ("When did the mill of Arden open?", "ill", "answer not in the passage"),
        ("When did the mill of Arden open?", "?!", "answer not in the passage"),
        ("Did the mill of Arden open in the year 1889?", "1889", "contains its answer"),
        ("Who, ADA ROE or another, built it?", "Ada Roe", "contains its answer"),
        ("Who built the mill in the passage?", "Ada Roe", "asks about the passage itself"),
    ],
)
def test_unfit_questions_have_a_reason(question, answer, reason):
    assert unfit(question, answer, MILL.text) == reason


def test_rejected_questions_are_counted():
    other = Passage("A passage of Roe.", "d2/1", "docs.jsonl:2")
    records = [
        {"pairs": [["When did the mill of Arden open?", "1889"], ["Who?", "Eve"], ["Who built it?", "Ada Roe"]]},
        {"missing": "unreadable reply"},
        {"pairs": [["WHO BUILT IT?", "Roe"]]},
    ]
    questions, left_out = written_questions(records, [MILL, other, other])
    assert [(one.question, one.answers, one.passage_id, one.kind) for one in questions] == [
        ("When did the mill of Arden open?", ("1889",), "d1/1", "when"),
        ("Who built it?", ("Ada Roe",), "d1/1", "who"),
    ]
    assert left_out == {"answer not in the passage": 1, "passages: unreadable reply": 1, "asked before": 1}
