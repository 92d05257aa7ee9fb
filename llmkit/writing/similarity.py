"""How much texts have in common: ROUGE-L, and the nearest of those seen before.

>>> seen = Nearest()
>>> seen.add("Write a poem about the sea.")
>>> round(seen.similarity("Write a poem about the sun."), 2)
0.86
"""

from __future__ import annotations

from rapidfuzz.distance import Indel
from rapidfuzz.process import extractOne

from llmkit.text.words import split_words

LIMIT = 0.7  # ROUGE-L from which a task is too much like one before (Wang et al. 2022, arXiv 2212.10560)


class Nearest:
    """Texts, and how near another one is to the nearest of them, by ROUGE-L (Lin 2004): the F1 of the words of both
    that stand in the same order.

    Each word is a character of its own, so that rapidfuzz compares strings: Indel's similarity is that F1.
    """

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Add a text."""
        self._texts.append(self._encoded(text))

    def similarity(self, text: str, first: int | None = None, at_least: float = 0.0) -> float:
        """Return the ROUGE-L with the nearest of the `first` texts, of all without; 0 where it is below `at_least`."""
        among = self._texts if first is None else self._texts[:first]
        match = extractOne(self._encoded(text), among, scorer=Indel.normalized_similarity, score_cutoff=at_least)
        return 0.0 if match is None else match[1]

    def _encoded(self, text: str) -> str:
        # 983,039 words from U+10000 on, no surrogate among them
        return "".join(
            self._words.setdefault(word, chr(0x10000 + len(self._words) % 0xFFFFF))
            for word in split_words(text.lower())
        )
