"""Problems for reinforcement learning: read every format that `rl` accepts as one.

    {"prompt": "2 + 2?", "answer": "4"}                         prompt: also question, problem, query, context, input,
                                                                sQuestion; or messages, also ShareGPT's
    {"instruction": "Add.", "input": "2 + 2", "output": "4"}    Alpaca's, with the prompt that sft trains on
    {"question": "...", "answer": "2 + 2 = 4.\\n#### 4"}         GSM8K's: the answer follows the last ####
    {"problem": "...", "solution": "... \\\\boxed{4}"}            MATH's: the answer is the last boxed expression
    {"question": "...", "options": ["A)3", "B)4"], "correct": "B"}          multiple choice; options are appended
    {"query": "...", "choices": ["3", "4"], "gold": 1}          the same, with an index from 0; also "answer"
    {"sQuestion": "...", "lSolutions": [4.0]}                   word problems with their solutions
    {"task_id", "prompt", "test", "entry_point"}                HumanEval's: code that is tested

The answer is the first field present of answer, answers, solution, target, continuation, correct and lSolutions; each
item of a list is correct. `verifier` names the verifier to use. Other fields pass through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, RecordPrompt, find_prompt, read_messages
from llmkit.formats.questions import FRAME, MARKER, answers_of, placed
from llmkit.io.progress import counted
from llmkit.io.records import (
    CONVERSATIONS,
    PROMPT_FIELDS,
    QUESTIONS,
    SOLVED_BY,
    Row,
    fields_of,
    first_of,
    kind_of,
    not_used,
)

BRACES = re.compile(
    r"(?P<box>\\(?:boxed|(?P<frame>fbox|fboxed))\s*)(?:(?P<brace>\{)|(?P<bare>[^\s\\{}$.,]+))|\\.|[{}]", re.DOTALL
)
LABEL = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem for rl: a prompt, and the data for judging a completion.

    messages  the prompt as messages; empty if it is plain text
    prompt    the prompt as text, or the text of the last message
    answer    short form: the text after GSM8K's ####, in the last box, or the letter of a choice; None without one
    verifier  named by the record, or None
    record    the complete record: ids, tests, options, schema, ...
    where     FILE:LINE
    losses    fields that may belong to the prompt but are not used
    alternatives  other correct answers
    """

    messages: tuple[Message, ...]
    prompt: str
    answer: str | None
    verifier: str | None
    record: dict[str, Any]
    where: str
    losses: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()


def answer_text(record: Mapping[str, Any]) -> str:
    """Return the longest answer or solution of a record that is text, or ""."""
    texts = [record[name] for name in SOLVED_BY if isinstance(record.get(name), str)]
    return max(texts, key=len, default="")


@placed
def read_problem(row: Row) -> Problem:
    """Read a problem from a record of any format. Raise UserError with file, line and what was expected."""
    value = row.value
    request = find_prompt(row)
    other = find_prompt(row, QUESTIONS)
    if (
        request is not None
        and other is not None
        and request.name in CONVERSATIONS
        and read_messages(row, request.entries)[-1].role == "assistant"  # the messages include the answer
    ):
        request = replace(other, used=(*other.used, request.name))
    if request is None:
        raise UserError(f"expected field 'prompt', 'question' or 'messages' (a problem), found {fields_of(value)}")
    verifier = value.get("verifier")
    if not isinstance(verifier, (str, type(None))):
        raise UserError(f"expected 'verifier' to be a name, found {kind_of(verifier)}")
    lost: list[str] = []
    messages, prompt = _messages_and_text(row, request, lost)
    losses = (*lost, *not_used(value, request.used, PROMPT_FIELDS))
    options = read_options(value)
    if options:
        if not messages and not all(text == letter for letter, text in options):  # otherwise the question has them
            prompt = FRAME.sub("", prompt) + "\n" + "".join(f"\n{letter}) {text}" for letter, text in options)
        return Problem(messages, prompt, _letter(row, options), verifier, value, row.where, losses)
    answers = _answers(row)
    answer = answers[0] if answers else None
    return Problem(messages, prompt, answer, verifier, value, row.where, losses, answers[1:])


def read_options(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Read multiple-choice options as (letter, text); none for other records.

    >>> read_options({"options": ["A)3", "B)4"]}), read_options({"choices": ["3"]})
    ((('A', '3'), ('B', '4')), (('A', '3'),))
    """
    field = first_of(record, ("options", "choices"))
    if field is None:
        return ()
    value = record[field]
    texts, labels = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        found = repr(value) if isinstance(value, list | dict) else kind_of(value)
        raise UserError(f"expected {field!r} to be a list of strings, found {found:.80}")
    if len(texts) > 26:
        raise UserError(f"expected at most 26 choices, found {len(texts)}")
    letters = list(ascii_uppercase[: len(texts)])
    if labels not in (None, letters, [str(number) for number in range(1, len(texts) + 1)]):
        raise UserError(f"expected the labels A, B, ... or 1, 2, ..., found {labels!r}")
    text_labels = [LABEL.match(text) for text in texts]
    if all(label and label[1] == letter for label, letter in zip(text_labels, letters, strict=True)):
        texts = [text[label.end() :] for text, label in zip(texts, text_labels, strict=True) if label]
    return tuple(zip(letters, (text.strip() for text in texts), strict=True))


def last_boxed(text: str) -> str | None:
    """Return the content of the last closed \\boxed{...}, or without one of the last \\fbox{...}, or None.

    >>> last_boxed(r"so \\boxed{\\frac{1}{2}}"), last_boxed(r"\\boxed{1} or \\boxed 7"), last_boxed(r"\\boxed{1")
    ('\\\\frac{1}{2}', '7', None)
    """
    last = {"box": 0, "frame": 0}  # start of the last one's content
    spans: dict[str, tuple[int, int]] = {}
    open_braces: list[tuple[str, int]] = []  # (kind, start of the content)
    for mark in BRACES.finditer(text):
        kind = "frame" if mark["frame"] else "box"
        if mark["box"] and mark["brace"]:
            open_braces.append((kind, mark.end()))
        elif mark["bare"]:
            last[kind], spans[kind] = mark.start(), mark.span("bare")
        elif mark[0] == "{":
            open_braces.append(("", 0))
        elif mark[0] == "}" and open_braces:
            kind, start = open_braces.pop()
            if kind and start > last[kind]:
                last[kind], spans[kind] = start, (start, mark.start())
    span = spans.get("box") or spans.get("frame")
    return text[span[0] : span[1]].strip() if span else None


# ---- fields


def _messages_and_text(row: Row, request: RecordPrompt, lost: list[str]) -> tuple[tuple[Message, ...], str]:
    """Return the prompt as messages (none for plain text) and as text (that of the last message)."""
    name, value = request.name, row.value[request.name]
    if not isinstance(value, list):
        text = request.entries[-1]["content"]
        if not text.strip():
            raise UserError(f"expected {name!r} to be text, found an empty string")
        # 'prompt' may be code to continue, whose white space matters
        text = text if name == "prompt" else text.strip()
        if len(request.entries) == 1:
            return (), text
        return read_messages(row, [*request.entries[:-1], {"role": "user", "content": text}], lost), text
    messages = read_messages(row, request.entries, lost)
    if messages[-1].role != "user":
        raise UserError(f"expected {name!r} to end with a message of the user, found one of the {messages[-1].role}")
    if not messages[-1].text.strip():
        raise UserError(f"expected {name!r} to end with a question, found an empty message")
    return messages, messages[-1].text


def _answers(row: Row) -> tuple[str, ...]:
    """Return the correct answers in the order of the record; none without an answer field."""
    field = first_of(row.value, SOLVED_BY)
    if field is None:
        return ()
    value = row.value[field]
    if field == "lSolutions" and (not isinstance(value, list) or len(value) != 1):
        raise UserError(f"expected 'lSolutions' to have one solution, found {value!r}")
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, dict) for item in items):  # SQuAD's, TriviaQA's
        items = answers_of(value, field)
    answers: dict[str, None] = {}
    for item in items:
        text = _as_text(field, item)
        if MARKER in text:
            text = text.rpartition(MARKER)[2]
        elif field == "solution" and (boxed := last_boxed(text)) is not None:
            text = boxed
        answers[text.strip()] = None
    return tuple(answers)


def _as_text(field: str, value: Any) -> str:
    """Convert an answer to text.

    >>> [_as_text("answer", value) for value in (43.0, 7, 0.5, "a b")]
    ['43', '7', '0.5', 'a b']
    """
    if isinstance(value, bool):  # ambiguous: a model may answer "yes" or "true"
        expected = f"expected {field!r} to be text or a number, found a boolean"
        raise UserError(f'{expected}; write the correct word, such as "yes" or "true"')
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise UserError(f"expected {field!r} to be text or a number, found {kind_of(value)}")
    return str(value)


def _letter(row: Row, options: tuple[tuple[str, str], ...]) -> str | None:
    """Return the letter of the correct choice, given by letter, by index from 0, or by the text of an option."""
    field = first_of(row.value, SOLVED_BY)
    if field is None:
        return None
    value = row.value[field]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return options[value][0]
    if isinstance(value, str):
        answer = value.strip()
        letters = [letter for letter, _ in options]
        if field == "answerKey" and answer.isdecimal() and 0 < int(answer) <= len(options):  # ARC counts from 1
            return letters[int(answer) - 1]
        matching = [letter for letter, text in options if answer in (letter, f"({letter})", f"{letter})", text)]
        if len(matching) == 1:
            return matching[0]
    raise UserError(f"expected {field!r} to be one of {counted(len(options), 'choice')}, found {value!r}")
