"""Ctrl-C reaches every process of a terminal at any moment: those that we start leave it to us, and say nothing."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.io import pool


def held(pid: int) -> bool:
    """Whether SIGINT is blocked or ignored in a process, as it is from its first instruction."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return any(int(status[name], 16) >> (signal.SIGINT - 1) & 1 for name in ("SigBlk", "SigIgn"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_a_process_that_we_start_never_sees_ctrl_c() -> None:
    """One that was still importing ended with a traceback between our messages."""
    child = pool.Worker(dict)
    child.start()
    try:
        assert held(child.process.pid)
    finally:
        child.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("cut", [0, 40, -500])
def test_a_process_whose_parent_was_interrupted_says_nothing(cut: int) -> None:
    sent = pickle.dumps(sys.path) + pickle.dumps((dict, None)) + pickle.dumps(b"x" * 1000)
    done = subprocess.run([sys.executable, "-c", pool.CHILD], input=sent[:cut], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
