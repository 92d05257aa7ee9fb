r"""The number that a text gives as its answer, read without `eval` and compared as an exact fraction.

    >>> last_number("He has 3 + 4 = 7 apples, which cost $1,250.50 in all.")
    Number(value=Fraction(2501, 2), percent=False, scale=1, unit='$')
    >>> print(last_number("It is not 5"), last_number("9**9**9"), last_number("5 or 6"), last_number("on 3/4/2024"))
    None None None None
    >>> last_number("minus 7").value, last_number(r"-\frac14").value, last_number("答案是8").value
    (Fraction(-7, 1), Fraction(-1, 4), Fraction(8, 1))

It reads digits of any script, English number words if the statement has no digits, thousands and decimals in the
conventions of several countries (1,000.5; 1.000.000,5; 1 000; 12,34,567; 1{,}000 in LaTeX), signs and "minus",
scientific notation, fractions (3/4, 2 1/2, \frac{3}{4}, ½), a currency before the number, and percent, "million" or a
unit after it. The context of a number gives its sign, or shows that it is not a statement (operand, bound, one of a
list, denial): these patterns see at most 200 characters before a number and 160 after it. phrases.json has the words
of several languages.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

from llmkit.text.answer_spans import CURRENCIES, FACTORS, MEASURED, MEASURES, SMALL
from llmkit.text.normalize import ROMAN, is_number, tokens

MINUS = "\u2212\u2013-"  # the hyphen last, for regex character classes
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
ANY_CASE = re.IGNORECASE
PHRASES: dict[str, list[str]] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
ANY = {name: "|".join(phrases) for name, phrases in PHRASES.items()}

# "the answer is (B)", "Answer: B", "The final answer is: B"; the last one counts
ANNOUNCED = re.compile(
    rf"(?:\banswer\**(?:\s+is\b(?!\s+not\b)|\s*[:=])|\bans\s*[.:=]|{ANY['the answer is']}"
    rf"|\b(?:{ANY['answer']})(?:\s+(?:ist|est|es|\u00e8|\u00e9|is)\b|\s*:))[\s:*]*",
    ANY_CASE,
)
SENTENCE_END = re.compile(r"[.!?](?:[\s*\"')]|\Z)|\n|[\u3002\uff01\uff1f]")

WORD = rf"(?:minus|negative|plus|positive|moins|menos|meno)\b|{ANY['minus']}"
SIGN = re.compile(rf"(?P<word>{WORD})|(?P<mark>[+{MINUS}])(?P<apart>[ \t]*)", ANY_CASE)
# signs, currencies and brackets directly before a number
LEAD = re.compile(rf"(?:(?:(?<![A-Za-z])(?:{WORD})|[+{MINUS}]|\\?[{CURRENCY}]|[(\[{{])[ \t]*)*\Z", ANY_CASE)
NEGATIVE = re.compile(rf"minus|negative|moins|menos|meno|{ANY['minus']}|[{MINUS}]", ANY_CASE)
# after these a sign may be apart from its number
STATES = re.compile(
    rf"(?:[=:<>\u2248,(\[{{{CURRENCY}*\"'`&|]|\\approx|\b(?:is|are|was|were|equals?|be|gives?|gets?|ist|es|est))"
    r"[ \t]*\Z",
    ANY_CASE,
)
NUMERAL = r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand"
# "ten minus 3": the first operand of a sign in words
OPERAND_OF_WORD = re.compile(rf"(?:[0-9)\]}}%]|\b[A-Za-z]|\b(?:{NUMERAL}))[ \t]*\Z", ANY_CASE)

# before an operand of an expression without a result, or an argument of a function
OPERAND = re.compile(
    r"(?:[\^\u00d7\u00f7\u00b7_\u221a\u221b\u00b1]|\\(?:times|cdot|div|pm|mp)|[0-9)]\s*x|[\w)\]}]\s*/|\+\s*/\s*-"
    r"|(?<![A-Za-z])\\?(?:sqrt|log|ln|lg|sin|cos|tan|exp|overline|bar|square root of)\b)\s*[{(\[]?\s*\Z"
    r"|[\w)\]}](?:\*{1,2}|\s+\*{1,2}\s+)\Z",  # **5** is bold, 9**5 is not
    ANY_CASE,
)
# the argument of a function of one letter: f(3)
APPLIED = re.compile(r"(?<![A-Za-z\\])[A-Za-z]\([ \t]*\Z|(?<!\|)\|[-\u2212]\Z")
# an operator, power, factorial or variable directly after: 3 * x, 10^6, 5!, 2x
OPERATED = re.compile(
    r"\s*(?:[\^\u00d7\u00f7\u00b7\u03c0\u221a\u00b1]|\\(?:times|cdot|div|pi|sqrt|pm|mp|theta|alpha)\b)|[xX][0-9]"
    r"|\s+(?:minus|plus|divided by)\b"
    r"|[\u00b2\u00b3\u2070-\u2079]|(?:\*{1,2}|\s+\*{1,2}\s+)[\w(]|!(?![\s\"')*]|\Z)"
    r"|\s*[xyzn](?![A-Za-z'])(?=\s*(?:[-+=^*/)}\]$.,]|\Z))"
)
# one of several: "4 or 5", "from 4 to 5", "x = 4 or x ="
LISTED = re.compile(
    r"[0-9%]\$?(?:[ \t]*[,;|&][ \t]*(?:or|and)?"
    r"|[ \t]+(?:or|and|nor|and/or|/|to|through|vs\.?|versus|until)|[ \t])[ \t]*\Z"
    rf"|[0-9]\s?(?:{ANY['or']})\s?\Z"
    r"|[0-9]\S{0,12} or (?:maybe|perhaps|possibly|even|it is) \Z"
    r"|\b([A-Za-z])\s*=[^=\n]{1,25}?(?:,|;|\bor\b|\band\b)[\s$]*\1\s*=[\s$]*\Z"
    r"|\b(?:from|between)\s[^.\n]{0,40}[0-9][^.\n]{0,15}\s(?:to|and)\s+\Z",
    ANY_CASE,
)
# another number follows: ", 5", "or 5", "to 5", "+ 5"
GOES_ON = re.compile(
    rf"\$?\s*(?:[,;/&|+*{MINUS}]|\\(?:times|cdot|div|text)|(?:or|and|to|through|vs\.?|versus|plus|minus|times)\b)"
    rf"\s*(?:(?:or|and|maybe|perhaps|even)\s+)?[-(]?[{CURRENCY}]?\s*[0-9]",
    ANY_CASE,
)

# a limit before the number: "> 5", "more than 5", "at least 5", "is over 5"; or after it: "5 or more", "5+"
BOUND = re.compile(
    r"(?:[^\s=>-][ \t]*>=?|(?:\A|\s)>=?\Z|<=?|[\u2264\u2265\u226a\u226b]"
    rf"|\\(?:leq?|geq?|lt|gt|leqslant|geqslant|ll|gg)\b|\b(?P<words>{ANY['bounds']})"
    rf"|{ANY['bounds without spaces']})[\s*\"'(]*\Z",
    ANY_CASE,
)
BOUND_BEHIND = re.compile(
    rf"\s*(?P<words>{ANY['bounds behind']})\b|\s*(?:{ANY['bounds behind without spaces']})|\+(?!\s*[\w(])", ANY_CASE
)

# a denial before it, with up to four filler words: "is not equal to 5", "the wrong answer is 5"
DENIED = re.compile(
    rf"(?:(?:\b(?:{ANY['denials']})\b|n['\u2019]t\b|\u2260|!=|\\neq?\b|<>)"
    rf"(?:[\s*\"'(]+(?:{ANY['between a denial and its number']})){{0,4}}"
    r"|\b(?:wrong|incorrect|mistaken|false) (?:answer|result|value|number|solution|guess|option|choice)\s+"
    r"(?:is|was|would be|might be|:|=)"
    r"|\bmistake (?:is|was|would be)(?: to (?:say|think|answer|get|write|take))?"
    rf"|{ANY['denials without spaces']})[\s*\"'(:=$]*\Z",
    ANY_CASE,
)
RIGHT = r"(?:right|correct|true|the (?:right |correct )?answer|it|possible|valid)\b"
# a denial after it: "5 is wrong", "5 cannot be right", "5 is too many"
DENIED_BEHIND = re.compile(
    r"[\s*\"'`)\]$]*(?:(?:is|was|would be|seems|looks)\s+(?:clearly |definitely |certainly |also |just |simply )?"
    rf"(?:not {RIGHT}|wrong\b|incorrect\b|false\b|impossible\b|too (?:many|few|much|little|big|small|high|low|large)\b)"
    rf"|(?:is|was)n['\u2019]?t {RIGHT}|can(?:not|['\u2019]t) be {RIGHT}|{ANY['denials behind']})",
    ANY_CASE,
)
# doubt or a correction after it: "5?", "5. Wait", "5, but that is not right"
TAKEN_BACK = re.compile(
    r"[^?.!\n]{0,20}\?|.{0,60}?(?:\b(?:(?:that|this|it|which)(?:['\u2019]s| is| was)|they(?:['\u2019]re| are| were))\s+"
    r"(?:clearly |actually |certainly )?"
    rf"(?:wrong|incorrect|false|not {RIGHT})|\bwait\b"
    r"|\b(?:no|nope|oops|hmm+)\b[^\w\n]{1,3}"
    r"(?:(?:it|that|this)(?:['\u2019]s| is) |make (?:it|that) |the answer is )?[-$]?[0-9]"
    r"|\b(?:actually|sorry|correction|i mean[t]?)\b[^0-9]{0,40}[0-9]"
    r"|\b(?:but|except that) (?:it|that|this|there) ?(?:is|are|was|were)(?:n['\u2019]t| not)\b)",
    ANY_CASE | re.DOTALL,
)
# "would be 5", a supposition if an "if" follows
SUPPOSED = re.compile(r"\b(?:would|could|might) (?:be|have been) [\s*\"'(]*\Z", ANY_CASE)
# relative; whole numbers are compared exactly
TOLERANCE = Fraction(1, 10**6)
LONGEST = 400  # characters of one number: no answer has more, and integers take quadratic time
LARGEST_EXPONENT = 400
READ_FROM_END = 100_000  # characters
BEFORE, AFTER = 200, 160  # characters around a number that decide whether it is a statement

RUN = re.compile(
    # the whole run of digits and what joins them, so that a part of a date or of 1.2.3 is never read as a number;
    # a letter before it makes it a name (x5, H2O), except in scripts without spaces between words
    r"(?<![0-9A-Za-z\u00aa-\u052f\u1e00-\u1fff])(?<![0-9]\.)"
    r"(?P<run>\.?[0-9]+(?:[.,:/\-\u2013\u2212][0-9]+)*(?:[eE][-+]?[0-9]+)?)"
    r"(?P<percent>\s{0,9}(?:\\?%|percent\b|per cent\b))?"
)
PLAIN = re.compile(
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
)
# points between thousands, if a comma or a second point shows it, and a comma before decimals
CONTINENTAL = re.compile(
    r"(?:[0-9]{1,3}(?:\.[0-9]{3}){2,}|[0-9]{1,3}(?:\.[0-9]{3})+(?=,)"
    r"|[0-9]+(?=,[0-9]{1,2}\Z|,[0-9]{4})|0(?=,))(?:,[0-9]+)?"
)
FRACTION = re.compile(r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)/([0-9]+(?:\.[0-9]+)?)")
MIXED = re.compile(r"(?<![\w.,/])[0-9]+[ ]\Z")
# "6, not 5" says 6
CONTRAST = re.compile(
    r"(?<=[0-9])([^.\n0-9]{0,20}?),? (?:and |but )?"
    r"(?:not|rather than|instead of|und nicht|nicht|et non|y no|e non|\u0430 \u043d\u0435) "
    rf"[{CURRENCY}]?[0-9][0-9.,]*[^0-9\n]{{0,20}}\Z"
)
CALLED = re.compile(r" is the (?:final |correct |right )?answer\b", re.IGNORECASE)
# "3 * 9 = 27 dollars in 3 weeks" says 27
RESULT = re.compile(rf"(?<=[0-9)%])\s?=\s?[{CURRENCY}]?\Z")
# may follow a result: words without a conclusion, a denial or another statement
CIRCUMSTANCES = re.compile(
    r"(?=\W{0,3}(?:[^\W\d_]|\Z))(?!.*\b(?:so|then|thus|therefore|which|leaving|is|are|was|were|has|have|or|not|wrong|no|if|but|except|minus|plus|less|times|until|later|and\s+[0-9])\b)[^,;:=?!<>\n]{0,200}\.?\s*",
    re.IGNORECASE,
)
VARIABLE = re.compile(r"[A-Za-z]\s*=(?!=)\s*\$?")
# "square" and "degrees" belong to the unit
UNIT = re.compile(rf"\s*(?:(?:square|cubic|degrees?)\s+)?([A-Za-z]+|[{CURRENCY}])(?:(?:/| per )([A-Za-z]+))?")
_HAN = "\u96f6\u3007\u4e00\u4e8c\u4e24\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343"
# after other words, a single 一 may be part of a word
HAN = re.compile(
    rf"(?:\W*|.*[^{_HAN}](?!\u4e00(?![{_HAN}])))([{_HAN}]+)[\u3040-\u9fff]?[\u3040-\u30ff]{{0,2}}\W*\Z", re.DOTALL
)
LONGEST_STATEMENT = 2000  # characters in which number words are read
JOINED = "\ue000"  # marks a fraction that was one character, or LaTeX
S = r"\s{0,9}"  # white space; unbounded, long runs would take quadratic time
MONTH = "(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]{0,6}"
PART = rf"(?:\{{{S}([-\u2212]?{S}[0-9.]+){S}\}}|([0-9]))"
LATEX_FRACTION = re.compile(rf"\\[cdt]?frac{S}{PART}{S}{PART}")
LATEX = (
    (r"<<[^<>]{0,200}>>", ""),  # GSM8K's calculator annotations
    (r"</?[A-Za-z][A-Za-z0-9]{0,15}/?>", " "),
    (r"(?<=[0-9])(?:\{,\}|,\\!|\\,(?=[0-9]{3})|[\u00a0\u2009\u202f'\u2019_](?=[0-9]{3}(?![0-9])))", ","),
    # 1 000 and 1 000 000, but not a longer row of numbers
    (r"(?<![0-9.,])(?<![0-9.,] )([1-9][0-9]{0,2}) ([0-9]{3})(?: ([0-9]{3}))?(?![0-9]| [0-9])", r"\1\2\3"),
    (
        r"(?<=10)[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]{1,4}",
        lambda match: "^" + unicodedata.normalize("NFKC", match[0]),
    ),
    # per second: m s^{-1}
    (
        r"(?<=[A-Za-z])(?:\s|\\[,;: ]|\\cdot|\u00b7|~){1,3}(s|h|min)(?:\^\{?[-\u2212][12]\b\}?|\u207b[\u00b9\u00b2])",
        r"/\1",
    ),
    (r"\$(?=[^$\n]{0,80}\\[A-Za-z ,;])([^$\n]{1,160}?)\$", r"\1"),  # math delimiters, not dollars
    (r"\\(?:[!,;: ]|left\b|right\b|displaystyle\b|quad\b)|~", " "),
    (rf"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname){S}\{{([^{{}}]{{0,200}})\}}", r" \1 "),
    (rf"{S}(?:\^{S}\{{?{S}\\circ{S}\}}?|\\degree\b|\u00b0)", " degrees "),
    # 10 to a power, after a factor
    (
        rf"(?<=[0-9]){S}(?:\\times|[xX*\u00d7\u00b7]|\\cdot){S}10{S}\^{S}\{{?{S}([-\u2212]?){S}([0-9]{{1,3}}){S}\}}?",
        r"e\1\2",
    ),
    # or without a factor
    (
        r"(?<![0-9A-Za-z.,^*/+)\u00d7\u00b7-])(?<![*/+)\u00d7\u00b7-] )"
        rf"10{S}\^{S}\{{?{S}([-\u2212]?)([0-9]{{1,3}})\b{S}\}}?",
        r"1e\1\2",
    ),
    (rf"(?i)\b({MONTH}\.?) [0-3]?[0-9](?:st|nd|rd|th)?,? (?=[0-9]{{4}}\b)", r"\1 "),
    (r"(?<=[0-9]) and (?=[0-9]{1,3}/[0-9]{1,3}\b)", " "),
    # powers of units; other single letters than m and s are variables
    (
        r"(?<![A-Za-z\\])(?!(?:sin|cos|tan|cot|log|ln|exp)\b)([A-Za-z]{2,12}|[ms])"
        rf"{S}\^{S}\{{?{S}-?[2-4]\b{S}\}}?",
        r"\1",
    ),
)
LATEX_PATTERNS = tuple((re.compile(pattern), replacement) for pattern, replacement in LATEX)
SCALE = re.compile(
    r"\s*(?:(?i:thousand|million|billion|trillion|dozen|lakh|crore)(?i:s?)\b|[\u4e07\u842c\ub9cc\u4ebf\u5104\uc5b5])|(?:[kKM]|mn|bn)\b"
)
SCALES = {
    "m": 10**6, "mn": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7,
    "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "\u4e07": 10**4, "\u842c": 10**4, "\ub9cc": 10**4, "\u4ebf": 10**8, "\u5104": 10**8, "\uc5b5": 10**8,
}  # fmt: skip


def sign_before(before: str, alone: bool) -> tuple[bool, int] | None:
    """Return whether a number is negative, and where its signs, currencies and brackets begin in the text before it.

    Return None if the sign is an operator. alone: the text has nothing else, so a hyphen is not a bullet.
    """
    lead = LEAD.search(before)
    assert lead is not None
    start = lead.start()
    signs = list(SIGN.finditer(lead[0]))
    if not signs:
        return False, start
    head = before[: start + signs[0].start()]
    first = signs[0]
    if first["word"]:
        if OPERAND_OF_WORD.search(head):
            return None
    elif re.search(r"[0-9)\]}%][ \t]*\Z|[\w.!]\Z", head):  # 10 - 7, x-7, Covid-19
        return None
    elif first["apart"]:
        line = head.rpartition("\n")[2]
        if not line.strip():
            if not alone:  # a bullet
                signs = signs[1:]
        elif not STATES.search(head):
            return None
    negative = sum(NEGATIVE.fullmatch(sign["word"] or sign["mark"]) is not None for sign in signs) % 2 == 1
    return negative, len(head)


def is_no_statement(head: str, before: str, after: str, question: str) -> bool:
    """True if a number is denied, bounded, taken back, one of several or part of an expression.

    head    text before its signs, currencies and brackets
    before  text before the number
    """
    for bound in (BOUND.search(head), BOUND_BEHIND.match(after)):
        if bound and not (bound["words"] and bound["words"].casefold() in question.casefold()):
            return True
    if SUPPOSED.search(head) and re.match(r"[^.\n]{0,20}\b(?:if|were|had)\b", after):
        return True
    return bool(
        OPERAND.search(head)
        or APPLIED.search(before)
        or OPERATED.match(after)
        or LISTED.search(head)
        or DENIED.search(head)
        or DENIED_BEHIND.match(after)
        or TAKEN_BACK.match(after)
    )


@dataclass(frozen=True, slots=True)
class Number:
    """A value with its context: 50% is 50 as well as 1/2.

    scale  10**6 for 2 million
    unit   symbol of a known unit of measurement or currency
    """

    value: Fraction
    percent: bool = False
    scale: int = 1
    unit: str = ""


def last_number(text: str, question: str = "") -> Number | None:
    """Return the last number of a text if it is a statement: not denied, one of a list, an operand or a bound.

    Deliberately strict: "10:30", "3-4" and dates are not numbers, and if the last number is not a statement, no earlier
    one counts. Only the last 100,000 characters are read. A bound that is in the question ("at least") is accepted.
    """
    text = _plain(text[-READ_FROM_END:])
    text = text[:-BEFORE] + CONTRAST.sub(r"\1", text[-BEFORE:])
    runs = deque(RUN.finditer(text), maxlen=8)
    if not runs:
        return None
    worked_out = next(
        (run for run in reversed(runs) if RESULT.search(text[max(0, run.start() - 9) : run.start()])), None
    )
    if worked_out and CIRCUMSTANCES.fullmatch(text, worked_out.end()):
        return _number(text, worked_out, question)
    return _number(text, runs[-1], question)


def announced_number(text: str, question: str = "") -> Number | None:
    """Return the number shortly after the last "the answer is"; None if the statement is open, or is reasoning."""
    plain = _plain(text[-READ_FROM_END:])
    places = deque(ANNOUNCED.finditer(plain), maxlen=1)
    if not places:
        called = deque(CALLED.finditer(plain), maxlen=1)
        run = deque(RUN.finditer(plain, 0, called[0].start()), maxlen=1) if called else None
        close = run and run[0].end() == called[0].start()
        return _number(plain, run[0], question) if run and close else None
    start = places[0].end()
    end = SENTENCE_END.search(plain, start)
    stop = end.start() if end else len(plain)
    for run in RUN.finditer(plain, start, min(stop, start + 1000)):
        if len(re.findall(r"[^\W\d_]+", plain[start : run.start()])) > 3:
            return None
        rest, sentence = plain[run.end() : run.end() + AFTER], plain[run.end() : stop]
        number = _number(plain, run, question)
        if number is not None and not GOES_ON.match(rest) and not re.match(r"[^,.;]{0,40}=", sentence):
            begins = not plain[: places[0].start()].strip(" \t\r\n*#")
            return None if begins and len(sentence.split()) > 3 and RUN.search(plain, stop) else number
        if "=" not in sentence:
            return None
        start = plain.rindex("=", run.end(), stop)
    return None


def only_number(text: str, question: str = "") -> Number | None:
    """Return the number of a text with exactly one."""
    plain = _plain(text)
    runs = list(islice(RUN.finditer(plain), 3)) if len(plain) <= READ_FROM_END else []
    if len(runs) == 2 and MIXED.search(plain[: runs[1].start()]):
        runs = runs[1:]
    return _number(plain, runs[0], question, alone=True) if len(runs) == 1 else None


def whole_number(text: str) -> Number | None:
    """Return the number that a text consists of, perhaps with a unit, `x =` before it and a final full stop.

    >>> [str(found and found.value) for found in map(whole_number, ("5 apples", "x = 5", "six", "1.2 million", "10^3"))]
    ['5', '5', '6', '1200000', '1000']
    >>> [whole_number(text) for text in ("7 Up", "Apollo 11", "5 pm", "2 of hearts", "5 or 6", "")]
    [None, None, None, None, None, None]
    """
    plain = _plain(in_digits(VARIABLE.sub("", text.strip().removesuffix(".")))).strip()
    plain = plain.strip("$").strip() if plain.endswith("$") else plain
    runs = list(islice(RUN.finditer(plain), 3))
    if not runs or not _is_unit(plain[runs[-1].end() :]):
        return None
    before = plain[: runs[-1].start()]
    mixed = MIXED.search(before)
    before = before[: mixed.start()] if mixed and len(runs) == 2 else before
    return _number(plain, runs[-1], "", alone=True) if not before.strip(f"{CURRENCY}+{MINUS} ") else None


def in_digits(text: str) -> str:
    """Write number words as digits in a text without digits: "twenty-one men" as "21 men", but not "no one".

    >>> in_digits("So she has minus two and a half."), in_digits("Six of 6"), in_digits("Wait a second, no one")
    ('So she has -2.5.', 'Six of 6', 'Wait a second, no one')
    """
    if len(text) > LONGEST_STATEMENT or any(map(str.isdecimal, text)):
        return text
    if numeral := HAN.match(text):
        return f"{text[: numeral.start(1)]}{_han(numeral[1])}{text[numeral.end(1) :]}"
    every = tokens(f"{text}\nend")
    pieces = []
    for token in every[:-1]:
        other = token.written.casefold() in ("second", "seconds") or (
            token.written.casefold() == "one" and len(every) > 2
        )
        is_word = is_number(token.word) and not other and not ROMAN.fullmatch(token.written)
        pieces.append(token.before + (token.word[1:] if is_word else token.written))
    return "".join(pieces) + every[-1].before.removesuffix("\n") if pieces else text


def same_number(number: Number, answer: Number) -> bool:
    """True if two numbers are equal: whole ones exactly, others up to a millionth of the answer.

    >>> half, fifty, percent = Number(Fraction(1, 2)), Number(Fraction(50)), Number(Fraction(50), percent=True)
    >>> same_number(percent, half), same_number(percent, fifty), same_number(fifty, half)
    (True, True, False)
    """
    if number.unit and answer.unit and number.unit != answer.unit:
        factor, other = FACTORS.get(number.unit), FACTORS.get(answer.unit)
        if not factor or not other or factor[0] != other[0]:
            return False
        return _close(number.value * factor[1], answer.value * other[1])
    if number.percent == answer.percent:
        return _close(number.value, answer.value)
    written = number.value if number.percent else answer.value
    other = answer.value if number.percent else number.value
    return _close(written, other) or _close(written / 100, other)


def unscaled(number: Number, question: str) -> Number:
    """Return the number without its scale, such as "million", if the question has that word: how many millions?"""
    words = [word for word, scale in SCALES.items() if scale == number.scale and len(word) > 2]
    named = any(word in question.casefold() for word in words)
    return Number(number.value / number.scale, number.percent) if named else number


def _close(value: Fraction, answer: Fraction) -> bool:
    if value.denominator == answer.denominator == 1:
        return value == answer
    return abs(value - answer) <= TOLERANCE * abs(answer)


def _plain(text: str) -> str:
    """Write digits of any script in ASCII (not superscripts: 5² is not 52), ½ as 1/2, and LaTeX as plain text."""
    if not text.isascii():
        text = "".join(character if character.isascii() else _ascii(character) for character in text)
    for pattern, replacement in LATEX_PATTERNS:
        text = pattern.sub(replacement, text)
    text = LATEX_FRACTION.sub(_fraction, text)
    if JOINED in text:
        text = re.sub(rf"(?<=[0-9]){JOINED}", " ", text)
        text = re.sub(rf"(?<=[A-Za-z)\]}}]){JOINED}", "\u00b7", text)  # x½ is a product
        text = text.replace(JOINED, "")
    return text


def _fraction(match: re.Match[str]) -> str:
    above, below = (match[1] or match[2]), (match[3] or match[4])
    negative = sum(part[0] in MINUS for part in (above, below)) == 1
    return f"{JOINED}{'-' if negative else ''}{above.strip(MINUS + ' ')}/{below.strip(MINUS + ' ')}"


def _han(text: str) -> int:
    """Read Chinese numerals.

    >>> [_han(text) for text in ("\u516b", "\u5341\u4e8c", "\u4e8c\u5341", "\u4e09\u767e\u96f6\u4e94")]
    [8, 12, 20, 305]
    """
    total = part = 0
    for character in text.replace("\u4e24", "\u4e8c"):
        value = int(unicodedata.numeric(character))
        total, part = (total + (part or 1) * value, 0) if value >= 10 else (total, part * 10 + value)
    return total + part


def _is_unit(text: str) -> bool:
    """True if the text after a number is empty, or a scale, a unit or counted things, in lower case."""
    rest = text[scale.end() :] if (scale := SCALE.match(text)) else text
    named = rest.split()
    return len(named) <= 4 and all(
        _unit(word)
        or (not re.search(r"[^\w/.%\u00b0-]|[A-Z0-9]", word) and (word == "per" or word not in SMALL | MEASURED))
        for word in named
    )


def _unit(text: str) -> str:
    """Return the symbol of the unit or currency that a text begins with; "" without one."""
    names = UNIT.match(text)
    signs = []
    for name in names.groups() if names else ():
        word = name if name in (*"MKGTSH", None) else name.casefold()
        forms = (word, word.removesuffix("s")) if word else ()
        signs += [known[form] for known in (MEASURES, CURRENCIES) for form in forms if form in known][:1]
    return "/".join(signs)


def _ascii(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= character <= "\uff5e" or "\ufe50" <= character <= "\ufe6b":  # full width, small forms
        return unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return JOINED + unicodedata.normalize("NFKD", character).replace("\u2044", "/")
    return "/" if character in "\u2044\u2215" else character


def _number(text: str, match: re.Match[str], question: str, alone: bool = False) -> Number | None:
    """Return the number of a match in `text`; None if it is malformed, denied, or part of something larger."""
    before, after = text[max(0, match.start() - BEFORE) : match.start()], text[match.end() : match.end() + AFTER]
    mixed = MIXED.search(before) if "/" in match["run"] else None
    whole = 0
    if mixed:
        if len(mixed[0]) > LONGEST:
            return None
        whole, before = int(mixed[0]), before[: mixed.start()]
    alone = alone or not (text[: match.start()].strip(f" {CURRENCY}{MINUS}") or after.strip(" .$\n"))
    signed = sign_before(before, alone)
    if signed is None or is_no_statement(before[: signed[1]], before, after, question):
        return None
    negative, start = signed
    value = _value(match["run"])
    if value is None:
        return None
    scale = SCALE.match(after) if match["percent"] is None else None
    factor = SCALES[scale[0].strip().lower().removesuffix("s")] if scale else 1
    value = (value + whole) * factor
    currency = next((sign for sign in before[max(0, start - 4) :] if sign in CURRENCY), "")
    unit = currency or _unit(after[scale.end() :] if scale else after)
    return Number(-value if negative else value, match["percent"] is not None, factor, unit)


def _value(run: str) -> Fraction | None:
    if len(run) > LONGEST:
        return None
    fraction = FRACTION.fullmatch(run)
    if fraction:
        below = Fraction(fraction[2])
        return Fraction(fraction[1].replace(",", "")) / below if below else None
    if CONTINENTAL.fullmatch(run):
        run = run.replace(".", "").replace(",", ".")
    if not PLAIN.fullmatch(run):
        return None
    exponent = re.split("[eE]", run)[1:]
    if exponent and (len(exponent[0]) > 5 or abs(int(exponent[0])) > LARGEST_EXPONENT):
        return None
    return Fraction(run.replace(",", ""))
