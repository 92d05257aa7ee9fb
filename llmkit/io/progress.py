"""Progress on stderr: a bar with rate and time left on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from llmkit.display import printable, redacted, write_message
from llmkit.io.ranks import launch

PLAIN_SECONDS = 10.0  # between two plain lines
BAR_SECONDS = 0.1  # between two updates of the bar: an update costs as much as tokenizing a small document


def say(message: str, quiet: bool = False) -> None:
    """Print a line to stderr, above the progress bar if there is one; only on rank 0."""
    if not quiet and launch().leads:
        write_message(f"llmkit: {message}")


class Progress:
    """A counter of work done that shows its progress.

    with Progress("encode", total=size, unit="B") as progress:
        progress.advance(4096, source="web")
    """

    def __init__(self, description: str, total: float | None = None, unit: str = "", quiet: bool = False) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.quiet = quiet or not launch().leads
        self.done, self.fields = 0.0, {}
        self.started = self._shown = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            sized = [BarColumn(), TaskProgressColumn(), TimeRemainingColumn()] if self.total else []
            # when stdout is a pipe, rich must not redirect its data to stderr, where the bar is
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                *sized,
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
            )
            self._task = self._bar.add_task(printable(redacted(self.description)), total=self.total, note="")
            self._bar.start()
        return self

    def advance(self, amount: float = 1.0, **fields: str | float) -> None:
        """Add `amount` to the work done; `fields` (such as loss=2.31) are shown next to the rate."""
        self.done += amount
        self.fields = fields or self.fields
        now = time.monotonic()
        if not self.quiet and now - self._shown >= (BAR_SECONDS if self._bar else PLAIN_SECONDS):
            self._shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        values = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items()]
        rate = f"{quantity(self.done / max(now - self.started, 1e-9))} {self.unit}/s"
        note = " ".join([rate, *values] if self.unit else values)
        if self._bar:
            self._bar.update(self._task, completed=self.done, note=printable(redacted(note)))
        elif self.total:
            share = min(1.0, self.done / self.total)  # the last step may exceed a time budget
            rest = "" if share < 0.001 else f", {duration((now - self.started) * (1 - share) / share)} left"
            say(f"{self.description} {share:.0%} {note}{rest}")
        else:
            say(f"{self.description} {note}")

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()


def quantity(number: float) -> str:
    """Format a number with at most three digits and a letter: `quantity(1234567) == "1.23M"`."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale * 0.9995:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Format seconds for a reader: `duration(3725) == "1h02m"`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h" if hours < 24_000 else "over 1000 days"


def counted(number: float, noun: str) -> str:
    """Format a count with its noun: `counted(1, "page") == "1 page"`, `counted(1200, "page") == "1,200 pages"`."""
    shown = f"{int(number):,}" if float(number).is_integer() else f"{number:g}"
    if number == 1:
        return f"{shown} {noun}"
    if noun.endswith("ry"):  # a retry, an entry
        return f"{shown} {noun[:-1]}ies"
    return f"{shown} {noun}{'es' if noun.endswith('s') else 's'}"
