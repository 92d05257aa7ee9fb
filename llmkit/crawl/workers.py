"""Spans worked on in several processes, their parts handed back in the order of the spans.

Plain child processes with pipes, not `multiprocessing`: that would run the caller's script again in each child, or
fork a parent that has threads. A child is started when there is work for it, and ends when its parent does.
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

from llmkit.crawl.parts import Part
from llmkit.errors import LlmkitError, UserError
from llmkit.io.ranks import interrupts_held

AHEAD = 2  # spans in flight for each process, so that a slow span does not leave the others idle
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
_CHILD = """
import pickle, sys
try:
    sys.path[:] = pickle.load(sys.stdin.buffer)
    from llmkit.crawl.workers import serve
    make = pickle.load(sys.stdin.buffer)
except EOFError:  # the parent was interrupted
    sys.exit()
serve(make)
"""


class Work(Protocol):
    """What is done with a span, built once in each process: pure, so that it does not matter where it is done."""

    def parts(self, span: Any) -> Iterator[Part]: ...


class WorkerDied(LlmkitError):
    """A process ended in the midst of a span."""

    exit_code = UserError.exit_code


def in_order(
    spans: Iterable[Any],
    make: Callable[[], Work],
    workers: int,
    finished: Callable[[Any], bool] = lambda span: False,
) -> Iterator[tuple[Any, Iterator[Part]]]:
    """Yield (span, its parts) in the order of `spans`; each must be used up before the next is asked for.

    make: pickles, and is called once in each process; `workers` of 1 stays in this one.
    finished: says that a span needs no work; its parts are then empty.
    Raises what the work raises; WorkerDied, naming the span, when a process is killed.
    """
    if workers == 1:
        work = None
        for span in spans:
            if finished(span):
                yield span, iter(())
                continue
            work = work or make()
            yield span, work.parts(span)
        return
    pool = _Pool(make, workers)
    waiting: deque[tuple[Any, SimpleQueue | None]] = deque()
    try:
        for span in spans:
            waiting.append((span, None if finished(span) else pool.submit(span)))
            # what is ready goes out before more is read: the input may be a slow pipe
            while len(waiting) >= AHEAD * workers or (waiting and _ready(waiting[0][1])):
                yield _taken(waiting.popleft())
        while waiting:
            yield _taken(waiting.popleft())
    finally:
        pool.stop()


def _ready(answers: SimpleQueue | None) -> bool:
    return answers is None or not answers.empty()


def _taken(item: tuple[Any, SimpleQueue | None]) -> tuple[Any, Iterator[Part]]:
    span, answers = item
    return span, iter(()) if answers is None else _answered(answers)


def _answered(answers: SimpleQueue) -> Iterator[Part]:
    while (answer := answers.get()) is not None:
        if isinstance(answer, BaseException):
            raise answer
        yield Part.unpack(answer)


class _Pool:
    """Threads that each hold one child and give it spans."""

    def __init__(self, make: Callable[[], Work], workers: int) -> None:
        self.make, self.workers = make, workers
        self.children: list[_Child] = []
        self.threads: list[Thread] = []
        self.tasks: SimpleQueue[tuple[Any, SimpleQueue] | None] = SimpleQueue()

    def submit(self, span: Any) -> SimpleQueue:
        """Have a span worked on; the queue gets packed parts, then None, or an exception."""
        if len(self.children) < self.workers:
            child = _Child(self.make)
            self.children.append(child)
            self.threads.append(Thread(target=self._serve, args=(child,), daemon=True))
            self.threads[-1].start()
        answers: SimpleQueue = SimpleQueue()
        self.tasks.put((span, answers))
        return answers

    def _serve(self, child: _Child) -> None:
        while (task := self.tasks.get()) is not None:
            span, answers = task
            try:
                for packed in child.work(span):
                    answers.put(packed)
                answers.put(None)
            except BaseException as error:  # raised again where the answers are read
                answers.put(error)

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


class _Child:
    """A process that works on one span after another."""

    def __init__(self, make: Callable[[], Work]) -> None:
        command = [sys.executable, "-c", _CHILD]
        environment = {**os.environ, **ONE_THREAD}
        with interrupts_held():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin and self.process.stdout
        self.to: IO[bytes] = self.process.stdin
        self.from_: IO[bytes] = self.process.stdout
        pickle.dump(sys.path, self.to)
        pickle.dump(make, self.to)

    def work(self, span: Any) -> Iterator[bytes]:
        """The packed parts of a span."""
        with suppress(BrokenPipeError):  # told better by the exit code below
            pickle.dump(span, self.to, protocol=5)
            self.to.flush()
        while True:
            try:
                kind, content = pickle.load(self.from_)
            except (EOFError, pickle.UnpicklingError):
                raise WorkerDied(_death(span, self.process.wait())) from None
            if kind == "end":
                return
            if kind == "user error":
                raise UserError(content)
            if kind == "error":
                raise RuntimeError(f"in the process that worked on {place(span)}:\n{content}")
            yield content

    def close(self) -> None:
        with suppress(OSError):
            self.to.close()
        self.from_.close()
        self.process.wait()


def place(span: Any) -> str:
    """A span as errors name it."""
    name = "stdin" if span.path == "-" else span.path
    if span.files:
        return f"{span.files[0]} to {span.files[-1]}"
    return f"{name}: from {span.start} on" if span.stop <= span.start else f"{name}: {span.start} to {span.stop}"


def _death(span: Any, code: int) -> str:
    how = f"exit code {code}"
    if code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
    cause = "; not enough memory? fewer --workers need less" if code == -signal.SIGKILL else ""
    return f"{place(span)}: the process that worked on this was ended by {how}{cause}"


def serve(make: Callable[[], Work]) -> None:
    """What a child does: work on spans from stdin until there are no more, and answer each on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent ends it
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        work = None
        while True:
            try:
                span = pickle.load(source)
            except EOFError:  # the parent is done, or gone
                return
            try:
                work = work or make()
                for part in work.parts(span):
                    _answer(sink, "part", part.pack())
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
