"""The one switch of the kernels, and what importing them costs."""

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


def test_triton_is_refused_where_there_is_no_gpu(monkeypatch):
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


def test_a_process_has_one_mode_of_triton():
    code = """
import os, triton
os.environ["LLMKIT_KERNELS"] = "interpret"
from llmkit.kernels.dispatch import triton_module
triton_module("launch")
"""
    environment = {"PATH": "", "LLMKIT_KERNELS": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if "No module named 'triton'" in run.stderr:
        pytest.skip("triton is not installed")
    assert "UserError: LLMKIT_KERNELS: triton is loaded in another mode already" in run.stderr
