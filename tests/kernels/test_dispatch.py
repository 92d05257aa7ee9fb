"""The one switch of the kernels, and what importing them costs."""

import subprocess
import sys

import pytest
from llmkit.kernels import backend

from llmkit.errors import UserError


@pytest.mark.parametrize("value", ["auto", "torch", ""])
def test_what_works_is_accepted(monkeypatch, value):
    monkeypatch.setenv("LLMKIT_KERNELS", value)
    assert backend() == "torch"


def test_anything_else_is_refused_with_the_list(monkeypatch):
    monkeypatch.setenv("LLMKIT_KERNELS", "cuda")
    with pytest.raises(UserError, match=r"LLMKIT_KERNELS: expected one of auto, torch, found 'cuda'"):
        backend()


def test_the_kernels_import_no_triton():
    code = "import sys, llmkit.kernels; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_can_be_kept():
    code = "from llmkit.kernels import keep_freed_memory; print(type(keep_freed_memory()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "<class 'bool'>\n", run.stderr
