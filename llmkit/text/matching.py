"""`--judge match`: judge an answer right, wrong or evasive by comparing its words with those of accepted answers.

    judge = MatchJudge()
    judge("The capital of France is Paris.", "What is the capital of France?", ["Paris"])   # "right"

An answer is right if its words are those of an accepted answer; or if, without small words and words of the question,
- one of the two has all words of the other: words may be missing or added, none may be replaced;
- the F1 of their words (Rajpurkar et al. 2016, arXiv:1606.05250) is at least 0.7;
or if an accepted answer occurs in a sentence whose other words do not change it (answer_spans.py). In all cases
- their numbers are equal and in the same order; if the answer is a year, a date in that year is accepted;
- their currencies are equal;
- there is no negation (`not`, `never`), no open choice (`or`), and no word of the question is replaced by its opposite.
The complete answer is compared, and also its first sentence if the rest does not retract it. An answer is `evasive` if
it is empty, says that it does not know, or only repeats the question; it is never right. A guess after such words ("I'm
not sure, but I think it's Paris") counts as an answer, and so does an answer before something unknown ("1874; the cause
is unknown"). The evasive phrases are in matching.json, by language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

from llmkit.formats.questions import Question
from llmkit.text.answer_spans import (
    BASES,
    JOINS,
    MONTHS,
    SMALL,
    Sentence,
    bare_answer,
    gives_answer,
    is_opposed,
    shorter_forms,
)
from llmkit.text.normalize import KNOWN, Token, is_number, is_sign, is_spaceless, places, word_list, words

RIGHT, WRONG, EVASIVE = "right", "wrong", "evasive"
VERDICTS = (RIGHT, WRONG, EVASIVE)
UNREADABLE = "unreadable"  # no verdict: the reply of a judging model could not be parsed
# two words of three pass (0.8), one of two does not (0.67): "Kennedy" is not "Robert Kennedy"
F1 = 0.7
REPEATED = 3  # fewest words of a question whose repetition is removed

DENIALS = word_list("denials")  # includes words that leave a choice open
TAKEN_BACK = DENIALS | word_list("retractions")
SPEAKERS, KNOWING, LACKING = word_list("speakers"), word_list("knowing"), word_list("lacking")
INFORMING, SELF = word_list("informing"), frozenset(["i", "im", "ive", "id", "me", "my", "we", "us", "our"])
KNOWING_ELSEWHERE, UNKNOWING = word_list("knowing elsewhere"), word_list("unknowing")
SENTENCE = re.compile(r"[.!?]\s")
ADVERBS = word_list("adverbs")
# "bronze, not iron" and "not iron, but bronze" say bronze
NOT_ONE = re.compile(r"\A\W*not (?:[^,.;]{1,60}),? but ", re.IGNORECASE)
NOT_OTHER = re.compile(
    r"(?:,? (?:and |but )?(?:rather than|instead of)|, (?:and |but )?not) [^,.;]{1,60}(?=[,.;]|\Z)", re.IGNORECASE
)
HEDGE = re.compile(
    r"(?:(?:if (?:i had to guess|pressed)|as far as i (?:know|recall|can tell)|perhaps|maybe|probably|possibly"
    r"|vielleicht|vermutlich|peut-\u00eatre|quiz\u00e1s?|forse|talvez|misschien"
    r"|i (?:think|believe|guess|suspect|assume|would (?:say|guess))|i['\u2019]d (?:say|guess)|my (?:best )?guess is"
    r"|ich (?:glaube|denke|vermute)|je (?:crois|pense)(?: que)?|creo que|credo|penso|acho que|ik (?:denk|geloof))"
    r"\b[\s,]{0,3}(?:that\s)?)+(?=\w)",
    re.IGNORECASE,
)
# the beginning of a guess after words of doubt
GUESS = re.compile(
    r"(?:\b(?:but|though|although|however|yet|still|aber|doch|mais|pero|ma|mas|maar)\b|[.;!\u2014])[\s,]{0,3}"
    rf"(?={HEDGE.pattern}|my (?:best )?guess|(?:it (?:is|was)|it['\u2019]s)\b)",
    re.IGNORECASE,
)
AFTERTHOUGHT = re.compile(r";|, (?=(?:but|although|though|who|which|and|while|for|with|as)\b)|(?<=\w\w)[.!]\s")
DOUBT, ASPECTS = word_list("doubt"), word_list("aspects")
DENIED_IN_JAPANESE = re.compile(
    "\u3067\u306f\u3042\u308a|\u3067\u306f\u306a|\u3058\u3083\u306a|\u3058\u3083\u3042\u308a"
)
UMLAUTS = str.maketrans({"\u00e4": "ae", "\u00f6": "oe", "\u00fc": "ue", "\u00f8": "oe", "\u00e5": "aa"})
FILLERS = word_list("fillers")
NAME = re.compile(r"\b[A-Z][^\W\d_]{4,30}\b")
YES, NO = frozenset(["yes", "yeah", "yep"]), frozenset(["no", "nope", "nah"])
SENTENCE_END = re.compile("(?<=\\w{3}[.!?])\\s+|(?<=[\u3002\uff01\uff1f\u0964])|\\s*\\n\\s*")
CLAUSE = re.compile(r", (?=(?:of which|of whom|which|who|where|including|with|because|as)\b)")
LABEL = re.compile(r"\W*(?:(?:the |final )*answer|a)\W*:\W*(?=\w)", re.IGNORECASE)


class Answered(NamedTuple):
    """A question and responses to it; `details` are passed through for the caller."""

    question: Question
    responses: Sequence[str]
    details: Any = None


class Judge(Protocol):
    """A judge of answers; `name` is for reports."""

    name: str

    def judge_each(self, answered: Iterable[Answered]) -> Iterator[tuple[Answered, list[str]]]:
        """Yield each question with the verdicts on its responses, of `VERDICTS` or `UNREADABLE`, in order."""
        ...


class MatchJudge:
    """A judge that compares words; `refusals` are further evasive answers."""

    name = "match"

    def __init__(self, refusals: Iterable[str] = ()) -> None:
        self._refusals = {words(text) for text in refusals}

    def __call__(self, response: str, question: str, answers: Sequence[str]) -> str:
        """Return one of `VERDICTS`."""
        response = LABEL.sub("", response, count=1) if LABEL.match(response) else response
        reply, query = Sentence.of(response), Sentence.of(question)
        accepted = [spelling for spelling in map(Sentence.of, _spelt(answers)) if spelling.words]
        if not reply.words:
            same = is_sign(response) and response.strip() in answers
            return RIGHT if same else EVASIVE
        if any(reply.words == right.words and _same_currency(reply, right) for right in accepted):
            return RIGHT
        if reply.words in self._refusals:
            return EVASIVE
        guesses = list(islice(GUESS.finditer(response), 9))
        if 0 < len(guesses) < 9:  # "I'm not sure, but I think it is"
            unsure = Sentence.of(response[: guesses[0].start()])
            if unsure.words and (self._is_evasive(unsure, accepted) or _lacks_knowledge(unsure, query)):
                return self(response[guesses[0].end() :], question, answers)
        is_evasive = self._is_evasive(reply, accepted)
        if is_evasive and "unknown" in reply.known and any("unknown" in right.known for right in accepted):
            return RIGHT
        if is_evasive or _lacks_knowledge(reply, query):
            answer, *more = AFTERTHOUGHT.split(response, maxsplit=1)
            rest = set(words(" ".join(more)))
            if more and (not DOUBT & rest or ASPECTS & rest - query.known):  # "1874, but I don't know why"
                verdict = self(answer, question, answers)
                if verdict == RIGHT or (verdict == WRONG and _names(Sentence.of(answer).tokens, query)):
                    return verdict
            if is_evasive:
                return EVASIVE
        if not _content(_without(reply.words, query.words)):
            return EVASIVE
        shorter = [other for right in accepted for other in shorter_forms(right, query) if other.words]
        if DENIED_IN_JAPANESE.search(response) and not DENIED_IN_JAPANESE.search(question):
            return WRONG
        plain = NOT_OTHER.sub("", NOT_ONE.sub("", response))
        same_names = [_with_names_of(answer, response) for answer in answers]
        if "who" in query.known:  # "it was Hans Müller" for an answer that is only a last name
            lasts = "|".join(answer for answer in answers if NAME.fullmatch(answer))
            same_names += [re.sub(rf"(?<=[a-z] )[A-Z][a-z]+ (?=(?:{lasts})\b)", "", response)] if lasts else []
        spelt = _spelt([response, plain, *same_names])
        texts = {text: None for written in spelt for text in (written, *_leading_parts(written))}
        forms = [(right, True) for right in accepted] + [(right, False) for right in shorter]
        readings = [reply, *(sentence for sentence in map(Sentence.of, texts) if sentence.words)]
        if any(self._matches(reading, query, form, whole) for reading in readings for form, whole in forms):
            return RIGHT
        accepted += shorter
        offered = any(right.known <= query.known for right in accepted)
        beyond = [word for word in _content(reply.words) if not query.echoes(word) and word not in FILLERS]
        is_choice = offered or any(right.known & YES | right.known & NO for right in accepted)
        if _lacks_knowledge(reply, query, is_choice):
            return EVASIVE
        if (hedge := HEDGE.match(response)) and self(response[hedge.end() :], question, answers) == RIGHT:
            return RIGHT
        return WRONG if is_choice or beyond else EVASIVE

    @staticmethod
    def _is_evasive(reply: Sentence, accepted: Sequence[Sentence]) -> bool:
        bare = tuple(word for word in reply.words if word not in ADVERBS)
        return reply.words == ("unknown",) or any(
            places(words, phrase) and not any(places(other.words, phrase) for other in accepted)
            for words in (reply.words, bare)
            if words
            for phrase in evasions()
        )

    def judge_each(self, answered: Iterable[Answered]) -> Iterator[tuple[Answered, list[str]]]:
        """Judge each question's responses; see `Judge`."""
        for item in answered:
            yield item, [self(response, item.question.question, item.question.answers) for response in item.responses]

    def _matches(self, reply: Sentence, question: Sentence, answer: Sentence, whole: bool) -> bool:
        """Return True if a sentence gives an accepted answer, by an occurrence or, if it is `whole`, by its words."""
        if answer.known <= YES or answer.known <= NO:  # without yes or no, compare affirmation and negation
            first = reply.words[0]
            if first in YES or first in NO:
                return (first in YES) == (answer.known <= YES) and not (reply.known & YES and reply.known & NO)
            opposed = is_opposed(reply, question, answer)
            if not opposed and not any(question.echoes(word) for word in reply.words if word not in SMALL):
                return False
            return (bool(DENIALS & reply.known - question.known) != opposed) == (answer.known <= NO)
        if DENIALS & reply.known - answer.known - question.known or not _same_currency(reply, answer):
            return False
        if is_opposed(reply, question, answer):
            return False
        rest = _without(reply.words, question.words)
        if answer.known <= question.known:  # a choice that the question offers
            if self._same(_content(rest), _content(answer.words)):
                return True
        elif self._has_words(rest, question, answer):
            given = gives_answer(reply, question, answer)
            same = whole or Counter(rest) - Counter(JOINS) == Counter(answer.words) - Counter(JOINS)
            if given or (given is None and same):
                return True
        if TAKEN_BACK & reply.known - answer.known - question.known or not _same_numbers(reply, question, answer):
            return False
        if not gives_answer(reply, question, answer):
            return False
        if not answer.known <= question.known:
            return True
        start = bare_answer(answer)  # a choice that the question offers: "the Tarn is longer", but not both of them
        return (
            reply.words[: len(start)] == start
            and "and" not in reply.known
            and any(word not in SMALL for word in reply.words[len(start) :])
        )

    def _has_words(self, words: tuple[str, ...], question: Sentence, answer: Sentence) -> bool:
        """Return True if the words are those of an answer, except small words and words of the question."""
        forms = {BASES[word]: word for word in answer.words if word in BASES}
        words = tuple(forms.get(BASES.get(word, ""), word) for word in words)  # "had frozen" for "froze"
        words = tuple(word for word in words if word in answer.known or not question.echoes(word))
        if JOINS & answer.known and Counter(_content(words)) != Counter(_content(answer.words)):
            return False  # a list
        if {"who", "whom"} & question.known and answer.words[-1] not in words and answer.text.istitle():
            return False  # a name without its last part
        beyond = tuple(
            word for word in _content(answer.words) if word not in question.known
        )  # "24" of "24 points" for "How many points ...?"
        return self._same(_content(words), _content(answer.words)) or (
            bool(beyond) and self._same(_content(words), beyond)
        )

    def _same(self, words: tuple[str, ...], answer: tuple[str, ...]) -> bool:
        if len(answer) == 1 and _is_year(answer[0]) and MONTHS & set(words):
            words = tuple(word for word in words if word not in MONTHS and not _is_day(word))
        if [*filter(is_number, words)] != [*filter(is_number, answer)]:
            return False
        if any(map(is_spaceless, answer)) and not places(words, answer):
            return False  # characters in another order are a different word
        word_counts, other = Counter(words), Counter(answer)
        shared = (word_counts & other).total()
        if shared < min(word_counts.total(), other.total()):
            return False
        return shared > 0 and 2 * shared / (word_counts.total() + other.total()) >= F1


def _same_currency(reply: Sentence, answer: Sentence) -> bool:
    return not (reply.currencies and answer.currencies) or bool(reply.currencies & answer.currencies)


def _same_numbers(reply: Sentence, question: Sentence, answer: Sentence) -> bool:
    """Return True if the numbers of a reply, except those of the question, are those of the answer.

    For an answer without numbers, return True if none replaces one of the question ("the second" for "the first").
    """
    numbers = [word for word in reply.words if is_number(word) and (word in answer.known or word not in question.known)]
    wanted = [word for word in answer.words if is_number(word)]
    if not wanted:
        return not numbers or not any(is_number(word) and word not in reply.known for word in question.words)
    pairs = zip(reply.words, reply.words[1:], strict=False)
    counted = [word for word, noun in pairs if is_number(word) and noun not in SMALL and question.echoes(noun)]
    if len(wanted) == 1 and counted == wanted:  # "8 legs and 6 eyes" for "How many legs ...?"
        return True
    if len(wanted) == 1 and _is_year(wanted[0]) and reply.known & MONTHS:
        numbers = [number for number in numbers if not _is_day(number)]
    return numbers == wanted


@cache
def evasions() -> tuple[tuple[str, ...], ...]:
    """Return the words of each evasive phrase in matching.json."""
    return tuple(dict.fromkeys(words(phrase) for some in KNOWN["evasions"].values() for phrase in some))


def _lacks_knowledge(reply: Sentence, question: Sentence, is_choice: bool = False) -> bool:
    """Return True if a reply says in other words than matching.json's phrases that something is not known."""
    end = next((at for at, token in enumerate(reply.tokens) if at and SENTENCE.search(token.before)), None)
    first = reply.words[:end]
    lacks = next((at for at, word in enumerate(first) if word in LACKING), None)
    near = set() if lacks is None else set(first[max(0, lacks - 4) : lacks + 9])
    if (
        near
        and (first[0] in SPEAKERS or near & {"i", "me"})
        and (near & KNOWING - question.known or first[lacks or 0] in UNKNOWING)
    ):
        return True
    is_own = not is_choice and bool(near & SELF - question.known) and not near & {"think", "believe"}
    uninformed = any(
        word in INFORMING and not question.echoes(word) for word in first[(lacks or 0) + 1 : (lacks or 0) + 6]
    )
    if near and (is_own or uninformed):  # "No date is given", unless a name or number is
        return not _names(reply.tokens[: len(first)], question)
    return len(first) <= 12 and bool(DENIALS & set(first)) and bool(KNOWING_ELSEWHERE & set(first) - question.known)


def _names(tokens: Sequence[Token], question: Sentence) -> bool:
    """Return True if there is a number, or a name after the first word, that is not in the question."""
    named = (
        token.word for at, token in enumerate(tokens) if is_number(token.word) or (at and token.written[:1].isupper())
    )
    return any(word not in SMALL | SELF and not question.echoes(word) for word in named)


def _spelt(texts: Iterable[str]) -> list[str]:
    """Return texts, and also their spellings with umlauts as two letters."""
    texts = list(texts)
    return list(dict.fromkeys([*texts, *(text.translate(UMLAUTS) for text in texts)]))


def _with_names_of(answer: str, response: str) -> str:
    """Spell the names of a response as in an answer: other transcriptions, and middle names for initials."""
    names = {_transcribed(name): name for name in NAME.findall(answer)}
    response = NAME.sub(lambda match: names.get(_transcribed(match[0]), match[0]), response)
    pieces = answer.replace(".", ". ").split()
    if len(response) > 1000 or not any(map(NAME.fullmatch, pieces)) or not any(part[1:] == "." for part in pieces):
        return response
    pattern = r"\W{1,2}".join(
        rf"{re.escape(part[0])}[^\W\d_]*" if part[1:] == "." else re.escape(part) for part in pieces
    )
    return re.sub(rf"\b{pattern}\b", lambda _: answer, response)


def _transcribed(name: str) -> str:
    name = name.casefold()
    for pattern, replacement in KNOWN["transcriptions"].items():
        name = re.sub(pattern, replacement, name)
    return name


def _leading_parts(response: str) -> Iterable[str]:
    """Yield the first sentence, and its part before a relative clause, unless the rest retracts it."""
    text = response.strip()
    for end in (SENTENCE_END, CLAUSE):
        first, *rest = end.split(text, maxsplit=1)
        if rest and not TAKEN_BACK.intersection(words(rest[0])):
            yield first
            text = first


def _content(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words without small ones, or all of them if none is left."""
    return tuple(word for word in words if word not in SMALL) or words


def _without(words: tuple[str, ...], question: tuple[str, ...]) -> tuple[str, ...]:
    """Remove a repetition of the complete question from the words of a reply."""
    for start in places(words, question)[:1] if len(question) >= REPEATED else ():
        return words[:start] + words[start + len(question) :]
    return () if words == question else words


def _is_year(word: str) -> bool:
    return is_number(word) and len(word) == 5 and word[1:].isdigit() and 1000 <= int(word[1:]) <= 2100


def _is_day(word: str) -> bool:
    return is_number(word) and len(word) <= 3 and word[1:].isdigit() and 1 <= int(word[1:]) <= 31
