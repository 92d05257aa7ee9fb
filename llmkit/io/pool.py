"""One pool of processes: items worked on in several, their results handed back in the order of the items.

    for path, results in in_order(paths, make, workers=4):
        for result in results: ...

Plain child processes with pipes, not `multiprocessing`: that would run the caller's script again in each child, which
a script without `if __name__ == "__main__"` does not survive, or fork a parent that has threads. A child is started
when there is work for it, and ends when its parent does.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any, Protocol

from llmkit.errors import LlmkitError, UserError
from llmkit.io.ranks import interrupts_held

AHEAD = 2  # items in flight for each process, so that a slow item does not leave the others idle
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
CHILD = """
import pickle, sys
try:
    sys.path[:] = pickle.load(sys.stdin.buffer)
    from llmkit.io.pool import serve
    make = pickle.load(sys.stdin.buffer)
except (EOFError, pickle.UnpicklingError):  # the parent was interrupted
    sys.exit()
serve(make)
"""


class Work(Protocol):
    """Work on one item, built once in each process; None, after the last item, asks for what is left."""

    def __call__(self, item: Any, /) -> Iterable[Any]: ...


class WorkerDied(LlmkitError):
    """A process ended in the midst of an item."""

    exit_code = UserError.exit_code


def in_order(
    items: Iterable[Any],
    make: Callable[[], Work],
    workers: int,
    *,
    name: Callable[[Any], str] = str,
    finished: Callable[[Any], bool] = lambda item: False,
    rest: bool = False,
    advice: str = "fewer processes (--workers) need less",
) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield (item, its results) in the order of `items`; the results must be used up before the next is asked for.

    make: pickles, and is called once in each process; `workers` of 1 stays in this one.
    name: an item as errors name it.
    finished: says that an item needs no work; its results are then empty.
    rest: (None, its results of None) follow for each process.
    advice: what helps where a process was ended for want of memory.
    Raises what the work raises; WorkerDied, naming the item, when a process is killed.
    """
    if workers == 1:
        work = None
        for item in items:
            if finished(item):
                yield item, iter(())
                continue
            work = work or make()
            yield item, iter(work(item))
        if rest and work:
            yield None, iter(work(None))
        return
    pool = _Pool(make, workers, name, advice)
    waiting: deque[tuple[Any, SimpleQueue | None]] = deque()
    try:
        for item in items:
            waiting.append((item, None if finished(item) else pool.submit(item)))
            # what is ready goes out before more is read: the input may be a slow pipe
            while len(waiting) >= AHEAD * workers or (waiting and _ready(waiting[0][1])):
                yield _taken(waiting.popleft())
        while waiting:
            yield _taken(waiting.popleft())
        for child in pool.children if rest else ():
            yield None, child.work(None)
    finally:
        pool.stop()


def _ready(answers: SimpleQueue | None) -> bool:
    return answers is None or not answers.empty()


def _taken(waiting: tuple[Any, SimpleQueue | None]) -> tuple[Any, Iterator[Any]]:
    item, answers = waiting
    return item, iter(()) if answers is None else _answered(answers)


def _answered(answers: SimpleQueue) -> Iterator[Any]:
    while (answer := answers.get()) is not None:
        kind, content = answer
        if kind == "error":
            raise content
        yield content


class _Pool:
    """Threads that each hold one child and give it items."""

    def __init__(self, make: Callable[[], Work], workers: int, name: Callable[[Any], str], advice: str) -> None:
        self.make, self.workers, self.name, self.advice = make, workers, name, advice
        self.children: list[Child] = []
        self.threads: list[Thread] = []
        self.tasks: SimpleQueue[tuple[Any, SimpleQueue] | None] = SimpleQueue()

    def submit(self, item: Any) -> SimpleQueue:
        """Have an item worked on; the queue gets ("result", result), then None, or ("error", exception)."""
        if len(self.children) < self.workers:
            child = Child(self.make, self.name, self.advice)
            self.children.append(child)
            self.threads.append(Thread(target=self._serve, args=(child,), daemon=True))
            self.threads[-1].start()
        answers: SimpleQueue = SimpleQueue()
        self.tasks.put((item, answers))
        return answers

    def _serve(self, child: Child) -> None:
        while (task := self.tasks.get()) is not None:
            item, answers = task
            try:
                for result in child.work(item):
                    answers.put(("result", result))
                answers.put(None)
            except BaseException as error:  # raised again where the answers are read
                answers.put(("error", error))

    def stop(self) -> None:
        for child in self.children:
            child.process.kill()
        with suppress(Exception):
            while True:
                self.tasks.get_nowait()
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join()
        for child in self.children:
            child.close()


class Child:
    """A process that works on one item after another."""

    def __init__(self, make: Callable[[], Work], name: Callable[[Any], str] = str, advice: str = "") -> None:
        self.name, self.advice = name, advice
        command = [sys.executable, "-c", CHILD]
        environment = {**os.environ, **ONE_THREAD}
        with interrupts_held():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin and self.process.stdout
        self._requests: IO[bytes] = self.process.stdin
        self._answers: IO[bytes] = self.process.stdout
        with suppress(BrokenPipeError):  # told better by the exit code at the first item
            pickle.dump(sys.path, self._requests)
            pickle.dump(make, self._requests)

    def work(self, item: Any) -> Iterator[Any]:
        """Yield the results of an item."""
        with suppress(BrokenPipeError):
            pickle.dump(item, self._requests, protocol=5)
            self._requests.flush()
        while True:
            try:
                kind, content = pickle.load(self._answers)
            except (EOFError, pickle.UnpicklingError):
                raise WorkerDied(self._death(item)) from None
            if kind == "end":
                return
            if kind == "user error":
                raise UserError(content)
            if kind == "error":
                raise RuntimeError(f"in the process that worked on {self.name(item)}:\n{content}")
            yield content

    def _death(self, item: Any) -> str:
        code = self.process.wait()
        ending = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                ending = signal.Signals(-code).name
        cause = f"; not enough memory? {self.advice}" if code == -signal.SIGKILL else ""
        return f"{self.name(item)}: the process that worked on this was ended by {ending}{cause}"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        with suppress(OSError):
            self._requests.close()
        self._answers.close()
        self.process.wait()


def serve(make: Callable[[], Work]) -> None:
    """Work on items from stdin until there are no more, and answer each on stdout: the loop of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent ends it
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        work = None
        while True:
            try:
                item = pickle.load(source)
            except (EOFError, pickle.UnpicklingError):  # the parent is done, or gone in the midst of an item
                return
            try:
                work = work or make()
                for result in work(item):
                    _answer(sink, "result", result)
                _answer(sink, "end", None)
            except BrokenPipeError:
                raise
            except UserError as error:
                _answer(sink, "user error", str(error))
            except MemoryError:
                os._exit(1)
            except Exception:
                _answer(sink, "error", traceback.format_exc())
    except BrokenPipeError:
        os._exit(1)  # without another try to write what is left in the buffer


def _answer(sink: IO[bytes], kind: str, content: Any) -> None:
    pickle.dump((kind, content), sink, protocol=5)
    sink.flush()
