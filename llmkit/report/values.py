"""Reading what may be anything: files of records line by line, and JSON values that need not be what they should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import orjson

from llmkit.errors import UserError
from llmkit.io.jsonl import BYTE_ORDER_MARK, open_input

T = TypeVar("T")


def read_or_note(notes: list[str], read: Callable[[], T]) -> T | None:
    """What is read; None, with a note, where it cannot be."""
    try:
        return read()
    except UserError as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(f"{error.filename}: {str(error.strerror).lower()}")
    return None


def raw_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank, unread: of a large file only some are wanted."""
    with open_input(path) as handle:
        for number, line in enumerate(handle, 1):
            if not line.isspace():
                yield number, line


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object on a line of JSONL; None where there is none."""
    try:
        value = orjson.loads(line.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def is_number(value: Any) -> bool:
    """True if a JSON value is one; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_object(value: Any) -> dict[str, Any]:
    """What should be an object, empty where it is none."""
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str | None:
    """What should be a string, None where it is none."""
    return value if isinstance(value, str) else None


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of what should be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(value: Any, *names: str) -> dict[str, Any] | None:
    """Those numbers of what should be an object; None where one is missing."""
    found = {name: as_object(value).get(name) for name in names}
    return found if all(map(is_number, found.values())) else None
