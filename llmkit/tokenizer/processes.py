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

from llmkit.io.ranks import available_cores, interrupts_held
from llmkit.tokenizer.patterns import Pattern
from llmkit.tokenizer.piece_counts import Counts, Ints, PieceCounter

ALONE_BYTES = 12 << 20  # counted within this process: children take 0.2 s to start
HANDED_OVER = 2_000_000  # counts of a child that are handed to the parent, so that many cores need little more memory
_CHILD = """
import pickle, sys
try:
    sys.path[:], pattern = pickle.load(sys.stdin.buffer)
except EOFError:  # the parent was interrupted
    sys.exit()
from llmkit.tokenizer.processes import count_in_child
count_in_child(pattern)
"""


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
            _count_in_children(blocks, counter, processes, on_progress)
    return counter.result()


def _count_in_children(
    blocks: Iterable[bytes], counter: PieceCounter, processes: int, on_progress: Callable[[int], object] | None
) -> None:
    children = [_Child(counter.pattern) for _ in range(processes)]
    idle: SimpleQueue[_Child] = SimpleQueue()
    for child in children:
        idle.put(child)

    def count(block: bytes) -> tuple[int, Counts | None]:
        child = idle.get()
        try:
            return len(block), child.count(block)
        finally:
            idle.put(child)

    def take(done: Future[tuple[int, Counts | None]]) -> None:
        size, counts = done.result()
        if counts is not None:
            counter.merge(counts)
        if on_progress:
            on_progress(size)

    waiting: deque[Future[tuple[int, Counts | None]]] = deque()
    try:
        with ThreadPoolExecutor(processes) as pool:
            for block in blocks:
                waiting.append(pool.submit(count, block))
                while len(waiting) > processes or (waiting and waiting[0].done()):
                    take(waiting.popleft())
            while waiting:
                take(waiting.popleft())
            for counts in pool.map(_Child.finish, children):
                counter.merge(counts)
    finally:
        for child in children:
            child.stop()


class _Child:
    """A process that counts what it is sent."""

    def __init__(self, pattern: Pattern) -> None:
        command = [sys.executable, "-c", _CHILD]
        with interrupts_held():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        self.to: IO[bytes] = self.process.stdin
        self.from_: IO[bytes] = self.process.stdout
        pickle.dump((sys.path, pattern), self.to)

    def count(self, block: bytes) -> Counts | None:
        """Have a block counted; returns when it is, with the counts so far where the child hands them over."""
        with suppress(BrokenPipeError):
            self.to.write(len(block).to_bytes(8, "little"))
            self.to.write(block)
            self.to.flush()
        return self._answer()

    def finish(self) -> Counts:
        """All that it has counted and not handed over; it ends."""
        with suppress(BrokenPipeError):
            self.to.write(bytes(8))
            self.to.flush()
        return self._answer()

    def _answer(self):
        try:
            return pickle.load(self.from_)
        except EOFError:
            raise RuntimeError(f"a process that counts pieces ended with code {self.process.wait()}") from None

    def stop(self) -> None:
        self.process.kill()
        with suppress(OSError):
            self.to.close()
        self.from_.close()
        self.process.wait()


def count_in_child(pattern: Pattern) -> None:
    """What a child does: count blocks from stdin until an empty one, and answer each on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent ends it
    try:
        _answer_blocks(pattern, sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # the parent is gone
        os._exit(1)  # without another try to write what is left in the buffer


def _answer_blocks(pattern: Pattern, source: IO[bytes], sink: IO[bytes]) -> None:
    counter = PieceCounter(pattern)
    while (header := source.read(8)) != bytes(8):
        size = int.from_bytes(header, "little")
        block = source.read(size)
        if not header or len(block) < size:  # the parent is gone
            return
        counter.add(block)
        counts = None
        if counter.rows > HANDED_OVER:
            counts, counter = counter.counts(), PieceCounter(pattern)
        pickle.dump(counts, sink, protocol=5)
        sink.flush()
    pickle.dump(counter.counts(), sink, protocol=5)
    sink.flush()
