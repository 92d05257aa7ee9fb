"""Safe text for people: foreign text without control characters, and no credentials.

Every message goes through `write_message`, and stdout on a terminal through `printable`. Text from models, servers,
documents, file names and exceptions could otherwise move the cursor, set the title or fill the clipboard (ESC, OSC 52,
C1). Options and commands are `redacted` before they are written to a manifest.
"""

from __future__ import annotations

import os
import re
import sys
from typing import IO, Any

from llmkit.errors import UserError

# control characters except newline and tab, with DEL and C1; bidirectional overrides; surrogates
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
KEYS = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "HF_TOKEN", "WANDB_API_KEY")  # values that are never shown
SHORTEST_KEY = 6  # characters: shorter values would hide words such as "none"
HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_QUERY = re.compile(r"[?&]([^\s=&#'\",]{1,64})=([^\s&#'\",]+)")
_OWN_QUERY = re.compile(r"\b(?:search|openai):https?://[^\s'\",]+")  # the user's servers: any value may be a key
_SECRET = re.compile(r"key|token|secret|passw|pwd|auth|sig|cred", re.IGNORECASE)


def printable(text: str) -> str:
    r"""Escape control characters as in JSON, except newlines and tabs.

    >>> printable("\x1b[31mred\ttwo\n")
    '\\u001b[31mred\ttwo\n'
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def redacted(text: str) -> str:
    """Hide credentials in a text: users and keys in URLs, and the values of KEYS in the environment.

    >>> redacted("search:http://ada:pw@host/s?q2=K&n=1"), redacted("http://host/?page=2&apikey=K")
    ('search:http://***@host/s?q2=***&n=***', 'http://host/?page=2&apikey=***')
    """
    for key in (os.environ.get(name, "").strip() for name in KEYS):
        if len(key) >= SHORTEST_KEY:
            text = text.replace(key, HIDDEN)
    if "://" not in text:
        return text
    text = _OWN_QUERY.sub(lambda own: _QUERY.sub(lambda pair: _hidden(pair), own[0]), _USER.sub(f"{HIDDEN}@", text))
    return _QUERY.sub(lambda pair: _hidden(pair) if _SECRET.search(pair[1]) else pair[0], text)


def _hidden(pair: re.Match[str]) -> str:
    return pair[0][: pair.start(2) - pair.start()] + HIDDEN


def write_message(text: str) -> None:
    """Write a message to stderr, if it is open."""
    if sys.stderr is not None:
        print(printable(redacted(text)), file=sys.stderr, flush=True)


class TerminalBytes:
    """Binary stdout of a terminal that writes UTF-8 text as `printable`."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle

    def write(self, data: Any) -> int:
        """Write whole characters."""
        self._handle.write(printable(bytes(data).decode("utf-8", "replace")).encode())
        return len(data)

    def flush(self) -> None:
        """Flush the buffer."""
        self._handle.flush()


def check_stdout() -> None:
    """Raise UserError if stdout is closed."""
    if sys.stdout is None:
        raise UserError("stdout: closed; name a file with --out")


def stdout_bytes() -> Any:
    """Return binary stdout, which escapes control characters on a terminal. Raise UserError if stdout is closed."""
    check_stdout()
    return TerminalBytes(sys.stdout.buffer) if sys.stdout.isatty() else sys.stdout.buffer
