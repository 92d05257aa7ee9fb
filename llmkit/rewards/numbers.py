"""The number that a text gives as its answer, read without `eval` and compared as an exact fraction.

    >>> last_number("He has 3 + 4 = 7 apples, which cost $1,250.50 in all.")
    Number(value=Fraction(2501, 2), percent=False)
    >>> print(last_number("It is not 5"), last_number("9**9**9"), last_number("5 or 6"), last_number("on 3/4/2024"))
    None None None None

Read are digits of any script, thousands set off by commas (1,000; 1{,}000 in LaTeX), decimals after a point, a sign
that touches, scientific notation, fractions (3/4, 2 1/2, \\frac{3}{4}, ½), currency before and percent after.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

# ten digits beyond what a double holds; whole numbers are compared exactly
TOLERANCE = Fraction(1, 10**6)
LONGEST = 400  # characters of one number: more is nobody's answer, and integers of many digits cost their square
LARGEST_EXPONENT = 400
READ_FROM_END = 100_000  # characters

MINUS = "\u2212\u2013-"  # the hyphen last, for classes of regexes
RUN = re.compile(
    # a sign that follows no operand; a currency between sign and number, or before both
    r"(?:(?<![\w)\]}.!])(?P<sign>[-+\u2212\u2013]))?(?P<currency>\\?[$\u20ac\u00a3\u00a5\u20b9])?(?:(?<=[$\u20ac\u00a3\u00a5\u20b9])(?P<after>[-+\u2212]))?"
    # the whole run of digits and what joins them, so that a part of a date or of 1.2.3 is never taken for a number
    r"(?<![^\W_])(?P<run>\.?[0-9]+(?:[.,:/\-\u2013\u2212][0-9]+)*(?:[eE][-+]?[0-9]+)?)"
    r"(?P<percent>\s*(?:\\?%|percent\b|per cent\b))?"
)
PLAIN = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
FRACTION = re.compile(r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)/([0-9]+(?:\.[0-9]+)?)")
MIXED = re.compile(r"(?<![\w.,/])[0-9]+[ ]\Z")
LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*([0-9.]+)\s*\}\s*\{\s*([0-9.]+)\s*\}"), r" \1/\2"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,(?=[0-9]{3}))"), ","),
    (re.compile(r"\\!"), ""),
)
# what makes a number the operand of an expression that nobody has worked out, or one of several
OPERAND = re.compile(
    rf"(?:[\^\u00d7\u00f7\u00b7+_]|\\(?:times|cdot|div)|[0-9)]\s*x|[\w)\]}}]\s*[/{MINUS}])\s*\{{?\s*\Z"
    r"|[\w)\]}](?:\*{1,2}|\s+\*{1,2}\s+)\Z"  # **5** is bold, 9**5 is not
)
OPERATED = re.compile(
    r"\s*(?:[\^\u00d7\u00f7\u00b7]|\\(?:times|cdot|div))|[xX][0-9]|(?:\*{1,2}|\s+\*{1,2}\s+)[\w(]|!(?![\s\"')*]|\Z)"
)
LISTED = re.compile(r"[0-9%](?:[ \t]*[,;|&][ \t]*(?:or|and)?|[ \t]+(?:or|and|and/or|/)|[ \t])[ \t]*\Z")
DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|isnt)\b|n['\u2019]t\b|\u2260|!=|\\neq?\b|<>)(?:[\s*\"'(]+(?!and\b|but\b|so\b)[a-z]+){0,3}[\s*\"'(:=$]*\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A value, and whether a percent sign stood behind it: 50% is 50 as well as 1/2."""

    value: Fraction
    percent: bool = False


def last_number(text: str) -> Number | None:
    """The last number of a text, where it is a statement: not denied, not one of a list, no operand.

    Deliberately strict: "1,5" and "1 000" are none (5 and 0 of something, or a number?), "10:30", "3-4" and dates are
    none, and a text whose last number is none has none, whatever stood before. Only the last 100,000 characters count.
    """
    text = _plain(text[-READ_FROM_END:])
    found = deque(RUN.finditer(text), maxlen=1)
    return _number(text, found[0]) if found else None


def only_number(text: str) -> Number | None:
    """The number of a text that holds one, and nothing that could be another."""
    plain = _plain(text)
    found = list(RUN.finditer(plain)) if len(plain) <= READ_FROM_END else []
    if len(found) == 2 and MIXED.search(plain[: found[1].start()]):
        found = found[1:]
    return _number(plain, found[0]) if len(found) == 1 else None


def whole_number(text: str) -> Number | None:
    """The number that a text is: nothing else stands there but white space and a final point."""
    plain = _plain(text).strip().removesuffix(".").strip().strip("$").strip()
    found = list(RUN.finditer(plain))
    if not found or found[-1].end() != len(plain):
        return None
    start = found[-1].start()
    mixed = MIXED.search(plain[:start])
    return _number(plain, found[-1]) if start == 0 or (mixed and mixed.start() == 0 and len(found) == 2) else None


def same_number(said: Number, answer: Number) -> bool:
    """Whether two numbers are the same: whole ones exactly, others to a millionth of the answer.

    >>> half, fifty, percent = Number(Fraction(1, 2)), Number(Fraction(50)), Number(Fraction(50), percent=True)
    >>> same_number(percent, half), same_number(percent, fifty), same_number(fifty, half)
    (True, True, False)
    """
    if said.percent == answer.percent:
        return _close(said.value, answer.value)
    written = said.value if said.percent else answer.value
    other = answer.value if said.percent else said.value
    return _close(written, other) or _close(written / 100, other)


def _close(said: Fraction, answer: Fraction) -> bool:
    if said.denominator == answer.denominator == 1:
        return said == answer
    return abs(said - answer) <= TOLERANCE * abs(answer)


def _plain(text: str) -> str:
    """Digits of any script in ASCII (no superscripts: 5² is not 52), ½ as 1/2, LaTeX's fractions and commas."""
    if not text.isascii():
        text = "".join(character if character.isascii() else _ascii(character) for character in text)
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return text


def _ascii(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKD", character).replace("\u2044", "/")
    return {"\uff05": "%", "\uff0c": ",", "\uff0e": ".", "\uff0d": "-", "\uff0b": "+", "\u00a0": " "}.get(
        character, character
    )


def _number(text: str, found: re.Match[str]) -> Number | None:
    """The number of a match in `text`; None where it is malformed, denied, or part of something larger."""
    before, after = text[max(0, found.start() - 200) : found.start()], text[found.end() : found.end() + 20]
    mixed = MIXED.search(before) if "/" in found["run"] and not found["sign"] else None
    whole = None
    if mixed:
        sign_place = before[: mixed.start()]
        whole, before = int(mixed[0]) if len(mixed[0]) < LONGEST else None, sign_place.rstrip(MINUS)
        negative = sign_place != before and not OPERAND.search(sign_place)
        if whole is None:
            return None
    else:
        sign = found["sign"] or found["after"]
        negative = sign is not None and sign in MINUS
    if OPERAND.search(before) or OPERATED.match(after) or LISTED.search(before) or DENIED.search(before):
        return None
    value = _value(found["run"])
    if value is None:
        return None
    value += whole or 0
    return Number(-value if negative else value, found["percent"] is not None)


def _value(run: str) -> Fraction | None:
    if len(run) > LONGEST:
        return None
    fraction = FRACTION.fullmatch(run)
    if fraction:
        below = Fraction(fraction[2])
        return Fraction(fraction[1].replace(",", "")) / below if below else None
    if not PLAIN.fullmatch(run):
        return None
    exponent = re.split("[eE]", run)[1:]
    if exponent and (len(exponent[0]) > 5 or abs(int(exponent[0])) > LARGEST_EXPONENT):
        return None
    return Fraction(run.replace(",", ""))
