"""Read files and JSON values of unknown content: lines of a file, values of the wrong type, and samples of many values.

`as_object`, `as_text`, `objects` and `numbers` return a value of the expected type, or an empty one; `Thinned` and
`thinned` keep a few evenly spaced values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import orjson

from llmkit.errors import UserError
from llmkit.io.jsonl import BYTE_ORDER_MARK, open_input

SPARE = 4  # first collect this many times the wanted values, then thin them to the exact number
T = TypeVar("T")


class Thinned(Generic[T]):
    """Keeps every n-th of the values added, n such that at most `most` (2 or more) are kept; the first and the last
    are always among them.

    >>> thinned = Thinned(4)
    >>> for value in range(10):
    ...     thinned.add(value)
    >>> thinned.values(), thinned.count
    ([0, 4, 8, 9], 10)
    """

    def __init__(self, most: int) -> None:
        self.count = 0
        self._most, self._every, self._next = max(2, most), 1, 0
        self._kept: list[T] = []
        self._last: Any = None

    def add(self, value: T) -> None:
        """One more."""
        if self.count == self._next:
            if len(self._kept) == self._most - 1:  # a place is left for the last one
                self._kept, self._every = self._kept[::2], 2 * self._every
            if self.count % self._every == 0:
                self._kept.append(value)
            self._next = len(self._kept) * self._every
        self._last = value
        self.count += 1

    def values(self) -> list[T]:
        """Those kept, in order."""
        ends_with_last = self.count == 0 or (self.count - 1) % self._every == 0
        return self._kept if ends_with_last else [*self._kept, self._last]


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most `most` of the values, evenly spaced, the first and the last among them.

    >>> thinned(range(9), 3)
    [0, 4, 8]
    """
    if len(values) <= most:
        return list(values)
    if most < 2:
        return list(values[:most])
    return [values[index * (len(values) - 1) // (most - 1)] for index in range(most)]


def read_or_note(notes: list[str], read: Callable[[], T]) -> T | None:
    """Call `read`; where that fails, add a note and return None."""
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
    """Return a value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str | None:
    """Return a value if it is a string, else None."""
    return value if isinstance(value, str) else None


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of what should be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(value: Any, *names: str) -> dict[str, Any] | None:
    """Those numbers of what should be an object; None where one is missing."""
    figures = {name: as_object(value).get(name) for name in names}
    return figures if all(map(is_number, figures.values())) else None
