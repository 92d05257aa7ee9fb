"""Passages, and questions made from them without a model."""

from __future__ import annotations

import doctest

import pytest

from llmkit.io.records import Row
from llmkit.probing import question_rules
from llmkit.probing.question_rules import (
    Passage,
    cut_passages,
    sample_passages,
    sentences,
    write_question,
    write_questions,
)


def test_the_examples_of_the_documentation_hold():
    assert doctest.testmod(question_rules).failed == doctest.testmod(question_rules).failed == 0


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("The bridge was rebuilt on 3 May 1721.", "When was the bridge rebuilt?", "3 May 1721"),
        ("Clara Weiss was born in Lower Austria.", "Where was Clara Weiss born?", "Lower Austria"),
        ("Clara Weiss was the mayor of the town.", "Who or what was the mayor of the town?", "Clara Weiss"),
        ("Clara Weiss painted the ceiling of the chapel.", "Who or what painted the ceiling of the chapel?",
         "Clara Weiss"),
        ("There are 14 bridges in Norden.", "How many bridges are there in Norden?", "14"),
        ("There were 14 old bridges left then.", "How many old bridges left then were there?", "14"),
        ("The town of Norden has three theatres.", "How many theatres does the town of Norden have?",
         "three"),
        ("After long talks, the treaty was signed on May 3, 1721 by all.",
         "Fill in the blank: After long talks, the treaty was signed on _____ by all.", "May 3, 1721"),
        ("In the north, 2.5 million people live from fishing alone.",
         "Fill in the blank: In the north, _____ people live from fishing alone.", "2.5 million"),
        ("After the war, many of the monks moved to Upper Lusatia again.",
         "Fill in the blank: After the war, many of the monks moved to _____ again.", "Upper Lusatia"),
    ],
)  # fmt: skip
def test_a_sentence_becomes_a_question(sentence, question, answer):
    written = write_question(sentence[:-1])
    assert written is not None and (written.question, written.answer) == (question, answer)


@pytest.mark.parametrize(
    "sentence",
    [
        "He was born in the north of the town in 1889",  # who?
        "This was the largest of the bridges in 1889",
        "Opened in 1889",
        "nothing here has a name or a number to ask about",
        'The mayor said "it was opened in 1889" to them all',
        "Count Arnheim's calmness caused the 'outburst' to be noticed with surprise",
        "In 1889 and again in 1889 the tower was painted red",  # the question would contain the answer
    ],
)
def test_some_sentences_give_no_question(sentence):
    assert write_question(sentence) is None


def test_sentences_end_where_they_should():
    text = (
        "St. Mary's opened at 5.30 p.m. today. J. R. Hill, Jr. came. Who\ncame? \u201cMe.\u201d It cost $3.5 million."
    )
    assert list(sentences(text)) == [
        "St. Mary's opened at 5.30 p.m. today", "J. R. Hill, Jr. came", "It cost $3.5 million"
    ]  # fmt: skip


def test_passages_end_at_paragraph_borders():
    text = "\n\n".join("word " * n for n in (50, 100, 400, 20))
    found = list(cut_passages(text, characters=800))
    assert "\n\n".join(found).split() == text.split() and [len(one.split()) for one in found] == [150, 400, 20]
    assert list(cut_passages(" \n ")) == []
    assert list(cut_passages("a\r\n\r\nb\nc", characters=3)) == ["a", "b\nc"]


def documents(count: int) -> list[Row]:
    return [
        Row({"text": f"Text {n}.", **({"id": f"d{n}"} if n % 2 else {})}, "docs.jsonl", n + 1) for n in range(count)
    ]


def test_passages_are_drawn_by_the_seed_in_order():
    drawn = sample_passages(documents(200), 20, seed=3)
    assert drawn == sample_passages(iter(documents(200)), 20, seed=3) != sample_passages(documents(200), 20, seed=4)
    lines = [int(one.where.split(":")[1]) for one in drawn]
    assert lines == sorted(set(lines)) and len(lines) == 20 and max(lines) > 100
    assert all(one.name in (f"d{line - 1}/1", f"{line}/1") for one, line in zip(drawn, lines, strict=True))
    assert len(sample_passages(documents(5), 20, seed=3)) == 5


def test_a_passage_gives_a_few_questions_and_blanks_only_where_needed():
    text = (
        "The tower of Arles was finished in 1889. The tower of Arles was finished in 1889. It was red in 1890. "
        "Before the war, some 30,000 people lived there. Clara Weiss painted the ceiling of the chapel."
    )
    passage = Passage(text, "d1/1", "docs.jsonl:1")
    one, two = write_questions(passage, 2, seed=0)
    assert {one.kind, two.kind} == {"when", "who"} and one.question.startswith("When")
    assert (one.passage, one.passage_id, one.where, one.answers) == (text, "d1/1", "docs.jsonl:1, d1/1", ("1889",))
    assert [found.kind for found in write_questions(passage, 9, seed=0)] == ["when", "cloze: number", "who"]
    assert len({write_questions(passage, 1, seed=seed)[0].question for seed in range(20)}) == 2


def test_a_text_of_punctuation_takes_no_quadratic_time():
    assert list(sentences("!" * 200_000)) == []  # regression: 87 s for 64,000 of them
