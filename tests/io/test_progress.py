"""Progress: a bar on a terminal, lines elsewhere, and never a byte on stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from llmkit.io import progress
from llmkit.io.progress import Progress, counted, duration, quantity, say


class Clock:
    """A clock that the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_lines_come_every_so_often_with_rate_and_time_left(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with Progress("encode", total=4_000_000, unit="B") as bar:
        for _ in range(300):
            clock.now += 0.1
            bar.advance(10_000, loss=2.34567, source="web")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 2 <= len(lines) <= 3
    assert lines[1] == "llmkit: encode 50% 100k B/s loss 2.346 source web, 20s left"


BAR = r"""
import sys, time
from llmkit.io.progress import Progress, say
with Progress("encode \x1b]0;a", total=3, unit="docs") as bar:
    for number in range(3):
        print("data", number)
        say("a word")
        bar.advance(1, loss=1.5)
        time.sleep(0.11)
"""


def test_a_bar_on_the_terminal_leaves_the_data_on_stdout_alone() -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", BAR], stdout=subprocess.PIPE, stderr=follower) as process:
        os.close(follower)
        assert process.stdout is not None
        shown = b""
        while True:
            try:
                block = os.read(leader, 4096)
            except OSError:
                break
            if not block:
                break
            shown += block
        assert process.stdout.read() == b"data 0\ndata 1\ndata 2\n"
    os.close(leader)
    assert process.returncode == 0
    assert rb"encode \u001b]0;a" in shown and b"\x1b]" not in shown  # file names may contain anything
    assert b"llmkit: a word" in shown and b"loss 1.5" in shown


def test_numbers_as_people_say_them(monkeypatch, capsys) -> None:
    numbers = {0: "0", 999: "999", 999.6: "1k", 1234567: "1.23M", 2.5e9: "2.5G", 0.012: "0.012"}
    assert {number: quantity(number) for number in numbers} == numbers
    times = {0.4: "0s", 99: "99s", 100: "1m40s", 3599.6: "1h00m", 3725: "1h02m", 49 * 3600: "2d01h"}
    assert {seconds: duration(seconds) for seconds in times} == times and duration(1.2e17) == "over 1000 days"
    assert counted(1, "process") == "1 process" and counted(1200, "page") == "1,200 pages"


def test_quiet_says_nothing_and_without_a_total_there_is_no_time_left(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    for quiet in (True, False):
        with Progress("count", unit="docs", quiet=quiet) as bar:
            clock.now += 11
            bar.advance(44)
        say("hello", quiet)
    assert capsys.readouterr() == ("", "llmkit: count 4 docs/s\nllmkit: hello\n")


def test_progress_ends_at_all_of_it_and_guesses_nothing_from_nothing(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with Progress("training", total=1.0) as bar:
        for amount in (0.0, 1.01):
            clock.now += 11
            bar.advance(amount, loss=2.5)
    first, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("llmkit: training 0% loss 2.5", "llmkit: training 100% loss 2.5, 0s left")
