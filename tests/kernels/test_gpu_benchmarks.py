"""The GPU benchmarks end to end on a CPU: tiny shapes, kernels in Triton's interpreter."""

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


def rows_of(path: Path, stage: str) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["stage"] == stage]


def test_the_kernels_are_checked_tuned_and_tabled(tmp_path):
    results = tmp_path / "results.jsonl"
    done = run("kernels.py", "--smoke", "-o", results)
    assert done.returncode == 0, done.stderr
    assert "Nothing was timed" in done.stdout and "| attention causal | 1,2,1,40,16 | llmkit |" in done.stdout
    rows = rows_of(results, "kernel")
    ours = {row["kind"]: row for row in rows if row["who"] == "llmkit"}
    expected = "attention causal, attention packed, attention windowed, loss, logprobs, grpo, decode"
    assert set(expected.split(", ")) <= set(ours)
    assert all(0 < row["error"] < 0.02 and row["forward_ms"] > 0 and row["forward_rate"] > 0 for row in ours.values())
    assert all(("both_ms" in row) == (kind not in ("logprobs", "decode")) for kind, row in ours.items())
    (machine,) = rows_of(results, "machine")
    assert machine["TFLOP/s"] > 0 < machine["TB/s"] and machine["torch"] == torch.__version__
    notes = {(row["kind"], row["who"]): row.get("note") for row in rows}
    assert notes["attention causal", "SDPA cuDNN"] == "absent: needs an NVIDIA GPU"
    assert notes["attention packed", "SDPA cuDNN"] == "absent: never with a mask"
    assert notes["loss", "Liger"].startswith("absent: ") and notes["loss", "torch.compile"] is None

    tiles = json.loads((tmp_path / "tiles.json").read_text())["interpreter"]["tiles"]
    assert {name.split()[0] for name in tiles} == {
        "attention_forward", "attention_grad_query", "attention_grad_key_value", "attention_decode",
        "linear_logsumexp", "cross_entropy",
    }  # fmt: skip
    tiles["attention_decode 32 bfloat16"]["block_n"] = 48  # not a power of two: the kernel fails
    (tmp_path / "tiles.json").write_text(json.dumps({"interpreter": {"tiles": tiles}}))
    again = run(
        "kernels.py", "--smoke", "--no-tune", "--only", "decode", "logprobs", "--who", "llmkit",
        "--tiles", tmp_path / "tiles.json", "-o", tmp_path / "again.jsonl",
    )  # fmt: skip
    assert again.returncode == 1 and not rows_of(tmp_path / "again.jsonl", "machine")[1:]
    assert [(row["kind"], row["who"], "note" in row) for row in rows_of(tmp_path / "again.jsonl", "kernel")] == [
        ("logprobs", "llmkit", False), ("decode", "llmkit", True),
    ]  # fmt: skip


def test_warp_specialization_is_measured_with_the_default_tiles(tmp_path):
    results = tmp_path / "results.jsonl"
    for _ in range(2):
        done = run("kernels.py", "--smoke", "--no-tune", "--specialized", "--only", "attention causal", "-o", results)
        assert done.returncode == 0, done.stdout
    assert len(rows_of(results, "machine")) == 1  # its ceilings are measured once
    assert [row["who"] for row in rows_of(results, "kernel")] == ["llmkit, specialized"] * 2


def test_after_a_kernels_fault_a_new_process_continues_with_the_next_case(tmp_path):
    script = f"""
import os, runpy, sys
os.environ |= {{"LLMKIT_KERNELS": "interpret", "TRITON_INTERPRET": "1"}}
sys.argv[0] = {str(FOLDER / "kernels.py")!r}
sys.path.insert(0, {str(FOLDER)!r})
import clock
clock.Clock.is_lost = lambda self: True
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    options = "--smoke", "--no-tune", "--only", "logprobs", "decode", "--who", "llmkit", "-o", tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert [row["kind"] for row in rows_of(tmp_path / "rows.jsonl", "kernel")] == ["logprobs", "decode"]


def test_a_wrong_answer_is_not_timed(monkeypatch, interpreted):
    monkeypatch.syspath_prepend(str(FOLDER))
    from cases import OURS, Makers
    from clock import Clock
    from measuring import measure
    from shapes import SMOKE

    case = Makers("cpu").loss(SMOKE.loss[0])
    plain = case.contenders["torch.compile"]
    case.contenders = {OURS: plain, "wrong": lambda x, w: plain(x, w) * 1.1, "broken": lambda x, w: 1 / 0}
    rows = {row["who"]: row for row in measure(case, Clock("cpu"))}
    assert "note" not in rows[OURS] and rows[OURS]["backward_rate"] != rows[OURS]["both_rate"] > 0
    assert rows["wrong"]["note"].startswith("WRONG") and "forward_ms" not in rows["wrong"]
    assert rows["wrong"]["error"] == pytest.approx(0.1, abs=0.01)
    assert rows["broken"]["note"].startswith("failed: ZeroDivisionError")


def test_a_training_step_has_the_same_loss_with_kernels_on_and_off(tmp_path):
    done = run("training.py", "--smoke", "-o", tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stderr
    on, off = rows_of(tmp_path / "results.jsonl", "training")
    assert (on["kernels"], off["kernels"]) == ("interpret", "torch")
    assert on["loss"] == pytest.approx(off["loss"], abs=1e-4) and on["parameters"] == off["parameters"]
    assert "| smoke | interpret | 13,440 |" in done.stdout


def test_generation_is_right_and_says_what_is_absent(tmp_path):
    done = run("generation.py", "--smoke", "-o", tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stderr
    assert "| smoke | llmkit eager | 1 |" in done.stdout
    rows = {(row["who"], row["batch"]): row for row in rows_of(tmp_path / "results.jsonl", "generation")}
    for batch in (1, 2):
        eager = rows["llmkit eager", batch]
        assert eager["error"] < 1e-5 and eager["x_eager"] == 1 and eager["tokens_per_second"] > 0 < eager["share"]
        assert rows["llmkit graphs", batch]["note"] == "absent: needs a GPU"
        theirs = rows["transformers", batch]
        assert theirs["error"] < 1e-5 and theirs["x_hf"] == 1 if "error" in theirs else "absent" in theirs["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["kernels.py", "training.py", "generation.py", "all.py"])
def test_without_a_gpu_one_line_says_so(script):
    done = run(script)
    assert done.returncode == 2 and done.stderr == f"{script}: no GPU here; --smoke runs it on a CPU\n"


def test_a_run_cut_off_at_any_moment_leaves_what_it_measured(tmp_path):
    """The time ends during compilation: running stages are stopped and reported, others do not start."""
    done = run("all.py", "--smoke", "--seconds", "9", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    outcomes = {row["name"]: row["outcome"] for row in rows_of(tmp_path / "results.jsonl", "end")}
    assert outcomes["compile 1"] in ("cut off", "done") and outcomes["generation"] == "not begun"
    assert len(outcomes) > 10 and (tmp_path / "compile-1.log").exists()
    assert "| generation | not begun |" in done.stdout and "| open |" in done.stdout


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_the_outcomes_of_tests_are_read_from_their_log(tmp_path, monkeypatch, options):
    monkeypatch.syspath_prepend(str(FOLDER))
    outcomes_in = importlib.import_module("all").outcomes_in
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    command = [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, "--rootdir", tmp_path, *options, tmp_path]
    log = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    outcomes = {test.rpartition("/")[2]: outcome for test, outcome in outcomes_in(log).items()}
    assert outcomes == {"test_it.py::test_a": "passed", "test_it.py::test_b": "failed"}


@pytest.mark.slow
def test_every_stage_of_eight_minutes_runs(tmp_path):
    done = run("all.py", "--smoke", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    outcomes = {row["name"]: row["outcome"] for row in rows_of(tmp_path / "results.jsonl", "end")}
    assert {name for name, outcome in outcomes.items() if outcome != "done"} == set()
    (check,) = rows_of(tmp_path / "results.jsonl", "check")
    assert check["outcome"].startswith("2 passed")


def test_the_list_of_open_measurements_is_that_of_the_reader(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from report import goals

    assert goals([]) in (FOLDER / "README.md").read_text()


def test_the_report_computes_shares_ratios_and_goals(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from report import goals, tables

    case = {"stage": "kernel", "kind": "attention causal", "shape": "1,32,8,8192,128", "unit": "TFLOP/s"}
    rows = [
        {"stage": "machine", "device": "a GPU", "TFLOP/s": 800.0},
        case | {"who": "SDPA flash", "forward_ms": 2.0, "forward_rate": 400.0},
        case | {"who": "llmkit", "forward_ms": 1.5, "both_ms": 4.0, "forward_rate": 533.3, "both_rate": 500.0,
                "backward_rate": 401.2},
    ]  # fmt: skip
    table = goals(rows)
    assert "533.3 TFLOP/s, 1.33x SDPA flash |" in table and "401.2 TFLOP/s |" in table
    assert table.count("| open |") == goals([]).count("| open |") - 2
    assert goals([*rows, {"stage": "machine", "smoke": "a CPU"}]) == goals([])
    groups = case | {
        "who": "llmkit, specialized",
        "forward_ms": 1.0,
        "both_ms": 5.0,
        "forward_rate": 800.0,
        "both_rate": 1,
    }
    assert "attention causal 1,32,8,8192,128: forward 1.50x, both 0.80x" in goals([*rows, groups])
    assert "| 62% |" in tables([*rows, groups]) and "| 1.33 |" in tables(
        rows
    )  # 500 of 800, and the speed-up over the best peer
