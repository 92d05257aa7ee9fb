"""Progress on stderr: a bar with rate and time left on a terminal, plain lines every so often elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

PLAIN_SECONDS = 10.0  # between two plain lines


def say(message: str, quiet: bool = False) -> None:
    """One line on stderr, above the bar if there is one."""
    if not quiet:
        print(f"llmkit: {message}", file=sys.stderr, flush=True)


class Progress:
    """Counts work done. Use as a context manager and call `advance`."""

    def __init__(
        self, description: str, total: float | None = None, unit: str = "", quiet: bool = False
    ) -> None:
        self.description, self.total, self.unit, self.quiet = description, total, unit, quiet
        self.done, self.fields, self.started = 0.0, "", time.monotonic()
        self._said = self.started
        self._bar = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = [
                "{task.description}",
                BarColumn(),
                "{task.percentage:>3.0f}%",
                TextColumn("{task.fields[rate]}"),
            ]
            columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn()]
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.description, total=self.total, rate="", note="")
            self._bar.start()
        return self

    def advance(self, amount: float = 1.0, **fields: str | float | int) -> None:
        """Add `amount` to the work done; `fields` (such as loss=2.31) are shown beside the rate."""
        self.done += amount
        if self.quiet:
            return
        if fields:
            self.fields = " ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items()
            )
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self.rate(now), note=self.fields)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            self._plain(now)

    def rate(self, now: float) -> str:
        per_second = self.done / max(now - self.started, 1e-9)
        for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if per_second >= scale:
                return f"{per_second / scale:.1f}{letter} {self.unit}/s"
        return f"{per_second:.1f} {self.unit}/s"

    def _plain(self, now: float) -> None:
        share, left = "", ""
        if self.total:
            share = f" {100 * self.done / self.total:.0f}%"
            left = (
                f", {(now - self.started) * max(self.total - self.done, 0) / max(self.done, 1e-9):.0f} s left"
            )
        say(f"{self.description}{share} {self.rate(now)}{' ' + self.fields if self.fields else ''}{left}")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
