"""The benchmarks for a GPU run from end to end on a CPU: tiny shapes, the kernels in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LLMKIT_KERNELS")}
    command = [sys.executable, FOLDER / script, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_kernels_are_checked_tuned_and_tabled(tmp_path):
    done = run("kernels.py", "--smoke", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "kernels.md").read_text() and "Nothing was timed" in done.stdout
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    ours = {row["kind"]: row for row in rows if row["who"] == "llmkit"}
    expected = "attention causal, attention packed, attention windowed, loss, logprobs, grpo, decode"
    assert set(expected.split(", ")) <= set(ours)
    assert all(0 < row["error"] < 0.02 and row["forward_ms"] > 0 and row["forward_rate"] > 0 for row in ours.values())
    assert all(("both_ms" in row) == (kind not in ("logprobs", "decode")) for kind, row in ours.items())
    assert ours["loss"]["both_ratio"] > 0
    notes = {(row["kind"], row["who"]): row.get("note") for row in rows}
    assert notes["attention causal", "SDPA cuDNN"] == "absent: needs an NVIDIA GPU"
    assert notes["attention packed", "SDPA cuDNN"] == "absent: never with a mask"
    assert notes["loss", "Liger"].startswith("absent: ") and notes["loss", "torch.compile"] is None

    tiles = json.loads((tmp_path / "tiles.json").read_text())["interpreter"]["tiles"]
    assert {name.split()[0] for name in tiles} == {
        "attention_forward", "attention_grad_query", "attention_grad_key_value", "attention_decode",
        "linear_logsumexp", "cross_entropy",
    }  # fmt: skip
    tiles["attention_decode 32 bfloat16"]["block_n"] = 48  # no power of two: a kernel that is given it fails
    (tmp_path / "tiles.json").write_text(json.dumps({"interpreter": {"tiles": tiles}}))
    again = run(
        "kernels.py", "--smoke", "--no-tune", "--only", "decode", "--tiles", tmp_path / "tiles.json", "-o", tmp_path
    )
    assert again.returncode == 1 and "failed: " in again.stdout and "logprobs" not in again.stdout


def test_a_wrong_answer_is_not_timed(monkeypatch, interpreted):
    monkeypatch.syspath_prepend(str(FOLDER))
    from cases import OURS, Makers
    from clock import Clock
    from measuring import measure
    from shapes import SMOKE

    case = Makers("cpu").loss(SMOKE.loss[0])
    plain = case.contenders["torch.compile"]
    case.contenders = {OURS: plain, "wrong": lambda x, w: plain(x, w) * 1.1, "broken": lambda x, w: 1 / 0}
    rows = {row["who"]: row for row in measure(case, Clock("cpu"), {"TFLOP/s": 1.0, "TB/s": 1.0})}
    assert "note" not in rows[OURS] and "both_ratio" not in rows[OURS]  # no peer is left to compare with
    assert rows["wrong"]["note"].startswith("WRONG") and "forward_ms" not in rows["wrong"]
    assert rows["wrong"]["error"] == pytest.approx(0.1, abs=0.01)
    assert rows["broken"]["note"].startswith("failed: ZeroDivisionError")


def test_a_training_step_has_the_same_loss_with_kernels_on_and_off(tmp_path):
    done = run("training.py", "--smoke", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    on, off = json.loads((tmp_path / "training.json").read_text())
    assert (on["kernels"], off["kernels"]) == ("interpret", "torch")
    assert on["loss"] == pytest.approx(off["loss"], abs=1e-4) and on["parameters"] == off["parameters"]
    assert "Nothing was timed" in done.stdout


def test_generation_is_right_and_says_what_is_absent(tmp_path):
    done = run("generation.py", "--smoke", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "generation.md").read_text() and "Nothing was timed" in done.stdout
    rows = {(row["who"], row["batch"]): row for row in json.loads((tmp_path / "generation.json").read_text())["rows"]}
    for batch in (1, 2):
        eager = rows["llmkit eager", batch]
        assert eager["error"] < 1e-5 and eager["x_eager"] == 1 and eager["tokens_per_second"] > 0 < eager["share"]
        assert rows["llmkit graphs", batch]["note"] == "absent: needs a GPU"
        theirs = rows["transformers", batch]
        assert theirs["error"] < 1e-5 and theirs["x_hf"] == 1 if "error" in theirs else "absent" in theirs["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["kernels.py", "training.py", "generation.py"])
def test_without_a_gpu_one_line_says_so(script):
    done = run(script)
    assert done.returncode == 2 and done.stderr == f"{script}: no GPU here; --smoke runs it on a CPU\n"
