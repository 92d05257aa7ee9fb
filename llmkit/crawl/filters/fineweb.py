"""FineWeb's own rules for quality (Penedo et al. 2024, section 3.6), with its thresholds."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.crawl.filters.verdict import Verdict, judge
from llmkit.text.words import CLOSING, TERMINAL, Split, repeated

_ENDS = tuple(TERMINAL)


@dataclass(frozen=True, slots=True)
class FineWebQuality:
    """What a page of prose looks like line by line; None switches a rule off."""

    min_terminal_line_fraction: float | None = 0.12  # lines that end a sentence
    max_short_line_fraction: float | None = 0.67  # lines of at most `short_line_length`
    max_duplicate_line_character_fraction: float | None = 0.01  # of lines that stood before; the paper says 0.1
    max_newline_to_word_ratio: float | None = 0.3
    short_line_length: int = 30  # characters


def fineweb_quality(split: Split, thresholds: FineWebQuality) -> Verdict:
    """Drop a page whose lines are those of a list, a menu or a copy; the `terminal_line_fraction` of no line is 0.

    A full stop counts behind a closing quotation mark or bracket too, as in `he said "no."`.
    """
    lines = split.lines
    count, characters = max(1, len(lines)), max(1, sum(map(len, lines)))
    terminal = sum(line.endswith(_ENDS) or line.rstrip(CLOSING).endswith(_ENDS) for line in lines)
    measures = {
        "terminal_line_fraction": terminal / count,
        "short_line_fraction": sum(len(line) <= thresholds.short_line_length for line in lines) / count,
        "duplicate_line_character_fraction": repeated(lines)[1] / characters,
        "newline_to_word_ratio": split.text.count("\n") * split.letters_per_word / max(1, split.word_count),
    }
    measures = split.telling(measures)
    return Verdict(*judge(measures, thresholds), split.text, measures)
