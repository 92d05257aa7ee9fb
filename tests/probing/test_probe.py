"""From judgements to the class of a question, and to lessons."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from llmkit.errors import UserError
from llmkit.formats.questions import Question
from llmkit.probing.probe import decide
from llmkit.probing.refusals import OURS, Refusals, balanced, language_of, lesson
from llmkit.text.matching import MatchJudge


@pytest.mark.parametrize(
    ("judgements", "known"),
    [
        ("rrrrr", "yes"),
        ("rrrrw", "yes"),
        ("rrrre", "yes"),
        ("rrrww", "mixed"),
        ("rwwww", "mixed"),
        ("reeee", "mixed"),
        ("wwwww", "no"),
        ("wwwwe", "no"),
        ("wwwee", "evasive"),
        ("eeeee", "evasive"),
        ("r", "yes"),
        ("w", "no"),
        ("rrw", "yes"),
        ("rww", "mixed"),
        ("rrrww", "mixed"),
    ],
)
def test_a_question_is_known_by_its_answers(judgements, known):
    names = {"r": "right", "w": "wrong", "e": "evasive"}
    assert decide([names[one] for one in judgements]) == known


def test_both_sides_are_thinned_to_the_balance():
    known = ["yes"] * 40 + ["no"] * 10 + ["mixed"] * 5 + ["evasive"] * 5

    def kept(balance: float | None, sides: list[str] = known) -> Counter[str]:
        return Counter(sides[place] for place in balanced(sides, balance, seed=1))

    assert kept(1.0) == {"yes": 10, "no": 10}
    assert kept(2.0) == {"yes": 20, "no": 10}
    assert kept(8.0) == {"yes": 40, "no": 5}
    assert kept(None) == {"yes": 40, "no": 10}
    assert kept(1.0, ["no"] * 7) == {"no": 7}
    assert kept(0.001) == {"yes": 1, "no": 10}
    assert balanced(known, 1.0, seed=1) == balanced(known, 1.0, seed=1) != balanced(known, 1.0, seed=2)


def record(known: str, language: str = "en", **more) -> dict:
    return {"question": "Who was it?", "answer": ["Ada", "Ada L."], "known": known, "language": language, **more}


def test_a_lesson_is_the_answer_or_a_refusal():
    refusals = Refusals()
    said = [one["content"] for one in lesson(record("yes"), refusals, 0)["messages"]]
    assert said == ["Who was it?", "Ada"]
    wordings = json.loads(OURS.read_text())
    for language, place in (("de", "de"), ("en", "en"), ("", "en"), ("fi", "en")):
        assert lesson(record("no", language), refusals, 0)["messages"][1]["content"] in wordings[place]
    varied = {lesson(record("no", question=f"Who was {n}?"), refusals, 0)["messages"][1]["content"] for n in range(90)}
    assert len(varied) == len(wordings["en"])


def test_our_refusals_do_not_count_as_answers():
    """Otherwise a model trained to refuse would count as wrong."""
    judge = MatchJudge(refusals=Refusals().texts())
    for language, texts in json.loads(OURS.read_text()).items():
        for text in texts:
            assert judge(text, "Who was it?", ["Ada"]) == "evasive", (language, text)


def test_the_language_is_the_records_or_what_its_text_shows():
    assert language_of(Question("Wer war es?", ("Ada",), language="fr")) == "fr"
    assert language_of(Question("Wie heißt die Hauptstadt der Republik Österreich?", ("Wien",))) == "de"
    passage = "La torre fue inaugurada en el año 1889 para la exposición universal de París."
    assert language_of(Question("1889?", ("x",), passage)) == "es"
    assert language_of(Question("1889?", ("x",))) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "r.json: expected a readable file of refusals: no such file"),
        ("[]", "r.json: expected a JSON object, found a list"),
        ("{", "r.json:1: expected JSON, found"),
        ("{}", "r.json: expected refusals by language, .* found none"),
        ('{"en": []}', "r.json: en: expected a list of refusals"),
        ('{"en": "No."}', "r.json: en: expected a list of refusals"),
        ('{"en": ["No.", " "]}', "r.json: en: expected a list of refusals"),
    ],
)
def test_a_bad_file_of_refusals_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Refusals(str(tmp_path / "r.json"))
