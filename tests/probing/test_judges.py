"""A model as a judge: its prompts, parsing its replies, and answers that are never right."""

from __future__ import annotations

import pytest
from scripted import ScriptedSampler

from llmkit.formats.questions import Question
from llmkit.probing.judges import ChatModel, ModelJudge, read_verdict
from llmkit.probing.probe import decide
from llmkit.text.matching import Answered, MatchJudge

ASKED = Question(
    "What is the capital of France?", ("Paris", "Lutetia"), "Paris, once Lutetia, is the capital of France."
)


def judged(reply, *responses: str, question: Question = ASKED) -> tuple[list[str], list[str]]:
    sampler = ScriptedSampler(reply)
    ((_, verdicts),) = ModelJudge(ChatModel(sampler, 0), MatchJudge()).judge_each([Answered(question, responses)])
    return verdicts, sampler.prompts


def test_a_model_judges_each_answer_once():
    def reply(prompt: str) -> str:
        return "VERDICT: right" if "<answer>\nParis\n</answer>" in prompt else "VERDICT: wrong"

    verdicts, prompts = judged(reply, "Paris", "Rome", " Paris ", "Rome")
    assert verdicts == ["right", "wrong", "right", "wrong"] and len(prompts) == 2
    for part in (ASKED.question, ASKED.passage, "Reference answer: Paris | Lutetia"):
        assert part in prompts[0]


def test_an_empty_or_evasive_answer_is_never_right_whatever_the_model_says():
    evasive = [
        "",
        "  \n",
        "I don't know.",
        "I'm sorry, I can't answer that.",
        ASKED.question,
        "?!",
        "Ich weiß es nicht.",
    ]
    verdicts, prompts = judged(lambda prompt: "VERDICT: right", *evasive)
    assert verdicts == ["evasive"] * len(evasive) and prompts == []
    verdicts, _ = judged(lambda prompt: "VERDICT: evasive", "It may be Rome")
    assert verdicts == ["evasive"]


@pytest.mark.parametrize("reply", ["", "right", "Right!", "VERDICT:", "VERDICT: maybe", "VERDICT: right or wrong"])
def test_an_unreadable_reply_has_no_verdict(reply):
    assert read_verdict(reply) is None
    assert judged(lambda prompt: reply, "Paris", "")[0] == ["unreadable", "evasive"]


def test_verdicts_are_parsed_from_replies():
    assert read_verdict("It says Paris.\nVERDICT: right\n") == "right"
    assert read_verdict("- **verdict: EVASIVE**") == "evasive"
    assert read_verdict("VERDICT: wrong\nVERDICT: wrong") == "wrong"
    assert read_verdict("VERDICT: wrong\nVERDICT: right") is None
    assert read_verdict("The answer is VERDICT: right") is None


def test_braces_in_a_passage_are_text():
    question = Question("What?", ("{0}",), "{answer} {}")
    _, prompts = judged(lambda prompt: "VERDICT: right", "{x}", question=question)
    assert "{answer} {}" in prompts[0] and "<answer>\n{x}\n</answer>" in prompts[0]
    assert "(not given)" in judged(lambda prompt: "", "a", question=Question("Who?", ("I",)))[1][0]


def test_unreadable_judgements_do_not_make_a_fact_known():
    r, w, e, u = "right", "wrong", "evasive", "unreadable"
    assert decide([r, r, r, r, u]) == "yes" and decide([r, r, r, u, u]) == "mixed"
    assert decide([w, w, w, w, u]) == "no" and decide([w, w, w, u, u]) == "mixed"
    assert decide([u] * 5) == "mixed" and decide([e, e, e, e, u]) == "evasive"
