"""A bound on the processor's time for one page, so that no page can stop a crawl.

    try:
        with work_limit(len(page)):
            ...
    except TooMuchWork:
        ...  # the page is dropped for the reason `too_slow`

The bound is a hundred times what slow pages take, so that what is kept does not depend on the machine.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS, BYTES_PER_SECOND = 30.0, 30_000  # of the processor: for every page, and more for a long one


class TooMuchWork(BaseException):
    """A page took more than its time; no `except Exception` of a library may take it for its own."""


def _stop(signum: int, frame: Any) -> None:
    raise TooMuchWork


@contextmanager
def work_limit(size: int) -> Iterator[None]:
    """Raise TooMuchWork inside the block when a page of `size` bytes takes far longer than any should.

    Without effect outside of the main thread, and where the system has no such clock.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    # raised again each second, for a library that calls back into Python and prints what is raised there
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + size / BYTES_PER_SECOND, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
