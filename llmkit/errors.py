"""The errors that llmkit raises on purpose, each with the exit code that the command line gives it.

Anything else that escapes is our bug: a traceback and exit code 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class LlmkitError(Exception):
    """Base of the errors that are reported in one line."""

    exit_code = 1


class UserError(LlmkitError, ValueError):
    """The user's mistake. The message is one line: the place, what was expected and found, what to do."""

    exit_code = 2


class SavedError(UserError):
    """Raised after a checkpoint, which the message names."""


class SharedError(UserError):
    """Raised in all processes of a job alike."""


class ServerError(UserError):
    """A server is down, or refuses; what was done until then is worth keeping."""


class GateError(LlmkitError):
    """A gate that the user asked for (`--fail-under`, `--fail-over`) was not met."""

    exit_code = 3


class Interrupted(LlmkitError):
    """SIGINT or SIGTERM arrived and the work was saved first; the message says how to go on."""

    exit_code = 130


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` before the message of a UserError that does not begin with it."""
    try:
        yield
    except UserError as error:
        if not where or str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from None
