"""The judge that compares words: what it must accept, and above all what it must not."""

from __future__ import annotations

import doctest
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from llmkit.text import answer_spans, normalize
from llmkit.text.matching import MatchJudge, evasions
from llmkit.text.normalize import words

CAPITAL = "What is the capital of France?"


def verdict(response: str, answer: str | list[str], question: str = "What is it?") -> str:
    return MatchJudge()(response, question, [answer] if isinstance(answer, str) else answer)


def test_the_examples_of_the_documentation_hold():
    assert doctest.testmod(normalize).failed == doctest.testmod(answer_spans).failed == 0


@pytest.mark.parametrize(
    "same",
    [
        ("1,000", "1000", "a thousand", "one thousand", "1000.0", "\uff11\uff10\uff10\uff10",
         "\u0661\u0660\u0660\u0660"),
        ("three", "3", "3.0", "third", "3rd", "III", "Three."),
        ("21", "twenty-one", "Twenty one", "twenty-first", "XXI"),
        ("305", "three hundred and five", "three hundred five"),
        ("5200000", "5.2 million", "$5,200,000"), ("-5", "\u22125"), ("A-", "a\u2212"), ("U.S.", "the US"),
        ("J. K. Rowling", "J.K. Rowling", "JK Rowling"), ("O\u2019Brien's", "o'brien"), ("ﬁsh", "fish"),
        ("Ogród Saski", "ogrod saski", "  OGRÓD\nSASKI!"), ("50%", "50 percent", "fifty percent"),
    ],
)  # fmt: skip
def test_ways_of_writing_the_same(same):
    assert len({words(text) for text in same}) == 1, [words(text) for text in same]


@pytest.mark.parametrize(
    "pair",
    [("1914", "1941"), ("5", "-5"), ("3.5", "35"), ("1,000", "1,00"), ("1990", "1990s"), ("two five", "twenty-five"),
     ("World War I", "World War II"), ("की", "का"), ("北京", "京北"), ("million", "billion"), ("2:1", "1:2"),
     ("A+", "A-"), ("A-", "A"), ("C++", "C"), ("C#", "C")],
)  # fmt: skip
def test_what_is_not_the_same(pair):
    assert words(pair[0]) != words(pair[1])


@pytest.mark.parametrize(
    ("response", "answer", "question"),
    [
        ("Paris", "Paris", CAPITAL),
        ("paris.", "Paris", CAPITAL),
        ("The capital of France is Paris.", "Paris", CAPITAL),
        ("It is Paris. The city lies on the Seine and has two million inhabitants.", "Paris", CAPITAL),
        ("What is the capital of France? Paris", "Paris", CAPITAL),
        ("Sir Winston Churchill", "Winston Churchill", "Who was it?"),
        ("John Kennedy", "John F. Kennedy", "Who was it?"),
        ("This is what it does: Paris", "Paris", "What is it?"),
        ("They scored 24.", "24 points", "How many points did they score?"),
        ("24 points", "24", "How many points did they score?"),
        ("twenty-four", "24", "How many points did they score?"),
        ("On 14 December 1972", "1972", "In which year was it?"),
        ("December 14, 1972", "14 December 1972", "When was it?"),
        ("Paris", "Paris", "Which is larger, Paris or London?"),
        ("Onions", "onion", "Which vegetable?"),
        ("Bob Russell", "Bobby Scott|Bob Russell", "Who wrote it?"),
        ("法国的首都是巴黎。", "巴黎", "法国的首都是什么?"),
        ("no", "No", "Is the earth flat?"),
        ("not guilty", "not guilty", "What was the plea?"),
        ("I don't know", "I Don't Know", "Which song is it?"),
        ("\u221e", "\u221e", "What is its sign?"),
        ("The type is A+.", "A+", "What blood type is it?"),
        ("It was St. Louis.", "St. Louis", "Which city was it?"),
    ],
)
def test_right_answers(response, answer, question):
    assert verdict(response, answer.split("|"), question) == "right"


@pytest.mark.parametrize(
    ("response", "answer", "question"),
    [
        ("Lyon", "Paris", CAPITAL),
        ("Paris, London, Rome or Berlin", "Paris", CAPITAL),  # tries them all
        ("Paris or Lyon", "Paris", CAPITAL),
        ("It is not Paris", "Paris", CAPITAL),
        ("It was never New York City", "New York City", "Where was it?"),
        ("Paris. No, wait, Lyon.", "Paris", CAPITAL),
        ("Paris Hilton", "Paris", CAPITAL),
        ("Comparison", "Paris", CAPITAL),  # the letters of the answer, not its word
        ("1941", "1914", "When was it?"),
        ("1,914", "19.14", "How much?"),
        ("24-10", "10-24", "What was the score?"),
        ("5 million people", "6 million people", "How many were there?"),
        ("5", "-5", "How cold was it?"),
        ("1990s", "1990", "When was it?"),
        ("5 miles", "5 kilometres", "How far is it?"),
        ("December 1972", "14 December 1972", "When exactly was it?"),
        ("14 December 1973", "1972", "In which year was it?"),
        ("King George V of England", "King George VI of England", "Who was it?"),
        ("World War I", "World War II", "Which war was it?"),
        ("University of California, Davis", "University of California, Berkeley", "Which university?"),
        ("Robert Kennedy", "John F. Kennedy", "Who was it?"),
        ("Kennedy", "Robert Kennedy", "Who was it?"),
        ("after 1900", "before 1900", "When was it?"),
        ("Paris and London", "Paris", "Which is larger, Paris or London?"),
        ("京北", "北京", "哪里?"),
        ("南京大学", "北京大学", "哪里?"),
        ("yes", "no", "Is the earth flat?"),
        ("a", "Paris", CAPITAL),
        ("London", "Paris", "Which is larger, Paris or London?"),
        ("Paris " * 40, "Paris", CAPITAL),
    ],
)
def test_wrong_answers(response, answer, question):
    assert verdict(response, answer, question) == "wrong"


@pytest.mark.parametrize(
    ("response", "answer", "question"),
    [
        ("", "Paris", CAPITAL),
        (" \n\t", "Paris", CAPITAL),
        ("?!...", "Paris", CAPITAL),
        ("---", "---", CAPITAL),
        ("", "", CAPITAL),  # no answer can be right where none is known
        (CAPITAL, "Paris", CAPITAL),
        ("what is the capital of france", "Paris", CAPITAL),
        ("The capital of France.", "Paris", CAPITAL),
        ("The capital of France is", "Paris", CAPITAL),
        ("Is it Paris or London?", "Paris", "Is it Paris or London?"),
        ("I don't know.", "Paris", CAPITAL),
        ("I don\u2019t know, but it may be Paris.", "Paris", CAPITAL),
        ("I'm not sure if it is Paris", "Paris", CAPITAL),
        ("As an AI language model, I cannot say. Paris", "Paris", CAPITAL),
        ("Das weiß ich leider nicht.", "Paris", "Was ist die Hauptstadt von Frankreich?"),
        ("Je ne sais pas.", "Paris", "Quelle est la capitale de la France ?"),
        ("No lo sé", "París", "¿Cuál es la capital de Francia?"),
        ("我不知道", "巴黎", "法国的首都是什么?"),
        ("ฉันไม่ทราบ", "ปารีส", "เมืองหลวงของฝรั่งเศสคืออะไร"),
        ("मुझे नहीं पता", "पेरिस", "फ्रांस की राजधानी क्या है?"),
        ("Δεν ξέρω", "Παρίσι", "Ποια είναι η πρωτεύουσα της Γαλλίας;"),
    ],
)
def test_evasive_answers_are_never_right(response, answer, question):
    assert verdict(response, answer, question) == "evasive"


def test_every_phrase_of_the_data_is_evasive():
    assert len(evasions()) > 100 and all(len(phrase) > 0 for phrase in evasions())


@pytest.mark.shared
@pytest.mark.parametrize("language", ["en", "de", "es", "ru", "zh", "th", "hi", "ar", "el", "tr", "vi", "ro"])
def test_real_answers_are_right_and_those_of_others_are_not(shared_data, language):
    """Every reference is right for its own question, whole and in a sentence; the question is no answer; another
    question's reference is right for fewer than 1 in 50."""
    from llmkit.formats.questions import read_questions

    path = shared_data / "qa" / f"xquad.{language}.json.gz"
    asked, _ = read_questions([str(path)], 400)
    judge = MatchJudge()
    assert all(judge(f"«{one.answers[0]}».", one.question, one.answers) == "right" for one in asked)
    assert all(judge(one.question, one.question, one.answers) == "evasive" for one in asked)
    others = [judge(asked[i - 7].answers[0], one.question, one.answers) == "right" for i, one in enumerate(asked)]
    assert sum(others) < len(asked) / 50


@pytest.mark.parametrize("half", ["seen", "held", "fresh", "second", "third", "fourth", "fifth", "sixth", "seventh"])
def test_agreement_with_the_labels_of_the_battery(half, capsys):
    """judge_battery.jsonl: invented questions and answers, labelled by hand before the judge was tried on them; the
    half "held" was tried only when the code for the other was finished, and "fresh" written after that; then "second",
    which agreed in .852 of its pairs at the first try, and after mends "third", .939, and
    "fourth", .924 (refusals in other words); "fifth" has refusals and what is near them, .734 at the
    first try, and "sixth", written after the mends for it, .642, and
    then "seventh", .871."""
    path = Path(__file__).with_name("judge_battery.jsonl")
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) >= 300
    judged = [(one, verdict(one["response"], one["answer"], one["question"])) for one in pairs if one["half"] == half]
    table = Counter((one["label"], said) for one, said in judged)
    agreement = sum(count for (label, said), count in table.items() if label == said) / len(judged)
    with capsys.disabled():
        print(f"\n{half}: {len(judged)} pairs, agreement {agreement:.4f}, {dict(table)}")
    unlike = [(one["question"], one["response"], said) for one, said in judged if one["label"] != said]
    assert agreement >= (0.93 if half in ("sixth", "seventh") else 0.97), unlike


def test_a_number_of_many_digits_is_a_word_like_any_other():
    assert verdict("9" * 5000, "1969", "In what year was it?") == "wrong"
    assert verdict(f"July {'9' * 5000}, 1969", "1969", "In what year was it?") == "wrong"


@pytest.mark.parametrize(
    "said", ["a ", "1 ", "Paris ", "what is ", "U.S. ", "1-", "hundred ", "not sure, but maybe ", "   "]
)
def test_the_time_of_a_long_answer_is_linear(said):
    start = time.process_time()
    assert verdict(said * (100_000 // len(said)), "Paris", CAPITAL) != "right"
    assert time.process_time() - start < 20  # 1.2 s; its square would be hours
