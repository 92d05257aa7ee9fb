"""Which runs of digits in a text are telephone numbers.

A number with its country's code is one if its length is possible there. Without, it must be valid in one of the
regions below and written as they write it, or stand behind a word such as `Tel.`; what stands behind `Order no.`,
dates, prices, ISBNs and parts of longer codes are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmkit.text.words import JOINED

# Steps through the text once and never goes back: a million digits are one match.
DASHES = "\\-\u2010\u2011\u2013"  # for a character class
_BETWEEN = rf"\)?(?:[ \u00a0]?[{DASHES}./(][ \u00a0]?|[ \u00a0])?"  # what may part the groups of one number
_W = rf"[^\W{JOINED}]"  # \w, but for letters that may touch a number without being part of it
NUMBER = re.compile(rf"(?:[+(]{{1,2}}|(?<!{_W})(?<!\.))\d(?:{_BETWEEN}\d+)*")
FEWEST_DIGITS, MOST_DIGITS = 7, 17  # 00 and the 15 of the longest international number
LONGEST = 40  # characters of one number as written
_CUE = re.compile(
    rf"(?:(?<!{_W})(?:tel|telephone|phones?|telefono|teléfono|telefon|telefonnummer|téléphone|tél|telefone|puhelin|telefoon"
    r"|tlf|tfn|fax|mobile?|mobil|mob|cell|cel|celular|móvil|portable|handy|gsm|call|calling|ring|dial|text|sms"
    r"|whatsapp|signal|hotline|helpline|freecall|freephone|rufen|appelez|llame|llámenos|chiama|ligue|bel|ext|тел|телефон|факс|звоните|τηλ)"
    r"|(?:电话|電話|手机|手機|携帯)(?:号码|號碼|番号)?|전화(?:번호)?|फ़ोन|फोन|โทร|هاتف|טלפון|📞|☎|✆|📱)"
    r"[^\w\n]{0,4}(?:(?:no|nr|number|us|me|him|her|them|at|on|is|the|now|today|toll|free|office|der|die|unter|au|al|ao"
    r"|le|numéro|número|numero|nummer|номер)\b[^\w\n]{0,4}){0,3}\(?\Z",
    re.I,
)
_OTHER = re.compile(
    rf"(?:(?<!{_W})(?:isbn|issn|ean|upc|gtin|sku|asin|doi|pmid|order|invoice|ref|reference|account|acct|ticket|item|part|model"
    r"|serial|patent|id|case|tracking|batch|lot|vat|tax|zip|version|page|pp?|chapter|figure|rfc|no|nr|number|code|bestell"
    r"|rechnung|commande|pedido|gene|build|grant|contract|license|licence|registration|docket|catalog|flight)"
    r"(?:nummer|\s?(?:no|nr|number|code|id))?|[#№$€£¥])[^\w\n]{0,3}\Z",
    re.I,
)
_NO_END = re.compile(rf"{_W}|[%°€$£@=/年月日元円号個个番월일원번]|[,.:]\d")  # units of East Asia among them
_DATE = re.compile(
    r"\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}\b.*|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d\d\b.*"
    rf"|(?:1[5-9]|20)\d\d ?[{DASHES}/] ?\d{{2,4}}\b.*"
)
_AMERICAN = re.compile(rf"(?:\+?1[{DASHES}. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[{DASHES}.])[2-9]\d\d[{DASHES}. ]\d{{4}}")
_TRUNK = re.compile(rf"\(?0[1-9]\d{{0,4}}\)?(?:[ \u00a0./{DASHES}]{{1,3}}\d{{2,8}}){{1,4}}")
_NO_PHONE = re.compile(r"\+?\d+\.\d+|\d{1,3}(?:\.\d{3})+|\d{5}-\d{4}")  # decimals, thousands, American postcodes
_COUNTING = re.compile(r"\d{3}(?: \d{3})+")  # 012 013 023: groups that no country writes behind its 0
_BRACKETED = re.compile(r"\([1-9]\d{1,2}\) ?\d{3,5}[-. ]?\d{4}")
_TRUNK_REGIONS = ("GB", "DE", "FR", "IT", "AU", "NL", "CH", "AT", "SE", "BE", "IE", "JP", "IN", "NZ", "ZA", "TR", "PL")


def find_phones(text: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Where each telephone number begins and ends, between two places of the text."""
    for match in NUMBER.finditer(text, start, len(text) if stop is None else stop):
        if match.end() - match.start() > LONGEST:
            continue
        begin = match.start() + (match[0].startswith("(") and ")" not in match[0])
        written = text[begin : match.end()]
        digits = re.sub(r"\D", "", written)
        if FEWEST_DIGITS <= len(digits) <= MOST_DIGITS and _is_phone(text, begin, written, digits):
            yield begin, match.end()


def _is_phone(text: str, start: int, written: str, digits: str) -> bool:
    stop = start + len(written)
    before, after = text[max(0, start - 40) : start], text[stop : stop + 2]
    if _NO_END.match(after) or before[-1:] in tuple("/=_@#$€£¥,.-&?%"):
        return False
    if _DATE.fullmatch(written) or _NO_PHONE.fullmatch(written) or re.search(r"\d:\Z", before):
        return False
    cue = bool(_CUE.search(before))
    if written.startswith(("+", "(+")):
        return _is_possible("+" + digits)
    if not cue and _OTHER.search(before):
        return False
    if digits.startswith("00") and len(digits) > 9:
        return _is_possible("+" + digits[2:])
    if cue:
        return len(digits) <= 12
    if _AMERICAN.fullmatch(written):
        return _is_valid(digits, ("US",))
    if _TRUNK.fullmatch(written) and 9 <= len(digits) <= 12 and not _COUNTING.fullmatch(written):
        return _is_valid(digits, _TRUNK_REGIONS)
    return bool(_BRACKETED.fullmatch(written)) and _is_valid(digits, ("US", "BR", "MX"))


def _is_possible(number: str) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_possible_number(phonenumbers.parse(number))
    except phonenumbers.NumberParseException:
        return False


def _is_valid(number: str, regions: tuple[str, ...]) -> bool:
    import phonenumbers

    for region in regions:
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False
