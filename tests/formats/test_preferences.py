"""Preference formats, and errors in records."""

from __future__ import annotations

import pytest

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.formats.preferences import Comparison, read_answers, read_comparison, read_prompt
from llmkit.io.records import Row

ASKED, RIGHT, WRONG = message("user", "2 + 2?"), message("assistant", "4"), message("assistant", "5")
USER, GOOD, BAD = ({"role": one.role, "content": one.text} for one in (ASKED, RIGHT, WRONG))

SYSTEM = {"role": "system", "content": "Be brief."}


def row(**value) -> Row:
    return Row(value, "prefs.jsonl", 3)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": BAD},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}},
        {"prompt": "2 + 2?", "completions": ["4", "5"], "ranking": [1, 2]},
    ],
)  # fmt: skip
def test_every_format_is_the_same_comparison(value):
    assert read_comparison(row(**value)) == Comparison((ASKED,), ((RIGHT,), (WRONG,)), (1, 2), 0.0, "prefs.jsonl:3")


def test_margin_and_ranks_with_ties():
    assert read_comparison(row(prompt="?", chosen="a", rejected="b", margin=1.5)).margin == 1.5
    ranked = read_comparison(row(prompt="?", completions=["a", "b", "c"], ranking=[2, 1, 2]))
    assert read_comparison(row(prompt="?", completions=["a", "b"], ranking=[9, 4.5])).ranks == (2, 1)
    assert read_comparison(row(prompt="?", chosen="a", rejected="b", margin=None)).margin == 0
    assert ranked.ranks == (2, 1, 2) and len(ranked.candidates) == 3


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),  # whole words
        ("Sum?  4", "Sum?  4 or 5", ("Sum?", "  4", "  4 or 5")),
        ("Sum? 4 or 5", "Sum? 4", ("Sum?", " 4 or 5", " 4")),
    ],
)
def test_the_common_beginning_of_two_texts_is_the_prompt(chosen, rejected, parts):
    found = read_comparison(row(chosen=chosen, rejected=rejected))
    assert (found.prompt[0].text, *(side[0].text for side in found.candidates)) == parts


def test_equal_answers_teach_nothing():
    assert read_comparison(row(prompt="?", chosen="a", rejected="a")) == "chosen equals rejected"
    assert read_comparison(row(chosen=[USER, GOOD], rejected=[USER, GOOD])) == "chosen equals rejected"
    same = row(prompt="?", completions=["a", "a"], ranking=[1, 2])
    assert read_comparison(same) == "all completions equal"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "?"}, "expected 'chosen' and 'rejected', or 'completions' and 'ranking'"),
        ({"prompt": "?", "chosen": "a"}, "found no 'rejected'"),
        ({"prompt": "?", "chosen": "a", "rejected": 5}, "'rejected' to be text or messages, found a number"),
        (
            {"prompt": "?", "chosen": "a", "rejected": "b", "margin": "big"},
            "'margin' to be a number from 0 to 10000, found 'big'",
        ),
        ({"prompt": "?", "chosen": "a", "rejected": "b", "margin": 1e300}, "from 0 to 10000, found 1e+300"),
        ({"prompt": "?", "completions": ["a", "b"], "ranking": [1]}, "2 ranks, one per completion, found 1"),
        ({"prompt": "?", "completions": ["a"], "ranking": [1]}, "a list of answers, found 1"),
        ({"prompt": "?", "completions": ["a", "b"], "ranking": [1, "x"]}, "numbers, 1 the best, found 'x'"),
        ({"prompt": [USER], "chosen": [{**USER, "content": "9?"}, GOOD], "rejected": BAD}, "begin with the prompt"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "an answer in 'chosen'"),
        ({"chosen": "forty", "rejected": "four"}, "to begin with '\\n\\nHuman:'"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "9?"}, BAD]}, "begin with the same prompt"),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, {**USER, "content": "9?"}, BAD]}, "the same prompt"),
        ({"prompt": "?", "chosen": [{"role": "judge", "content": "x"}], "rejected": "b"}, "a role among"),
    ],
)
def test_a_wrong_record_is_named_with_its_line(value, expected):
    with pytest.raises(UserError, match=r"^prefs\.jsonl:3: ") as error:
        read_comparison(row(**value))
    assert expected in str(error.value)


def test_records_for_scoring():
    assert read_prompt(row(messages=[USER], completion="4")) == (ASKED,)
    assert read_answers(row(prompt="2 + 2?", completion="4")) == [(RIGHT,)]
    assert read_answers(row(prompt="2 + 2?", completions=["4", "5"])) == [(RIGHT,), (WRONG,)]
    with pytest.raises(UserError, match=r"prefs\.jsonl:3: expected field 'completion'"):
        read_answers(row(prompt="2 + 2?"))
    with pytest.raises(UserError, match=r"prefs\.jsonl:3: expected field 'prompt' or 'messages'"):
        read_prompt(row(completion="4"))
