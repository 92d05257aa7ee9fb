"""Kernel tests run in Triton's interpreter where they ask for it: the whole session has one mode of Triton."""

from __future__ import annotations

import importlib.util
import os

import pytest

# Triton reads it while it is imported, which whatever test comes first may do; compiling is tested in a process of
# its own, without it.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def on_one_thread():
    """The arrays are small: two threads beside other processes wait longer than they compute."""
    from llmkit.model.devices import threads  # brings torch, and so Triton, which reads the variable above

    with threads(1):
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels, run by the interpreter on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("LLMKIT_KERNELS", "interpret")
