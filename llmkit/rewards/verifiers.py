"""`--reward verifier`: 1 for a right completion, 0 for any other, decided by rules, not by a model.

    verifier=NAME forces one for all problems; else a problem's own `verifier`, else the one that fits its answer

An empty completion is never right. Text of a model is never evaluated here: programs run in a sandbox.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from string import ascii_uppercase

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, last_boxed, read_options
from llmkit.io.pool import TimeLimitError, Worker, WorkerDied
from llmkit.rewards.code import CodeTests, has_tests
from llmkit.rewards.constraints import SchemaVerifier, check_pattern, is_pattern_met
from llmkit.rewards.final_answer import (
    after_thinking,
    chosen,
    final,
    last_sentence,
    marked,
    plain,
    says,
    tagged,
    unasked,
)
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
    judge  whether a nonempty completion is right; None if that cannot be decided
    """

    check: Callable[[Problem], None]
    judge: Callable[[Problem, str], bool | None]


# ---- numbers


def _check_number(problem: Problem) -> None:
    if _number(_answer(problem)) is None:
        raise _unfit(problem, "number", "an answer with one number", problem.answer)


def is_number_right(problem: Problem, completion: str) -> bool:
    """True if the answer is the number marked by #### or \\boxed, else announced by "the answer is", else the last.

    A completion of three words or more that is copied from the question is no answer.
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
    """True if the number after #### is the answer. Deliberately strict: without the marker nothing is right."""
    return (
        marked(completion, numeric=True) is not None and "####" in completion and is_number_right(problem, completion)
    )


# ---- text


def _check_text(problem: Problem) -> None:
    if not plain(_answer(problem)):
        raise _unfit(problem, "exact", "an answer of words", problem.answer)


def is_matching(problem: Problem, completion: str) -> bool:
    """True if the completion has the words of the answer, as `probe-knowledge --judge match` compares them."""
    from llmkit.text.matching import RIGHT, MatchJudge

    return MatchJudge()(completion, problem.prompt, [problem.answer or ""]) == RIGHT


# ---- choices


def _check_choice(problem: Problem) -> None:
    letters = [letter for letter, _ in _options(problem)]
    if _answer(problem).strip(" ().") not in letters:
        expected = f"an answer among {letters[0]} to {letters[-1]}"
        raise _unfit(problem, "choice", expected, problem.answer)


def is_choice_right(problem: Problem, completion: str) -> bool:
    """True if the completion chooses the option with that letter, of A to Z if the record lists no options."""
    return chosen(completion, _options(problem)) == (problem.answer or "").strip(" ().")


def _options(problem: Problem) -> tuple[tuple[str, str], ...]:
    return read_options(problem.record) or tuple((letter, "") for letter in ascii_uppercase)


# ---- LaTeX

SECONDS = 3  # for parsing and for comparing; math-verify's SIGALRM does not interrupt one long operation
MEMORY = 4 << 30  # bytes of address space
LONGEST = 1000  # characters of an expression; answers of MATH have 70 at most
SPACES = re.compile(r"\s+|\\[,;:! ]|~")
BASE = re.compile(r"(?<=[0-9])_\{?\s*([0-9]+)")  # math-verify takes 1101_4 for 1101_9
# math-verify cannot read `5,\!525` and `\frac \pi4` in MATH's answers, line breaks, or a full stop
GROUPS = re.compile(r"(?<=[0-9])(?:,\s*\\[!,:; ]|\{\s*,\s*\}|\\[!,:; ])\s*(?=[0-9]{3}(?![0-9]))")
WRAPPED = re.compile(r"\\math(?:rm|bf|it|sf)\{(.*)\}\Z", re.DOTALL)
UNBRACED = re.compile(r"\\[dtc]?frac\s*(\\pi|[0-9A-Za-z])\s*(\\pi|[0-9A-Za-z])")
LEFT_OPEN = re.compile(r"\b(?:or|not)\b|\\(?:lor|vee|neq?|neg|pm|mp)\b")


def readable(text: str) -> str:
    r"""Rewrite LaTeX so that math-verify can read it.

    >>> readable(r"\frac{12}{5,\!525}"), readable(r"\frac \pi4 + 1{,}000."), readable(r"(1,\! 20)")
    ('\\frac{12}{5525}', '\\frac{\\pi}{4} + 1000', '(1,\\! 20)')
    """
    text = re.sub(r"\s*\u00b0", r"^\\circ", WRAPPED.sub(r"\1", text.strip()))
    text = UNBRACED.sub(r"\\frac{\1}{\2}", GROUPS.sub("", text))
    return " ".join(text.split()).removesuffix(".")


class LatexComparer:
    """Compares the last boxed expression with the answer, by math-verify in a separate process.

    Deliberately strict: without \\boxed nothing is right, and an "or" leaves the answer open. math-verify parses with
    the grammar of latex2sympy; its other parser, which lets sympy evaluate Python, is not used.

    seconds  CPU time of one comparison
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.worker = Worker(start_comparing, seconds)

    def check(self, problem: Problem) -> None:
        """Raise UserError for a problem without an answer, or if math-verify is not installed."""
        if find_spec("math_verify") is None:
            raise UserError(f"{problem.where}: the verifier 'latex' needs math-verify; pip install 'llmkit[math]'")
        if not (problem.answer or "").strip():
            raise UserError(f"{problem.where}: expected an answer for the verifier 'latex', found none")

    def judge(self, problem: Problem, completion: str) -> bool | None:
        """True if the boxed expression is the answer; None if math-verify cannot read the answer."""
        completion = after_thinking(completion)
        tag = tagged(completion)
        boxed, boxed_answer = last_boxed(completion if tag is None else tag), last_boxed(problem.answer or "")
        expression = (tag or "").strip().strip("$") if boxed is None else boxed
        answer = (problem.answer or "").strip().strip("$") if boxed_answer is None else boxed_answer
        squeezed = SPACES.sub("", expression)
        if not squeezed or len(expression) > LONGEST:
            return False
        if squeezed == SPACES.sub("", answer):
            return True
        if set(LEFT_OPEN.findall(expression)) - set(LEFT_OPEN.findall(answer)):
            return False
        base, base_of_answer = BASE.findall(expression), BASE.findall(answer)
        if base and base_of_answer and base != base_of_answer:
            return False
        pair = readable(answer), readable(expression)
        for _ in range(2):  # another program may have killed the process; a second death is the expression's fault
            try:
                return self.worker.call(pair)
            except TimeLimitError:
                break
            except WorkerDied:
                continue
        return False


def start_comparing() -> Callable[[tuple[str, str]], Iterator[bool | None]]:
    """Load math-verify with a memory limit; return a function that compares (answer, expression)."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list:
        return parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", "first_match", parsing_timeout=SECONDS)

    def compare(pair: tuple[str, str]) -> Iterator[bool | None]:
        try:
            answer = parsed(pair[0])
            expression = parsed(pair[1]) if answer else []
            yield (bool(expression) and bool(verify(answer, expression, timeout_seconds=SECONDS))) if answer else None
        except Exception:
            yield False

    return compare


# ---- choice of a verifier


NAMES = ("number", "gsm8k", "exact", "match", "choice", "regex", "latex", "json-schema", "tests")
WHOLE = ("regex", "json-schema", "latex")  # also see thinking and tags
TEXT_VERIFIERS = {
    "number": Verifier(_check_number, is_number_right),
    "gsm8k": Verifier(_check_number, is_gsm8k_right),
    "exact": Verifier(_check_text, lambda problem, completion: says(completion, problem.answer or "")),
    "match": Verifier(_check_text, is_matching),
    "choice": Verifier(_check_choice, is_choice_right),
    "regex": Verifier(check_pattern, is_pattern_met),
}


def check_name(name: str, where: str) -> str:
    """Return the name. Raises UserError if there is no such verifier."""
    if name in NAMES:
        return name
    near = get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{where}: expected a verifier among {', '.join(NAMES)}, found {name!r}{hint}")


def verifier_of(problem: Problem) -> str:
    """Return the name of the verifier that a problem names, or that fits its record.

    `tests`, `json-schema`, `regex` and `choice` if it has unit tests, a schema, a pattern or options (or an answer like
    "(B)" or "B"); `latex` if the answer has a backslash or is boxed in the record's solution; `number` if the answer is
    one number, perhaps with a unit or "x =", such as GSM8K's; else `exact`. `gsm8k`, which demands the marker, is used
    only if named.
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

    forced   verifier of all problems
    sandbox  whether unit tests run in the sandbox; they may take `seconds`
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
        """Raise UserError for a problem that its verifier cannot judge."""
        for alternative in _each_answer(problem):
            name = self._forced or verifier_of(alternative)
            (self._tests if name == "tests" else self._verifiers[name]).check(alternative)

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """Return 1.0, 0.0 or None for each attempt; equal completions of a problem are judged once."""
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
