"""Every stage, killed at random moments and resumed, leaves the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = os.environ.get("LLMKIT_KILLS", "20")  # kills per stage
QUICK = ["pretrain", "sft", "train-reward", "rl", "probe-knowledge"]  # one kill each; other stages have separate tests
SEED = os.environ.get("LLMKIT_KILLS_SEED", "0")


@pytest.mark.parametrize("moments", ["1", pytest.param(MOMENTS, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_every_stage_leaves_the_same_bytes(tmp_path: Path, moments: str) -> None:
    stages = QUICK if moments == "1" else []
    script = str(Path(__file__).parent.joinpath("helpers", "kills.py"))
    command = [sys.executable, script, moments, *stages, "--seed", SEED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
