"""The verifier `latex`: the last boxed expression equals the answer, as math-verify compares them.

Deliberately strict: without \\boxed nothing is right, and an "or" leaves the answer open. math-verify parses with the
grammar of latex2sympy; its other parser, which lets sympy evaluate Python, is not used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, last_boxed
from llmkit.io.pool import TimeLimitError, Worker, WorkerDied
from llmkit.rewards.final_answer import after_thinking, tagged

SECONDS = 3  # for parsing and for comparing, each; math-verify stops itself by SIGALRM, but not in one long operation
MEMORY = 4 << 30  # bytes of address space
LONGEST = 1000  # characters of an expression; answers of MATH have 70 at most
SPACES = re.compile(r"\s+|\\[,;:! ]|~")
BASE = re.compile(r"(?<=[0-9])_\{?\s*([0-9]+)")  # math-verify takes 1101_4 for 1101_9
# of MATH's answers math-verify cannot read `5,\!525` and `\frac \pi4`, nor a line break, nor a full stop
GROUPS = re.compile(r"(?<=[0-9])(?:,\s*\\[!,:; ]|\{\s*,\s*\}|\\[!,:; ])\s*(?=[0-9]{3}(?![0-9]))")
WRAPPED = re.compile(r"\\math(?:rm|bf|it|sf)\{(.*)\}\Z", re.DOTALL)
UNBRACED = re.compile(r"\\[dtc]?frac\s*(\\pi|[0-9A-Za-z])\s*(\\pi|[0-9A-Za-z])")
LEFT_OPEN = re.compile(r"\b(?:or|not)\b|\\(?:lor|vee|neq?|neg|pm|mp)\b")


def readable(text: str) -> str:
    r"""Write the same in a way that math-verify reads.

    >>> readable(r"\frac{12}{5,\!525}"), readable(r"\frac \pi4 + 1{,}000."), readable(r"(1,\! 20)")
    ('\\frac{12}{5525}', '\\frac{\\pi}{4} + 1000', '(1,\\! 20)')
    """
    text = re.sub(r"\s*\u00b0", r"^\\circ", WRAPPED.sub(r"\1", text.strip()))
    text = UNBRACED.sub(r"\\frac{\1}{\2}", GROUPS.sub("", text))
    return " ".join(text.split()).removesuffix(".")


class LatexComparer:
    """Compares in a process of its own; `seconds` of the processor for one comparison."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.worker = Worker(start_comparing, seconds)

    def check(self, problem: Problem) -> None:
        """Raise UserError for a problem without an answer, and without math-verify."""
        if find_spec("math_verify") is None:
            raise UserError(f"{problem.where}: the verifier 'latex' needs math-verify; pip install 'llmkit[math]'")
        if not (problem.answer or "").strip():
            raise UserError(f"{problem.where}: expected an answer for the verifier 'latex', found none")

    def judge(self, problem: Problem, completion: str) -> bool | None:
        """True if the boxed expression is the answer; None where math-verify cannot read the answer."""
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
        for _ in range(2):  # the process may have been ended by others: two deaths are the expression's
            try:
                return self.worker.call(pair)
            except TimeLimitError:
                break
            except WorkerDied:
                continue
        return False


def start_comparing() -> Callable[[tuple[str, str]], Iterator[bool | None]]:
    """Load math-verify into this process, with a limit of memory; what comes back compares (answer, expression)."""
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
