"""Counting pieces in several processes.

Plain child processes with pipes, not `multiprocessing`: that would run the caller's script again in each child, which
a script without `if __name__ == "__main__"` does not survive, or fork a parent that has threads.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO

from llmkit.tokenizer.counting import Ints, PieceCounter
from llmkit.tokenizer.patterns import Pattern

ALONE_BYTES = 12 << 20  # counted within this process: children take 0.2 s to start
_CHILD = """
import pickle, sys
sys.path[:], pattern = pickle.load(sys.stdin.buffer)
from llmkit.tokenizer.processes import count_in_child
count_in_child(pattern)
"""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_pieces(
    blocks: Iterable[bytes],
    pattern: Pattern,
    processes: int | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[list[bytes], Ints]:
    """The different pieces of all blocks and how often each occurs; the work of all cores, unless told otherwise.

    on_progress gets the bytes of each block once it is counted. An error raised by `blocks` passes through.
    """
    processes = available_cores() if processes is None else processes
    counter = PieceCounter(pattern)
    counted = 0
    blocks = iter(blocks)
    for block in blocks:
        counter.add(block)
        counted += len(block)
        if on_progress:
            on_progress(len(block))
        if counted >= ALONE_BYTES and processes > 1:
            for state in _count_in_children(blocks, pattern, processes, on_progress):
                counter.merge(state)
    return counter.result()


def _count_in_children(blocks: Iterable[bytes], pattern: Pattern, processes: int, on_progress):
    children = [_Child(pattern) for _ in range(processes)]
    idle: SimpleQueue[_Child] = SimpleQueue()
    for child in children:
        idle.put(child)

    def count(block: bytes) -> int:
        child = idle.get()
        try:
            child.count(block)
        finally:
            idle.put(child)
        return len(block)

    def report(done: Future[int]) -> None:
        size = done.result()
        if on_progress:
            on_progress(size)

    waiting: deque[Future[int]] = deque()
    try:
        with ThreadPoolExecutor(processes) as pool:
            for block in blocks:
                waiting.append(pool.submit(count, block))
                while len(waiting) > processes or (waiting and waiting[0].done()):
                    report(waiting.popleft())
            while waiting:
                report(waiting.popleft())
            yield from pool.map(_Child.state, children)
    finally:
        for child in children:
            child.stop()


class _Child:
    """A process that counts what it is sent."""

    def __init__(self, pattern: Pattern) -> None:
        command = [sys.executable, "-c", _CHILD]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        self.to: IO[bytes] = self.process.stdin
        self.from_: IO[bytes] = self.process.stdout
        pickle.dump((sys.path, pattern), self.to)

    def count(self, block: bytes) -> None:
        """Have a block counted; returns when it is."""
        try:
            self.to.write(len(block).to_bytes(8, "little"))
            self.to.write(block)
            self.to.flush()
        except BrokenPipeError:
            pass
        if not self.from_.read(1):
            raise RuntimeError(f"a process that counts pieces ended with code {self.process.wait()}")

    def state(self):
        """All that it counted; it ends."""
        self.to.write(bytes(8))
        self.to.flush()
        return pickle.load(self.from_)

    def stop(self) -> None:
        self.process.kill()
        with suppress(OSError):
            self.to.close()
        self.from_.close()
        self.process.wait()


def count_in_child(pattern: Pattern) -> None:
    """What a child does: count blocks from stdin until an empty one, then write the counts to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent ends it
    counter = PieceCounter(pattern)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while size := int.from_bytes(source.read(8), "little"):
        block = source.read(size)
        if len(block) < size:  # the parent is gone
            return
        counter.add(block)
        del block
        sink.write(b".")
        sink.flush()
    pickle.dump(counter.state(), sink, protocol=5)
    sink.flush()
