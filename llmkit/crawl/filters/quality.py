"""Quality rules for texts: Gopher's, C4's and FineWeb's.

Sources: Gopher: Rae et al. 2021 (section A1.1 and table A1); C4: Raffel et al. 2020 (section 2.2), with FineWeb's
choices; FineWeb: Penedo et al. 2024 (section 3.6). Each family is a dataclass of thresholds, with the defaults of the
papers and of FineWeb, and a function that measures a text and returns a verdict:

    verdict = gopher_quality(Split(text), GopherQuality())

Fractions of characters are relative to all characters of the text. In scripts without spaces an n-gram has n times
Split.letters_per_word letters.
"""

# ruff: noqa: RUF001 -- words of other scripts look like ours

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.text.words import CLOSING, TERMINAL, Split, count_sentences, repeated, split_words

if TYPE_CHECKING:
    import numpy as np

FINEWEB_ENDS = tuple(TERMINAL)
C4_ENDS = (".", "?", "!", '"', "'", "\u201d", "\u2019")  # quotation marks count, as in C4
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LOREM_IPSUM, JAVASCRIPT = "lorem ipsum", "javascript"
TOP_N_GRAMS = range(2, 5)
DUPLICATE_N_GRAMS = range(5, 11)
BULLETS = ("•", "-", "‣", "◦", "●", "▪", "■", "*", "–", "·")
ELLIPSES = ("...", "…")

# English: the eight of the paper; other languages: words of similar rank and function. The rule is off for languages
# that are not listed: with the English words it would drop all their pages.
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


class Verdict(NamedTuple):
    """The result of a filter.

    reason: the name of the threshold (`min_words`) or rule that drops the page, or None; score: the measure that broke
    the threshold; measures: all that the filter measured.
    """

    reason: str | None
    score: float | None
    measures: Mapping[str, float]


def judge(measures: Mapping[str, float], thresholds: Any) -> Verdict:
    """Find the first threshold, in the order of the fields, that the measures break.

    A measure NAME breaks `max_NAME` if it is above it, and `min_NAME` if it is below; None is off.

    >>> judge({"words": 12, "mean_word_length": 4.5}, GopherQuality())[:2]
    ('min_words', 12)
    """
    for limit in fields(thresholds):
        bound, measure = getattr(thresholds, limit.name), measures.get(limit.name[4:])
        if bound is None or measure is None:
            continue
        above, below = limit.name.startswith("max_"), limit.name.startswith("min_")
        if (above and measure > bound) or (below and measure < bound):
            return Verdict(limit.name, measure, measures)
    return Verdict(None, None, measures)


@dataclass(frozen=True, slots=True)
class FineWebQuality:
    """Rules on the lines of a page; none switches a rule off."""

    min_terminal_line_fraction: float | None = 0.12  # lines that end a sentence
    max_short_line_fraction: float | None = 0.67  # lines of at most `short_line_length`
    max_duplicate_line_character_fraction: float | None = 0.01  # in repeated lines; the paper says 0.1
    max_newline_to_word_ratio: float | None = 0.3
    short_line_length: int = 30  # characters


def fineweb_quality(split: Split, thresholds: FineWebQuality) -> Verdict:
    """Drop a page whose lines look like a list, a menu or a copy. Without lines `terminal_line_fraction` is 0.

    Terminal punctuation may be followed by a closing quotation mark or bracket, as in `he said "no."`.
    """
    lines = split.lines
    count, characters = max(1, len(lines)), max(1, sum(map(len, lines)))
    terminal = sum(line.endswith(FINEWEB_ENDS) or line.rstrip(CLOSING).endswith(FINEWEB_ENDS) for line in lines)
    measures = {
        "terminal_line_fraction": terminal / count,
        "short_line_fraction": sum(len(line) <= thresholds.short_line_length for line in lines) / count,
        "duplicate_line_character_fraction": repeated(lines)[1] / characters,
        "newline_to_word_ratio": split.text.count("\n") * split.letters_per_word / max(1, split.word_count),
    }
    return judge(split.telling(measures), thresholds)


@dataclass(frozen=True, slots=True)
class C4:
    """Rules on lines and pages; false or none switches a rule off."""

    min_sentences: int | None = 5  # in the remaining lines
    min_words_per_line: int | None = 3
    max_word_length: int | None = 1000  # characters; removes lines with a longer word
    remove_citations: bool = True  # [12], [edit] and [citation needed], but not their lines
    remove_javascript_lines: bool = True  # lines with "javascript"
    remove_policy_lines: bool = True  # lines with "privacy policy", "use cookies" and the like
    remove_unterminated_lines: bool = False  # lines that do not end in . ? ! or a quotation mark; FineWeb keeps them
    drop_lorem_ipsum: bool = True  # pages with "lorem ipsum"
    drop_curly_bracket: bool = True  # pages with a "{" in a remaining line: code


def c4(split: Split, rules: C4) -> tuple[str, Verdict]:
    """Return the text without the removed lines, and the verdict. If a line drops the page, return the complete text.

    Measures: the lines removed by each rule (`javascript_lines`, ...), and the remaining `sentences` and `words`.
    """
    page = split.text.lower()
    is_suspect = any(phrase in page for phrase in (LOREM_IPSUM, JAVASCRIPT, *POLICIES))
    lines: list[str] = []
    measures: dict[str, float] = {}
    sentences = lost = 0
    for line in map(str.strip, split.text.split("\n")):
        if rules.remove_citations and "[" in line:
            original, line = line, CITATION.sub("", line).strip()
            lost += len(split_words(original)) - len(split_words(line))
        rule = _c4_rule(line, rules, split.letters_per_word, is_suspect)
        if rule in ("lorem_ipsum", "curly_bracket"):
            return split.text, Verdict(rule, None, measures)
        if rule:
            measures[rule] = measures.get(rule, 0) + 1
            lost += len(split_words(line)) if line else 0
            continue
        sentences += count_sentences(line)
        lines.append(line)
    measures |= {"sentences": sentences, "words": split.word_count - lost}
    return "\n".join(lines).strip(), judge(split.telling(measures), rules)


def _c4_rule(line: str, rules: C4, letters_per_word: int, is_suspect: bool) -> str | None:
    """Return the rule that removes a line or drops its page. In scripts without spaces the rule on long words is off.

    is_suspect: the page contains one of the phrases. Few do; in the others the lines need not be searched.
    """
    longest, least = rules.max_word_length, rules.min_words_per_line
    if letters_per_word > 1:
        if least is not None and len(split_words(line)) < least * letters_per_word:
            return "short_lines"
    elif longest is not None and len(line) > longest < max(map(len, line.split())):
        return "long_word_lines"
    elif rules.remove_unterminated_lines and (not line.endswith(C4_ENDS) or line.endswith("...")):
        return "unterminated_lines"
    elif least is not None and len(line.split(None, least)) < least:
        return "short_lines"
    if is_suspect:
        lowered = line.lower()
        if rules.drop_lorem_ipsum and LOREM_IPSUM in lowered:
            return "lorem_ipsum"
        if rules.remove_javascript_lines and JAVASCRIPT in lowered:
            return "javascript_lines"
        if rules.remove_policy_lines and any(policy in lowered for policy in POLICIES):
            return "policy_lines"
    return "curly_bracket" if rules.drop_curly_bracket and "{" in line else None


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Repetition within a page; none switches a rule off."""

    max_duplicate_paragraph_fraction: float | None = 0.30  # repeated paragraphs
    max_duplicate_paragraph_character_fraction: float | None = 0.20
    max_duplicate_line_fraction: float | None = 0.30  # repeated lines
    max_duplicate_line_character_fraction: float | None = 0.20
    max_top_2_gram_character_fraction: float | None = 0.20  # all occurrences of the most frequent pair of words
    max_top_3_gram_character_fraction: float | None = 0.18
    max_top_4_gram_character_fraction: float | None = 0.16
    max_duplicate_5_gram_character_fraction: float | None = 0.15  # repeated 5-grams, overlaps counted once
    max_duplicate_6_gram_character_fraction: float | None = 0.14
    max_duplicate_7_gram_character_fraction: float | None = 0.13
    max_duplicate_8_gram_character_fraction: float | None = 0.12
    max_duplicate_9_gram_character_fraction: float | None = 0.11
    max_duplicate_10_gram_character_fraction: float | None = 0.10


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Properties of prose; none switches a rule off."""

    min_words: int | None = 50  # without symbols
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0  # in characters
    max_mean_word_length: float | None = 10.0
    max_hash_to_word_ratio: float | None = 0.1  # "#" per word or symbol
    max_ellipsis_to_word_ratio: float | None = 0.1  # "..." and "…" per word or symbol
    max_bullet_line_fraction: float | None = 0.9  # lines that begin with a bullet
    max_ellipsis_line_fraction: float | None = 0.3  # lines that end in an ellipsis
    min_alphabetic_word_fraction: float | None = 0.8  # words and symbols that contain a letter
    min_stop_words: int | None = 2  # distinct stop words of the page's language


def gopher_repetition(split: Split, thresholds: GopherRepetition) -> Verdict:
    """Drop a page with too much repetition. All measures of an empty text are 0."""
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
    return judge(measures, thresholds)


def _n_gram_characters(split: Split) -> tuple[dict[int, int], dict[int, int]]:
    """Return by n the characters of the most frequent n-gram, and those of repeated n-grams.

    An n-gram that occurs twice begins and ends with (n-1)-grams that do, so each n only examines neighbouring pairs
    left by n-1. n-grams are numbered exactly, not hashed. Of 1,300 words 20 are left at n = 6.
    """
    import numpy as np

    ids = split.ids
    ends = np.concatenate(([0], np.cumsum(split.lengths[ids])))  # where each word ends, with no space between
    letters = split.letters_per_word
    space = int(letters == 1)

    def size(start: int, length: int) -> int:
        return int(ends[start + length] - ends[start]) + space * (length - 1)

    # if all n-grams are equally frequent, the first counts
    top = {n: size(0, n * letters) if len(ids) >= n * letters else 0 for n in TOP_N_GRAMS}
    duplicate = dict.fromkeys(DUPLICATE_N_GRAMS, 0)
    starts = (split.counts[ids] > 1).nonzero()[0]  # first words of the n-grams that occur twice
    names = ids[starts]  # n-gram numbers
    for length in range(2, DUPLICATE_N_GRAMS[-1] * letters + 1):
        pairs = (starts[1:] == starts[:-1] + 1).nonzero()[0]
        names, first, counts = _group(names[pairs] * len(ids) + names[pairs + 1])
        starts = starts[pairs]
        n = length // letters if length % letters == 0 else 0
        if n in top and (most := int(counts.max(initial=1))) > 1:
            top[n] = most * size(int(starts[first[counts == most].min()]), length)
        again = counts[names] > 1
        starts, names = starts[again], names[again]
        if not len(starts):  # on half of all pages by n = 8
            break
        if n in duplicate:
            duplicate[n] = _duplicate(starts.tolist(), names.tolist(), ends, length)
    return top, duplicate


def _group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the keys; return each key's number, and by number the first index and the count.

    np.unique with all its results, in half the time for a few hundred keys.
    """
    import numpy as np

    order = keys.argsort(kind="stable")
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    bounds = new.nonzero()[0]
    names = np.empty(len(keys), np.int64)
    names[order] = new.cumsum() - 1
    return names, order[bounds], np.diff(np.append(bounds, len(keys)))


def _duplicate(starts: list[int], names: list[int], ends: np.ndarray, n: int) -> int:
    """Count the characters in repeated n-grams, from left to right, each once."""
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

    `stop_words` is not measured for languages without a list, nor what LEFT_OUT names for the script. An empty text
    only has `words`, which is 0.
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
        return judge(measures, thresholds)
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
    return judge(split.telling(measures), thresholds)
