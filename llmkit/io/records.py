"""Schemas of the records that stages exchange (JSONL, one object per line; unknown keys pass through).

- document `{"text", "id"?, "url"?, "source"?, ...}`: read by train-bpe and pretrain
- prompt `{"prompt", ...}` or another field of ASKING: read by sample and rl
- completion `{"prompt", "completion", "token_ids", "finish_reason", "seed", ...input}`: written by sample

Each check raises a UserError that names file, line, the expected field and the fields found.

Bad records are skipped, reported and counted, up to a bound (`--max-bad`; docs/records.md).

bad = BadRecords("1%")
for record in good_records(rows, read_conversation, "chats.jsonl", bad): ...
bad.results  # {"bad_records": 2, "not_used": {"'text' not used": 7}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from llmkit.config import parse_max_bad
from llmkit.errors import UserError
from llmkit.io.progress import counted, say

# The field names that all readers look for; the first one present is used
CONVERSATIONS = ("messages", "conversations", "data")  # "data" is UltraChat's list of texts
QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "context", "input", "sQuestion")
ASKING = (*CONVERSATIONS[:2], *QUESTIONS)
PROMPT_FIRST = ("prompt", *ASKING)  # for records with an answer, whose `messages` may contain it
SYSTEM = ("system", "system_prompt")  # precede the question, as does "history"
SHOWN = ("tools", "functions", "images", "image", "audio", "videos")  # shown with a prompt, to other kinds of models
PROMPT_FIELDS = (*ASKING, *SYSTEM, "history", *SHOWN)
# servers accept these per prompt, sample only as options of a run
SAMPLING = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "n")
# Answers by priority: among completions the longest form first, among correct answers the shortest
ANSWERS = ("completion", "response", "output", "solution", "answer", "answers", "target", "continuation")
FACTS = ("answer", "answers", "continuation")  # the complete text is correct
SOLVED_BY = (*FACTS[:2], "solution", "target", "continuation", "correct", "lSolutions", "answerKey", "gold", "output")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # before an answer
CHOSEN = {"response_j": "chosen", "response_k": "rejected"}  # aliases
COMPARED = ("chosen", "rejected", *CHOSEN, "completions", "ranking", "margin")
CHOICES = ("choices", "options")
OTHERS = ("text", *CHOICES)
OUTSIDE = "characters outside the vocabulary"  # become <unk>; counted with the unused fields
KNOWN = frozenset((*PROMPT_FIELDS, *ANSWERS, *THOUGHTS, *COMPARED, *OTHERS))
OF_DOCUMENT = ("text", "source", *KNOWN)  # fields that training on documents reads
REPORTED_EACH = 3  # skipped records reported individually per file
SAVED_FIELDS = ("name", "good", "bad", "first", "losses")  # fields of a Tally stored as JSON
EARLY = 1000  # records of a file after which the share of bad ones is checked while reading

T = TypeVar("T")


def not_used(
    value: dict[str, Any], used: Collection[str], known: Collection[str] = KNOWN, shown_text: str = ""
) -> tuple[str, ...]:
    """List the fields of a record with a known name that are not used, except text contained in `shown_text`.

    >>> not_used({"text": "Once", "id": 7, "prompt": "Tell a story.", "tools": []}, ["text"])
    ("'prompt' not used",)
    """
    unused = [name for name in value if name in known and name not in used and value[name]]
    lost = [name for name in unused if not (isinstance(value[name], str) and value[name].strip() in shown_text)]
    return tuple(f"{name!r} not used" for name in lost)


@dataclass(frozen=True, slots=True)
class Row:
    """A record and its origin; line 0 if `path` alone names it. `losses` lists its unused parts."""

    value: dict[str, Any]
    path: str
    line: int
    losses: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


def kind_of(value: Any) -> str:
    """Name the type of a JSON value, for messages: "a list", "null"."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def with_made(given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Add fields to a record; values that they replace move to `given`.

    >>> with_made({"prompt": "2+2?", "completion": "4"}, {"completion": "Four.", "seed": 0})
    {'prompt': '2+2?', 'completion': 'Four.', 'seed': 0, 'given': {'completion': '4'}}
    """
    taken = {name: given[name] for name in fields if given.get(name) not in (None, fields[name])}
    if taken and "given" in given:
        taken["given"] = given["given"]
    return {**given, **fields, **({"given": taken} if taken else {})}


def check_document(row: Row) -> Row:
    """Return the row if it is a document: `text`, and `source` if present, are strings. Raise UserError otherwise."""
    if "text" not in row.value:
        raise UserError(f"{row.where}: expected field 'text' (a document), found {sorted(row.value)}")
    if not isinstance(row.value["text"], str):
        raise UserError(f"{row.where}: expected 'text' to be a string, found {kind_of(row.value['text'])}")
    if not isinstance(row.value.get("source", ""), str):
        raise UserError(f"{row.where}: expected 'source' to be a string, found {kind_of(row.value['source'])}")
    losses = not_used(row.value, ("text",)) if len(row.value) > 1 else ()
    return replace(row, losses=losses) if losses else row


def with_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Rename the columns of a record to fields, as `--columns` says.

    A column may be a nested field, `chat.turns`, whose outer field is kept; of `content|text` the first one present is
    used. Raise UserError if the record has none.

    >>> with_columns(Row({"id": 1, "content": "Once"}, "d.jsonl", 1), {"text": "content"}).value
    {'text': 'Once', 'id': 1}
    """
    taken: dict[str, Any] = {}
    gone = set(columns)
    for name, column in columns.items():
        for choice in choices_of(column, row.value):
            value: Any = row.value
            for part in (choice,) if choice in row.value else choice.split("."):
                if value is not None and not (isinstance(value, dict) and part in value):
                    value = row
                    break
                value = value and value[part]
            if value is not row:
                break
        else:
            raise UserError(f"{row.where}: expected field {column!r} (--columns), found {sorted(row.value)}")
        taken[name] = value
        gone.add(choice)
    return replace(row, value=taken | {name: value for name, value in row.value.items() if name not in gone})


def choices_of(column: str, names: Collection[str]) -> list[str]:
    """Split alternatives such as `content|text`, unless that is itself a column name."""
    return [column] if column in names else column.split("|")


def fields_of(value: dict[str, Any]) -> list[str]:
    """List the fields of a record for messages, marking those that are null."""
    return [name if value[name] is not None else f"{name}: null" for name in sorted(value)]


def first_of(value: dict[str, Any], names: Collection[str]) -> str | None:
    """Return the first of `names` that is a field of the record and not null."""
    return next((name for name in names if value.get(name) is not None), None)


def good_records(
    rows: Iterable[Row | UserError],
    read: Callable[[Row], T],
    name: str,
    bad: BadRecords | None = None,
    limit: int | None = None,
) -> Iterator[T]:
    """Yield `read(row)` for the records of one file, at most `limit`; skip bad ones.

    A bad record is a UserError among `rows`, or one for which `read` raises UserError. `bad` counts and reports it, and
    raises UserError beyond its bound; without `bad` the first one is raised.
    """
    bad = BadRecords() if bad is None else bad
    tally = bad.begin(name)
    given = 0
    for row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            record = read(row)
        except UserError as error:
            bad.skip(error, name)
            continue
        tally.good += 1
        if losses := getattr(record, "losses", ()):
            tally.losses.update(losses)
        yield record
        given += 1
        if given == limit:
            break
    bad.report(name)


@dataclass
class Tally:
    """Counts of one file: good records, bad ones with the error of the first, and unused fields of the good ones."""

    name: str
    good: int = 0
    bad: int = 0
    first: str = ""
    losses: Counter[str] = field(default_factory=Counter)
    reported: int = 0  # bad records already counted in a printed line
    reported_losses: Counter[str] = field(default_factory=Counter)
    pending: list[str] = field(default_factory=list)  # lines held back, because an error may replace them


class BadRecords:
    """Skips the bad records of a run, prints the first of each file, and counts all, also unused fields of good ones.

    most   how many records per file may be bad, as in `--max-bad`: a share such as "1%", or a count. A share allows at
           least one, and is checked at the end of the file, or while reading after EARLY records. "0" allows none.

    A file in which every record is bad is always an error.
    """

    def __init__(self, most: str = "0", quiet: bool = False) -> None:
        self._most, self._quiet = most, quiet
        self._share, self._count = parse_max_bad(most)
        self.tallies: list[Tally] = []

    @property
    def results(self) -> dict[str, Any]:
        """The counts for a manifest and a summary."""
        losses = sum((tally.losses for tally in self.tallies), Counter[str]())
        results: dict[str, Any] = {"bad_records": sum(tally.bad for tally in self.tallies)}
        return {**results, "not_used": dict(losses)} if losses else results

    def begin(self, name: str) -> Tally:
        """Start a new tally for a file."""
        self.tallies.append(Tally(name))
        return self.tallies[-1]

    def skip(self, error: UserError, name: str, *, was_good: bool = False) -> None:
        """Skip a record of a file, or at FILE:LINE; `was_good` if it was already counted as good.

        Raise UserError beyond the bound.
        """
        tally = self._tally(name)
        tally.good -= was_good
        tally.bad += 1
        tally.first = tally.first or str(error)
        if self._count == 0:
            raise error
        if self._share is None or tally.good + tally.bad >= EARLY:
            self._check(tally)
        if tally.bad <= REPORTED_EACH:
            tally.pending.append(f"skipped: {error}{'; more are counted' if tally.bad == REPORTED_EACH else ''}")
        if tally.good:
            self._print_pending(tally)

    def count_unused(self, name: str, losses: Iterable[str]) -> None:
        """Count unused fields of a good record of a file, or at FILE:LINE."""
        self._tally(name).losses.update(losses)

    def report(self, name: str) -> None:
        """Print the counts of a file. Raise UserError beyond the bound."""
        tally = self._tally(name)
        self._check(tally)
        if tally.bad and not tally.good:
            more = f"; all {counted(tally.bad, 'record')} of {name} are bad" if tally.bad > 1 else ""
            raise UserError(f"{tally.first}{more}")
        self._print_pending(tally)
        if tally.bad > tally.reported:
            tally.reported = tally.bad
            say(f"{name}: {tally.bad} of {counted(tally.good + tally.bad, 'record')} skipped", self._quiet)
        if tally.losses != tally.reported_losses:
            tally.reported_losses = Counter(tally.losses)
            counts = ", ".join(f"{loss} {count}" for loss, count in tally.losses.items())
            say(f"{name}: of {counted(tally.good, 'record')}: {counts}", self._quiet)

    def report_all(self) -> None:
        """Print the counts of all files that were not yet printed. Raise UserError beyond the bound."""
        for name in {tally.name: None for tally in self.tallies}:
            self.report(name)

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Add the counts that an earlier run saved. Raise UserError beyond the bound."""
        for values in saved:
            self.tallies.append(Tally(**{**values, "losses": Counter(values["losses"])}))
            self.report(self.tallies[-1].name)

    def as_json(self, since: int = 0) -> list[dict[str, Any]]:
        """Return the counts as JSON, from file number `since` on."""
        return [{name: getattr(tally, name) for name in SAVED_FIELDS} for tally in self.tallies[since:]]

    def _print_pending(self, tally: Tally) -> None:
        for line in tally.pending:
            say(line, self._quiet)
        tally.pending.clear()

    def _tally(self, name: str) -> Tally:
        of_name = (tally for tally in reversed(self.tallies) if name == tally.name or name.startswith(f"{tally.name}:"))
        return next(of_name, None) or self.begin(name)

    def _check(self, tally: Tally) -> None:
        seen = tally.good + tally.bad
        if tally.bad > (max(1, self._share * seen) if self._share is not None else self._count):
            raise UserError(
                f"{tally.first}; {tally.bad:,} of {counted(seen, 'record')} of {tally.name} are bad, more than "
                f"--max-bad {self._most} allows"
            )
