"""Normalize text to comparable words, independent of case, accents, punctuation and the notation of numbers.

    >>> words("The U.S. paid $1,000,000 in Henry VIII's time.")
    ('us', 'paid', '#1000000', 'in', 'henry', '#8', 'time')
    >>> words("one million") == words("1.0 million") == words("1,000,000") == words("1M")
    True
    >>> words("three and a half") == words("3 1/2") == words("3\u00bd") == words("3.5")
    True

A number becomes "#" and its value, from digits of any script, English number words, fractions and Roman numerals.
In scripts without spaces (Chinese, Japanese, Thai, ...) each character is a word. Articles (a, an, the) are dropped
unless there is nothing else, and so is a plural's last s.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.text.words import MARKS, UNSPACED

ARTICLES = {"a", "an", "the"}
SPELLINGS = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"), "\u0131": "i"})  # dotless i: Turkish
ACCENTS = re.compile("[\u0300-\u036f]")
INITIALS = re.compile(r"(?:\b[^\W\d_]\.[ ]?){2,}")  # U.S., J. K.
ROMAN = re.compile(r"(?=[IVXLC]{2}|[VX])(?:C{0,3}|XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")

KNOWN: dict[str, Any] = json.loads(Path(__file__).with_name("matching.json").read_text(encoding="utf-8"))
PIECE = re.compile(
    r"(?P<number>(?:(?<![\w)\]])[-\u2212])?(?:(?:\d{1,9} )?(?<![/\d])\d{1,9}[/\u2044][1-9]\d{0,2}(?![/\d])"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?))(?:(?:st|nd|rd|th)\b|(?P<scale>[kKMB]|mn|bn)\b)?"
    rf"|(?P<percent>%)|(?P<character>[{UNSPACED}])"
    rf"|(?P<word>(?:[^\W\d_{UNSPACED}][{MARKS}]*)+(?:'[^\W\d_]+)*"
    r"(?:\+{1,2}|#|(?<=\b\w)[-\u2212](?!\w))?)"  # C++, C#, A+ and A- differ from C and A
)
LONGEST_NUMBER, LARGEST = 100, 10**60  # characters of digits; value of number words
ISO_DATE = re.compile(r"(?<![\d-])(\d{4})-(0[1-9]|1[0-2])-([0-3]\d)(?![\d-])")
DOTTED_DATE = re.compile(r"(?<![\d.])([0-3]?\d)\.(0?[1-9]|1[0-2])\.(\d{4})(?![\d.])")
MONTHS = KNOWN["months"]  # the first twelve entries
MAY = "maymonth"  # May next to a number; elsewhere it is often the verb
MONTH_OF = {
    form: MAY if number == 4 else MONTHS[number]
    for number, some in enumerate(KNOWN["month names"])
    for form in some.split()
}
BEFORE_MONTHS, AMBIGUOUS_MONTHS = set(KNOWN["before months"]), set(KNOWN["ambiguous months"])  # "may", "march"
ABBREVIATED = {"st": "saint", "mt": "mount"}  # before a name
# Korean particles: one syllable is stripped only if at least two are left
PARTICLES = re.compile(
    rf"(?<=[\uac00-\ud7a3])(?:{KNOWN['endings']})\Z|(?<=[\uac00-\ud7a3]{{2}})[{KNOWN['particles']}]\Z"
)
LETTERS = str.maketrans(KNOWN["letters"])
TEN_WORDS = [*KNOWN["tens"], *KNOWN["ordinal tens"]]
TENS = {word: 20 + 10 * (index % 8) for index, word in enumerate(TEN_WORDS)}
SMALL_NUMBERS = TENS | {word: value for name in ("units", "ordinals") for value, word in enumerate(KNOWN[name])}
SMALL_NUMBERS |= {word: int(value) for value, some in KNOWN["numerals"].items() for word in some.split()}
SCALES: dict[str, int] = KNOWN["scales"]
SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9}  # directly after digits
PARTS = {"half": Fraction(1, 2), "halves": Fraction(1, 2), "quarter": Fraction(1, 4), "quarters": Fraction(1, 4)}
PARTS |= {word + end: Fraction(1, SMALL_NUMBERS[word]) for word in KNOWN["ordinals"][3:] for end in ("", "s")}


class Token(NamedTuple):
    """A normalized word, its original spelling, and the text between it and the previous word."""

    word: str
    written: str
    before: str


def words(text: str) -> tuple[str, ...]:
    """Return the normalized words of a text in order, without articles if there are other words."""
    with_articles = [token.word for token in tokens(text)]
    return tuple(word for word in with_articles if word not in ARTICLES) or tuple(with_articles)


def places(words: Sequence[str], phrase: Sequence[str]) -> list[int]:
    """Return the indices at which a phrase, a sequence of words, occurs in `words`."""
    if not phrase or phrase[0] not in words:
        return []
    return [at for at in range(len(words) - len(phrase) + 1) if words[at : at + len(phrase)] == phrase]


def word_list(name: str) -> frozenset[str]:
    """Return the normalized words of a list in matching.json."""
    return frozenset(word for entry in KNOWN[name] for word in words(entry))


def tokens(text: str) -> list[Token]:
    """Return the normalized words of a text, with articles, as tokens."""
    text = re.sub("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(SPELLINGS)
    text = ACCENTS.sub("", unicodedata.normalize("NFD", text))
    text = INITIALS.sub(
        lambda match: match[0].replace(".", "").replace(" ", "") + " ", unicodedata.normalize("NFC", text)
    )
    text = re.sub(r"(?i)\bper cent\b", "percent", text.translate(LETTERS))
    text = re.sub(r"\b(?:kph|kmh|kmph)\b", "km/h", re.sub(r"\bmph\b", "mi/h", text))
    text = DOTTED_DATE.sub(lambda match: f"{int(match[1])} {MONTHS[int(match[2]) - 1]} {match[3]}", text)
    text = ISO_DATE.sub(lambda match: f"{int(match[3])} {MONTHS[int(match[2]) - 1]} {match[1]}", text)
    matches = list(PIECE.finditer(text))
    pieces = [_piece(match) for match in matches]
    result: list[Token] = []
    at = last = 0
    while at < len(pieces):
        sign = pieces[at] in ("minus", "negative") and at + 1 < len(pieces)
        value, end = _number_at(pieces, at + sign)
        sign &= end > at + 1
        # a number in words, digits with a scale, and "minus 5" are one word each
        if end > at + sign:
            word = _value(-value if sign else value)
        else:
            word, end = re.sub(r"(?<=..[^s])s\Z", "", pieces[at]), at + 1  # strip the plural
        following = pieces[end] if end < len(pieces) else ""
        if word in MONTH_OF or word == "march":
            beside = is_number(following) or any(is_number(token.word) for token in result[-1:])
            alone = len(pieces) == 1 or pieces[max(0, at - 1)] in BEFORE_MONTHS
            beside = beside or (alone and matches[at][0][:1].isupper())
            word = MONTH_OF.get(word, word) if beside or word not in AMBIGUOUS_MONTHS else word
        elif word in ABBREVIATED and following and matches[end][0][:1].isupper():
            word = ABBREVIATED[word]
        result.append(Token(word, text[matches[at].start() : matches[end - 1].end()], text[last : matches[at].start()]))
        at, last = end, matches[end - 1].end()
    return result


def is_number(word: str) -> bool:
    """Return True if a normalized word is a number."""
    return word.startswith("#")


def is_sign(text: str) -> bool:
    """Return True if a text without words contains a symbol, such as a mathematical sign or an emoji."""
    return any(unicodedata.category(character)[0] == "S" for character in text)


def is_spaceless(word: str) -> bool:
    """Return True if a word is a character of a script without spaces."""
    return re.fullmatch(f"[{UNSPACED}]", word) is not None


def _piece(match: re.Match[str]) -> str:
    """Normalize a match: a number to "#" and its value, a word without case and possessive s."""
    if match["number"]:
        if len(match["number"]) > LONGEST_NUMBER:  # not an answer, and conversion takes quadratic time
            return "#" + match["number"]
        number = match["number"].replace(",", "").replace("\u2212", "-").replace("\u2044", "/")
        whole, _, part = number.rpartition(" ")
        value = Fraction(part) + (Fraction(whole or 0) if not whole.startswith("-") else Fraction(whole))
        return _value(value * SUFFIXES.get(match["scale"] or "", 1))
    if match["percent"]:
        return "percent"
    if match["character"]:
        return match["character"]
    word = match["word"]
    bare = word.removesuffix("'s")
    if ROMAN.fullmatch(bare):
        values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in bare]
        return _value(
            sum(-value if value < after else value for value, after in zip(values, [*values[1:], 0], strict=True))
        )
    return PARTICLES.sub("", bare.casefold().replace("'", "").replace("\u2212", "-"))


def _value(number: Decimal | Fraction | int) -> str:
    exact = Fraction(number)
    if exact.denominator == 1:
        return f"#{exact.numerator}"
    return f"#{Context(LONGEST_NUMBER).divide(exact.numerator, exact.denominator).normalize():f}"


def _number_at(pieces: list[str], at: int) -> tuple[Fraction, int]:
    """Return the number that starts at piece `at`, and its end; the end is `at` if there is none.

    >>> _number_at("three hundred and five men".split(), 0)
    (Fraction(305, 1), 4)
    """
    total, part, last, end = Fraction(0), Fraction(0), sys.maxsize, at
    while end < len(pieces) and part < LARGEST:
        word = pieces[end]
        if word == "and" and last in SCALES.values() and end + 1 < len(pieces) and pieces[end + 1] in SMALL_NUMBERS:
            end += 1
            continue
        count, after = _part_at(pieces, end + (word == "and" and end > at))
        if count and (end == at or word == "and"):  # "half a million", "three quarters", "two and a half"
            part, last, end = part + count, 0, after
            end += pieces[end : end + 1] == ["a"] and pieces[end + 1 : end + 2] != [] and pieces[end + 1] in SCALES
            continue
        if is_number(word):
            if end > at or len(word) > LONGEST_NUMBER:
                break
            part, last = Fraction(word[1:]), 0
        elif word in SCALES or (end > at and word.removesuffix("s") in SCALES and not word.endswith("ths")):
            scale = SCALES[word.removesuffix("s")]
            if end == at:
                part = Fraction(1)
            if scale == 100:
                part *= scale
            else:
                total, part = total + part * scale, Fraction(0)
            last = scale
        else:
            small = SMALL_NUMBERS.get(word)
            # "twenty one" and "hundred five" continue; "five six" and "nineteen eighty" are two numbers
            if small is None or not (last >= 100 or (last == 10 and small < 10)):
                break
            part, last = part + small, 10 if word in TENS else 1
        end += 1
    return total + part, end


def _part_at(pieces: list[str], at: int) -> tuple[Fraction, int]:
    """Return the fraction in words that starts at piece `at`, 0 if there is none, and its end.

    >>> [_part_at(text.split(), 0)[0] for text in ("half", "a third", "three quarters", "third", "three third")]
    [Fraction(1, 2), Fraction(1, 3), Fraction(3, 4), Fraction(0, 1), Fraction(0, 1)]
    """
    first, second = [*pieces[at : at + 2], "", ""][:2]
    if first in ("half", "halves"):
        return PARTS[first], at + 1
    count = 1 if first == "a" else SMALL_NUMBERS.get(first, 0) if first not in KNOWN["ordinals"] else 0
    if second in PARTS and count and (count == 1 or second.endswith("s")):
        return count * PARTS[second], at + 2
    return Fraction(0), at
