"""Process pools: one that returns results in the order of the items, and a single worker with a time limit.

    for path, results in in_order(paths, make, workers=4):
        for result in results: ...
    text = Worker(make, seconds=3).call(item)

Children are plain processes with pipes. `multiprocessing` would either run the caller's script again in each child,
which breaks scripts without `if __name__ == "__main__"`, or fork a parent that has threads. A child is started when
there is work for it, and ends with its parent.
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

AHEAD = 2  # items in flight per process, so that a slow item does not leave the others idle
Work = Callable[[Any], Iterable[Any]]  # item to results; called with None at the end, returns remaining results
END = object()  # follows the results of an item
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
# environment of a single worker: a chat template that breaks out of its sandbox finds no API keys
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
    """A worker process ended while working on an item."""

    exit_code = UserError.exit_code


class TimeLimitError(WorkerDied):
    """An item exceeded its limit of processor time."""


def in_order(
    items: Iterable[Any],
    make: Callable[[], Work],
    workers: int,
    *,
    name: Callable[[Any], str] = str,
    finished: Callable[[Any], bool] = lambda item: False,
    rest: bool = False,
    advice: str = "use fewer processes (--workers)",
) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield (item, its results) in the order of `items`; exhaust the results before the next pair.

    make: picklable, called once per process to make its work function; with one worker, in this process.
    name: names an item in errors.
    finished: returns True if an item needs no work; its results are then empty.
    rest: at the end, yield (None, results of None) for each process.
    advice: shown if a process was killed, probably for lack of memory.
    Raise the exceptions of the work, and WorkerDied, naming the item, if a process is killed.
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
            # yield finished results before reading on: the input may be a slow pipe
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
    """Run the items of `tasks` through a worker; put each item's results, then END or an exception, into its queue."""
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
    """An unpickler of plain strings, numbers, lists and the like, so that no answer can run code in this process."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all classes and functions."""
        raise WorkerDied(f"the answer of a worker process was refused, because it contains {module}.{name}")


class Worker:
    """A process that works on one item at a time. `call` starts it, and restarts it if it ended or after a fork.

    make, name, advice: as in `in_order`.
    alone: outside of a pool; the output of the work is discarded, and its environment is reduced to SEEN.
    seconds: limit of processor time per item, which does not depend on the load of the machine; None is no limit.
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
        self._owner = 0  # the process that started it
        self._lock = Lock()

    def start(self) -> None:
        """Start the process."""
        errors = subprocess.DEVNULL if self._alone else None
        seen = {name: value for name, value in os.environ.items() if name in SEEN or not self._alone}
        command, environment = [sys.executable, "-c", CHILD], {**seen, **ONE_THREAD}
        # the child inherits the blocked SIGINT, so that Ctrl-C never reaches it, even in its imports: we end it
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
        with suppress(BrokenPipeError):  # the first item reports the exit code
            pickle.dump(sys.path, self.process.stdin)
            pickle.dump((self._make, self._seconds), self.process.stdin)

    def call(self, item: Any) -> Any:
        """Return the single result of an item; errors are those of `results`."""
        with self._lock:
            if self._owner != os.getpid():
                self.start()
            try:
                (result,) = self.results(item)
            except UserError:
                raise
            except BaseException:  # a late answer must not be taken for that of the next item
                self.close()
                raise
        return result

    def results(self, item: Any) -> Iterator[Any]:
        """Yield the results of an item.

        Raise the UserError of the work, RuntimeError for its other errors, WorkerDied, naming the item, if the
        process ends, and TimeLimitError.
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
                message = f"{self._name(item)}: the worker process was ended by {ending}{cause}"
                raise WorkerDied(message) from None
            if kind == "end":
                return
            if kind == "user error":
                raise UserError(content)
            if kind == "error":
                raise RuntimeError(f"in the worker process of {self._name(item)}:\n{content}")
            yield content

    def close(self) -> None:
        """End the process; the next `call` starts a new one."""
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
    """Run the loop of a child process: read items from stdin until it closes, write results to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child too; the parent ends it
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep the prints of libraries out of the answers

    def answer(kind: str, content: Any) -> None:
        pickle.dump((kind, content), sink, protocol=5)
        sink.flush()

    try:
        work = None
        while True:
            try:
                item = pickle.load(source)
            except (EOFError, pickle.UnpicklingError):  # the parent is done, or died while sending an item
                return
            try:
                work = work or make()
                signal.setitimer(signal.ITIMER_PROF, seconds or 0)  # SIGPROF ends us, even inside a long C call
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
        os._exit(1)  # without flushing the buffer into the broken pipe again
