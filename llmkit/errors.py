"""The errors that llmkit raises on purpose, with their exit codes.

Any other exception that reaches the command line is a bug: a traceback and exit code 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class LlmkitError(Exception):
    """Base class of errors that are reported in one line."""

    exit_code = 1


class UserError(LlmkitError, ValueError):
    """A mistake of the user. The message is one line: the place, what was expected and found, what to do."""

    exit_code = 2


class SavedError(UserError):
    """Raised after saving a checkpoint, which the message names."""


class SharedError(UserError):
    """Raised identically on all ranks of a job."""


class ServerError(UserError):
    """A server is down or refuses requests; the work done so far is kept."""


class GateError(LlmkitError):
    """A gate (`--fail-under`, `--fail-over`) was not met."""

    exit_code = 3


class Interrupted(LlmkitError):
    """SIGINT or SIGTERM arrived and the work was saved; the message says how to resume."""

    exit_code = 130


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefix the message of a UserError with `where`, unless it already begins with it."""
    try:
        yield
    except UserError as error:
        if not where or str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from None
