"""Find a known answer in a sentence, and decide by the words around it whether the sentence gives that answer.

    reply, question, answer = map(Sentence.of, ("It was built in 1902 by Otto Feld.", "Who built it?", "Otto Feld"))
    gives_answer(reply, question, answer)  # True

A sentence may say more than the answer ("in 1902", ", the novelist"), but not something else: "Ada Byrne's brother" and
"New York" are not "Ada Byrne" and "York". The word lists are in matching.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from llmkit.text.normalize import ARTICLES, KNOWN, MAY, ROMAN, Token, is_number, is_spaceless, places, tokens, word_list

MOST = 3  # occurrences of an answer in one sentence; more is guessing

SMALL, MONTHS = word_list("small"), word_list("months") | {MAY}
TITLES, NAMES_OF, BOUNDS, MEASURED = (word_list(name) for name in ("titles", "names of", "bounds", "measured"))
ORIGINS, DIRECTIONS, COMPANIES = word_list("origins"), word_list("directions"), word_list("companies")
BOUNDS_ELSEWHERE = word_list("bounds elsewhere")  # bounds only before numbers: "nach" also means "to"
CHANGERS = word_list("changers")
KINDS = {entry.split()[0]: frozenset(entry.split()) for entry in KNOWN["kinds"]}
DETERMINERS = frozenset(KNOWN["determiners"])
AUXILIARIES = word_list("auxiliaries")
AGENTS = frozenset(["by", "von", "vom", "par", "por", "da", "door"])
JOINS = frozenset(["and", "und", "et", "y", "e"])
BASES = {form: entry.split()[0] for entry in KNOWN["irregular"] for form in entry.split()}
MEASURES = {form: entry.split()[0] for entry in KNOWN["measures"] for form in entry.split()}
# symbol of a unit: (quantity, factor to the smallest unit)
FACTORS = {sign: (kind, factor) for kind, units in KNOWN["factors"].items() for sign, factor in units.items()}
CURRENCIES = {form: entry.split()[0] for entry in KNOWN["currencies"] for form in entry.split()}


def stem(word: str) -> str:
    """Strip the endings of verbs and nouns from a word.

    >>> {stem(word) for word in ("paint", "painted", "painter", "painting")}, stem("sung") == stem("sing")
    ({'paint'}, True)
    """
    if word in BASES:
        return BASES[word]
    for ending in ("ing", "ied", "ed", "er", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    word = word[:-1] if len(word) > 3 and word[-1] in "ey" else word
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


OPPOSITES: dict[str, set[str]] = {}
for _pair in KNOWN["opposites"]:
    _one, _other = map(stem, _pair.split())
    OPPOSITES.setdefault(_one, set()).add(_other)
    OPPOSITES.setdefault(_other, set()).add(_one)


@dataclass(frozen=True)
class Sentence:
    """A text and its words."""

    text: str
    tokens: tuple[Token, ...]

    @classmethod
    def of(cls, text: str) -> Sentence:
        """Split a text into words; units after a number become their symbols."""
        kept: list[Token] = []
        measured = False  # True if a unit may follow
        for token in tokens(text):
            is_unit = measured and token.word in MEASURES
            if not (measured and token.word in ("per", "degree")):
                kept.append(token._replace(word=MEASURES[token.word]) if is_unit else token)
                measured = is_unit or is_number(token.word)
        return cls(text, tuple(kept))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words without articles, as `normalize.words` gives them."""
        with_articles = [token.word for token in self.tokens]
        return tuple(word for word in with_articles if word not in ARTICLES) or tuple(with_articles)

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset(self.words)

    @cached_property
    def stems(self) -> frozenset[str]:
        return frozenset(map(stem, self.words))

    @cached_property
    def currencies(self) -> set[str]:
        """The currencies in the text, by their symbols."""
        named = {CURRENCIES[token.word] for token in self.tokens if token.word in CURRENCIES}
        return named | {sign for sign in CURRENCIES.values() if sign in self.text}

    def echoes(self, word: str) -> bool:
        """Return True if a word, or another form of it, is in the sentence: "scored" for "score", "sang" for "sung"."""
        return word in self.known or (len(word) > 2 and stem(word) in self.stems)


def is_opposed(reply: Sentence, question: Sentence, answer: Sentence) -> bool:
    """Return True if the opposite of a word of the question is used, "lost" for "won", or a word such as "vice"."""
    unlike = reply.stems - question.stems - answer.stems
    if reply.known & CHANGERS - question.known - answer.known:
        return True
    return any(OPPOSITES.get(stem, frozenset()) & unlike for stem in question.stems - reply.stems)


def bare_answer(answer: Sentence) -> tuple[str, ...]:
    """Return the words of an answer without leading small words: "May" of "in May", "cheese" of "its cheese"."""
    words = answer.words
    start = next((index for index, word in enumerate(words) if word not in SMALL or word in MONTHS), 0)
    return words[start:]


def shorter_forms(answer: Sentence, question: Sentence) -> Iterator[Sentence]:
    """Yield shorter forms of an answer: the last name for "who", the place without its country for "where"."""
    if question.known & {"where"} and "," in answer.text:
        yield Sentence.of(answer.text.partition(",")[0])
    names = [token for token in answer.tokens if token.word not in ARTICLES or (token.written == "A" and token.before)]
    if (
        question.known & {"who", "whom", "whose"}
        and len(names) > 1
        and all(name.written[:1].isupper() and not is_number(name.word) for name in names)
        and any(word not in SMALL for word in question.words)
    ):
        yield Sentence.of(names[-1].written)
    if len(names) > 1 and names[0].word in KINDS and (question.known & KINDS[names[0].word]):
        yield Sentence.of(" ".join(name.written for name in names[1:]))
    yield from _other_units(answer)
    yield from _name_forms(answer, names, question)
    number = next(iter(answer.words), "")
    counted = [token.written for token in answer.tokens[1:]]
    if "how" in question.known and is_number(number) and counted and _are_counted(counted):
        yield Sentence.of(answer.tokens[0].written)


def _are_counted(written: Sequence[str]) -> bool:
    return not any(word[:1].isupper() or word in MEASURES or word in CURRENCIES or is_number(word) for word in written)


def _other_units(answer: Sentence) -> Iterator[Sentence]:
    """Yield a number in other units: 4.5 t as 4500 kg, 1/2 as 50%."""
    if len(answer.words) not in (1, 2) or not is_number(answer.words[0]) or len(answer.words[0]) > 30:
        return
    value, unit = Decimal(answer.words[0][1:]), answer.words[1:]
    if unit == ("percent",):
        yield from (Sentence.of(f"{value:f}"), Sentence.of(f"{value / 100:f}"))
    elif not unit and 0 < value < 1:
        yield Sentence.of(f"{(value * 100).normalize():f} percent")
    elif unit and unit[0] in ("c", "f"):
        yield Sentence.of(f"{value:f} degrees")
    elif unit and unit[0] in FACTORS:
        kind, factor = FACTORS[unit[0]]
        for sign, (other, size) in FACTORS.items():
            if other == kind and sign != unit[0]:
                yield Sentence.of(f"{(value * factor / size).normalize():f} {sign}")


def _name_forms(answer: Sentence, names: Sequence[Token], question: Sentence) -> Iterator[Sentence]:
    """Yield a name without titles and suffixes such as Ltd, with and without initials, and with the last name first."""
    plain_names = [name for name in names if name.word not in TITLES | COMPANIES]
    if not plain_names or not all(name.written[:1].isupper() or name.word in JOINS for name in plain_names):
        return
    if len(plain_names) < len(names):
        yield Sentence.of(" ".join(name.written for name in plain_names))
    if not question.known & {"who", "whom", "whose"}:
        return
    people = [part.split() for part in re.split(r",| and | & ", answer.text) if part.strip()]
    if len(people) > 1 and all(len(part) > 1 for part in people):
        yield Sentence.of(" and ".join(part[-1] for part in people))
    elif 2 <= len(plain_names) <= 5:
        given, last = [name.written for name in plain_names[:-1]], plain_names[-1].written
        initials = [f"{name[0]}." for name in given]
        yield from (Sentence.of(f"{some} {last}") for some in {given[0], " ".join(initials), initials[0]})
        yield Sentence.of(f"{given[0]} {' '.join(initials[1:])} {last}")
        yield from (Sentence.of(f"{last} {some}") for some in {given[0], " ".join(given)})


def gives_answer(reply: Sentence, question: Sentence, answer: Sentence) -> bool | None:
    """Return True if a sentence gives the answer that occurs in it; None if its words do not occur in sequence."""
    wanted = bare_answer(answer)
    content: list[Token] = []  # the reply without articles
    determined: set[int] = set()  # indices of words after an article or another determiner
    before = last = ""
    for token in reply.tokens:
        before += token.before
        if token.word not in ARTICLES:
            if last in DETERMINERS:
                determined.add(len(content))
            content.append(token._replace(before=before))
            before = ""
        last = token.word
    starts = places(tuple(token.word for token in content), wanted)
    if not starts:
        return None
    if len(starts) > MOST:
        return False
    context = _Context(content, question, answer, determined)
    return any(context.keeps_answer(start, start + len(wanted)) for start in starts)


class _Context:
    """The words of a sentence around an answer."""

    def __init__(self, tokens: Sequence[Token], question: Sentence, answer: Sentence, determined: set[int]) -> None:
        self._tokens, self._question, self._answer, self._determined = tokens, question, answer, determined
        self._is_name = any(token.written[:1].isupper() for token in answer.tokens if token.word not in ARTICLES)
        self._is_number = any(map(is_number, answer.words))
        first = question.words[:2]
        self._wants_agent = first[:1] == ("who",) and len(first) > 1 and first[1] not in AUXILIARIES
        self._where = "where" in question.known

    def keeps_answer(self, start: int, stop: int) -> bool:
        """Return True if the words before and after leave the words from `start` to `stop` as the answer."""
        return self._before(start) and self._behind(start, stop) and not self._is_left(start, stop)

    def _is_left(self, start: int, stop: int) -> bool:
        """Return True for an origin or past state: "from Paris to Lyon", "the capital until 1950; now it is Brant"."""
        behind = [token.word for token in self._tokens[stop:]]
        if start and (self._tokens[start - 1].word == "from" or stem(self._tokens[start - 1].word) == stem("leave")):
            return bool({"to", "for"} & set(behind)) and not any(map(self._question.echoes, ORIGINS))
        if start and self._tokens[start - 1].word == "to" and "from" in self._question.known:
            return any(token.word == "from" for token in self._tokens[:start])
        if "now" in behind and "now" not in self._question.known:
            return bool({"was", "were", "used", "until"} & {token.word for token in self._tokens})
        # "Alaric was killed by the dragon" for "Who killed the dragon?"
        passive = behind[:1] and behind[0] in AUXILIARIES and "by" in behind[1:4]
        return bool(passive) and self._wants_agent

    def _plain(self, token: Token) -> bool:
        return token.word in SMALL or self._question.echoes(token.word) or token.word in self._answer.known

    def _before(self, start: int) -> bool:
        if start == 0:
            return True
        left, own = self._tokens[start - 1], self._tokens[start]
        if left.word in BOUNDS - self._question.known and not (left.word == "since" and "when" in self._question.known):
            return False
        if self._is_number and (
            left.word in BOUNDS_ELSEWHERE or (left.word == "to" and start > 1 and self._tokens[start - 2].word == "up")
        ):
            return False
        if left.word == "from" and start > 1 and self._tokens[start - 2].word in (*MEASURES.values(), "far", "away"):
            return False
        apart = own.before.strip(" \"'*`(\u00ab\u201c")
        if left.word in JOINS and not apart and start > 1:
            return self._tokens[start - 2].word in self._answer.known or self._plain(self._tokens[start - 2])
        if left.word == "of" and start > 1 and self._tokens[start - 2].word in DIRECTIONS - self._question.known:
            return False
        if left.word in ("of", "de", "di", "del", "du") and not self._where and self._is_name:
            head = self._tokens[start - 2].word if start > 1 else ""
            return head in NAMES_OF or self._question.echoes(head) or is_number(head)
        if self._wants_agent and self._is_name and not apart and left.word not in self._answer.known:
            if left.word in ("with", "for", "to", "from", "at"):
                return False
            if self._question.echoes(left.word) and left.word not in SMALL and not left.written[:1].isupper():
                return left.written.lower() in self._question.text.lower() and stem(left.word) != stem(
                    self._question.words[1]
                )
        is_kind = bool(KINDS.get(left.word, frozenset()) & self._question.known)  # "Mount" for "Which mountain ...?"
        if self._plain(left) or left.word in TITLES or left.word.endswith("ly") or is_kind:
            return True
        if apart == "." and len(left.written) == 1:  # an initial
            return False
        if apart in (":", "-", "\u2013", "\u2014", "=", "?", "!", ";", "."):
            return True
        if self._is_number and left.word in MONTHS:
            return True
        if left.written[:1].isupper() and start > 1:
            return False
        if apart == ",":
            return not left.written[:1].isupper()
        if self._is_number:
            return True
        return (
            not self._is_name
            or start - 1 in self._determined
            or (start > 1 and self._tokens[start - 2].word in ("by",))
        )

    def _behind(self, start: int, stop: int) -> bool:
        if self._tokens[stop - 1].written.endswith(("'s", "s'")) and not self._answer.text.rstrip(".").endswith(
            ("'s", "s'")
        ):
            return all(self._plain(token) for token in self._tokens[stop:])
        if stop == len(self._tokens):
            return True
        right = self._tokens[stop]
        apart = right.before.strip(" \"'*`)\u00bb\u201d\u00b0")
        is_capital = (
            right.written[:1].isupper() and right.word not in ("i", "id", "im") and stop not in self._determined
        )
        if right.word in JOINS and not apart:
            after = self._tokens[stop + 1] if stop + 1 < len(self._tokens) else None
            acts = after is not None and (after.word in BASES or (len(after.word) > 4 and after.word.endswith("ed")))
            return after is None or acts or self._plain(after) or after.word in ("nothing", "other")
        if right.word in ("or", "than"):
            return right.word == "than" and self._question.echoes("than")
        if right.word in ("\u7684", "\u306e") and not apart and stop + 1 < len(self._tokens):
            return self._plain(self._tokens[stop + 1])  # a possessive, as in "X's brother"
        if self._plain(right) or is_spaceless(right.word):
            return self._plain(right)
        if apart:
            return not (apart == "," and is_capital and not self._where and not self._is_number)
        if self._is_number and "many" in self._question.known and _are_counted([right.written]):
            return True  # "350 students" for "How many pupils ...?"
        if self._is_number:
            years = right.word == MEASURES["year"] and bool(self._question.known & {"old", "age"})
            return (
                years
                or right.word in MEASURED
                or right.word in MONTHS
                or right.word in CURRENCIES
                or is_number(right.word)
            )
        if is_number(right.word):
            return right.before != "" and not ROMAN.fullmatch(right.written)
        if is_capital:
            return False
        after = self._tokens[stop + 1] if stop + 1 < len(self._tokens) else None
        if self._is_name and start > 0 and self._tokens[start - 1].word in AGENTS:
            return True
        acts = right.word in BASES or right.word.endswith("ed") or right.word.endswith(("ly", "\ub2e4", "\uc694"))
        return acts or (self._is_name and after is not None and (after.word in SMALL or stop + 1 in self._determined))
