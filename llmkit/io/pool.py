"""Processes that work on items: a pool that hands results back in the order of the items, and a worker for one item.

    for path, results in in_order(paths, make, workers=4):
        for result in results: ...
    text = Worker(make, seconds=3).call(item)

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
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from llmkit.errors import LlmkitError, UserError

AHEAD = 2  # items in flight for each process, so that a slow item does not leave the others idle
Work = Callable[[Any], Iterable[Any]]  # on one item; None, after the last, asks for what is left
END = object()  # after the results of an item
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
# what a worker of single items sees of our environment: a chat template that broke out of its sandbox finds no keys
SEEN = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ", "LANG", "LC_ALL", "SOURCE_DATE_EPOCH", "HOME")
CHILD = """
import pickle, sys
try:
    sys.path[:] = pickle.load(sys.stdin.buffer)
    from llmkit.io.pool import serve
    make, seconds = pickle.load(sys.stdin.buffer)
except (EOFError, pickle.UnpicklingError):  # the parent was interrupted
    sys.exit()
serve(make, seconds)
"""


class WorkerDied(LlmkitError):
    """A process ended in the midst of an item."""

    exit_code = UserError.exit_code


class TimeLimitError(WorkerDied):
    """An item took more time of the processor than it may."""


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
            else:
                work = work or make()
                yield item, iter(work(item))
        if rest and work:
            yield None, iter(work(None))
        return
    processes: list[Worker] = []
    threads: list[Thread] = []
    tasks: SimpleQueue[tuple[Any, SimpleQueue] | None] = SimpleQueue()
    waiting: deque[tuple[Any, SimpleQueue]] = deque()
    try:
        for item in items:
            answers: SimpleQueue = SimpleQueue()
            waiting.append((item, answers))
            if finished(item):
                answers.put(END)
            else:
                if len(processes) < workers:
                    processes.append(Worker(make, name=name, advice=advice, alone=False))
                    processes[-1].start()
                    threads.append(Thread(target=_work_on, args=(tasks, processes[-1]), daemon=True))
                    threads[-1].start()
                tasks.put((item, answers))
            # what is ready goes out before more is read: the input may be a slow pipe
            while len(waiting) >= AHEAD * workers or (waiting and not waiting[0][1].empty()):
                item, answers = waiting.popleft()
                yield item, _results(answers)
        for item, answers in waiting:
            yield item, _results(answers)
        for worker in processes if rest else ():
            yield None, worker.results(None)
    finally:
        for worker in processes:
            worker.process.kill()
        while not tasks.empty():
            with suppress(Empty):
                tasks.get_nowait()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()
        for worker in processes:
            worker.close()


def _work_on(tasks: SimpleQueue[tuple[Any, SimpleQueue] | None], worker: Worker) -> None:
    """Have a process work on items; the queue of each gets its results, then END or an exception."""
    while (task := tasks.get()) is not None:
        item, answers = task
        try:
            for result in worker.results(item):
                answers.put(result)
            answers.put(END)
        except BaseException as error:
            answers.put(error)


def _results(answers: SimpleQueue) -> Iterator[Any]:
    while (answer := answers.get()) is not END:
        if isinstance(answer, BaseException):
            raise answer
        yield answer


class PlainValues(pickle.Unpickler):
    """Reads what is made of strings, numbers, lists and the like alone, so that no answer can run code here."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse a class or function."""
        raise WorkerDied(f"the answer of a process has {module}.{name} in it, and is not read")


class Worker:
    """A process for one item at a time; `call` starts it, also after it ended, and in a fork of this process.

    make, name, advice: as of `in_order`.
    alone: not of a pool; what the work prints goes nowhere, and of the environment it sees no more than it needs.
    seconds: processor time of an item, so that a busy machine does not change results; None: no limit.
    """

    process: subprocess.Popen[bytes]

    def __init__(
        self,
        make: Callable[[], Work],
        seconds: float | None = None,
        name: Callable[[Any], str] = str,
        advice: str = "",
        alone: bool = True,
    ) -> None:
        self._make, self._seconds, self._name, self._advice, self._alone = make, seconds, name, advice, alone
        self._owner = 0  # the process that has started it
        self._lock = Lock()

    def start(self) -> None:
        """Start the process."""
        errors = subprocess.DEVNULL if self._alone else None
        seen = {name: value for name, value in os.environ.items() if name in SEEN or not self._alone}
        command, environment = [sys.executable, "-c", CHILD], {**seen, **ONE_THREAD}
        # Ctrl-C is held back meanwhile: the child never sees it, not even in its imports, for we end it
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        self._owner = os.getpid()
        weakref.finalize(self, _end, self.process, self._owner)
        assert self.process.stdin
        with suppress(BrokenPipeError):  # told better by the exit code at the first item
            pickle.dump(sys.path, self.process.stdin)
            pickle.dump((self._make, self._seconds), self.process.stdin)

    def call(self, item: Any) -> Any:
        """Return the only result of an item; errors are those of `results`."""
        with self._lock:
            if self._owner != os.getpid():
                self.start()
            try:
                (result,) = self.results(item)
            except UserError:
                raise
            except BaseException:  # the answer may be on its way, and belongs to no later item
                self.close()
                raise
        return result

    def results(self, item: Any) -> Iterator[Any]:
        """Yield the results of an item.

        Raises UserError of the work, RuntimeError for its bugs; WorkerDied, naming the item, when the process ends,
        TimeLimitError at the limit of time.
        """
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            pickle.dump(item, self.process.stdin, protocol=5)
            self.process.stdin.flush()
        while True:
            try:
                reader = PlainValues if self._alone else pickle.Unpickler
                kind, content = reader(self.process.stdout).load()
            except (EOFError, pickle.UnpicklingError):
                code = self.process.wait()
                if code == -signal.SIGPROF:
                    raise TimeLimitError(f"{self._name(item)}: took more than {self._seconds:g} s") from None
                ending = next((known.name for known in signal.Signals if known == -code), f"exit code {code}")
                cause = f"; not enough memory? {self._advice}" if code == -signal.SIGKILL else ""
                message = f"{self._name(item)}: the process that worked on this was ended by {ending}{cause}"
                raise WorkerDied(message) from None
            if kind == "end":
                return
            if kind == "user error":
                raise UserError(content)
            if kind == "error":
                raise RuntimeError(f"in the process that worked on {self._name(item)}:\n{content}")
            yield content

    def close(self) -> None:
        """End the process; another call starts a new one."""
        if self._owner:
            _end(self.process, self._owner)
            self._owner = 0


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def serve(make: Callable[[], Work], seconds: float | None) -> None:
    """Work on items from stdin until there are no more, and answer each on stdout: the loop of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent ends it
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(kind: str, content: Any) -> None:
        pickle.dump((kind, content), sink, protocol=5)
        sink.flush()

    try:
        work = None
        while True:
            try:
                item = pickle.load(source)
            except (EOFError, pickle.UnpicklingError):  # the parent is done, or gone in the midst of an item
                return
            try:
                work = work or make()
                signal.setitimer(signal.ITIMER_PROF, seconds or 0)  # SIGPROF ends us, also within one long operation
                for result in work(item):
                    answer("result", result)
                answer("end", None)
            except BrokenPipeError:
                raise
            except UserError as error:
                answer("user error", str(error))
            except MemoryError:
                os._exit(1)
            except Exception:
                answer("error", traceback.format_exc())
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    except BrokenPipeError:
        os._exit(1)  # without another try to write what is left in the buffer
