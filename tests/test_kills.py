"""Every stage, killed at random moments and resumed, leaves the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = os.environ.get("LLMKIT_KILLS", "20")  # of each stage
SEED = os.environ.get("LLMKIT_KILLS_SEED", "0")


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_every_stage_leaves_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent.joinpath("helpers", "kills.py")), MOMENTS, "--seed", SEED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
