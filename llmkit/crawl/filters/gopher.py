"""Gopher's rules for repetition and for quality (Rae et al. 2021, section A1.1 and table A1).

Each family is a dataclass of thresholds, whose defaults are the paper's and FineWeb's, and a function that measures a
text and gives the verdict. A fraction of characters has all characters of the text beneath it. In a script
without spaces an n-gram has n times as many letters as a word has there (Split.letters_per_word).
"""

# ruff: noqa: RUF001 -- words of other scripts look like ours

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.crawl.filters.verdict import Verdict, judge
from llmkit.text.words import Split, repeated

if TYPE_CHECKING:
    import numpy as np

TOP_N_GRAMS = range(2, 5)
DUPLICATE_N_GRAMS = range(5, 11)
BULLETS = ("•", "-", "‣", "◦", "●", "▪", "■", "*", "–", "·")
ELLIPSES = ("...", "…")

# The eight of the paper for English; for others the words of like rank and office. A language that is not here
# has no such rule: the English words would drop every page of it.
_STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die und in den von zu das mit sich ist nicht",
    "fr": "de la le et les des en un du une est que",
    "es": "de la que el en y los se del las un por",
    "it": "di e il la che in un per è del una con",
    "pt": "de a o que e do da em um para com não",
    "nl": "de het een en van in is dat op te niet met",
    "sv": "och i att det som en på är av för med den",
    "da": "og i at det er en til af den på for med",
    "no": "og i det er en til som på at av for med",
    "nn": "og i det er ein til som på at av for med",
    "fi": "ja on ei että se oli hän joka mutta kun ovat myös",
    "pl": "w i na z się do nie to że jest o jak",
    "cs": "a v se na je že s z do o to i",
    "sk": "a v sa na je že s z do o to aj",
    "ro": "de și în a la cu pe un nu care este o",
    "hu": "a az és hogy nem is egy ez van meg de csak",
    "tr": "ve bir bu da de için ile çok olarak daha gibi ne",
    "ru": "и в не на что с по как это к он из",
    "uk": "і в не на що з у до та як це за",
    "bg": "на и в да за се от с не по е са",
    "el": "και το να του η της με που την από για είναι",
    "hr": "i u je se na da za su od s koji ne",
    "ca": "de la i el que a en els les un per una",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam pada akan",
    "vi": "và của là có được cho các trong không một với những",
    "ar": "في من على إلى أن عن التي هذا مع هذه الذي لا",
    "fa": "و در به از که این را با است برای آن یک",
    "he": "של את על לא הוא עם זה כי גם או היא אל",
    "hi": "के का की है में से को और पर ने यह भी",
}
STOP_WORDS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """How much of a page may repeat; None switches a rule off."""

    max_duplicate_paragraph_fraction: float | None = 0.30  # paragraphs that stood before
    max_duplicate_paragraph_character_fraction: float | None = 0.20
    max_duplicate_line_fraction: float | None = 0.30  # lines that stood before
    max_duplicate_line_character_fraction: float | None = 0.20
    max_top_2_gram_character_fraction: float | None = 0.20  # all occurrences of the most frequent pair of words
    max_top_3_gram_character_fraction: float | None = 0.18
    max_top_4_gram_character_fraction: float | None = 0.16
    max_duplicate_5_gram_character_fraction: float | None = 0.15  # 5-grams that stood before, overlaps counted once
    max_duplicate_6_gram_character_fraction: float | None = 0.14
    max_duplicate_7_gram_character_fraction: float | None = 0.13
    max_duplicate_8_gram_character_fraction: float | None = 0.12
    max_duplicate_9_gram_character_fraction: float | None = 0.11
    max_duplicate_10_gram_character_fraction: float | None = 0.10


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """What a page of prose looks like; None switches a rule off."""

    min_words: int | None = 50  # symbols left out
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0  # in characters
    max_mean_word_length: float | None = 10.0
    max_hash_to_word_ratio: float | None = 0.1  # "#" for each word or symbol
    max_ellipsis_to_word_ratio: float | None = 0.1  # "..." and "…" for each word or symbol
    max_bullet_line_fraction: float | None = 0.9  # lines that begin with a bullet
    max_ellipsis_line_fraction: float | None = 0.3  # lines that end in an ellipsis
    min_alphabetic_word_fraction: float | None = 0.8  # words and symbols that hold a letter
    min_stop_words: int | None = 2  # different stop words of the page's language; see STOP_WORDS


def gopher_repetition(split: Split, thresholds: GopherRepetition) -> Verdict:
    """Drop a page of which too much repeats; all measures of an empty text are 0."""
    characters = max(1, len(split.text))
    paragraphs, paragraph_characters = repeated(split.paragraphs)
    lines, line_characters = repeated(split.lines)
    measures = {
        "duplicate_paragraph_fraction": paragraphs / max(1, len(split.paragraphs)),
        "duplicate_paragraph_character_fraction": paragraph_characters / characters,
        "duplicate_line_fraction": lines / max(1, len(split.lines)),
        "duplicate_line_character_fraction": line_characters / characters,
    }
    top, duplicate = _n_gram_characters(split)
    measures |= {f"top_{n}_gram_character_fraction": top[n] / characters for n in TOP_N_GRAMS}
    measures |= {f"duplicate_{n}_gram_character_fraction": duplicate[n] / characters for n in DUPLICATE_N_GRAMS}
    return Verdict(*judge(measures, thresholds), split.text, measures)


def _n_gram_characters(split: Split) -> tuple[dict[int, int], dict[int, int]]:
    """For each n, the characters of the most frequent n-gram and those of n-grams that stood before.

    An n-gram that occurs twice begins and ends with (n-1)-grams that do: each n looks only at the pairs of neighbours
    that n-1 left, with numbers for the n-grams that are exact, no hashes. Of 1,300 words 20 are left at n = 6.
    """
    import numpy as np

    ids = split.ids
    ends = np.concatenate(([0], np.cumsum(split.lengths[ids])))  # where each word ends, with no space between
    letters = split.letters_per_word
    space = int(letters == 1)
    top = {n: _first(ends, n * letters, space) for n in TOP_N_GRAMS}
    duplicate = dict.fromkeys(DUPLICATE_N_GRAMS, 0)
    starts = (split.counts[ids] > 1).nonzero()[0]  # of the n-grams that occur twice: the first word,
    names = ids[starts]  # and a number for each
    for length in range(2, DUPLICATE_N_GRAMS[-1] * letters + 1):
        pairs = (starts[1:] == starts[:-1] + 1).nonzero()[0]
        names, first, counts = _group(names[pairs] * len(ids) + names[pairs + 1])
        starts = starts[pairs]
        n = length // letters if length % letters == 0 else 0
        if n in top:
            top[n] = _top(starts, first, counts, ends, length, space)
        again = counts[names] > 1
        starts, names = starts[again], names[again]
        if not len(starts):  # by n = 8 on half of all pages
            break
        if n in duplicate:
            duplicate[n] = _duplicate(starts.tolist(), names.tolist(), ends, length)
    return top, duplicate


def _group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A number for each key, and for each number where its key stands first and how often it occurs.

    What np.unique gives when asked for everything, at half its price for a few hundred keys.
    """
    import numpy as np

    order = keys.argsort(kind="stable")
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    bounds = new.nonzero()[0]
    names = np.empty(len(keys), np.int64)
    names[order] = new.cumsum() - 1
    ends = np.append(bounds[1:], len(keys))
    return names, order[bounds], (ends - bounds)[: len(bounds)]


def _first(ends: np.ndarray, n: int, space: int) -> int:
    """The characters of the first n-gram, where all are equally frequent; 0 for fewer than n words."""
    return int(ends[n]) + space * (n - 1) if len(ends) > n else 0


def _top(starts: np.ndarray, first: np.ndarray, counts: np.ndarray, ends: np.ndarray, n: int, space: int) -> int:
    """The characters of all occurrences of the most frequent n-gram; of several, the one that comes first."""
    most = counts.max(initial=1)
    if most == 1:
        return _first(ends, n, space)
    start = starts[first[counts == most].min()]
    return int(most * (ends[start + n] - ends[start] + space * (n - 1)))


def _duplicate(starts: list[int], names: list[int], ends: np.ndarray, n: int) -> int:
    """The characters of n-grams that stood before, read from the left, none counted twice."""
    seen: set[int] = set()
    characters = free = 0
    for start, name in zip(starts, names, strict=True):
        if start < free:
            continue
        if name in seen:
            characters += int(ends[start + n] - ends[start])
            free = start + n
        seen.add(name)
    return characters


def gopher_quality(split: Split, thresholds: GopherQuality, language: str = "en") -> Verdict:
    """Drop a page that does not look like prose in its language.

    Without `stop_words` for a language that has no list, and without what LEFT_OUT says of the script. An empty text
    has only `words`, which is 0.
    """
    import numpy as np

    vocabulary, counts = split.vocabulary, split.counts
    alphabetic = np.fromiter(map(str.isalpha, vocabulary), bool, len(vocabulary))
    named = alphabetic.copy()
    for number in (~alphabetic).nonzero()[0].tolist():
        named[number] = vocabulary[number].strip("_")[:1].isalnum()
        alphabetic[number] = any(map(str.isalpha, vocabulary[number]))
    words = int(counts[named].sum())
    measures: dict[str, float] = {"words": words // split.letters_per_word}
    if not words:
        return Verdict(*judge(measures, thresholds), split.text, measures)
    total, lines = len(split.words), len(split.lines)
    measures |= {
        "mean_word_length": float((counts * split.lengths)[named].sum() / words),
        "hash_to_word_ratio": split.text.count("#") / total,
        "ellipsis_to_word_ratio": sum(map(split.text.count, ELLIPSES)) / total,
        "bullet_line_fraction": sum(line.startswith(BULLETS) for line in split.lines) / lines,
        "ellipsis_line_fraction": sum(line.endswith(ELLIPSES) for line in split.lines) / lines,
        "alphabetic_word_fraction": float(counts[alphabetic].sum() / total),
    }
    if stop_words := STOP_WORDS.get(language):
        measures["stop_words"] = len(stop_words.intersection(map(str.lower, vocabulary)))
    measures = split.telling(measures)
    return Verdict(*judge(measures, thresholds), split.text, measures)
