"""No verifier or judge ends a run with a traceback, for any completion or record."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, read_problem
from llmkit.io.records import Row
from llmkit.rewards import Attempt
from llmkit.rewards.code import code_of
from llmkit.rewards.constraints import FormatReward
from llmkit.rewards.numbers import SCALES, last_number
from llmkit.rewards.verifiers import NAMES, VerifierReward
from llmkit.text.matching import VERDICTS, MatchJudge
from llmkit.text.normalize import KNOWN

ODD = r"""
0 7 -5 1,000 1.000,5 3/4 0/0 ½ 1e999 1e-5 9**9 1_000 00 1. .5 5! 2x 10^3 1:30 3/4/2024 XIV IV ..
yes no not or and but minus plus the a is answer unknown I in per of to from until
second hundredths thirds half halves quarters dozens Millions MILLIONS ks bns percent per-cent
m km/h kg °C degrees dollars $ € % ‰ m/s^2 square Monday May march St. Mr. U.S. C++ A-
一 三百 零 两 十 八万 亿 ٣ ² ① 答案是 答えは 모르 ไม่ नहीं Ⅱ 😀
... . ! ? , ; : ' " `` ** ( ) [ ] { } < > = != ≠ ≈ - -- + +- * / \ | # #### _ ^ ~ & @
\boxed{5} \boxed{ \boxed{} \frac{1}{0} \frac12 \text{ $5$ <answer> </answer> <think> </think>
```python ``` {"a": {"a":1} [1e999] NaN def
"""
PIECES = [
    *ODD.split(), *(word + end for word in SCALES for end in ("", "s")),
    "\uff11\uff12", "\n", "\n\n", "\t", "\u00a0", "\u200b", "\u0301", "\u2028", "\x00", "\ue000", "\ufffd",
    "I don't know", "not sure, but I think", "The answer is ", "Answer:", "A.", "(B)",
]  # fmt: skip
WORDS = [word for some in KNOWN.values() if isinstance(some, list) for entry in some for word in entry.split()]
TEXTS = st.builds(
    lambda pieces, joint: joint.join(pieces),
    st.lists(st.sampled_from(PIECES) | st.sampled_from(WORDS), max_size=7),
    st.sampled_from(["", " "]),
)


def problem(prompt: str, answer: str, **more) -> Problem:
    return read_problem(Row({"prompt": f"What? {prompt}", "answer": answer or "5", **more}, "p.jsonl", 3))


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=150)
def test_verifiers_and_judge_take_any_text(said, asked, answer):
    options = {"options": ["red", answer, "..."], "schema": {"type": "object"}, "pattern": "a+"}
    for one in (problem(asked, answer), problem(asked, "B", **options)):
        for name in sorted(set(NAMES) - {"tests", "latex"}):
            reward = VerifierReward(name)
            try:
                reward.check(one)
            except UserError:  # a bad record is reported before the run
                continue
            assert reward.score([Attempt(one, said, 5, "stop", 9)])[0] in (0.0, 1.0)
    assert FormatReward(".*").score([Attempt(problem(asked, answer), said, 5, "stop", 9)])[0] in (0.0, 1.0)
    code_of(said, ["f"])
    for answers in ([answer], [answer, "yes"], ["no"], []):
        assert MatchJudge()(said, asked, answers) in VERDICTS


@given(TEXTS)
@settings(max_examples=20)
def test_latex_takes_any_text(comparer, said):
    one = problem("?", r"\frac{1}{2}")
    assert comparer.score([Attempt(one, f"\\boxed{{{said}}}", 5, "stop", 9)])[0] in (0.0, 1.0)


@pytest.fixture(scope="module")
def comparer():
    pytest.importorskip("math_verify")
    reward = VerifierReward("latex")
    yield reward
    reward.close()


@pytest.mark.parametrize(("scale", "end"), list(product(SCALES, ["", "s"])))
def test_every_scale_and_its_plural_is_read(scale, end):
    if len(scale) > 2:
        for word in (scale + end, (scale + end).title(), (scale + end).upper()):
            found = last_number(f"It is 5 {word}")
            assert found is not None and found.value == 5 * SCALES[scale], word


@pytest.mark.parametrize("said", ["...\nIt is Monday", "!\n\n?", "It is.\n...\nyes", "- \n- yes"])
@pytest.mark.parametrize("answer", ["yes", "no", "Monday"])
def test_answers_with_lines_without_words_get_a_verdict(said, answer):
    assert MatchJudge()(said, "Is it Monday?", [answer]) in VERDICTS
