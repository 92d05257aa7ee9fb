"""The verifier `latex`: the last boxed expression equals the answer, as math-verify compares them.

Deliberately strict: without \\boxed nothing is right, and an "or" leaves the answer open.
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
import threading
from importlib.util import find_spec

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, last_boxed
from llmkit.io.ranks import interrupts_held
from llmkit.rewards.final_answer import after_thinking, tagged

START_SECONDS = 120  # sympy takes 1 to 3, and more on a busy machine
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
    """Compares with a process that is started when it is first needed, and anew when it hangs or dies.

    seconds  of one comparison; the process stops itself after 3 for each of two expressions and 3 to compare them
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def check(self, problem: Problem) -> None:
        """Raise UserError for a problem without an answer, and without math-verify."""
        if find_spec("math_verify") is None:
            raise UserError(f"{problem.where}: the verifier 'latex' needs math-verify; pip install 'llmkit[math]'")
        if not (problem.answer or "").strip():
            raise UserError(f"{problem.where}: expected an answer for the verifier 'latex', found none")

    def is_right(self, problem: Problem, completion: str) -> bool | None:
        """True if the boxed expression is the answer; None where math-verify cannot read the answer."""
        completion = after_thinking(completion)
        tag = tagged(completion)
        said = last_boxed(completion if tag is None else tag)
        said = (tag or "").strip().strip("$") if said is None else said
        squeezed = SPACES.sub("", said)
        held = last_boxed(problem.answer or "")
        answer = (problem.answer or "").strip().strip("$") if held is None else held
        if not squeezed or len(said) > LONGEST:
            return False
        if squeezed == SPACES.sub("", answer):
            return True
        if set(LEFT_OPEN.findall(said)) - set(LEFT_OPEN.findall(answer)):
            return False
        bases = [BASE.findall(text) for text in (said, answer)]
        if all(bases) and bases[0] != bases[1]:
            return False
        return self._compare(readable(answer), readable(said))

    def _compare(self, answer: str, said: str) -> bool | None:
        asked = json.dumps({"answer": answer, "said": said}) + "\n"
        with self._one_at_a_time:
            line = self._ask(asked)
            if line == "":  # the process was dead, or died of it
                line = self._ask(asked)
            return None if line == "null\n" else line == "true\n"

    def _ask(self, asked: str) -> str | None:
        """The line that comes back; "" from a process that ended, None from one that was ended for its time."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(asked)
            process.stdin.flush()
            line = self._read(process, self.seconds)
        except BrokenPipeError:
            line = ""
        if not line:
            self._end()
        return line

    @staticmethod
    def _read(process: subprocess.Popen[str], seconds: float) -> str | None:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            return process.stdout.readline() if selector.select(seconds) else None

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llmkit.rewards.latex_worker"]
        with interrupts_held():  # a training saves and ends after the step in which Ctrl-C comes
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
            )
        if self._read(process, START_SECONDS) != "ready\n":
            process.kill()
            raise UserError("the verifier 'latex': math-verify does not start; try python -c 'import math_verify'")
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """End the process."""
        with self._one_at_a_time:
            self._end()
