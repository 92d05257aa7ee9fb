from __future__ import annotations

import json

import pytest

from llmkit.formats.conversations import Message, Part, message, read_conversation
from llmkit.io.records import Row
from llmkit.writing.draft import Draft, read_draft
from llmkit.writing.prompts import KINDS

CALLED = Message("assistant", (Part("calc", "2+2"), Part("result", "4"), Part("text", "It is 4.")))
DRAFTS = [
    Draft(0, (message("user", "Hi"), message("assistant", "Hello.")), seed=7),
    Draft(
        1, (message("system", "Be brief."), message("user", "2+2?"), CALLED), (message("assistant", "5"),), "closed QA"
    ),
    Draft(2, fault="empty reply", topic="sea > boats", refusal=True, language="en", record={"id": 3}),
]


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: str(draft.index))
def test_a_draft_comes_back_from_its_state(draft):
    assert read_draft(json.loads(json.dumps(draft.as_state()))) == draft


def test_a_line_is_what_sft_reads_and_keeps_what_was_given():
    record = {"id": "a7", "question": "2+2?", "answer": "4", "verifier": "math", "output": "Four.", "scores": 1}
    draft = Draft(1, DRAFTS[1].messages, kind="closed QA", topic="sums", seed=9, record=record)
    line = draft.as_line(guide="9f86", writer="tiny", scores={"helpful": 5})
    conversation = read_conversation(Row(line, "chats.jsonl", 1))
    assert conversation.messages == draft.messages and conversation.losses == ()
    assert (line["id"], line["topic"], line["kind"], line["seed"]) == ("a7", "sums", "closed QA", 9)
    assert (line["answer"], line["verifier"]) == ("4", "math") and not {"question", "output"} & set(line)
    assert line["given"] == {"scores": 1}


def test_each_version_has_one_of_the_answers():
    texts = [version.messages[-1].text for version in DRAFTS[1].versions()]
    assert texts == ["It is 4.", "5"]
    assert [len(version.others) for version in DRAFTS[1].versions()] == [0, 0]


def test_the_shares_of_the_kinds_are_those_of_the_paper():
    assert sum(percentage for percentage, _ in KINDS.values()) == pytest.approx(99.9) and len(KINDS) == 10
