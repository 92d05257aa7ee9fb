"""What a process asks of its machine."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_can_be_kept():
    code = "from llmkit.model.devices import keep_freed_memory; print(type(keep_freed_memory()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "<class 'bool'>\n", run.stderr
