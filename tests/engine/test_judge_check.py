"""Agreement of the judge with people, and of a model's certainty with the judge."""

from __future__ import annotations

import doctest
import math

import pytest

from llmkit.engine import judge_check
from llmkit.engine.judge_check import calibration, check_judge
from llmkit.engine.matching import Answered, MatchJudge
from llmkit.errors import UserError
from llmkit.records import Row

QUESTION = {"question": "What is the capital of France?", "answer": "Paris"}


def answers(*values) -> list[Answered]:
    return [judge_check.labelled(Row({**QUESTION, **one}, "labels.jsonl", line)) for line, one in enumerate(values, 1)]


def labelled(*pairs) -> list[Answered]:
    return answers(*({"response": response, "label": label} for response, label in pairs))


def test_the_examples_of_the_documentation_hold():
    import numpy

    assert doctest.testmod(judge_check, extraglobs={"np": numpy}).failed == 0


def test_agreement_and_kappa_of_a_hand_computed_table():
    """People: 3 right, 2 wrong; the judge: 2 right, 3 wrong; 4 of 5 agree. By chance (3*2 + 2*3) / 25 = 0.48 would."""
    found = check_judge(
        MatchJudge(),
        labelled(("Paris", "right"), ("Paris.", "correct"), ("Lutetia", "right"), ("Rome", "wrong"), ("Lyon", "WRONG")),
    )
    assert found["answers"] == 5 and found["agreement"] == 0.8
    assert found["kappa"] == pytest.approx((0.8 - 0.48) / (1 - 0.48), abs=1e-4)
    assert found["table"] == {"right, judged right": 2, "right, judged wrong": 1, "wrong, judged wrong": 2}
    assert found["agreement_95"][0] < 0.5 < found["agreement_95"][1]


def test_labels_that_say_only_right_or_not_leave_evasion_out():
    found = check_judge(MatchJudge(), labelled(("Paris", True), ("", 0), ("I don't know", "evasive"), ("Rome", False)))
    assert (found["agreement"], found["kappa"]) == (1.0, 1.0)
    found = check_judge(MatchJudge(), labelled(("", "evasive"), ("I don't know", "wrong")))
    assert found["agreement"] == 0.5 and found["kappa"] == 0.0


def test_a_report_of_a_probe_can_be_labelled():
    found = check_judge(MatchJudge(), answers({"responses": ["Paris", "Rome"], "labels": ["right", "right"]}))
    assert found["table"] == {"right, judged right": 1, "right, judged wrong": 1}


def test_there_is_no_kappa_where_all_is_the_same():
    assert check_judge(MatchJudge(), labelled(("Paris", "right"), ("Paris", "right")))["kappa"] is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"response": "Paris"}, "labels.jsonl:1: expected fields 'response' and 'label'"),
        (
            {"response": "Paris", "label": "good"},
            "labels.jsonl:1: expected 'label' to be right, wrong, .* found 'good'",
        ),
        ({"response": "Paris", "label": 2}, "labels.jsonl:1: expected 'label' to be .* found 2"),
        ({"response": 3, "label": True}, "labels.jsonl:1: expected a response of text, found 3"),
        ({"responses": ["a"], "labels": []}, "labels.jsonl:1: expected as many 'labels' as 'responses'"),
        ({"response": "a", "label": True, "answer": ""}, "labels.jsonl:1: expected 'answer' to be text"),
    ],
)
def test_a_bad_label_is_named(value, message):
    with pytest.raises(UserError, match=message):
        check_judge(MatchJudge(), answers(value))


def test_no_labels_are_refused():
    with pytest.raises(UserError, match="--judge-check: expected labelled answers, found none"):
        check_judge(MatchJudge(), [])


def record(*answers) -> dict:
    return {"logprobs": [math.log(p) for p, _ in answers], "judgements": [verdict for _, verdict in answers]}


def test_certainty_that_tells_right_from_wrong():
    found = calibration([record((0.9, "right"), (0.85, "right"), (0.2, "wrong")), record((0.1, "wrong"))])
    assert found["auroc"] == 1.0 and (found["answers"], found["right"]) == (4, 2)
    assert found["ece"] == pytest.approx((0.1 + 0.15 + 0.2 + 0.1) / 4, abs=1e-4)


def test_certainty_that_tells_nothing_or_the_contrary():
    assert calibration([record((0.1, "right"), (0.9, "wrong"))])["auroc"] == 0.0
    assert calibration([record((0.5, "right"), (0.5, "wrong"))]) == {
        "answers": 2, "right": 1, "auroc": 0.5, "ece": 0.0
    }  # fmt: skip
    found = calibration([record((0.99, "wrong"), (0.99, "evasive"))])
    assert found["auroc"] is None and found["ece"] == pytest.approx(0.99) and found["answers"] == 1
    assert calibration([record((0.5, "evasive"))])["ece"] is None
