"""The switch between kernels and torch, and the import cost of kernels."""

import subprocess
import sys

import pytest
import torch
from llmkit.kernels.dispatch import backend, triton_module

from llmkit.errors import UserError


@pytest.mark.parametrize("value", ["auto", "torch", ""])
@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_without_a_gpu_torch_computes(monkeypatch, value, device_type):
    monkeypatch.setenv("LLMKIT_KERNELS", value)
    assert backend(device_type) == "torch"


def test_anything_else_is_refused_with_the_list(monkeypatch):
    monkeypatch.setenv("LLMKIT_KERNELS", "cuda")
    with pytest.raises(
        UserError, match=r"LLMKIT_KERNELS: expected one of auto, triton, torch, interpret, found 'cuda'"
    ):
        backend()


def test_triton_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setenv("LLMKIT_KERNELS", "triton")
    with pytest.raises(UserError, match="LLMKIT_KERNELS=triton: expected a GPU, found cpu"):
        backend("cpu")


def test_the_interpreter_serves_cpu_tensors(interpreted):
    assert backend("cpu") == "interpret"
    assert triton_module("launch").target() == "interpreter"


def test_a_compiled_function_sees_the_switch(monkeypatch):
    monkeypatch.setenv("LLMKIT_KERNELS", "torch")
    compiled = torch.compile(lambda x: x + (backend(x.device.type) == "torch"), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1


def test_the_kernels_import_no_triton():
    code = "import sys, llmkit.kernels; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("environment", "first", "message"),
    [
        ({"LLMKIT_KERNELS": "interpret"}, "import triton", "interpret: Triton was imported before, in its other mode; "
         "set TRITON_INTERPRET=1 too"),
        ({"LLMKIT_KERNELS": "interpret", "TRITON_INTERPRET": "1"}, "import triton", None),
        ({"LLMKIT_KERNELS": "interpret"}, "", None),
        ({"TRITON_INTERPRET": "1"}, "import triton", "auto: Triton was imported before, in its other mode; start a "
         "process without TRITON_INTERPRET"),
    ],
)  # fmt: skip
def test_a_process_has_one_mode_of_triton(environment, first, message):
    pytest.importorskip("triton")
    code = f"{first}\nfrom llmkit.kernels.dispatch import triton_module; print(triton_module('launch').interpreting())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""} | environment)
    if message is None:
        assert run.stdout == "True\n", run.stderr
    else:
        assert run.stderr.splitlines()[-1] == f"llmkit.errors.UserError: LLMKIT_KERNELS={message}"
