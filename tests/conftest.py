"""Fixtures of all tests: the shared data folder, if there is one, and the command line as a user runs it."""

from __future__ import annotations

import os
import platform
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# two threads, set before torch is imported: tiny models are slower on many, especially on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this at import, so a session has one mode; compilation is tested in a separate process
os.environ["TRITON_INTERPRET"] = "1"
# float32 by default, with the same rounding on CPUs with bfloat16 arithmetic
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import pytest

with suppress(ImportError):  # in the extra `test`
    from hypothesis import settings

    settings.register_profile("llmkit", deadline=None)  # the default of 200 ms is too short on a busy machine
    settings.load_profile("llmkit")

# background jobs of a shell ignore SIGINT, and children inherit that: tests that interrupt a stage would hang
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by playwright; its event loop runs until the end of the module."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on the PATH")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The project's shared data folder; its tests have the mark `shared`."""
    folder = Path(os.environ.get("LLMKIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared data: set LLMKIT_SHARED_DATA to its folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


@pytest.fixture
def one_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry a failed request once instead of six times."""
    monkeypatch.setattr("llmkit.generation.served_models.RETRIES", 1)


@pytest.fixture(scope="session")
def llmkit() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a new process: `llmkit("sample", "base/", stdin="...")`.

    stdin is empty by default; other keywords go to subprocess.run.
    """

    def run(*arguments: str | Path, stdin: str = "", **details) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmkit", *map(str, arguments)]
        details = {"timeout": 300, **details}
        return subprocess.run(command, input=stdin, capture_output=True, text=True, **details)

    return run


@pytest.fixture(scope="session")
def on_terminal() -> Callable[..., str]:
    """Run a command on a new terminal without input; return its output there, without colours."""

    def run(*command: str) -> str:
        leader, follower = pty.openpty()
        with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower) as process:
            os.close(follower)
            impatient = threading.Timer(120, process.kill)  # if it waits for input
            impatient.start()
            shown = b""
            with suppress(OSError):  # Linux's end of file
                while block := os.read(leader, 4096):
                    shown += block
            process.wait()
            impatient.cancel()
        os.close(leader)
        assert process.returncode != -signal.SIGKILL, f"waited for input, having shown {shown!r}"
        return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())

    return run
