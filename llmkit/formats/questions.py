"""Questions with answers: read every format that `probe-knowledge` accepts as one.

    {"question": "When did it open?", "answer": "1889"}         also "answers"; a list has equally correct answers
    {"question": ..., "answers": {"text": ["1889"]}, "context": "..."}      SQuAD's rows; the context is the passage
    {"version": ..., "data": [{"paragraphs": [{"context", "qas"}]}]}        SQuAD 1.1 and 2, one JSON object per file
    {"context": "Question: ...?\\nAnswer:", "answer": "1889", "aliases": ["the year 1889"]}    llm-foundry's; also
                                                                "continuation", after a sentence to be completed

A record may name its `passage` (or `context`), `passage_id` (or `id`) and `language`, an ISO 639-1 code.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from llmkit.errors import UserError, naming
from llmkit.io.jsonl import json_rows, names_of, records_of
from llmkit.io.records import CHOICES, FACTS, BadRecords, Row, fields_of, first_of, kind_of, not_used

F = TypeVar("F", bound=Callable[..., Any])
MARKER = "####"  # precedes the final answer in GSM8K
EXPECTED = "'question' and 'answer', or 'context' and 'continuation'"
# the text around the question in a prompt for base models
FRAME = re.compile(r"\A\s*(?:question|q):[ \t]*|\s*\n\s*(?:answer|a):\s*\Z", re.IGNORECASE)
ASKED_BY = re.compile(r"\b(how many|how much|how|who|whom|whose|what|when|where|which|why)\b", re.IGNORECASE)


def placed(read: F) -> F:
    """Prefix the UserErrors of a function with FILE:LINE of its first argument, a row."""

    @wraps(read)
    def read_placed(row: Row, *arguments: Any) -> Any:
        with naming(row.where):
            return read(row, *arguments)

    return cast(F, read_placed)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its correct answers; the first is the one to teach.

    passage, passage_id  the text it was made from, and its name
    kind                 "who", "when", "how many", ...; "cloze: year", ...; else "other"
    language             ISO 639-1; empty if unknown
    where                FILE:LINE
    losses               unused parts of the record
    """

    question: str
    answers: tuple[str, ...]
    passage: str = ""
    passage_id: str = ""
    kind: str = "other"
    language: str = ""
    where: str = ""
    losses: tuple[str, ...] = ()


def read_questions(
    paths: Sequence[str],
    limit: int | None = None,
    bad: BadRecords | None = None,
    columns: Mapping[str, str] = {},
) -> tuple[list[Question], Counter[str]]:
    """Read the questions of files, `-` for stdin, at most `limit` records in total; count skipped ones by reason.

    SQuAD 2's unanswerable questions are skipped. `bad` skips and counts bad records; without it, the first raises
    UserError with file and line. Raise UserError if no question is left.
    """

    def rows_of(handle: io.BufferedReader, path: str, columns: Mapping[str, str]) -> Iterator[Row | UserError]:
        for row in json_rows(handle, path, columns):
            yield from [row] if isinstance(row, UserError) else unfolded(row)

    read = list(records_of(paths, rows_of, read_question, limit, bad, columns))
    questions = [item for item in read if not isinstance(item, str)]
    if not questions:
        raise UserError(f"{names_of(paths)}: expected questions with answers, found none")
    return questions, Counter(item for item in read if isinstance(item, str))


def kind_of_question(text: str) -> str:
    """Classify an English question by its first question word; "other" without one.

    >>> kind_of_question("In which year did it open?"), kind_of_question("Kde to je?")
    ('which', 'other')
    """
    match = ASKED_BY.search(text)
    return match[1].lower() if match else "other"


# ---- SQuAD


def unfolded(row: Row) -> Iterator[Row]:
    """Yield a record itself, or the questions in one or all of SQuAD's articles."""
    if first_of(row.value, FACTS) is None and "paragraphs" in row.value:  # one article, of an object on many lines
        yield from _squad([row.value], row.path, row.line)
    elif first_of(row.value, FACTS) is None and "data" in row.value:
        yield from _squad(_listed(row.value, "data", row.path), row.path)
    else:
        yield row


def _squad(articles: Iterable[dict[str, Any]], name: str, first: int = 1) -> Iterator[Row]:
    """Yield the questions of SQuAD's articles, named by article, paragraph and id: "xquad.en.json:2.1, id 7"."""
    for article_number, article in enumerate(articles, first):
        where = f"{name}:{article_number}"
        title = str(article.get("title") or article_number)
        for number, paragraph in enumerate(_listed(article, "paragraphs", where), 1):
            here = f"{where}.{number}"
            for entry in _listed(paragraph, "qas", here):
                question = {key: entry.get(key) for key in ("question", "answers")}
                unanswered = entry.get("is_impossible") or entry.get("answers") == []
                passage = {"passage": paragraph.get("context"), "passage_id": f"{title}/{number}"}
                yield Row({**question, **passage, "is_impossible": unanswered}, f"{here}, id {entry.get('id')}", 0)


def _listed(value: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    objects = value.get(field)
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise UserError(f"{where}: expected {field!r} to be a list of objects, as in SQuAD, found {_found(objects)}")
    return objects


# ---- records


@placed
def read_question(row: Row) -> Question | str:
    """Read the question in a record, or the reason why there is none. Raise UserError with file, line and expected."""
    value = row.value
    field = first_of(value, FACTS)
    asking = first_of(value, ("question", "context"))
    if asking is None or field is None:
        raise UserError(f"expected {EXPECTED}, found {fields_of(value)}")
    if value.get("is_impossible") or (isinstance(value[field], dict) and value[field].get("text") == []):
        return "no answer in the passage"
    text = _text(value[asking], asking)
    if asking == "context":
        text = _text(FRAME.sub("", text), asking)
    aliases = value.get("aliases") or []
    answers = answers_of(chosen(value, field), field) + (answers_of(aliases, "aliases") if aliases else ())
    named = first_of(value, ("passage", "context") if asking == "question" else ("passage",))
    passage = None if named is None else _text(value[named], named)
    name = value.get("passage_id", value.get("id"))
    language = value.get("language") or ""
    if not isinstance(language, str):
        raise UserError(f"expected 'language' to be a code such as \"en\", found {kind_of(language)}")
    return Question(
        text,
        tuple(dict.fromkeys(answer.rpartition(MARKER)[2].strip() or answer for answer in answers)),
        passage or "",
        "" if name is None else str(name),
        kind_of_question(text) if asking == "question" or text.endswith("?") else "completion",
        language,
        row.where,
        not_used(value, ("context", asking, field)),
    )


def chosen(value: dict[str, Any], field: str) -> Any:
    """Return the answer in a field of a record; an index into its choices, from 0, gives the choice.

    >>> chosen({"choices": ["3", "4"], "answer": 1}, "answer"), chosen({"answer": 1}, "answer")
    ('4', 1)
    """
    answer, choices = value[field], next((value[name] for name in CHOICES if isinstance(value.get(name), list)), [])
    return choices[answer] if type(answer) is int and 0 <= answer < len(choices) else answer


def answers_of(value: Any, field: str) -> tuple[str, ...]:
    """Read the answers of a field: text, number or a list of them, SQuAD's {"text": ...} or a list of it, or TriviaQA's
    {"value": ..., "aliases": [...]}. Raise UserError for other values."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    elif isinstance(value, dict) and (name := first_of(value, ("value", "Value"))) is not None:
        value = [value[name], *(value.get("aliases") or value.get("Aliases") or [])]
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError(f"expected an answer in {field!r}, found an empty list")
    texts = [item["text"] if isinstance(item, dict) and "text" in item else item for item in items]
    numbers = [str(text) if isinstance(text, (int, float)) and not isinstance(text, bool) else text for text in texts]
    return tuple(dict.fromkeys(_text(text, field) for text in numbers))


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"expected {field!r} to be text, found {_found(value)}")
    return value.strip()


def _found(value: Any) -> str:
    return "an empty string" if isinstance(value, str) else "none" if value is None else kind_of(value)
