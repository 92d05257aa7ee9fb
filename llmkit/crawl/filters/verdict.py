"""Verdicts of filters on a page, by measures compared with thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is None for a page that stays; otherwise it is the threshold's name (`min_words`) or a rule's.

    `score` is the measure that broke the threshold, `text` what is left of the text, `measures` all that the
    filter measured, from which other thresholds can be tried (`judge`).
    """

    reason: str | None
    score: float | None
    text: str
    measures: Mapping[str, float] = field(default_factory=dict)


def judge(measures: Mapping[str, float], thresholds: Any) -> tuple[str | None, float | None]:
    """The first threshold that the measures break, in the order of its dataclass, and the measure.

    A field `max_NAME` is broken by a measure NAME above it, `min_NAME` by one below it; None is off.

    >>> from llmkit.crawl.filters.gopher import GopherQuality
    >>> judge({"words": 12, "mean_word_length": 4.5}, GopherQuality())
    ('min_words', 12)
    """
    for limit in fields(thresholds):
        bound, measure = getattr(thresholds, limit.name), measures.get(limit.name[4:])
        if bound is None or measure is None:
            continue
        above, below = limit.name.startswith("max_"), limit.name.startswith("min_")
        if (above and measure > bound) or (below and measure < bound):
            return limit.name, measure
    return None, None
