"""Encoded conversations of one source, held in memory, each short enough for a row of training.

5 bytes a token: a million conversations of 300 tokens take 1.5 GB. What does not fit a row is truncated at the end of a
turn, dropped, split between turns or refused, and what nothing would be learnt from is left out; both are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmkit.errors import UserError

ON_LONG = ("truncate", "drop", "split", "error")


class Encoded(Protocol):
    """A conversation in tokens: int32 (T,), bool (T,), and the positions at which a turn has just ended."""

    @property
    def token_ids(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray: ...

    @property
    def turn_ends(self) -> tuple[int, ...]: ...


@dataclass
class Examples:
    """The examples of one source.

    name      of the source, in reports
    lengths   (N,) int64, in tokens
    counts    what was done to which number of conversations: "truncated", "dropped: too long", "nothing trained" ...
    """

    name: str
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: Counter[str] = field(default_factory=Counter)
    _token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    _trained: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    _ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and their targets' mask."""
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        return self._token_ids[span], self._trained[span]

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of a row that each takes, (N,) int64: all but its last, which nothing follows."""
        return self.lengths - 1

    @property
    def inputs(self) -> int:
        """Tokens that all examples take."""
        return int(self.sizes.sum())

    @property
    def targets(self) -> int:
        """Tokens that are learnt."""
        return int(self._trained.sum())

    @classmethod
    def gather(
        cls,
        name: str,
        encoded: Iterable[tuple[str, Encoded]],
        longest: int,
        on_long: str = "truncate",
        counts: Counter[str] | None = None,
    ) -> Examples:
        """Hold (place, conversation) pairs as examples of at most `longest` tokens.

        `counts`, where given, is gone on with: those who yield the pairs may count in it what they leave out.
        Raises UserError for a conversation that is too long under "error", and where nothing at all is trained on.
        """
        examples, ids, trained = cls(name, counts=Counter() if counts is None else counts), [], []
        for where, one in encoded:
            examples.counts["read"] += 1
            for begin, end in _spans(one, longest, on_long, where, examples.counts):
                if not one.trained[begin + 1 : end].any():  # the first token of an example is never a target
                    examples.counts["nothing trained"] += 1
                    continue
                ids.append(one.token_ids[begin:end])
                trained.append(one.trained[begin:end])
        if not ids:
            read = examples.counts["read"]
            reasons = ", ".join(f"{key} {count}" for key, count in examples.counts.items() if key != "read")
            raise UserError(f"{name}: nothing to train on in {read} conversations ({reasons or 'it is empty'})")
        examples.lengths = np.array([len(part) for part in ids], np.int64)
        examples._token_ids, examples._trained = np.concatenate(ids), np.concatenate(trained)
        examples._ends = np.cumsum(examples.lengths)
        return examples


def _spans(one: Encoded, longest: int, on_long: str, where: str, counts: Counter[str]) -> list[tuple[int, int]]:
    """What is kept of a conversation, as spans of its tokens that begin and end between turns."""
    length = len(one.token_ids)
    if length <= longest:
        return [(0, length)]
    if on_long == "error":
        raise UserError(
            f"{where}: {length - 1} tokens are more than the context of {longest - 1}; "
            "shorten it, lengthen --sequence-length, or choose --on-long truncate, drop or split"
        )
    if on_long == "drop":
        counts["dropped: too long"] += 1
        return []
    if on_long == "truncate":
        end = max((end for end in one.turn_ends if end <= longest), default=0)
        if not one.trained[1:end].any():  # the first answer is the one that is too long
            counts["cut within a turn"] += 1
            return [(0, longest)]
        counts["truncated"] += 1
        return [(0, end)]
    counts["split"] += 1
    spans, begin = [], 0
    for end, following in zip(one.turn_ends, (*one.turn_ends[1:], None), strict=True):
        if following is None or following - begin > longest:
            spans.append((begin, min(end, begin + longest)))
            begin = end
    return spans
