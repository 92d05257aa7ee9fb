"""Files and JSON values of unknown content: recognizing kinds of records, and sampling them evenly.

`as_object`, `as_text` and `objects` return a value of the expected type, or an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import orjson

from llmkit.errors import UserError
from llmkit.io.jsonl import BYTE_ORDER_MARK, open_input
from llmkit.io.progress import counted

SPARE = 4  # first collect this many times the wanted values, then thin them to the exact number
LONGEST = {"input": 600, "output": 1200, "about": 200}  # characters shown of a record
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """Fields by which a kind of record is recognized (`has`) and shown; `stage` is the only one that writes it."""

    has: tuple[str, ...]
    input: str
    output: str
    worth: str
    about: tuple[str, ...]
    stage: str | None = None


# by display name: a record is of the first kind whose fields it has; the page shows files in this order
KINDS = {
    "rollouts": Kind(
        ("prompt", "completion", "reward", "group", "step"),
        "prompt", "completion", "reward", ("answer", "finish_reason"),
    ),
    "disagreements": Kind(
        ("prompt", "completion", "gold", "difference"),
        "prompt", "completion", "reward", ("gold", "difference"),
    ),
    "recitations": Kind(
        ("prefix", "completion", "matched"),
        "prefix", "completion", "share", ("repeats",), "probe-knowledge",
    ),
    "completions": Kind(
        ("completion", "finish_reason"),
        "prompt", "completion", "reward", ("finish_reason",), "sample",
    ),
    "probed questions": Kind(
        ("question", "responses", "judgements", "known"),
        "question", "responses", "known", ("answer", "judgements"), "probe-knowledge",
    ),
    # written by people, as for sft
    "examples": Kind(("prompt", "completion"), "prompt", "completion", "reward", ("source",)),
    "conversations": Kind(("messages",), "messages", "messages", "known", ("source",)),
    "rejected documents": Kind(("source", "step", "reason"), "url", "text", "reason", ("step", "score")),
    "documents": Kind(("text",), "url", "text", "reward", ("language", "source")),
}  # fmt: skip


@dataclass(frozen=True)
class RecordsFile:
    """A JSONL file: `kind` is a key of KINDS; `run` is the path of the run that wrote it, if known."""

    path: str
    kind: str
    run: str | None = None


# ---- values


def is_number(value: Any) -> bool:
    """Return True if a JSON value is a number, not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_object(value: Any) -> dict[str, Any]:
    """Return a value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str | None:
    """Return a value if it is a string, else None."""
    return value if isinstance(value, str) else None


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a value that should be a list of objects."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


@contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Turn the error of a file that is unreadable or has unexpected content into a note."""
    try:
        yield
    except UserError as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(f"{error.filename}: {str(error.strerror).lower()}")


# ---- lines


def raw_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of the non-blank lines, unparsed: of a large file only some are used."""
    with open_input(path) as handle:
        for number, line in enumerate(handle, 1):
            if not line.isspace():
                yield number, line


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object on a JSONL line, or None."""
    try:
        value = orjson.loads(line.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


class Thinned(Generic[T]):
    """Keeps at most `most` of the added values, almost evenly spaced, including first and last; counts all.

    >>> sample = Thinned(3)
    >>> for value in range(1000):
    ...     sample.add(value)
    >>> sample.values(), sample.count
    ([0, 512, 999], 1000)
    """

    def __init__(self, most: int) -> None:
        self.count = 0
        self._most, self._every = most, 1
        self._values: list[T] = []  # every n-th value, up to SPARE times as many as wanted
        self._last: Any = None

    def add(self, value: T) -> None:
        if self.count % self._every == 0:
            if len(self._values) == SPARE * self._most - 1:  # leaves room for the last one
                self._values, self._every = self._values[::2], 2 * self._every
            if self.count % self._every == 0:
                self._values.append(value)
        self._last = value
        self.count += 1

    def values(self) -> list[T]:
        ends_with_last = self.count == 0 or (self.count - 1) % self._every == 0
        return thinned(self._values if ends_with_last else [*self._values, self._last], self._most)


def thinned(values: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the values, evenly spaced, including first and last.

    >>> thinned(range(9), 3)
    [0, 4, 8]
    """
    if len(values) <= most:
        return list(values)
    if most < 2:
        return list(values[:most])
    return [values[index * (len(values) - 1) // (most - 1)] for index in range(most)]


# ---- records to browse


def read_excerpts(
    file: RecordsFile, most: int, note: Callable[[str], object], limit: int | None = None
) -> dict[str, Any]:
    """Sample at most `most` records of a file, evenly spaced. Only these are parsed; `records` counts all."""
    lines: Thinned[tuple[int, bytes]] = Thinned(most)
    for numbered in islice(raw_lines(file.path), limit):
        lines.add(numbered)
    chosen = lines.values()
    records, has = [(number, parsed(line)) for number, line in chosen], {*KINDS[file.kind].has}
    rows = [_excerpt(record, file.kind, number) for number, record in records if record and record.keys() >= has]
    if bad := len(chosen) - len(rows):
        note(f"{file.path}: {bad} of {counted(len(chosen), 'sampled line')} left out: not {file.kind}")
    return {"path": file.path, "kind": file.kind, "records": lines.count, "shown": len(rows), "rows": rows}


def _excerpt(record: Mapping[str, Any], kind: str, line: int) -> dict[str, Any]:
    """Return the shown fields of a record, shortened; `input_cut` and `output_cut` count the omitted characters."""
    fields = KINDS[kind]
    output = record.get(fields.output)
    prompt = record.get(fields.input, record.get("messages", record.get("id", "")))
    if kind == "conversations" and isinstance(output, list):
        prompt, output = output[:-1], output[-1:]
        output = output[0].get("content") if output and isinstance(output[0], dict) else output
    elif kind == "probed questions" and isinstance(output, list):
        output = "\n".join(f"{number}. {_text_of(answer)}" for number, answer in enumerate(output, 1))
    row: dict[str, Any] = {"line": line}
    if is_number(record.get("step")):
        row["step"] = record["step"]
    for name, value in (("input", prompt), ("output", output)):
        text = _text_of(value)
        row[name] = text[: LONGEST[name]]
        if len(text) > LONGEST[name]:
            row[f"{name}_cut"] = len(text) - LONGEST[name]
    worth = record.get(fields.worth)
    if is_number(worth) or isinstance(worth, str):
        row["worth"] = worth
    about = [name for name in fields.about if record.get(name) not in (None, "", [])]
    row["about"] = {name: _text_of(record[name])[: LONGEST["about"]] for name in about}
    return row


def _text_of(value: Any) -> str:
    """Return a JSON value as readable text; supports strings, messages, and parts of messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        messages = [item for item in value if isinstance(item, dict) and "content" in item]
        if len(value) == 1 and messages and messages[0].get("role") == "user":
            return _text_of(messages[0]["content"])
        if messages and len(messages) == len(value):
            return "\n".join(f"{item.get('role', '?')}: {_text_of(item['content'])}" for item in messages)
        if value and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in value):
            pieces = ((str(item.get("type", "text")), item["text"]) for item in value)
            return "".join(text if kind == "text" else f"[{kind}: {text}]" for kind, text in pieces)
        if all(isinstance(item, str) for item in value):
            return " | ".join(value)
    return "" if value is None else orjson.dumps(value).decode()
