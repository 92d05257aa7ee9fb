"""`--reward verifier`: 1 for a right completion, 0 for any other, by rules that cannot be talked round.

    verifier=NAME forces one for all problems; else a problem's own `verifier`, else the one that its answer calls for

An empty completion is never right, and nothing that a model wrote is ever evaluated here: programs run in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from string import ascii_uppercase

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, read_options
from llmkit.rewards.code import CodeTests, has_tests
from llmkit.rewards.constraints import SchemaVerifier, check_pattern, is_pattern_met
from llmkit.rewards.final_answer import chosen, final, last_sentence, marked, plain, says, unasked
from llmkit.rewards.latex import LatexComparer
from llmkit.rewards.numbers import (
    Number,
    announced_number,
    in_digits,
    last_number,
    only_number,
    same_number,
    unscaled,
    whole_number,
)
from llmkit.rewards.reward import Attempt, Reward

SOLUTIONS = ("solution", "chain_of_thought", "rationale")


@dataclass(frozen=True)
class Verifier:
    """A rule.

    check  raises UserError for a problem that it cannot judge
    judge  whether a completion, which is not empty, is right; None where that cannot be told
    """

    check: Callable[[Problem], None]
    judge: Callable[[Problem, str], bool | None]


# ---- numbers


def _check_number(problem: Problem) -> None:
    if _number(_answer(problem)) is None:
        raise _unfit(problem, "number", "an answer that holds one number", problem.answer)


def is_number_right(problem: Problem, completion: str) -> bool:
    """The number that is marked by #### or \\boxed, else announced by "the answer is", else the last, is the answer.

    Three words or more that the question holds as they stand are the question said again, and no answer.
    """
    if len(completion.split()) >= 3 and completion in problem.prompt:
        return False
    boxed, question, answer = marked(completion, numeric=True), problem.prompt, _number(problem.answer or "")
    ending = last_sentence(completion) if boxed is None else boxed
    if not ending.strip() and completion.rstrip().endswith((":", "=", "\uff1a")):
        return False
    in_words = in_digits(ending)
    if in_words != ending:
        number = last_number(in_words, question)
    elif boxed is None:
        number = announced_number(completion, question) or last_number(completion, question)
    else:
        number = only_number(boxed, question) or only_number(boxed.rpartition("=")[2], question)
    if number is None or answer is None:
        return False
    return same_number(number, answer) or same_number(unscaled(number, question), answer)


def _number(answer: str) -> Number | None:
    return whole_number(answer) or only_number(answer)


def is_gsm8k_right(problem: Problem, completion: str) -> bool:
    """The number after #### is the answer. Deliberately strict: without the marker nothing is right."""
    return (
        marked(completion, numeric=True) is not None and "####" in completion and is_number_right(problem, completion)
    )


# ---- text


def _check_text(problem: Problem) -> None:
    if not plain(_answer(problem)):
        raise _unfit(problem, "exact", "an answer of words", problem.answer)


def is_matching(problem: Problem, completion: str) -> bool:
    """The answer's words are those of the completion, as `probe-knowledge --judge match` compares them."""
    from llmkit.text.matching import RIGHT, MatchJudge

    return MatchJudge()(completion, problem.prompt, [problem.answer or ""]) == RIGHT


# ---- choices


def _check_choice(problem: Problem) -> None:
    letters = [letter for letter, _ in _options(problem)]
    if _answer(problem).strip(" ().") not in letters:
        expected = f"an answer among {letters[0]} to {letters[-1]}"
        raise _unfit(problem, "choice", expected, problem.answer)


def is_choice_right(problem: Problem, completion: str) -> bool:
    """The completion chooses the option of that letter; one of A to Z where the record lists no options."""
    return chosen(completion, _options(problem)) == (problem.answer or "").strip(" ().")


def _options(problem: Problem) -> tuple[tuple[str, str], ...]:
    return read_options(problem.record) or tuple((letter, "") for letter in ascii_uppercase)


# ---- which


NAMES = ("number", "gsm8k", "exact", "match", "choice", "regex", "latex", "json-schema", "tests")
WHOLE = ("regex", "json-schema", "latex")  # are given thinking and tags, too
TEXT_VERIFIERS = {
    "number": Verifier(_check_number, is_number_right),
    "gsm8k": Verifier(_check_number, is_gsm8k_right),
    "exact": Verifier(_check_text, lambda problem, completion: says(completion, problem.answer or "")),
    "match": Verifier(_check_text, is_matching),
    "choice": Verifier(_check_choice, is_choice_right),
    "regex": Verifier(check_pattern, is_pattern_met),
}


def check_name(name: str, where: str) -> str:
    """The name of a verifier. Raises UserError for one that there is not."""
    if name in NAMES:
        return name
    near = get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{where}: expected a verifier among {', '.join(NAMES)}, found {name!r}{hint}")


def verifier_of(problem: Problem) -> str:
    """The name of the verifier that a problem asks for, or that its record calls for.

    `tests`, `json-schema`, `regex` and `choice` where it has unit tests, a schema, a pattern or options (or an answer
    like "(B)" or "B"); `latex` where the answer has a backslash or is boxed in the record's solution; `number` where
    all of it is a number, as GSM8K's are, a unit or "x =" aside; else `exact`. `gsm8k`, which demands the marker, is
    never taken unasked.
    """
    record = problem.record
    if problem.verifier is not None:
        return check_name(problem.verifier, f"{problem.where}, 'verifier'")
    if has_tests(record):
        return "tests"
    if isinstance(record.get("schema"), dict):
        return "json-schema"
    if isinstance(record.get("pattern"), str):
        return "regex"
    answer = problem.answer or ""
    if read_options(record) or re.fullmatch(r"\(?[A-Z](?:\)|\.|)", answer.strip()):
        return "choice"
    answer = _answer(problem)
    if "\\" in answer or any("\\boxed" in str(record.get(name, "")) for name in SOLUTIONS):
        return "latex"
    return "exact" if whole_number(answer) is None else "number"


class VerifierReward(Reward):
    """1 for a right completion, 0 for any other.

    forced   the verifier for all problems
    sandbox  whether unit tests run in the sandbox, for `seconds` at most
    """

    verifies = True

    def __init__(
        self, forced: str | None = None, flag: str = "--reward", *, sandbox: bool = True, seconds: float = 10.0
    ) -> None:
        super().__init__("verifier" if forced is None else f"verifier={forced}", flag)
        self._forced = forced
        self._tests, self._latex, self._schema = CodeTests(sandbox, seconds), LatexComparer(), SchemaVerifier()
        self._verifiers = {**TEXT_VERIFIERS, "latex": self._latex, "json-schema": self._schema}

    def check(self, problem: Problem) -> None:
        """Raise UserError for a problem without what its verifier needs."""
        for alternative in _each_answer(problem):
            name = self._forced or verifier_of(alternative)
            (self._tests if name == "tests" else self._verifiers[name]).check(alternative)

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """1.0, 0.0 or None for each attempt; equal completions of a problem are judged once."""
        keys = [(id(attempt.problem), attempt.completion) for attempt in attempts]
        verdicts: dict[tuple[int, str], bool | None] = {}
        tested: dict[tuple[int, str], tuple[Problem, str]] = {}
        for key, attempt in zip(keys, attempts, strict=True):
            if not attempt.completion.strip():
                verdicts[key] = False
            elif (self._forced or verifier_of(attempt.problem)) == "tests":
                tested[key] = attempt.problem, attempt.completion
            elif key not in verdicts:
                verdicts[key] = self._judge(attempt.problem, attempt.completion)
        verdicts.update(zip(tested, self._tests.judge_all(list(tested.values())), strict=True))
        return [None if verdicts[key] is None else float(bool(verdicts[key])) for key in keys]

    def _judge(self, problem: Problem, completion: str) -> bool | None:
        text, verdict = unasked(completion, problem.prompt).strip(), False
        for alternative in _each_answer(problem):
            name = self._forced or verifier_of(alternative)
            answer = text if name in WHOLE else final(text).strip()
            is_right = bool(answer) and self._verifiers[name].judge(alternative, answer)
            if is_right:
                return True
            verdict = None if is_right is None else verdict
        return verdict

    def close(self) -> None:
        """End the processes that compare LaTeX and check JSON."""
        self._latex.worker.close()
        self._schema.worker.close()


def _each_answer(problem: Problem) -> list[Problem]:
    """Return the problem with each of its answers alone."""
    return [problem, *(replace(problem, answer=alternative) for alternative in problem.alternatives)]


def _answer(problem: Problem) -> str:
    if problem.answer is None:
        actual = "null" if "answer" in problem.record else sorted(problem.record)
        expected = f"expected field 'answer' for the verifier, found {actual}"
        raise UserError(f"{problem.where}: {expected}; add one, or use another reward")
    return problem.answer


def _unfit(problem: Problem, name: str, expected: str, actual: str | None) -> UserError:
    return UserError(f"{problem.where}: expected {expected} for the verifier {name!r}, found {(actual or '')[:80]!r}")
