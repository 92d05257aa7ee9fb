"""`metrics.jsonl`, whatever a kill leaves of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from llmkit.io.metrics import MetricsLog, read_metrics, trim_metrics


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
