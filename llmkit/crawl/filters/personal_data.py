"""Find personal data in a text and replace it with values reserved for examples.

| kind | found | replaced with |
|---|---|---|
| email | addresses, also `name (at) host (dot) org` | `email@example.com` |
| ip | public IPv4 and IPv6, except version numbers and public resolvers | `192.0.2.1`, `2001:db8::1` |
| phone | telephone numbers, see below | `+1 202 555 0100` |
| ssn | US social security numbers with hyphens | `000-00-0000` |
| card | payment cards by prefix, length and Luhn checksum | `0000 0000 0000 0000` |
| iban | accounts by country, length and check digits (mod 97) | `XX00 0000 0000 0000` |

The text stays natural, and placeholders are never matched again. All patterns run in linear time: a million digits,
dots or @ cost at most a second.

Digits with a country code are a telephone number if their length is possible in that country. Without a code, they must
be valid in one of the regions below and formatted as is usual there, or follow a word such as `Tel.`. Digits after
`Order no.`, dates, prices, ISBNs and parts of longer codes are not telephone numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import NamedTuple

from llmkit.text.words import JOINED

DASHES = "\\-\u2010\u2011\u2013"  # for a character class
_BETWEEN = rf"\)?(?:[ \u00a0]?[{DASHES}./(][ \u00a0]?|[ \u00a0])?"  # separators between the groups of a number
_W = rf"[^\W{JOINED}]"  # \w, except letters that may touch a number without being part of it
# never backtracks: a million digits are one match
NUMBER = re.compile(rf"(?:[+(]{{1,2}}|(?<!{_W})(?<!\.))\d(?:{_BETWEEN}\d+)*")
FEWEST_DIGITS, MOST_DIGITS = 7, 17  # 00 and the 15 digits of the longest international number
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
_NO_END = re.compile(rf"{_W}|[%°€$£@=/年月日元円号個个番월일원번]|[,.:]\d")  # including East Asian units
_DATE = re.compile(
    r"\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}\b.*|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d\d\b.*"
    rf"|(?:1[5-9]|20)\d\d ?[{DASHES}/] ?\d{{2,4}}\b.*"
)
_AMERICAN = re.compile(rf"(?:\+?1[{DASHES}. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[{DASHES}.])[2-9]\d\d[{DASHES}. ]\d{{4}}")
_TRUNK = re.compile(rf"\(?0[1-9]\d{{0,4}}\)?(?:[ \u00a0./{DASHES}]{{1,3}}\d{{2,8}}){{1,4}}")
_NO_PHONE = re.compile(r"\+?\d+\.\d+|\d{1,3}(?:\.\d{3})+|\d{5}-\d{4}")  # decimals, thousands, US ZIP codes
_COUNTING = re.compile(r"\d{3}(?: \d{3})+")  # 012 013 023: no country groups digits so after its 0
_BRACKETED = re.compile(r"\([1-9]\d{1,2}\) ?\d{3,5}[-. ]?\d{4}")
_TRUNK_REGIONS = ("GB", "DE", "FR", "IT", "AU", "NL", "CH", "AT", "SE", "BE", "IE", "JP", "IN", "NZ", "ZA", "TR", "PL")
PLACEHOLDERS = {
    "email": "email@example.com",
    "iban": "XX00 0000 0000 0000",
    "card": "0000 0000 0000 0000",
    "ssn": "000-00-0000",
    "ip": "192.0.2.1",
    "phone": "+1 202 555 0100",
}
IPV6_PLACEHOLDER = "2001:db8::1"

# public DNS resolvers: Google, Cloudflare, Quad9, OpenDNS, Level 3, Yandex, 114DNS, AliDNS, Comodo
RESOLVERS = frozenset(
    """8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 1.1.1.2 1.0.0.2 9.9.9.9 149.112.112.112 208.67.222.222 208.67.220.220 4.2.2.1
    4.2.2.2 4.2.2.3 4.2.2.4 77.88.8.8 77.88.8.1 114.114.114.114 114.114.115.115 223.5.5.5 223.6.6.6 8.26.56.26
    8.20.247.20 94.140.14.14 94.140.15.15 2001:4860:4860::8888 2001:4860:4860::8844 2606:4700:4700::1111
    2606:4700:4700::1001 2620:fe::fe 2620:fe::9""".split()  # noqa: SIM905
)
# candidates for numbers, in one quick pass: the strict patterns, 0.25 ms each for a page, run only on these
_STRETCH = re.compile(r"\d[\dA-Z \u00a0()./\u2010\u2011\u2013-]{6,}")
_LOCAL = re.compile(rf"(?:{_W}|[.+%!#$&*/=?^`{{|}}~'-]){{1,64}}")  # read from right to left
_PARTED = re.compile(r"[/=?&|{}]|%[0-9a-f]{2}", re.I)  # separators in URLs; hardly ever in e-mail addresses
_LETTER = rf"[^\W\d_{JOINED}]"
_HOST = re.compile(
    rf"(?:[^\W_{JOINED}](?:(?:{_W}|-){{0,61}}[^\W_{JOINED}])?\.){{1,8}}(?:xn--[a-z0-9-]{{2,59}}|{_LETTER}{{2,24}})"
    rf"(?!{_W}|@|\.{_LETTER})",
    re.I,
)
_NEXT_SENTENCE = re.compile(r"(?<=[a-z])\.[A-Z][a-z]+$")  # ann@example.org.Write to her
_SPELT_OUT = re.compile(r"[\[({<] ?(?:at|AT|At|@) ?[\])}>] ?")
_SPELT_HOST = re.compile(
    r"[a-z0-9-]{1,63}(?: ?(?:\.|[\[({<] ?(?:dot|punkt|punto|point) ?[\])}>]) ?[a-z0-9-]{2,63}){1,4}", re.I
)
_FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "avif", "ico", "css", "js", "mjs", "json", "html", "php", "pdf"}
_IPV4 = re.compile(rf"(?<!{_W})(?<![.,/+-])(?:\d{{1,3}}\.){{3}}\d{{1,3}}(?!{_W}|-|\.\d|,\d)")
_IPV6 = re.compile(rf"(?<!{_W})(?<![:.])[23][0-9a-f]{{3}}:[0-9a-f:]{{3,34}}(?!{_W}|:|\.\d)", re.I)
_VERSION = re.compile(
    r"(?:\b(?:v|ver|vers|versions?|release|rev|revision|build|firmware|driver|kernel|sdk|update|patch|section|chapter"
    r"|clause|rule|paragraph|figure|table|step|oid)|版本|バージョン|버전|[§#=~^])[\s.:]{0,3}\Z",
    re.I,
)
_SSN = re.compile(rf"(?<!{_W})(?<!-)(?!000|666|9)\d{{3}}-(?!00)\d\d-(?!0000)\d{{4}}(?!{_W}|-)")
_CARD = re.compile(rf"(?<!{_W})(?<![.,+-])\d(?:[ -]?\d)*(?!{_W}|[.,]\d)")
_CARD_PREFIX = re.compile(
    r"(?:4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14,17})"
)
_CARD_GROUPS = re.compile(r"\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5}")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d\d(?: ?[A-Z0-9]){11,30}")


def _phones(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for match in NUMBER.finditer(text, start, stop):
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
        return _is_valid("+" + digits, [None])
    if not cue and _OTHER.search(before):
        return False
    if digits.startswith("00") and len(digits) > 9:
        return _is_valid("+" + digits[2:], [None])
    if cue:
        return len(digits) <= 12
    if _AMERICAN.fullmatch(written):
        return _is_valid(digits, ["US"])
    if _TRUNK.fullmatch(written) and 9 <= len(digits) <= 12 and not _COUNTING.fullmatch(written):
        return _is_valid(digits, _TRUNK_REGIONS)
    return bool(_BRACKETED.fullmatch(written)) and _is_valid(digits, ["US", "BR", "MX"])


def _is_valid(number: str, regions: Sequence[str | None]) -> bool:
    """Return True if a number is valid in one of the regions. Region None: it has a country code; check its length."""
    import phonenumbers

    for region in regions:
        with suppress(phonenumbers.NumberParseException):
            parsed = phonenumbers.parse(number, region)
            if phonenumbers.is_valid_number(parsed) if region else phonenumbers.is_possible_number(parsed):
                return True
    return False


class Found(NamedTuple):
    """A piece of personal data and its place."""

    kind: str  # a key of PLACEHOLDERS
    start: int
    stop: int


def find(text: str) -> list[Found]:
    """Find all personal data in a text, in order and without overlaps."""
    taken = [Found("email", *span) for finder in (_emails, _spelt_emails) for span in finder(text)]
    taken += [Found("ip", *span) for span in _ipv6(text)]
    for stretch in _STRETCH.finditer(text):
        start, stop = max(0, stretch.start() - 4), stretch.end() + 3  # context that the patterns look at
        if sum(map(str.isdigit, stretch[0])) >= FEWEST_DIGITS or stretch[0].count(".") > 2:
            taken += [Found(kind, *span) for kind, finder in _FINDERS.items() for span in finder(text, start, stop)]
    order = list(PLACEHOLDERS)  # of two that overlap, the kind with the stricter check wins
    apart: list[Found] = []
    for item in sorted(taken, key=lambda item: (item.start, order.index(item.kind))):
        if apart and item.start < apart[-1].stop:
            if order.index(item.kind) < order.index(apart[-1].kind):
                apart[-1] = item
            continue
        apart.append(item)
    return apart


def redact(text: str) -> tuple[str, dict[str, int]]:
    """Replace personal data by placeholders; return the text and the count of each kind.

    >>> redact("Write to ann.hill@example.org or call +44 20 7946 0958.")
    ('Write to email@example.com or call +1 202 555 0100.', {'email': 1, 'phone': 1})
    """
    pieces, position = [], 0
    counts: Counter[str] = Counter()
    for kind, start, stop in find(text):
        placeholder = IPV6_PLACEHOLDER if kind == "ip" and ":" in text[start:stop] else PLACEHOLDERS[kind]
        if text[start:stop] == placeholder:
            continue
        pieces += [text[position:start], placeholder]
        position = stop
        counts[kind] += 1
    return "".join([*pieces, text[position:]]), dict(counts)


def _emails(text: str) -> Iterator[tuple[int, int]]:
    free = 0
    for sign in re.finditer("@", text):
        at = sign.start()
        host = _HOST.match(text, at + 1, at + 255)
        local = _LOCAL.match(text[max(free, at - 65) : at][::-1])
        if not host or not local or host[0].rpartition(".")[2].lower() in _FILES:
            continue
        name = _PARTED.split(local[0][::-1])[-1].lstrip(".-'`*!#^~$%")  # medium.com/@some.author leaves none
        start = at - len(name)
        handle = text[start - 1 : start] == "@"  # @name@host.social
        service = name.lower() == "git" or (name.lower() == "noreply" and text[host.end() : host.end() + 1] == ":")
        if not name or len(local[0]) > 64 or ".." in name or name.endswith(".") or handle or service:
            continue
        free = at + 1 + len(_NEXT_SENTENCE.sub("", host[0]))
        yield start, free


def _spelt_emails(text: str) -> Iterator[tuple[int, int]]:
    """Find `name [at] host [dot] org` and `name [at] host.org`."""
    for sign in _SPELT_OUT.finditer(text):
        stop = sign.start() - (text[sign.start() - 1 : sign.start()] == " ")
        local = re.match(rf"(?:{_W}|[.+-]){{1,64}}", text[max(0, stop - 64) : stop][::-1])
        host = _SPELT_HOST.match(text, sign.end(), sign.end() + 255)
        if local and host and re.search(r"[a-z]{2,}$", host[0], re.I):
            yield stop - len(local[0]), host.end()


def _ipv4(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text, start, stop):
        before = text[max(0, match.start() - 16) : match.start()]
        named = re.search(r"\bips?\b[^\w\n]*(?:address(?:es)?\b)?[^\n\w]{0,3}\Z", before, re.I)
        # four small numbers are a version or a heading; one in 5,000 public addresses looks like that
        small = all(int(part) < 30 for part in match[0].split("."))
        if _is_public(match[0]) and not _VERSION.search(before) and (named or not small):
            yield match.span()


def _ipv6(text: str) -> Iterator[tuple[int, int]]:
    if not re.search(r":[0-9a-fA-F]{0,4}:", text):
        return
    for match in _IPV6.finditer(text):
        address = match[0] if match[0].endswith("::") else match[0].rstrip(":")
        if _is_public(address):
            yield match.start(), match.start() + len(address)


def _is_public(address: str) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    is_assigned = parsed.version == 4 or parsed.packed[0] >> 5 == 1  # 2000::/3
    return parsed.is_global and not parsed.is_multicast and str(parsed) not in RESOLVERS and is_assigned


def _cards(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    for match in _CARD.finditer(text, start, stop):
        if not 13 <= match.end() - match.start() <= 23 or not _CARD_GROUPS.fullmatch(match[0]):
            continue
        digits = re.sub(r"\D", "", match[0])
        if _CARD_PREFIX.fullmatch(digits) and luhn.is_valid(digits) and len(set(digits)) > 1:
            yield match.span()


def _ibans(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN.finditer(text, start, stop):
        groups = match[0].split(" ")
        for count in range(len(groups), 0, -1):  # the last groups may be ordinary words
            written = " ".join(groups[:count])
            # stdnum's country rules do not know all banks
            if len(written) >= 15 and iban.is_valid(written, check_country=False):
                yield match.start(), match.start() + len(written)
                break


# each searches between two positions of the text
_FINDERS: dict[str, Callable[[str, int, int], Iterator[tuple[int, int]]]] = {
    "iban": _ibans,
    "card": _cards,
    "ssn": lambda text, start, stop: (match.span() for match in _SSN.finditer(text, start, stop)),
    "ip": _ipv4,
    "phone": _phones,
}
