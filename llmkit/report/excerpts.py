"""Records to browse: an even sample of the lines of a file, each as what went in, what came out, what it was worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import orjson

from llmkit.io.progress import counted
from llmkit.report.runs import KINDS, RecordsFile
from llmkit.report.values import SPARE, Thinned, is_number, parsed, raw_lines, thinned

LONGEST = {"input": 600, "output": 1200, "about": 200}  # characters shown


def read_excerpts(
    file: RecordsFile, most: int, note: Callable[[str], object], limit: int | None = None
) -> dict[str, Any]:
    """At most `most` records of a file, evenly spaced; `records` tells of how many. Only those are parsed."""
    lines: Thinned[tuple[int, bytes]] = Thinned(SPARE * most)
    for numbered in islice(raw_lines(file.path), limit):
        lines.add(numbered)
    rows = []
    bad = 0
    chosen = thinned(lines.values(), most)
    for number, line in chosen:
        record = parsed(line)
        if record is None:
            bad += 1
        else:
            rows.append(excerpt(record, file.kind, number))
    if bad:
        note(f"{file.path}: {bad} of {counted(len(chosen), 'line')} looked at are no JSON object and were left out")
    return {"path": file.path, "kind": file.kind, "records": lines.count, "shown": len(rows), "rows": rows}


def excerpt(record: Mapping[str, Any], kind: str, line: int) -> dict[str, Any]:
    """One record in brief; `cut` tells how many characters were left out."""
    fields = KINDS[kind]
    output = record.get(fields.output)
    given = record.get(fields.input, record.get("messages", record.get("id", "")))
    if kind == "conversations" and isinstance(output, list):
        given, output = output[:-1], output[-1:]
        output = output[0].get("content") if output and isinstance(output[0], dict) else output
    elif kind == "probed questions" and isinstance(output, list):
        output = "\n".join(f"{number}. {text_of(answer)}" for number, answer in enumerate(output, 1))
    row: dict[str, Any] = {"line": line}
    if is_number(record.get("step")):
        row["step"] = record["step"]
    for name, value in (("input", given), ("output", output)):
        text = text_of(value)
        row[name] = text[: LONGEST[name]]
        if len(text) > LONGEST[name]:
            row[f"{name}_cut"] = len(text) - LONGEST[name]
    worth = record.get(fields.worth)
    if is_number(worth) or isinstance(worth, str):
        row["worth"] = worth
    about = [name for name in fields.about if record.get(name) not in (None, "", [])]
    row["about"] = {name: text_of(record[name])[: LONGEST["about"]] for name in about}
    return row


def text_of(value: Any) -> str:
    """Return a JSON value as text for people: a text; messages by their roles; the parts of a message."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        messages = [item for item in value if isinstance(item, dict) and "content" in item]
        if len(value) == 1 and messages and messages[0].get("role") == "user":
            return text_of(messages[0]["content"])
        if messages and len(messages) == len(value):
            return "\n".join(f"{item.get('role', '?')}: {text_of(item['content'])}" for item in messages)
        if value and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in value):
            pieces = ((str(item.get("type", "text")), item["text"]) for item in value)
            return "".join(text if kind == "text" else f"[{kind}: {text}]" for kind, text in pieces)
        if all(isinstance(item, str) for item in value):
            return " | ".join(value)
    return "" if value is None else orjson.dumps(value).decode()
