"""The user's own rewards: a command that reads JSON lines, or a function in a Python file.

cmd:./score.py            one process per batch; reads a record per line, with `completion`, `finish_reason` and
                          `token_count`, and prints a number or {"reward": number} per line; null: cannot judge
py:score.py:reward        reward(record) -> float | None, with the same record, in this process
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from numbers import Real
from typing import Any

import orjson

from llmkit.errors import UserError
from llmkit.formats.conversations import as_record
from llmkit.io.jsonl import dump_json
from llmkit.io.progress import counted
from llmkit.io.records import kind_of
from llmkit.rewards.reward import Attempt, Reward, finite
from llmkit.tools.python import exchange
from llmkit.tools.user_code import UserFunction

LONGEST_LINE = 1 << 20  # bytes that a command may print in one line


def record_of(attempt: Attempt) -> dict[str, Any]:
    """Build the input of a command or function: the problem's record with prompt and completion."""
    problem = attempt.problem
    return {
        **problem.record,
        "prompt": as_record(problem.messages) if problem.messages else problem.prompt,
        "answer": problem.answer,
        **({"answers": [problem.answer, *problem.alternatives]} if problem.alternatives else {}),
        "completion": attempt.completion,
        "finish_reason": attempt.finish_reason,
        "token_count": attempt.token_count,
        **({"tool_calls": [*attempt.tool_calls]} if attempt.tool_calls else {}),
    }


class CommandReward(Reward):
    """`cmd:COMMAND`: a process per batch, which must answer within `seconds`."""

    def __init__(self, command: str, words: list[str], seconds: float, flag: str) -> None:
        super().__init__(f"cmd:{command}", flag)
        self._words, self.seconds = words, seconds

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """Return the numbers that the command prints. Raises UserError if it fails, hangs or prints anything else."""
        if not attempts:
            return []
        lines = self._run(attempts).split(b"\n")
        if lines[-1].strip() == b"":
            lines.pop()
        if len(lines) != len(attempts):
            raise self._miscounted(len(attempts), str(len(lines)))
        return finite([self._number(line, number) for number, line in enumerate(lines, 1)], self.where)

    def _run(self, attempts: Sequence[Attempt]) -> bytes:
        data = b"".join(dump_json(record_of(attempt)) + b"\n" for attempt in attempts)

        def check_size(printed: bytearray) -> bool:
            ended, last = printed.count(b"\n"), printed[printed.rfind(b"\n") + 1 :]
            if ended > len(attempts) or (ended == len(attempts) and last.strip()):
                raise self._miscounted(len(attempts), "more")
            if len(last) > LONGEST_LINE:
                expected = f"expected at most {LONGEST_LINE} bytes, found more"
                raise UserError(f"{self.where}: line {ended + 1}: {expected}")
            return False

        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(self._words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            raise UserError(f"{self.where}: cannot run the command: {error.strerror}") from None
        with process:
            try:
                out, err, ending = exchange(process, data, self.seconds, check_size)
                lines = err.decode("utf-8", "replace").strip().splitlines()[-1:]
                last_words = f": {lines[0].strip()[:300]}" if lines else ""
                if ending == "timeout":
                    late = f"no answer within {counted(self.seconds, 'second')}{last_words}"
                    raise UserError(f"{self.where}: {late}")
            except BaseException:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    process.kill()
                raise
        if process.returncode:
            code = process.returncode
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise UserError(f"{self.where}: expected exit status 0, found {ended}{last_words}")
        return out

    def _miscounted(self, lines: int, actual: str) -> UserError:
        return UserError(f"{self.where}: expected {counted(lines, 'line')}, one per completion, found {actual}")

    def _number(self, line: bytes, number: int) -> float | None:
        expected = f'{self.where}: line {number}: expected a number or {{"reward": number}}, found'
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:  # also for NaN
            raise UserError(f"{expected} {line[:60].decode('utf-8', 'replace')!r}") from None
        value = value["reward"] if isinstance(value, dict) and "reward" in value else value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{expected} {kind_of(value)}")
        return float(value)


def split_command(command: str, flag: str) -> list[str]:
    """Split a command into words. Raises UserError if its program cannot be run."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{flag} cmd:{command}: expected a command: {error}") from None
    if not words:
        raise UserError(f"{flag} cmd: expected a command, such as cmd:./score.py")
    if shutil.which(words[0]) is None:
        actual = "a file that is not executable; chmod +x it" if os.path.isfile(words[0]) else "none of that name"
        raise UserError(f"{flag} cmd:{command}: expected a program {words[0]!r}, found {actual}")
    return words


class FunctionReward(Reward):
    """`py:FILE.py:FUNCTION`: a Python function, called for each completion."""

    def __init__(self, spec: str, flag: str) -> None:
        super().__init__(spec, flag)
        self._function = UserFunction(spec, self.where)

    def score(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """Call the function on each attempt. Raises UserError if it raises, with the problem, file and line."""
        return finite([self._call(attempt) for attempt in attempts], self.where)

    def _call(self, attempt: Attempt) -> float | None:
        value = self._function(record_of(attempt), attempt.problem.where)
        if value is None:
            return None
        if not isinstance(value, Real):
            raise UserError(f"{self.where}: expected a number, found {kind_of(value)} for {attempt.problem.where}")
        try:
            return float(value)
        except Exception as error:  # 10**400, or a user's number class
            raise UserError(
                f"{self.where}: expected a finite number, found one that is not a float ({type(error).__name__}) for "
                f"{attempt.problem.where}"
            ) from None
