"""The process pool returns results in order, whatever its processes do."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.io.pool import CHILD, TimeLimitError, Worker, WorkerDied, in_order


@dataclass
class Echo:
    """Returns the item three times; at item `at` it does `act`."""

    at: int = -1
    act: str = ""

    def __call__(self, item: int):
        for number in range(3):
            if item == self.at and number == 1:
                self.misbehave()
            time.sleep(0.02 if item % 3 == 0 else 0)  # the first of three is ready last
            print("a library that prints is not taken for an answer")
            yield f"{item}.{number}"

    def misbehave(self):
        if self.act == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.act == "exit":
            os._exit(7)
        raise {"mistake": UserError("a.warc:9: wrong"), "bug": KeyError("lost")}[self.act]


def lines(found) -> list[str]:
    return [line for _, results in found for line in results]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items_and_finished_ones_are_not_worked_on(workers):
    expected = [f"{index}.{number}" for index in range(11) for number in range(3)]
    assert lines(in_order(range(11), Echo, workers)) == expected
    odd = in_order(range(6), partial(Echo, 2, "bug"), workers, finished=lambda item: item % 2 == 0)
    assert lines(odd) == [f"{index}.{number}" for index in (1, 3, 5) for number in range(3)]


def test_no_more_is_read_than_the_processes_are_busy_with():
    taken = []

    def watched():
        for item in range(1000):
            taken.append(item)
            yield item

    found = in_order(watched(), Echo, 2)
    next(found)
    assert len(taken) <= 4
    found.close()  # pyright: ignore


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        ("killed", WorkerDied, "item 4: .* ended by SIGKILL; not enough memory"),
        ("exit", WorkerDied, "item 4: .* ended by exit code 7"),
        ("mistake", UserError, "^a.warc:9: wrong$"),
        ("bug", RuntimeError, "(?s)item 4.*KeyError: 'lost'"),
    ],
)
def test_a_dead_process_is_reported_after_earlier_results(act, error, message):
    got = []
    with pytest.raises(error, match=message):
        for _, results in in_order(range(9), partial(Echo, 4, act), 2, name=lambda item: f"item {item}"):
            for result in results:
                got.append(result)
    assert got == [f"{index}.{number}" for index in range(4) for number in range(3)] + ["4.0"]


def test_processes_end_with_their_parent():
    def children() -> set[int]:
        return {int(pid) for pid in os.popen(f"pgrep -P {os.getpid()} -f [l]lmkit.io.pool").read().split()}

    others = children()  # from other tests: the template worker stays
    results = in_order(range(50), Echo, 2)
    next(results)
    own = children() - others
    assert len(own) == 2
    results.close()  # pyright: ignore
    for pid in own:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@dataclass
class Division:
    """Divides ten by the item; items 97 to 99 fail, exit or hang."""

    def __call__(self, item: int):
        if item == 99:
            while True:
                pass
        if item == 98:
            os._exit(7)
        if item == 97:
            raise UserError("no 97")
        yield os.getpid(), 10 / item


def environment():
    """Work that returns its environment."""
    return lambda item: [Path("/proc/self/environ").read_text() + repr(dict(os.environ))]


def test_a_worker_of_single_items_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    worker = Worker(environment)
    seen = worker.call(None)
    assert "a secret" not in seen and os.environ["PATH"] in seen
    worker.close()


def test_a_worker_that_ends_is_replaced():
    worker = Worker(Division, seconds=0.2, name=lambda item: f"item {item}")
    first, result = worker.call(5)
    assert result == 2
    with pytest.raises(UserError, match=r"^no 97$"):
        worker.call(97)
    assert worker.call(1) == (first, 10)
    with pytest.raises(TimeLimitError, match=r"item 99: took more than 0.2 s"):
        worker.call(99)
    second, result = worker.call(2)
    assert second != first and result == 5
    with pytest.raises(WorkerDied, match=r"item 98: .*exit code 7"):
        worker.call(98)
    with pytest.raises(RuntimeError, match=r"(?s)item 0.*ZeroDivisionError"):
        worker.call(0)
    third, _ = worker.call(1)
    if not (fork := os.fork()):
        os._exit(worker.call(1)[0] == third)
    assert os.waitpid(fork, 0)[1] == 0 and worker.call(1)[0] == third
    del worker
    with pytest.raises(ProcessLookupError):
        os.kill(third, 0)


def evil():
    """Work whose result would run code if it were unpickled without restrictions."""
    return lambda item: [Evil()] if item else ["good"]


class Evil:
    def __reduce__(self):
        return os.putenv, ("LLMKIT_WAS_HERE", "1")


def test_an_answer_of_a_worker_of_single_items_runs_no_code():
    worker = Worker(evil)
    assert worker.call(0) == "good"
    with pytest.raises(WorkerDied, match="was refused"):
        worker.call(1)
    assert worker.call(0) == "good"  # a new process


# ---- Ctrl-C reaches every process of a terminal: our children leave it to us, silently


def held(pid: int) -> bool:
    """Return whether SIGINT is blocked or ignored in a process; in ours it is from the first instruction on."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return any(int(status[name], 16) >> (signal.SIGINT - 1) & 1 for name in ("SigBlk", "SigIgn"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_a_process_that_we_start_never_sees_ctrl_c() -> None:
    """Regression: a process that was still importing printed a traceback between our messages."""
    child = Worker(dict)
    child.start()
    try:
        assert held(child.process.pid)
    finally:
        child.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("cut", [0, 40, -500])
def test_a_process_whose_parent_was_interrupted_says_nothing(cut: int) -> None:
    sent = pickle.dumps(sys.path) + pickle.dumps((dict, None)) + pickle.dumps(b"x" * 1000)
    done = subprocess.run([sys.executable, "-c", CHILD], input=sent[:cut], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
