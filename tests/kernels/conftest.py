"""Kernel tests run in Triton's interpreter if they use `interpreted`, or on a GPU with LLMKIT_TEST_DEVICE=cuda."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from functools import partial

import pytest

DEVICE = os.environ.get("LLMKIT_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def on_one_thread():
    """Use one thread: the arrays are so small that on a busy machine two threads wait longer than they compute."""
    from llmkit.model.devices import threads  # imports torch and Triton, which reads TRITON_INTERPRET

    with threads(1):
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run Triton kernels in the interpreter on CPU tensors, or compiled on LLMKIT_TEST_DEVICE."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv("LLMKIT_KERNELS", "interpret")
        yield
        return
    import torch

    monkeypatch.setenv("LLMKIT_KERNELS", "triton")
    monkeypatch.setattr(torch, "Generator", partial(torch.Generator, DEVICE))
    with torch.device(DEVICE):
        yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # after a kernel's fault this process cannot use the GPU
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist reports the test and starts a new process for the rest
        raise
