"""What a verifier must reward and, above all, what it must not: a policy finds every loophole."""

from __future__ import annotations

import doctest
import json
import random
import re
import time
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, read_problem
from llmkit.io.jsonl import read_jsonl
from llmkit.io.records import Row
from llmkit.rewards import Attempt, final_answer, numbers, verifiers
from llmkit.rewards.constraints import SchemaVerifier
from llmkit.rewards.numbers import Number, last_number, whole_number
from llmkit.rewards.verifiers import NAMES, LatexComparer, VerifierReward, verifier_of


def problem(**value) -> Problem:
    return read_problem(Row({"prompt": "What is it?", **value}, "p.jsonl", 3))


def score(completion: str, name: str | None = None, **value) -> float:
    reward = VerifierReward(name)
    asked = problem(**value)
    reward.check(asked)
    (found,) = reward.score([Attempt(asked, completion, 5, "stop", 10)])
    reward.close()
    return found


def test_the_examples_of_the_documentation_hold():
    assert [doctest.testmod(module).failed for module in (verifiers, numbers, final_answer)] == [0, 0, 0]


# ---- numbers

RIGHT = [
    ("1000", "1,000"), ("1,000", "1000"), ("1000", "$1,000.00"), ("1000", "1{,}000"), ("1000", "1e3"), ("5", "5.0"),
    ("5.0", "5"), ("5", "five is 5"), ("5", "5."), ("5", "**5**"), ("5", "It's 5!"), ("5", "(5)"), ("5", "5 apples"),
    ("5", "5kg"), ("5", "\u0665"), ("5", "\uff15"), ("-5", "-5"), ("-5", "\u22125"), ("-5", "x = -5"), ("-5", "-$5"),
    ("-5", "$-5"), ("0.5", "1/2"), ("0.5", "\u00bd"), ("0.5", "\\frac{1}{2}"), ("0.5", "50%"), ("50", "50%"),
    ("50%", "0.5"), ("50%", "50"), ("2.5", "2 1/2"), ("2.5", "2\u00bd"), ("-2.5", "-2 1/2"), ("1/3", "0.3333333"),
    ("0.3", "0.30000000000000004"), ("72", "48/2 = 24, 48 + 24 = 72"), ("72", "so much.\n#### 72"),
    ("72", "#### 72\nShe sold 24 in May."), ("72", "#### $72.00"), ("72", "\\boxed{72} in 2 months"),
    ("5", "She did not eat more, so she has 5"), ("5", "It is not 4, it is 5"), ("5", "between 3 and 4 or so: 5"),
    ("5", "1 2 3 4\n5"), ("1000000", "1,000,000 people"), (".5", "0.5"), ("$18", "18"), ("18", "\u20ac18"),
    ("0", "zero"), ("5", "five"), ("21", "Twenty-one."), ("0.5", "a half"), ("-2.5", "minus two and a half"),
    ("2500000", "two and a half million"), ("5 apples", "5"), ("5 apples", "She has five."), ("12k", "12,000"),
    ("1.2 million", "1,200,000"), ("10^3", "1000"), ("x=5", "5"), ("x = 5", "So x = 5."), ("six", "6"),
    ("18 cm", "0.18 m"), ("18 cm", "18"), ("3 hours", "180 min"), ("1000", "1 000"), ("1000.5", "1.000,5"),
    ("1234567", "1'234'567"), ("1234567", "12,34,567"), ("1.5", "1,5"), ("8", "\u7b54\u6848\uff1a\u516b"),
    ("1969", "July 20, 1969"), ("6", "5. Actually, it's 6."),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_a_right_number_is_rewarded(answer, completion):
    assert score(completion, "number", answer=answer) == 1


WRONG = [
    # empty, and not a number
    ("5", ""), ("5", " "), ("5", "\n\t\u00a0\u200b"), ("0", ""), ("0", "None"), ("0", "-"), ("1", "no one"),
    ("5", "not five"), ("5", "four or five"), ("5", "more than five"),
    ("5", "NaN"), ("5", "Infinity"), ("5", "-inf"), ("5", "1e99999999"), ("5", "5e-99999999"), ("5", "1/0"),
    ("5", "5/0"), ("0", "0/0"), ("5", "x5"), ("5", "v5"), ("52", "5\u00b2"), ("0", "0x10"),
    # another value
    ("5", "6"), ("5", "-5"), ("-5", "5"), ("5", "0.5"), ("0.5", "5"), ("50", "0.5"), ("5", "5.01"), ("1000", "1"),
    ("1000000", "1000001"), ("1000000000000", "1000000000001"), ("5", "10-5"), ("1000", "1.000"), ("15", "1,5"),
    # undecided, denied, listed
    ("5", "The answer is not 5"), ("5", "It isn't 5"), ("5", "it is not equal to 5"), ("5", "x \u2260 5"),
    ("5", "x != 5"), ("5", "never 5"), ("5", "4 or 5"), ("5", "5 or 6"), ("5", "either 4, or 5"), ("5", "4, 5"),
    ("100", " ".join(map(str, range(101)))), ("100", ", ".join(map(str, range(101)))),
    ("50", ", ".join(map(str, range(101)))),
    ("7", "\n".join(map(str, range(101)))), ("5", "3-5"), ("5", "4/5"), ("5", "2 5"),
    # not worked out
    ("387420489", "9**9"), ("9", "9**9**9"), ("9", "9^9^9^9"), ("9", "9**9**9**9**9"), ("9", "10 - 9"), ("9", "3 * 9"),
    ("9", "0 + 9"), ("5", "5 \u00d7 1"), ("2", "x^{2}"), ("5", "__import__('os').system('true')"),
    # texts that contain the answer
    ("2024", "3/4/2024"), ("30", "10:30"), ("2", "1.2.2"), ("5", "15"), ("5", "50"), ("5", "5,000"), ("5", "5.5.5"),
    ("18 cm", "18 m"), ("$5", "\u20ac5"), ("1.2 million", "1.2"), ("12k", "12"), ("5 apples", "15"), ("6", "7\u62168"),
    ("6", "over 6"), ("6", "unlikely to be 6"), ("6", "The answer is 6. Actually, it's 5."), ("1969", "before 1969"),
    # two results
    ("5", "2 + 3 = 5 6"), ("5", "2 + 3 = 5 5 6"), ("5", "2 + 3 = 5, 6"),
    # several conclusions
    ("5", "#### 5\n#### 6"), ("6", "#### 5\n#### 6"), ("5", "####"), ("5", "#### 5 6"), ("5", "#### 5 or 6"),
    ("5", "5\n####"), ("5", "#### not 5"), ("6", "\\boxed{6} no, \\boxed{5}"), ("5", "\\boxed{}"),
    ("5", "\\boxed{4, 5}"),
    # long
    ("5", "5" * 1_000_000), ("5", "5," * 200_000), ("5", "5 " * 200_000), ("5", "-" * 500_000), ("5", "5." * 200_000),
    ("5", "\\boxed{" * 100_000), ("5", "#### " * 100_000), ("5", "9" * 399 + "**" * 100_000), ("5", "5/" * 200_000),
    ("5", "5e" * 200_000), ("5", "$" * 500_000), ("5", "\\frac{" * 100_000), ("5", "not " * 200_000 + "5"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["number", "gsm8k"])
@pytest.mark.parametrize(("answer", "completion"), WRONG, ids=lambda text: ascii(text[:20]))
def test_a_wrong_number_is_not(name, answer, completion):
    start = time.process_time()
    assert score(completion, name, answer=answer) == 0
    assert time.process_time() - start < 5, "the time of a rule must not grow with the square of the completion"


def test_the_marker_is_demanded_by_gsm8k_alone():
    assert score("72", "number", answer="72") == 1
    assert score("72", "gsm8k", answer="72") == 0
    assert score("#### 72", "gsm8k", answer="48 + 24 = 72\n#### 72") == 1


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (["12 + 3", "2 Apples", "3 4", "a", "", "x1", "1.2.3", "3-4", "ab 5"], False),
        (["5", " 5. ", "$5", "$5$", "-5", "5%", "1,000", "2 1/2", "1/2", "\\frac{1}{2}", "1e5"], True),
        (["2 apples", "x = 5", "1.2 million", "six"], True),
    ],
)
def test_a_text_is_read_as_a_number_only_as_a_whole(texts, whole):
    assert {text for text in texts if (whole_number(text) is not None) != whole} == set()


def test_a_percentage_keeps_both_readings():
    assert last_number("50 percent") == Number(50, True) and last_number("50") == Number(50, False)  # type: ignore


# ---- the question repeated


@pytest.mark.parametrize(
    ("prompt", "answer", "completion", "right"),
    [
        ("What is 2 + 5?", "5", "What is 2 + 5?", 0),
        ("Is it 3 or is it 5", "5", "Is it 3 or is it 5", 0),
        ("Is it 3 or is it 5", "5", "Is it 3 or is it 5\n5", 1),
        ("Name the answer, which is 5", "5", "Name the answer, which is 5 " * 9, 0),
        ("What is larger, 3 or 5?", "5", "5", 1),
        ("She has 2. How many have 5?", "5", "How many have 5?", 0),
    ],
)
def test_a_repeated_question_is_not_an_answer(prompt, answer, completion, right):
    assert score(completion, "number", prompt=prompt, answer=answer) == right


# ---- texts and choices


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("yajo", "yajo", 1), ("yajo", " YAJO. ", 1), ("yajo", "The last letters are y, a, j, o.\nyajo", 1),
        ("yajo", "so the answer is yajo.", 1), ("yajo", "\"yajo\"", 1), ("yajo", "**yajo**", 1), ("yes", "Yes!", 1),
        ("yajo", "#### yajo", 1), ("yajo", "\\boxed{yajo}", 1), ("1 2 3", "1  2 3", 1), ("} ]", "} ]", 1),
        ("yajo", "", 0), ("yajo", " \n ", 0), ("yajo", "yaj", 0), ("yajo", "yajos", 0), ("yajo", "not yajo", 0),
        ("yajo", "yajo or yajp", 0), ("yajo", "The answer is not yajo", 0), ("yes", "yes and no", 0),
        ("yes", "yes no yes no", 0), ("1 2 3", "1 3 2", 0), ("1 2 3", "1 2 3 4", 0), ("} ]", "] }", 0), ("} ]", "", 0),
        ("yajs", "yaj", 0), ("5\u00b2", "52", 0), ("yajo", "yajo\nbut I am not sure", 0),
        ("no", "n o", 0), ("a", "b", 0), ("yajo", "#### yajo\n#### yes", 0), ("yes", "The answer is: no. yes?", 0),
    ],
)  # fmt: skip
def test_exact(answer, completion, right):
    assert score(completion, "exact", answer=answer) == right


OPTIONS = ["A)an apple", "B)Vitamin C", "C)a pear", "D)3"]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B)", 1), ("B.", 1), ("**B**", 1), ("B) Vitamin C", 1), ("Vitamin C", 1),
        ("vitamin c.", 1), ("The answer is (B).", 1), ("Answer: B", 1), ("First A, then C.\nThe answer is B", 1),
        ("#### B", 1), ("\\boxed{B}", 1), ("A is wrong.\nB", 1), ("The correct option is B, as a pear has none", 1),
        ("", 0), (" ", 0), ("A", 0), ("C", 0), ("E", 0), ("A or B", 0), ("B or A", 0), ("A, B, C, D", 0), ("ABCD", 0),
        ("not B", 0), ("neither A nor B", 0), ("I think", 0), ("It isn't B", 0), ("B is wrong", 0),
        ("The answer is not B", 0), ("A B", 0), ("(A)(B)(C)(D)", 0),
        ("B\nC", 0), ("the answer is C. The answer is B or C", 0), ("Bob", 0), ("B2", 0), ("\\boxed{A, B}", 0),
        ("#### A\n#### B", 0), ("B)", 1), ("B) a pear", 1), ("A) Vitamin C", 0), ("all of them", 0), ("I", 0),
        ("What is it?\n\nA) an apple\nB) Vitamin C\nC) a pear\nD) 3", 0),
        ("an apple\nVitamin C\na pear\n3", 0), ("A" * 1_000_000, 0), ("(B) " * 100_000 + "(A)", 0),
    ],
)  # fmt: skip
def test_choice(completion, right):
    assert score(completion, options=OPTIONS, answer=None, correct="B") == right


@pytest.mark.parametrize(
    ("name", "value", "right", "wrong"),
    [
        (None, {"prompt": "Which is it?\n(A) three\n(B) four", "answer": "(B)"}, ["B", "(B)", "So it is (B)."],
         ["A", "A or B"]),  # a letter in brackets is a choice from the prompt
        ("match", {"prompt": "What is the capital of France?", "answer": "Paris"}, ["It is Paris.", "Paris"],
         ["", "Not Paris", "Paris or Rome", "I do not know"]),
    ],
)  # fmt: skip
def test_choices_in_the_prompt_and_words(name, value, right, wrong):
    assert {text: score(text, name, **value) for text in right + wrong} == dict.fromkeys(right, 1) | dict.fromkeys(
        wrong, 0
    )


# ---- regular expressions, JSON, LaTeX


@pytest.mark.parametrize(
    ("pattern", "completion", "right"),
    [
        (r"\d+ eggs", "12 eggs", 1), (r"\d+ eggs", " 12 eggs\n", 1), (r"\d+ eggs", "", 0), (r".*", "", 0),
        (r".*", "  ", 0),
        (r"\d+ eggs", "I have 12 eggs", 0), (r"\d+ eggs", "12 eggs 13 eggs", 0), (r"(a+)+$", "a" * 60 + "b", 0),
        (r"(a|a)*c", "a" * 60, 0), (r"(?:x+x+)+y", "x" * 60, 0), (r"(.*)\1{20}z", "ab" * 5000, 0),
    ],
)  # fmt: skip
def test_regex_takes_the_whole_and_little_time(pattern, completion, right):
    start = time.process_time()
    assert score(completion, pattern=pattern) == right
    assert time.process_time() - start < 5


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "s": {"type": "string", "pattern": "^(a+)+$"}},
    "patternProperties": {"^b+$": {"type": "integer"}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ('{"a": 1}', 1), ('```json\n{"a": 1}\n```', 1), ('{"a": 1, "s": "aa"}', 1), (' {"a": 1} ', 1),
        ('{"a": 1.0}', 1),
        ("", 0), ("{}", 0), ("null", 0), ('{"a": "1"}', 0), ('{"a": true}', 0), ('{"a": 1} and more', 0),
        ('Here: {"a": 1}', 0), ('{"a": 1}{"a": 2}', 0), ('{"a": "x", "a": 1}', 0), ('{"a": NaN}', 0),
        ('{"a": Infinity}', 0),
        ('{"a": 1, "s": "b"}', 0), ('{"a": 1, "bb": "1"}', 0), ('{"a": 1,}', 0), ("{'a': 1}", 0), ('{"a": 1', 0),
        ("[" * 100_000, 0), ('{"a":' * 100_000, 0),
        ('{"a": 1, "s": "' + "a" * 50 + 'b"}', 0), ('{"a": ' + "9" * 1_000_000 + "}", 0),
        ("```json\n{\"a\": 1}\n```\n```json\n{}\n```", 0), ('{"a": 1e999}', 0),
    ],
)  # fmt: skip
def test_json_must_fit_the_schema(completion, right):
    assert score(completion, schema=SCHEMA) == right


@pytest.mark.parametrize(
    ("schema", "completion", "right"),
    [
        ({"additionalProperties": False, "patternProperties": {"^(a+)+$": {}}}, '{"%s!": 1}' % ("a" * 40), 0),
        ({"additionalProperties": False, "patternProperties": {"^a+$": {}}}, '{"aa": 1}', 1),
        ({"additionalProperties": False, "properties": {"b": {}}}, '{"aa": 1}', 0),
        ({"additionalProperties": {"type": "integer"}, "properties": {"b": {}}}, '{"a": 1, "b": "x"}', 1),
        ({"additionalProperties": {"type": "integer"}, "properties": {"b": {}}}, '{"a": "x"}', 0),
        ({"type": "number", "multipleOf": 0.01}, "1e999", 0),
        ({"type": "number", "multipleOf": 0.01}, "1" + "0" * 400, 1),
        ({"type": "number", "multipleOf": 0.5}, "2.5", 1),
        ({"type": "number"}, "-1e999", 0),
        ({"type": "number"}, "1e308", 1),
    ],
)
def test_no_json_hangs_or_overflows_a_schema(schema, completion, right):
    assert score(completion, schema=schema) == right


def test_a_schema_fetches_nothing():
    with pytest.raises(UserError, match="refer to its own parts"):
        score('{"a": 1}', schema={"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}})


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("\\frac{1}{2}", "\\boxed{\\frac12}", 1), ("\\frac{1}{2}", "so $\\boxed{0.5}$", 1), ("149", "\\boxed{149}", 1),
        ("11+x", "\\boxed{x + 11}", 1), ("(1,2)", "\\boxed{(1, 2)}", 1), ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", 1),
        ("149", "$\\boxed{7}$, rather $\\boxed{149}$", 1), ("149", "149", 0), ("149", "", 0), ("149", "\\boxed{}", 0),
        ("149", "\\boxed{149} no, \\boxed{7}", 0), ("149", "\\boxed{149 or 7}", 0), ("149", "\\boxed{149, 7}", 0),
        ("149", "\\boxed{149", 0), ("149", "\\boxed{{149}", 0), ("5", "\\boxed{\\neq 5}", 0), ("5", "\\boxed{x}", 0),
        ("(1,2)", "\\boxed{(2, 1)}", 0), ("1101_4", "\\boxed{1101_9}", 0), ("\\frac{1}{2}", "\\boxed{2}", 0),
        ("5", "\\boxed{__import__('os').system('true')}", 0), ("5", "\\boxed{" + "5" * 1_000_000 + "}", 0),
        ("5", "\\boxed{9^{9^{9^{9^{9}}}}}", 0), ("5", "\\boxed{" * 50_000, 0), ("5", "\\boxed{" + "(" * 900 + "}", 0),
        ("5", "\\boxed{10000000!}", 0), ("5", "\\boxed{\\pm 5}", 0),
    ],
)  # fmt: skip
def test_latex_compares_what_is_boxed(answer, completion, right):
    pytest.importorskip("math_verify")
    assert score(completion, "latex", answer=answer) == right


def test_an_answer_that_math_verify_cannot_parse_is_not_judged():
    """For an answer that is damaged in the data, an identical completion is right, and any other is undecided."""
    pytest.importorskip("math_verify")
    right = {"\\boxed{\\frac{7}}": 1, "\\boxed{7}": None, "7": 0, "": 0}
    assert {text: score(text, "latex", answer="\\frac{7}") for text in right} == right


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("\\frac{12}{5,\\!525}", "\\boxed{\\frac{12}{5525}}"),
        ("5525", "\\boxed{5{,}525}"),
        ("\\frac{7}{5} + \\frac{1}{5} i.", "\\boxed{\\frac{7+i}{5}}"),
        ("90\\text{ square\nunits}", "\\boxed{90}"),
        ("\\frac \\pi4 + 2 - \\sqrt2", "\\boxed{2-\\sqrt{2}+\\frac{\\pi}{4}}"),
    ],
)
def test_every_way_to_write_an_answer_of_math_is_read(answer, said):
    pytest.importorskip("math_verify")
    assert score(said, "latex", answer=answer) == 1
    assert score(f"\\boxed{{{answer}+1}}", "latex", answer=answer) == 0


def test_a_comparison_that_hangs_is_ended_and_the_next_one_works():
    pytest.importorskip("math_verify")
    asked = problem(answer="x+1")
    hasty = LatexComparer(seconds=1e-6)
    assert not hasty.judge(asked, "\\boxed{1+x}")  # stopped before it could answer
    hasty.worker.close()
    comparer = LatexComparer()
    assert comparer.judge(asked, "\\boxed{1+x}")
    comparer.worker.close()
    assert comparer.judge(asked, "\\boxed{x - (-1)}")
    comparer.worker.close()


# ---- selection of the verifier


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"answer": "72"}, "number"), ({"answer": "x\n#### 1,000"}, "number"), ({"answer": "$5"}, "number"),
        ({"answer": "yajo"}, "exact"), ({"answer": "5 apples"}, "number"),
        ({"answer": "7 Up"}, "exact"), ({"answer": "A"}, "choice"), ({"answer": "\\frac{1}{2}"}, "latex"),
        ({"answer": "149", "solution": "so \\boxed{149}"}, "latex"),
        ({"options": ["A)1", "B)2"], "correct": "A"}, "choice"),
        ({"schema": SCHEMA}, "json-schema"), ({"pattern": "a+"}, "regex"),
        ({"answer": "72", "verifier": "gsm8k"}, "gsm8k"),
        ({"test": "def check(candidate):\n    assert candidate(1)", "entry_point": "f"}, "tests"),
        ({"tests": ["assert f(1) == 2"]}, "tests"), ({"answer": "(B)"}, "choice"),
    ],
)  # fmt: skip
def test_the_record_says_which_verifier(value, name):
    assert verifier_of(problem(**value)) == name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (None, {}, "expected field 'answer' for the verifier, found ['prompt']"),
        ("number", {}, "expected field 'answer'"), ("number", {"answer": "Paris"}, "an answer with one number"),
        ("number", {"answer": "1 or 2"}, "an answer with one number"),
        ("choice", {"answer": "Paris"}, "among A to Z"),
        ("exact", {"answer": "''"}, "an answer of words"), ("exact", {}, "expected field 'answer'"),
        (None, {"answer": "5", "verifier": "nubmer"}, "found 'nubmer'; did you mean 'number'?"),
        (None, {"pattern": "(a"}, "expected a regular expression, found '(a'"),
        ("regex", {}, "expected field 'pattern'"),
        (None, {"schema": {"type": "strnig"}}, "to be a JSON schema"), (None, {"schema": {}}, "which any JSON fits"),
        (None, {"schema": {"pattern": "(a"}}, 'not a "regex"'), ("json-schema", {}, "expected field 'schema'"),
        ("latex", {}, "expected an answer"), ("tests", {}, "expected 'test' and 'entry_point', or 'tests'"),
        (None, {"tests": []}, "to be assertions"), (None, {"tests": ["assert f(1"]}, "to be Python"),
        (None, {"tests": ["f(1)"]}, "to assert something"), (None, {"tests": ["assert 1"]}, "to assert something"),
        (None, {"test": "x", "entry_point": "f"}, "to define check(candidate)"),
        ("tests", {"test": "x"}, "expected 'test' and 'entry_point'"),
        (None, {"test": "x", "entry_point": 5}, "'entry_point' to be text"),
    ],
)  # fmt: skip
def test_a_problem_that_cannot_be_judged_is_an_error_in_one_line(name, value, message):
    with pytest.raises(UserError) as caught:
        VerifierReward(name).check(problem(**value))
    assert message in str(caught.value) and str(caught.value).startswith("p.jsonl:3") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tests"])
@pytest.mark.parametrize("completion", ["", " ", "\n\n\t", "\u00a0", "\u3000"])
def test_nothing_is_never_right(name, completion):
    values = {"answer": "5", "pattern": ".*", "schema": {"type": "integer"}, "options": ["A)5"]}
    values |= {"answer": "A"} if name == "choice" else {}
    values |= {} if name == "choice" else {"options": None}
    assert score(completion, name, **values) == 0


# ---- precision and recall on public solutions


@pytest.mark.parametrize("name", ["number", "gsm8k"])
def test_every_solution_of_gsm8k_is_right_and_none_with_another_number(shared_data: Path, name: str):
    reward, draw = VerifierReward(name), random.Random(0)
    problems = list(read_jsonl([str(shared_data / "math/gsm8k.train.jsonl.gz")], None, read_problem))
    solutions = [one.record["answer"] for one in problems]
    assert (
        reward.score([Attempt(*pair, 1, "stop", 9) for pair in zip(problems, solutions, strict=True)]) == [1.0] * 7473
    )

    def other(text: str) -> str:
        steps, _, answer = text.rpartition("####")
        place = draw.choice([found.start() for found in re.finditer(r"\d", answer)])
        return f"{steps}####{answer[:place]}{(int(answer[place]) + draw.randint(1, 9)) % 10}{answer[place + 1 :]}"

    changed = [Attempt(one, other(text), 1, "stop", 9) for one, text in zip(problems, solutions, strict=True)]
    assert sum(reward.score(changed)) == 0


def test_every_solution_of_math_is_right(shared_data: Path):
    pytest.importorskip("math_verify")
    reward = VerifierReward()
    problems = list(read_jsonl([str(shared_data / "math/math.test.jsonl.gz")], None, read_problem))
    attempts = [Attempt(one, one.record["chain_of_thought"], 1, "stop", 9) for one in problems]
    assert sum(reward.score(attempts)) == 5000
    shifted = [Attempt(one, f"\\boxed{{{one.answer}+1}}", 1, "stop", 9) for one in problems[:200]]
    assert set(reward.score(shifted)) == {0.0}, "math-verify reads them all, in the way in which we write them to it"
    reward.close()


@pytest.mark.parametrize("name", ["AddSub.json.gz", "MultiArith.json.gz", "SingleEq.questions.json.gz",
"aqua.dev.jsonl.gz",
                                  "last_letters.json.gz", "coin_flip.json.gz"])  # fmt: skip
def test_the_answers_of_other_sets_are_right_and_those_of_the_next_problem_are_not(shared_data: Path, name: str):
    reward = VerifierReward()
    problems = list(read_jsonl([str(shared_data / "math" / name)], None, read_problem))
    for one in problems:
        reward.check(one)
    said = [one.answer or "" for one in problems]
    assert set(reward.score([Attempt(*pair, 1, "stop", 9) for pair in zip(problems, said, strict=True)])) == {1.0}
    moved = [*said[1:], said[0]]
    found = reward.score([Attempt(*pair, 1, "stop", 9) for pair in zip(problems, moved, strict=True)])
    assert found == [float(a == b) for a, b in zip(said, moved, strict=True)]


def quickly_met(schema: dict, completion: str) -> bool:
    began = time.monotonic()
    found = score(completion, schema=schema, verifier="json-schema")
    assert time.monotonic() - began < 60  # hours without a limit
    return found == 1.0


@pytest.mark.parametrize("kind", ["2020-12", "2019-09"])
@pytest.mark.parametrize("keyword", ["unevaluatedProperties", "additionalProperties"])
def test_json_schema_has_a_limit_of_time_on_every_pattern(keyword: str, kind: str) -> None:
    schema = {"$schema": f"https://json-schema.org/draft/{kind}/schema", "patternProperties": {"^(a+)+$": True}}
    slow = (
        {"allOf": [schema], "type": "object", keyword: False} if keyword.startswith("u") else schema | {keyword: False}
    )
    assert not quickly_met(slow, json.dumps({"a" * 40 + "!": 1}))


def test_json_schema_has_a_limit_of_time_on_the_whole_check() -> None:
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**twice, "d40": {"type": "integer"}}}
    verifier = SchemaVerifier(1.0)
    assert not verifier.judge(problem(schema=schema), "1")
    verifier.worker.close()


def test_json_schema_compares_many_items_by_their_values() -> None:
    unique = {"type": "array", "uniqueItems": True}
    items = [[{"a": i}, [i]][i % 2] for i in range(30_000)]
    assert quickly_met(unique, json.dumps(items))
    assert not quickly_met(unique, json.dumps([*items, {"a": 2.0}]))
    assert quickly_met(unique, '[1, true, 0, false, [1], [true], {}, [], null, "1"]')
    assert not quickly_met(unique, "[1, 1.0]")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$schema": 5}, "expected 'schema' to be a JSON schema: 5 is not of type"),
        ({"$schema": "https://a.example/"}, "Unknown meta-schema: 'https://a.example/'"),
        ({"properties": {"a": {"$ref": "#/nope"}}}, "expected 'schema' to refer to its own parts"),
        ({"items": {"$ref": "http://127.0.0.1:1/x"}}, "expected 'schema' to refer to its own parts"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_before_the_run(schema: dict, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        quickly_met(schema, "5")


def test_a_pattern_too_deep_is_refused_on_one_short_line_and_one_that_recurs_is_not_met() -> None:
    for pattern in ("(a" * 3000 + ")" * 3000, "(?:" * 3000 + "a" + ")" * 3000):
        with pytest.raises(UserError, match="expected a regular expression, found") as refused:
            score("a", pattern=pattern, verifier="regex")
        assert len(str(refused.value)) < 200
    assert score("a" * 50, pattern="(?R)", verifier="regex") == 0.0
