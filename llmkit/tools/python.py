"""Python for models: runs a program in a sandbox and returns its output.

    run_python("print(2 ** 10)").output  ->  "1024\\n"

The sandbox is llmkit/tools/jail.py: namespaces, a private root, Landlock, seccomp and resource limits, which the child
process sets up itself before the code runs. It needs Linux 5.13 or later on x86_64 or aarch64. If a part is missing,
nothing is run, unless the user gives `--sandbox none`.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmkit.errors import UserError

BLOCK = 1 << 16  # bytes per read; also the bytes of stderr that are kept
LONGEST_WAIT = 3600.0  # seconds per wait: epoll's limit is 24 days
LONGEST_PROGRAM = 1 << 18  # bytes
PAUSES = (0.05, 0.1, 0.2, 0.5, 1, 2, 4)  # seconds between retries if the machine is out of processes or memory
LEAVING_SECONDS = 0.5  # time for killed processes to disappear on a busy machine
GRACE_SECONDS = 1.0  # a program ends itself this long after its timeout if it was not killed


def exchange(
    process: subprocess.Popen[bytes], data: bytes, seconds: float, is_enough: Callable[[bytearray], bool]
) -> tuple[bytes, bytes, str]:
    """Feed a process; return its stdout, the end of its stderr, and "done", "output" or "timeout".

    is_enough  called with the output after each block; True stops with "output"
    """
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + seconds
    outputs: list[Any] = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    out, err, written = bytearray(), b"", 0
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for stream in outputs:
            selector.register(stream, selectors.EVENT_READ)
        while outputs:
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(out), err, "timeout"
            for key, _ in selector.select(min(left, LONGEST_WAIT)):
                stream: Any = key.fileobj
                if stream is process.stdin:
                    try:
                        written += os.write(stream.fileno(), data[written : written + BLOCK])
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:  # it may answer without reading everything
                        written = len(data)
                    if written == len(data):
                        selector.unregister(stream)
                        stream.close()
                elif not (block := os.read(stream.fileno(), BLOCK)):
                    selector.unregister(stream)
                    outputs.remove(stream)
                elif stream is process.stderr:
                    err = (err + block)[-BLOCK:]
                else:
                    out += block
                    if is_enough(out):
                        return bytes(out), err, "output"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it closed its output and keeps running
        return bytes(out), err, "timeout"
    return bytes(out), err, "done"


@dataclass(frozen=True)
class Limits:
    """Limits of a program. Its files are in memory, at most twice `file_bytes`."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class PythonResult:
    """The result of a program.

    output   stdout and stderr, interleaved, at most `output_bytes`
    ended    "done", "error" (an exception or a non-zero exit status), "timeout" (wall or CPU time), "output" (too
             much of it) or "killed"
    """

    output: str
    ended: str


def check_sandbox() -> None:
    """Raise UserError with the reason if the sandbox does not work. Tried once per process."""
    if missing := _missing():
        raise UserError(f"the Python sandbox does not work on this machine: {missing}; --sandbox none runs without one")


@lru_cache(1)
def _missing() -> str | None:
    if sys.platform != "linux":
        return f"it needs Linux, found {sys.platform}"
    try:
        result = run_python("import json\nprint('done')")
    except UserError as error:
        return str(error)
    if result != PythonResult("done\n", "done"):
        last_line = (result.output.strip().splitlines() or ["nothing"])[-1]
        return f"expected a program in it to print 'done', found {last_line[:200]!r} ({result.ended})"
    return None


@lru_cache(1)
def _memory() -> int:
    """Return three quarters of the machine's or container's memory, divided by the local world size."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path("/sys/fs/cgroup", name).read_text()))
    return total * 3 // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


_taken = 0  # bytes of `_memory` reserved by running programs
_taken_changed = threading.Condition()


@contextmanager
def room_for(limits: Limits, programs: int) -> Iterator[None]:
    """Reserve memory for programs that run at the same time, with `descriptors`; wait until it is free."""
    global _taken
    size = programs * (limits.memory_bytes + 2 * limits.file_bytes)
    with _taken_changed:
        _taken_changed.wait_for(lambda: _taken == 0 or _taken + size <= _memory())
        _taken += size
    try:
        yield
    finally:
        with _taken_changed:
            _taken -= size
            _taken_changed.notify_all()


def run_python(
    code: str, limits: Limits | None = None, *, sandbox: bool = True, descriptors: tuple[int, ...] = ()
) -> PythonResult:
    """Run a program and wait for it to end. None of its processes is left when this returns.

    `descriptors` are file descriptors that it inherits, such as pipes to another program; then the caller holds
    `room_for` both. Without them this waits for room itself. Raises UserError if the sandbox cannot be set up, before
    the program runs. Without `sandbox` the program is a plain child process in an empty folder, limited only in time
    and output.
    """
    limits = limits or Limits()
    data = code.encode("utf-8", "replace")
    if len(data) > LONGEST_PROGRAM:
        return PythonResult(f"the program is longer than {LONGEST_PROGRAM} bytes", "error")
    with nullcontext() if descriptors else room_for(limits, 1):
        for pause in (*PAUSES, None):
            try:
                return _run_in(data, limits, sandbox, descriptors)
            except _BusyError as error:
                if pause is None:
                    raise UserError(f"{error}, for {sum(PAUSES):.0f} seconds") from None
                time.sleep(pause)
    raise AssertionError("the last try returns or raises")


class _BusyError(Exception):
    """The machine is out of processes or memory; nothing was run."""


def _run_in(data: bytes, limits: Limits, sandbox: bool, descriptors: tuple[int, ...]) -> PythonResult:
    if not sandbox:
        with TemporaryDirectory(prefix="llmkit-") as folder:
            return _run(data, limits, -1, folder, descriptors)
    status, theirs = os.pipe()
    try:
        result = _run(data, limits, theirs, "/", (theirs, *descriptors))
    finally:
        os.close(theirs)
        refusal = os.read(status, 500).decode("utf-8", "replace")
        os.close(status)
    if refusal.startswith("busy: "):
        raise _BusyError(refusal.removeprefix("busy: "))
    if refusal:
        raise UserError(refusal)
    return result


def _run(data: bytes, limits: Limits, status: int, folder: str, descriptors: tuple[int, ...]) -> PythonResult:
    """Start jail.py, feed it `data`, read its output up to the limits, and kill its process group."""
    milliseconds = round((limits.wall_seconds + GRACE_SECONDS) * 1000)
    numbers = (status, os.getpid(), milliseconds, limits.memory_bytes, limits.cpu_seconds, limits.file_bytes)
    jail = str(Path(__file__).with_name("jail.py"))
    try:
        started = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", jail, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={},
            pass_fds=descriptors,
            start_new_session=True,
        )
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.ENOMEM):
            raise _BusyError(f"no new process: {error.strerror}") from None
        raise
    most = limits.output_bytes
    with started as child:
        try:
            output, _, ended = exchange(child, data, limits.wall_seconds, lambda read: len(read) > most)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.wait()
            with suppress(ChildProcessError):  # if we are a container's init process, orphans of the child become ours
                while True:
                    os.waitpid(-child.pid, 0)
            until = time.monotonic() + LEAVING_SECONDS
            with suppress(ProcessLookupError, PermissionError):
                while time.monotonic() < until:
                    os.killpg(child.pid, signal.SIGKILL)
                    time.sleep(0.001)
    if ended == "done" and child.returncode:
        ended = "error"
        if child.returncode == 128 + signal.SIGXCPU:
            ended = "timeout"
        elif not 0 < child.returncode <= 128:
            ended = "killed"
    return PythonResult(output[:most].decode("utf-8", "replace"), ended)
