"""Lines, paragraphs, words and sentences of a text, by regular expression, each split once and shared.

Words follow the known implementations of the Gopher rules: a run of letters and digits is a word, with inner joining
characters (don't, 3.5, U.S), and a run of other visible characters is a symbol, which also counts as a word. In
scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter is a word; rules that count words
count `Split.letters_per_word` of them as one, and skip the measures in LEFT_OUT.
"""

# ruff: noqa: RUF001 -- the marks of other scripts look like ours

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def _combining_marks() -> str:
    """Return the combining marks as character ranges; `\\w` lacks them and would split Hindi words."""
    marks = {code for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M"}
    starts = sorted(code for code in marks if code - 1 not in marks)
    ends = sorted(code for code in marks if code + 1 not in marks)
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in zip(starts, ends, strict=True))


MARKS = _combining_marks()
CHINESE = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # and kana
THAI, BURMESE = "\u0e01-\u0eff", "\u1000-\u109f\u1780-\u17ff"  # and Lao, and Khmer
UNSPACED = CHINESE + THAI + BURMESE
_SCRIPTS = {"chinese": CHINESE, "thai": THAI, "burmese": BURMESE, "hangul": "\uac00-\ud7a3"}
JOINED = UNSPACED + _SCRIPTS["hangul"]  # letters that may be adjacent to words and numbers of other scripts
_ANY_SCRIPT = re.compile("|".join(f"(?P<{name}>[{letters}])" for name, letters in _SCRIPTS.items()))
LETTERS_PER_WORD = {"chinese": 2, "thai": 4, "burmese": 4}  # approximate; vowel signs and tones count with their letter
# Measures that are meaningless in these scripts: Korean words have 2.9 letters on average, 30 letters are a long line
# in a script of syllables or words, and Thai and Lao end sentences with a space.
LEFT_OUT = {
    "chinese": frozenset({"mean_word_length", "short_line_fraction"}),
    "thai": frozenset({"mean_word_length", "terminal_line_fraction", "sentences"}),
    "burmese": frozenset({"mean_word_length"}),
    "hangul": frozenset({"mean_word_length", "short_line_fraction"}),
}
_SPECIAL = re.compile(f"[{MARKS}{UNSPACED}]")
_WORD = re.compile(r"\w+(?:['’.,]\w+)*|[^\w\s]+")  # 1.6 times as fast as _ANY_WORD, for texts without its scripts
_LETTER = rf"[^\W{UNSPACED}]"
_ANY_WORD = re.compile(
    rf"{_LETTER}(?:{_LETTER}|[{MARKS}\u200c\u200d]|['’.,](?={_LETTER}))*|[{UNSPACED}][{MARKS}]*|[^\w\s]+"
)

TERMINAL = ".?!…‼⁇⁈⁉‽。！？．｡﹒﹖﹗।॥؟۔։።፧។៕༎꓿᙮᠃᠉။"  # marks that end a sentence: FineWeb's and more
CLOSING = "\"'”’»›)]}」』）】"  # may follow them
_NO_SPACE_FOLLOWS = "。！？｡।॥។။"
# It never backtracks, so that a million full stops cost no more than a million letters.
_SENTENCE_END = re.compile(rf"[{re.escape(TERMINAL)}]+[{re.escape(CLOSING)}]*(\s?)")
_ABBREVIATIONS = set("Mr Mrs Ms Dr Prof St Jr Sr vs etc No Inc Ltd Co Fig e.g i.e".split())  # noqa: SIM905


def split_words(text: str) -> list[str]:
    """Split a text into words and symbols; none contains white space."""
    pattern = _ANY_WORD if not text.isascii() and _SPECIAL.search(text) else _WORD
    return pattern.findall(text)


def count_sentences(line: str) -> int:
    """Count the sentences of one line, at least 1 unless it is blank.

    >>> count_sentences('Mr. Hill paid 3.50. "Thanks!" he said. Then')
    4
    """
    line = line.strip()
    sentences, last = int(bool(line)), len(line)
    for end in _SENTENCE_END.finditer(line):
        start, stop = end.span()
        if stop == last or not (end[1] or line[start] in _NO_SPACE_FOLLOWS):
            continue
        before = line[max(0, start - 6) : start].rpartition(" ")[2]
        abbreviated = line[start] == "." != line[start + 1] and (
            before in _ABBREVIATIONS or (len(before) == 1 and before.isalpha())
        )
        sentences += not abbreviated
    return sentences


class Split:
    """A text with its parts, each computed lazily."""

    def __init__(self, text: str, word_count: int | None = None) -> None:
        """word_count: the number of words if known; counting takes 0.05 ms per kilobyte."""
        self.text = text
        if word_count is not None:
            self.word_count = word_count

    @cached_property
    def lines(self) -> list[str]:
        """The non-blank lines, stripped."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The paragraphs, separated by blank lines."""
        return [part for part in map(str.strip, re.split(r"\n\s*\n", self.text)) if part]

    @cached_property
    def words(self) -> list[str]:
        """The words and symbols, in order."""
        return split_words(self.text)

    @cached_property
    def word_count(self) -> int:
        """Number of words and symbols."""
        return len(self.words)

    @cached_property
    def script(self) -> str | None:
        """The script of more than half of the words, if it has its own rules.

        >>> Split("港は静かで、船が入ってくる。").script, Split("The harbour (港) was quiet.").script
        ('chinese', None)
        """
        if self.text.isascii() or not _ANY_SCRIPT.search(self.text):
            return None
        letters: Counter[str | None] = Counter()
        for word, number in zip(self.vocabulary, self.counts.tolist(), strict=True):
            script = _ANY_SCRIPT.match(word)
            letters[script.lastgroup if script else None] += number * word[0].isalnum()
        script, number = letters.most_common(1)[0]
        return script if 2 * number > letters.total() else None

    @property
    def letters_per_word(self) -> int:
        """Letters per word in a script without spaces; 1 for other scripts."""
        return LETTERS_PER_WORD.get(self.script or "", 1)

    def telling(self, measures: dict[str, float]) -> dict[str, float]:
        """Return the measures that are meaningful in this script."""
        without = LEFT_OUT.get(self.script or "", ())
        return {name: value for name, value in measures.items() if name not in without}

    @cached_property
    def ids(self) -> np.ndarray:
        """The index of each word in the vocabulary: int64, (words,)."""
        import numpy as np

        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        ids = np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))
        self._vocabulary = list(numbers)
        return ids

    @property
    def vocabulary(self) -> list[str]:
        """The distinct words, in the order of first appearance."""
        _ = self.ids
        return self._vocabulary

    @cached_property
    def counts(self) -> np.ndarray:
        """The frequency of each word of the vocabulary: int64, (vocabulary,)."""
        import numpy as np

        return np.bincount(self.ids, minlength=len(self.vocabulary))

    @cached_property
    def lengths(self) -> np.ndarray:
        """The length of each word of the vocabulary in characters: int64, (vocabulary,)."""
        import numpy as np

        return np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))


def repeated(pieces: list[str]) -> tuple[int, int]:
    """Count the parts that repeat an earlier one, and their characters."""
    unique = set(pieces)
    return len(pieces) - len(unique), sum(map(len, pieces)) - sum(map(len, unique))
