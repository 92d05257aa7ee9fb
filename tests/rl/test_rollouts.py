"""The log of rollouts as input of other stages."""

from __future__ import annotations

import pytest
from attempts import attempt, problem

from llmkit.errors import UserError
from llmkit.formats.conversations import Part, read_conversation
from llmkit.formats.preferences import read_answers
from llmkit.formats.problems import read_problem
from llmkit.io.records import Row
from llmkit.rl.rollouts import Rollout, RolloutLog

CALLED = (Part("text", "Well: "), Part("calc", "2 + 2"), Part("result", "4"), Part("text", "4"))


def called(asked) -> dict:
    made = attempt([1], [ord(c) for c in "Well: 4"]).completion
    return Rollout(asked, [1], made, 0, 0, 0, parts=CALLED).record()


def test_a_rollout_with_calls_trains_on_them():
    """sft reads the messages; a judge reads the text, as in training."""
    row = Row(called(problem()), "rollouts.jsonl", 1)
    asked, answered = read_conversation(row).messages
    assert (asked.role, asked.text, answered.parts) == ("user", "2 + 2?", CALLED)
    ((said,),) = read_answers(row)
    assert said.text == "Well: 4"


def test_a_conversation_comes_before_its_answer():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    asked = read_problem(Row({"messages": turns, "answer": "4"}, "p.jsonl", 1))
    read = read_conversation(Row(called(asked), "rollouts.jsonl", 1)).messages
    assert [one.role for one in read] == ["system", "user", "assistant"] and read[2].parts == CALLED


def test_a_rollout_without_calls_is_a_prompt_and_a_completion():
    record = attempt([1], [52]).record()
    assert "messages" not in record and (record["prompt"], record["completion"]) == ("2 + 2?", "4")


def test_an_edited_log_is_not_resumed(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    log = RolloutLog(path)
    log.write([attempt([1], [52], reward=1.0)])
    written = path.read_bytes()
    path.write_bytes(written.replace(b'"completion":"4"', b'"completion":"5"'))
    with pytest.raises(UserError, match=r"rollouts\.jsonl: damaged or edited; restore it, or start over"):
        RolloutLog(path).trim(9)
    path.write_bytes(written + b'{"step": 7, "group": 999')  # a line truncated by a kill
    assert RolloutLog(path).trim(9) == 1 and path.read_bytes() == written
