"""What a process is fed and prints back, bounded: `communicate` holds all of it, and `yes` fills 20 GB in a minute."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable
from typing import Any

BLOCK = 1 << 16  # bytes read at once, and kept of what is said on standard error
LONGEST_WAIT = 3600.0  # seconds at a time: epoll takes no more than 24 days


def exchange(
    process: subprocess.Popen[bytes], data: bytes, seconds: float, is_enough: Callable[[bytearray], bool]
) -> tuple[bytes, bytes, str]:
    """Feed a process and return what it printed, the end of its errors, and "done", "output" or "timeout".

    is_enough  asked after each block of what was printed so far; True stops the reading with "output"
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
                    except BrokenPipeError:  # it may answer before it has read all
                        written = len(data)
                    if written == len(data):
                        selector.unregister(stream)
                        stream.close()
                    continue
                part = os.read(stream.fileno(), BLOCK)
                if not part:
                    selector.unregister(stream)
                    outputs.remove(stream)
                elif stream is process.stderr:
                    err = (err + part)[-BLOCK:]
                else:
                    out += part
                    if is_enough(out):
                        return bytes(out), err, "output"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it closed its output and goes on
        return bytes(out), err, "timeout"
    return bytes(out), err, "done"
