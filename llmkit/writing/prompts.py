"""The prompts of the writer and the judge (prompts.toml), and readers for lists and messages in replies."""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.config import read_toml

TEXTS = read_toml(str(Path(__file__).with_name("prompts.toml")), "prompts")
KINDS: dict[str, tuple[float, str]] = TEXTS["kinds"]  # kind of task: percentage, and what the user wants

_ITEM = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.):])\s+")  # noqa: RUF001 -- list markers
_QUOTED = re.compile(r'"([^"“”«»]*)"|“([^"“”«»]*)”|«([^"“”«»]*)»')


def read_list(reply: str) -> list[str]:
    """Read the items of a list, without bullets and numbers, introductory lines and duplicates.

    >>> read_list("Sure, here they are:\\n\\n1. Boats\\n2) **Tides**\\n- Boats\\n")
    ['Boats', 'Tides']
    """
    lines = [_ITEM.sub("", line).strip().strip("*").strip() for line in reply.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.endswith(":") and len(line) <= 200))


def read_message(reply: str) -> str:
    """Read a message from a reply, without quotation marks around it.

    >>> read_message(' "How deep is the sea?"\\n'), read_message('"A" or "B"?')
    ('How deep is the sea?', '"A" or "B"?')
    """
    quoted = _QUOTED.fullmatch(text := reply.strip())
    return text if quoted is None else "".join(filter(None, quoted.groups())).strip()
