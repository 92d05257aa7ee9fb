"""Kernel tests run in Triton's interpreter where they ask for it."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def on_one_thread():
    """The arrays are small: two threads beside other processes wait longer than they compute."""
    from llmkit.model.devices import threads  # brings torch, and so Triton, which reads TRITON_INTERPRET

    with threads(1):
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels, run by the interpreter on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("LLMKIT_KERNELS", "interpret")
