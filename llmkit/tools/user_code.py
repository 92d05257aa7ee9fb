"""Functions of the user's own, `py:FILE.py:FUNCTION`: rewards, filters of pages, and what answers a search.

    reward = UserFunction("py:score.py:reward", "--reward py:score.py:reward")
    reward({"completion": "4"}, "problems.jsonl:5")

They run in llmkit's process. What they raise is told in one line, with the last place of it in the user's file and the
record that they were given.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from llmkit.errors import UserError

PREFIX = "py:"


def check_spelling(spec: str, where: str) -> tuple[str, str]:
    """File and function of `py:FILE.py:FUNCTION`; nothing is loaded. `where` names the option or key, in errors.

    Raises UserError for another form, and for a file that is not there.
    """
    path, separator, function = spec.removeprefix(PREFIX).rpartition(":")
    if not (spec.startswith(PREFIX) and separator and path.endswith(".py") and function.isidentifier()):
        raise UserError(f"{where}: expected py:FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UserError(f"{where}: expected a file {path}, found {'a folder' if Path(path).exists() else 'none'}")
    return path, function


class UserFunction:
    """A function in a file of Python."""

    def __init__(self, spec: str, where: str) -> None:
        """Raises UserError as `check_spelling` does, for code that raises, and where there is no such function."""
        path, name = check_spelling(spec, where)
        self._where, self._path = where, os.path.realpath(path)
        module_spec = spec_from_file_location("llmkit_user_" + Path(path).stem, path)
        assert module_spec is not None and module_spec.loader is not None, "its name ends in .py"
        module = module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses and pickle look for it there
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise self._failed(error) from None
        self._function: Any = getattr(module, name, None)
        if not callable(self._function):
            names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise UserError(f"{where}: expected a function {name!r} in {path}, found {names}")

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        return self._function

    def __call__(self, argument: Any, record: object) -> Any:
        """Call the function. Raises UserError with file and line of the user's code where it raises.

        record: what names the argument in errors, such as its id or `problems.jsonl:5`
        """
        try:
            return self._function(argument)
        except (Exception, SystemExit) as error:
            raise self._failed(error, f" for {record}") from None

    def _failed(self, error: BaseException, of_record: str = "") -> UserError:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == self._path]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"{self._path}:{lines[-1]}" if lines else self._path
        try:
            message = " ".join(str(error).split())[:300]
        except Exception as other:
            message = f"its text raises {type(other).__name__}"
        failure = f"{type(error).__name__}: {message}" if message else type(error).__name__
        return UserError(f"{self._where}: {where}: {failure}{of_record}")
