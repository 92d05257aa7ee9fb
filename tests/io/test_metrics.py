"""`metrics.jsonl`, also after kills, and its copies in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import save_folder

from llmkit.errors import UserError
from llmkit.io.metrics import MetricsLog, TensorBoard, WeightsAndBiases, numbers, read_metrics, trim_metrics
from llmkit.stages.sft import SftConfig, run


def test_metrics_are_on_disk_at_once_and_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": np.float32(2.5)})
        assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    with MetricsLog(path) as log:
        log.write({"step": 2, "loss": math.inf})
        log.write({"note": "no step"})
    assert path.read_text().startswith('{"step":1,"loss":2.5}\n{"step":2,"loss":null}\n')
    trim_metrics(path, 1)
    assert [row.get("step") for row in read_metrics(path)] == [1, None]


ROWS = [{"step": step, "loss": 3 / step, "seconds": 0.5 * step, "tokens": 9 * step} for step in range(1, 8)]
ROWS.insert(3, {"step": 3, "tokens": 27, "val_loss": 1.25})
ROWS.insert(5, {"step": 4, "sample": "some text", "grad_norm": math.nan})


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves as TensorBoard reads them: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}


def in_the_file(folder: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        for name, value in numbers(row).items():
            curves.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return curves


def write(folder: Path, rows: list[dict], mirror) -> None:
    with MetricsLog(folder / "metrics.jsonl", [partial(mirror, folder)]) as log:
        for row in rows:
            log.write(row)


def test_a_killed_run_resumes_without_duplicate_or_incomplete_steps(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path / "metrics.jsonl", [partial(TensorBoard, tmp_path)])
    for row in ROWS[:6]:
        log.write(row)
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-7])  # killed after the checkpoint of step 2
    with (tmp_path / "metrics.jsonl").open("ab") as handle:
        handle.write(b'{"step": 5, "lo')
    trim_metrics(tmp_path / "metrics.jsonl", 2)
    write(tmp_path, ROWS[2:], TensorBoard)
    assert in_tensorboard(tmp_path) == in_the_file(tmp_path)
    assert [step for step, _ in in_tensorboard(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_stage_writes_it_into_its_folder(tmp_path):
    pytest.importorskip("tensorboard")
    data = tmp_path / "c.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Throw {i}", "completion": "heads"}) + "\n" for i in range(8)))
    base = save_folder(tmp_path / "base")
    quick = {"max_steps": 3, "sequence_length": 64, "quiet": True, "log_to": ("tensorboard",)}
    summary = run(SftConfig(model=str(base), data=(str(data),), out=str(tmp_path / "chat"), **quick))
    assert summary is not None and summary.steps == 3
    shown = in_tensorboard(tmp_path / "chat")
    assert shown == in_the_file(tmp_path / "chat") and [step for step, _ in shown["loss"]] == [1, 2, 3]


def test_weights_and_biases_has_one_run_over_resumptions(tmp_path, monkeypatch):
    logged, opened = [], []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end"))
    wandb = SimpleNamespace(init=lambda **details: opened.append(details) or run, Settings=lambda **details: details)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for rows in (ROWS[:6], ROWS[2:]):
        trim_metrics(tmp_path / "metrics.jsonl", 2)
        write(tmp_path, rows, partial(WeightsAndBiases, options={"seed": 3}, quiet=True))
    first, second = opened
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"] == {"seed": 3}
    assert logged.count("end") == 2
    again = logged[logged.index("end") + 1 : -1]
    assert [step for step, row in again if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert (3, {"tokens": 27, "val_loss": 1.25}) in again


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_the_work(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"--log-to {package}: needs the package {package}; pip install 'llmkit\[{package}\]'"
    ):
        SftConfig(model="base/", log_to=(package,))
