r"""The context of a number: its sign, and what makes it no statement (operand, bound, one of a list, denial).

Each pattern is tried on at most 200 characters before a number or 160 behind it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MINUS = "\u2212\u2013-"  # the hyphen last, for classes of regexes
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
ANY_CASE = re.IGNORECASE

# "the answer is (B)", "Answer: B", "The final answer is: B"; the last one counts
ANNOUNCED = re.compile(
    r"(?:\banswer\**(?:\s+is\b(?!\s+not\b)|\s*[:=])|\bans\s*[.:=]|\u7b54\u6848(?:\u662f|\u4e3a|\u70ba)|\u7b54\u6848?\s*[:\uff1a]|\u7b54\u3048\u306f"
    r"|\uc815?\ub2f5\uc740|\uc815?\ub2f5\s*[:\uff1a]|\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d"
    r"|\b(?:antwort|r\u00e9ponse|respuesta|risposta|resposta|antwoord|odpowied\u017a|\u043e\u0442\u0432\u0435\u0442)(?:\s+(?:ist|est|es|\u00e8|\u00e9|is)\b|\s*:))[\s:*]*",
    ANY_CASE,
)
SENTENCE_END = re.compile(r"[.!?](?:[\s*\"')]|\Z)|\n|[\u3002\uff01\uff1f]")

# the words and characters of a sign, in some languages
WORD = r"(?:minus|negative|plus|positive|moins|menos|meno)\b|\u30de\u30a4\u30ca\u30b9|\u8d1f|\u8ca0"
SIGN = re.compile(rf"(?P<word>{WORD})|(?P<mark>[+{MINUS}])(?P<apart>[ \t]*)", ANY_CASE)
# signs, currencies and brackets directly before a number
LEAD = re.compile(rf"(?:(?:(?<![A-Za-z])(?:{WORD})|[+{MINUS}]|\\?[{CURRENCY}]|[(\[{{])[ \t]*)*\Z", ANY_CASE)
NEGATIVE = re.compile(rf"minus|negative|moins|menos|meno|\u30de\u30a4\u30ca\u30b9|\u8d1f|\u8ca0|[{MINUS}]", ANY_CASE)
# after these a sign apart from its number is one all the same
STATES = re.compile(
    rf"(?:[=:<>\u2248,(\[{{{CURRENCY}*\"'`&|]|\\approx|\b(?:is|are|was|were|equals?|be|gives?|gets?|ist|es|est))"
    r"[ \t]*\Z",
    ANY_CASE,
)
NUMERAL = r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand"
# "ten minus 3": what a sign in words subtracts from
OPERAND_OF_WORD = re.compile(rf"(?:[0-9)\]}}%]|\b[A-Za-z]|\b(?:{NUMERAL}))[ \t]*\Z", ANY_CASE)

# what makes a number the operand of an expression that nobody has worked out, or the argument of a function
OPERAND = re.compile(
    r"(?:[\^\u00d7\u00f7\u00b7_\u221a\u221b\u00b1]|\\(?:times|cdot|div|pm|mp)|[0-9)]\s*x|[\w)\]}]\s*/|\+\s*/\s*-"
    r"|(?<![A-Za-z])\\?(?:sqrt|log|ln|lg|sin|cos|tan|exp|overline|bar|square root of)\b)\s*[{(\[]?\s*\Z"
    r"|[\w)\]}](?:\*{1,2}|\s+\*{1,2}\s+)\Z",  # **5** is bold, 9**5 is not
    ANY_CASE,
)
# the argument of a function of one letter: f(3)
APPLIED = re.compile(r"(?<![A-Za-z\\])[A-Za-z]\([ \t]*\Z|(?<!\|)\|[-\u2212]\Z")
# an operator, power, factorial or variable directly behind: 3 * x, 10^6, 5!, 2x
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
    r"|[0-9]\s?(?:\u6216|\u8fd8\u662f|\u307e\u305f\u306f|\u304b|\ub610\ub294|\u0e2b\u0e23\u0e37\u0e2d|\u0623\u0648|\u092f\u093e|oder|ou|o|\u0438\u043b\u0438)\s?\Z"
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

# a limit before the number: "> 5", "more than 5", "at least 5", "is over 5"
BOUND = re.compile(
    r"(?:[^\s=>-][ \t]*>=?|(?:\A|\s)>=?\Z|<=?|[\u2264\u2265\u226a\u226b]"
    r"|\\(?:leq?|geq?|lt|gt|leqslant|geqslant|ll|gg)\b"
    r"|\b(?P<words>(?:more|less|fewer|greater|larger|smaller|bigger|higher|lower|older|younger|longer|shorter) than"
    r"(?: or equal to)?|at least|at most|up to|(?:maximum|minimum|max|min) of|almost|nearly|close to"
    r"|(?:well|just|slightly|far|way|a little|a bit) (?:over|under|above|below|beyond|past)|upwards? of|in excess of"
    r"|as (?:many|much|few|little|high|low) as"
    r"|before|until|till|since|prior to"
    r"|(?:\A|(?<=is )|(?<=are )|(?<=was )|(?<=were )|(?<=has )|(?<=have )|(?<=thing )|(?<=where )|(?<=number )|(?<== ))"
    r"(?:over|under|above|below|beyond|near|after)"
    # other languages
    r"|mehr als|weniger als|mindestens|h\u00f6chstens|\u00fcber|unter"
    r"|plus de|moins de|au moins|au plus|m[a\u00e1]s de|menos de"
    r"|al menos|pi\u00f9 di|meno di|almeno|mais de|meer dan|minder dan"
    r"|\u0431\u043e\u043b\u044c\u0448\u0435|\u043c\u0435\u043d\u044c\u0448\u0435"
    r"|\u0431\u043e\u043b\u0435\u0435|\u043c\u0435\u043d\u0435\u0435)"
    r"|\u5927\u4e8e|\u5c0f\u4e8e|\u8d85\u8fc7|\u5c11\u4e8e|\u591a\u4e8e|\u4e0d\u5230|\u81f3\u5c11|\u81f3\u591a|\u6700\u591a)[\s*\"'(]*\Z",
    ANY_CASE,
)
# a limit behind it: "5 or more", "5+"
BOUND_BEHIND = re.compile(
    r"\s*(?P<words>or (?:more|less|fewer|higher|lower|above|below|over|under|greater)|and (?:up|above|over|below)"
    r"|at (?:least|most))\b"
    r"|\s*(?:\u4ee5\u4e0a|\u4ee5\u4e0b|\u4ee5\u5185|\u672a\u6e80|\uc774\uc0c1|\uc774\ud558|\ubbf8\ub9cc|\ucd08\uacfc|\u3088\u308a[\u5927\u5c0f\u591a\u5c11]|\ubcf4\ub2e4|\u4ee5\u5916)|\+(?!\s*[\w(])",
    ANY_CASE,
)

# a denial before it, with up to four filler words between: "is not equal to 5", "the wrong answer is 5"
DENIED = re.compile(
    r"(?:(?:\b(?:not|never|neither|nor|cannot|isnt|except|other than|rather than|instead of|anything but|far from"
    r"|opposite of|doubt|false|no longer|rul(?:e|es|ed) out|excludes?|eliminates?|rejects?"
    r"|suppose|imagine|unlikely to|if (?:it|that|this|the answer)"
    r"|(?:might|may|would|could) (?:think|guess|say|believe)"
    r"|nicht|keine?|pas|no es|niet|non \u00e8|n\u00e3o \u00e9|\u043d\u0435)\b"
    r"|n['\u2019]t\b|\u2260|!=|\\neq?\b|<>)"
    r"(?:[\s*\"'(]+(?:equal(?:s|ed)?|to|the|an?|answer|number|value|result|be|being|is|it(?:['\u2019]s)?|that|as|really|were|was"
    r"|exactly|actually|even|simply|just|quite|necessarily|have|has|had|get|gives?|makes?|costs?|say|right|correct"
    r"|[a-z]\b)){0,4}"
    r"|\b(?:wrong|incorrect|mistaken|false) (?:answer|result|value|number|solution|guess|option|choice)\s+"
    r"(?:is|was|would be|might be|:|=)"
    r"|\bmistake (?:is|was|would be)(?: to (?:say|think|answer|get|write|take))?"
    r"|\u4e0d\u662f|\u5e76\u975e|\u4e0d\u7b49\u4e8e|\u0e44\u0e21\u0e48\u0e43\u0e0a\u0e48|\u0644\u064a\u0633[\u062a\u0648]?)[\s*\"'(:=$]*\Z",
    ANY_CASE,
)
RIGHT = r"(?:right|correct|true|the (?:right |correct )?answer|it|possible|valid)\b"
# a denial behind it: "5 is wrong", "5 cannot be right", "5 is too many"
DENIED_BEHIND = re.compile(
    r"[\s*\"'`)\]$]*(?:(?:is|was|would be|seems|looks)\s+(?:clearly |definitely |certainly |also |just |simply )?"
    rf"(?:not {RIGHT}|wrong\b|incorrect\b|false\b|impossible\b|too (?:many|few|much|little|big|small|high|low|large)\b)"
    rf"|(?:is|was)n['\u2019]?t {RIGHT}|can(?:not|['\u2019]t) be {RIGHT}"
    r"|\u3067\u306f\u3042\u308a\u307e\u305b\u3093|\u3067\u306f\u306a\u3044|\u3058\u3083\u306a\u3044|(?:[\uc774\uac00]\s*)?\uc544[\ub2c8\ub2d9]|\u4e0d\u5bf9|\u4e0d\u5c0d|(?:\u2019\s*)?de\u011fil|\u0928\u0939\u0940\u0902)",
    ANY_CASE,
)
# doubt or a correction behind it: "5?", "5. Wait", "5, but that is not right"
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
# "would be 5", which an "if" behind makes a supposition
SUPPOSED = re.compile(r"\b(?:would|could|might) (?:be|have been) [\s*\"'(]*\Z", ANY_CASE)


class Sign(NamedTuple):
    """True if a number is negative, and where its signs, currencies and brackets begin in what stands before it."""

    negative: bool
    start: int


def sign_before(before: str, alone: bool) -> Sign | None:
    """The sign of a number; None where it is an operator. `alone`: there is nothing else, so a hyphen is no bullet."""
    lead = LEAD.search(before)
    assert lead is not None
    start = lead.start()
    signs = list(SIGN.finditer(lead[0]))
    if not signs:
        return Sign(False, start)
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
    negative = sum(NEGATIVE.fullmatch(one["word"] or one["mark"]) is not None for one in signs) % 2 == 1
    return Sign(negative, len(head))


def goes_on(rest: str, sentence: str) -> bool:
    """True if a list, a range or an expression goes on behind a number."""
    return GOES_ON.match(rest) is not None or re.match(r"[^,.;]{0,40}=", sentence) is not None


def is_no_statement(head: str, before: str, after: str, asked: str) -> bool:
    """True if a number is denied, bounded, taken back, one of several or part of an expression.

    head    what stands before its signs, currencies and brackets
    before  what stands before the number
    """
    for place in (BOUND.search(head), BOUND_BEHIND.match(after)):
        if place and not (place["words"] and place["words"].casefold() in asked.casefold()):
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
