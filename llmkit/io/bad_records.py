"""Records that cannot be used: skipped, reported and counted, up to a bound (`--max-bad`; docs/records.md).

bad = BadRecords("1%")
for record in good_records(rows, read_conversation, "chats.jsonl", bad): ...
bad.results  # {"bad_records": 2, "not_used": {"'text' not used": 7}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmkit.config import parse_max_bad
from llmkit.errors import UserError
from llmkit.io.progress import counted, say
from llmkit.io.records import Row

REPORTED_EACH = 3  # skipped records of a file that are reported one by one
SAVED_FIELDS = ("name", "good", "bad", "first", "losses")  # of a tally, in JSON
EARLY = 1000  # records of a file, from which on a share of them is judged while reading

T = TypeVar("T")


def good_records(
    rows: Iterable[Row | UserError],
    read: Callable[[Row], T],
    name: str,
    bad: BadRecords | None = None,
    limit: int | None = None,
) -> Iterator[T]:
    """Yield what `read` makes of the records of one file, at most `limit`; skip bad ones.

    A bad record is a UserError among `rows`, or one that `read` refuses by a UserError. `bad` counts and reports it,
    and raises UserError beyond its bound; without `bad` the first one is raised.
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
    reported: int = 0  # bad ones that the line at the end has counted
    reported_losses: Counter[str] = field(default_factory=Counter)
    pending: list[str] = field(default_factory=list)  # lines that an error may make superfluous


class BadRecords:
    """Skips the records of a run that cannot be used, prints the first of each file, and counts all of them.

    Fields of good records that are not used are counted, too.

    most   how many of a file may be bad, as `--max-bad` has it: a share such as "1%", or a count. A share bears one in
           any file, is judged at the end of the file, and from EARLY records on while reading. "0" bears none.

    A file in which every record is bad is an error under any bound.
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
        """Begin the counts of a file, anew if it is read again."""
        self.tallies.append(Tally(name))
        return self.tallies[-1]

    def skip(self, error: UserError, name: str, *, was_good: bool = False) -> None:
        """Skip a record; `was_good` if it was counted as good before. Raises UserError beyond the bound."""
        tally = self._tally(name)
        tally.good -= was_good
        tally.bad += 1
        tally.first = tally.first or str(error)
        if self._count == 0:
            raise error
        if self._share is None or tally.good + tally.bad >= EARLY:
            self._check(tally)
        if tally.bad <= REPORTED_EACH:
            tally.pending.append(f"skipped: {error}{'; others are counted' if tally.bad == REPORTED_EACH else ''}")
        if tally.good:
            self._print_pending(tally)

    def count_unused(self, name: str, losses: Iterable[str]) -> None:
        """Count fields of a good record that are not used."""
        self._tally(name).losses.update(losses)

    def report(self, name: str) -> None:
        """Print the counts of a file that has been read. Raises UserError beyond the bound."""
        tally = self._tally(name)
        self._check(tally)
        if tally.bad and not tally.good:
            more = f"; none of the {counted(tally.bad, 'record')} of {name} can be used" if tally.bad > 1 else ""
            raise UserError(f"{tally.first}{more}")
        self._print_pending(tally)
        if tally.bad > tally.reported:
            tally.reported = tally.bad
            say(f"{name}: {tally.bad} of {counted(tally.good + tally.bad, 'record')} skipped", self._quiet)
        if tally.losses != tally.reported_losses:
            tally.reported_losses = Counter(tally.losses)
            counts = ", ".join(f"{loss} {count}" for loss, count in tally.losses.items())
            say(f"{name}: of {counted(tally.good, 'record')}: {counts}", self._quiet)

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Take over the counts of files that an earlier run has read. Raises UserError beyond the bound."""
        for values in saved:
            self.tallies.append(Tally(**{**values, "losses": Counter(values["losses"])}))
            self.report(self.tallies[-1].name)

    def as_json(self, since: int = 0) -> list[dict[str, Any]]:
        """The counts as JSON, from file number `since` on."""
        return [{name: getattr(tally, name) for name in SAVED_FIELDS} for tally in self.tallies[since:]]

    def _print_pending(self, tally: Tally) -> None:
        for line in tally.pending:
            say(line, self._quiet)
        tally.pending.clear()

    def _tally(self, name: str) -> Tally:
        return next((tally for tally in reversed(self.tallies) if tally.name == name), None) or self.begin(name)

    def _check(self, tally: Tally) -> None:
        seen = tally.good + tally.bad
        if tally.bad > (max(1, self._share * seen) if self._share is not None else self._count):
            raise UserError(
                f"{tally.first}; {tally.bad} of {counted(seen, 'record')} of {tally.name} cannot be used, more than "
                f"--max-bad {self._most} allows"
            )
