"""An even sample of what is too long to show, in one pass and bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
SPARE = 4  # a sample of so many times as many is thinned again at the end, to be as long as is wished


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
    return [values[place * (len(values) - 1) // (most - 1)] for place in range(most)]
