"""The funnel: how many records every step saw, kept and dropped, why, and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from llmkit.display import printable

READ = "read"  # the step before all others: a record that is no page ends there


class Funnel:
    """Counts of records by the step and reason that dropped them.

    >>> funnel = Funnel(["read", "language"])
    >>> funnel.count(None, None), funnel.count("language", "other_language")
    (None, None)
    >>> funnel.as_json()[1]
    {'step': 'language', 'in': 2, 'kept': 1, 'dropped': {'other_language': 1}, 'seconds': 0.0}
    """

    def __init__(self, steps: Sequence[str]) -> None:
        self.kept = 0
        self.dropped: dict[str, Counter[str]] = {step: Counter() for step in steps}
        self.seconds = dict.fromkeys(steps, 0.0)

    @property
    def records(self) -> int:
        """All records seen."""
        return self.kept + sum(counts.total() for counts in self.dropped.values())

    def count(self, step: str | None, reason: str | None) -> None:
        """One record more: kept when `step` is None, else dropped by that step for that reason."""
        if step is None:
            self.kept += 1
        else:
            assert reason, f"{step} dropped a record and did not say why"
            self.dropped[step][reason] += 1

    def spend(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of the processor that steps took, summed over processes."""
        for step, amount in seconds.items():
            self.seconds[step] += amount

    def as_json(self) -> list[dict[str, Any]]:
        """One object a step, in order: `{"step", "in", "kept", "dropped": {reason: count}, "seconds"}`."""
        rows, left = [], self.records
        for step, counts in self.dropped.items():
            passed = left - counts.total()
            reasons = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
            rows.append({"step": step, "in": left, "kept": passed, "dropped": reasons})
            rows[-1]["seconds"] = round(self.seconds[step], 3)
            left = passed
        assert left == self.kept, f"{left} records left the last step, {self.kept} were kept"
        return rows

    def show(self, to: TextIO, recipe: str) -> None:
        """Print the recipe's name and the table: with rich on a terminal, plain columns elsewhere."""
        print(f"recipe {printable(recipe)}", file=to)
        header = ("step", "in", "kept", "dropped", "share", "seconds")
        rows = [row for step in self.as_json() for row in _table_rows(step)]
        if to.isatty():
            _show_rich(header, rows, to)
            return
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        for row in [header, *rows]:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            print("  ".join(cells).rstrip(), file=to)
        to.flush()


def _table_rows(step: Mapping[str, Any]) -> list[tuple[str, ...]]:
    dropped = sum(step["dropped"].values())
    share = lambda count: f"{count / step['in']:.1%}" if step["in"] else ""  # noqa: E731
    first = (
        step["step"],
        f"{step['in']:,}",
        f"{step['kept']:,}",
        f"{dropped:,}",
        share(dropped),
        f"{step['seconds']:.2f}",
    )
    return [
        first,
        *(
            (f"  {printable(reason)}", "", "", f"{count:,}", share(count), "")
            for reason, count in step["dropped"].items()
        ),
    ]


def _show_rich(header: Sequence[str], rows: Sequence[tuple[str, ...]], to: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="dim" if row[0].startswith(" ") else "")
    Console(file=to, markup=False).print(table)
