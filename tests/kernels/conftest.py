"""Kernel tests run in Triton's interpreter where they ask for it; on a GPU with LLMKIT_TEST_DEVICE=cuda."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from functools import partial

import pytest

DEVICE = os.environ.get("LLMKIT_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def on_one_thread():
    """The arrays are small: two threads beside other processes wait longer than they compute."""
    from llmkit.model.devices import threads  # brings torch, and so Triton, which reads TRITON_INTERPRET

    with threads(1):
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels, run by the interpreter on CPU tensors, or compiled on those of LLMKIT_TEST_DEVICE."""
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
    except RuntimeError:  # a kernel's fault: nothing runs in this process any more
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist names the test and starts another process for the others
        raise
