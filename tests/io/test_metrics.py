"""`metrics.jsonl`, whatever a kill leaves of it, and the curves drawn from it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from llmkit.io.metrics import LOSS_CURVE, MetricsLog, read_metrics, trim_metrics, write_curve

SVG = "{http://www.w3.org/2000/svg}"

# ---- metrics


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


# ---- loss curve


def draw(folder: Path, rows: list[dict]) -> ElementTree.Element:
    with MetricsLog(folder / "metrics.jsonl") as log:
        for row in rows:
            log.write(row)
    write_curve(folder, "loss.svg", LOSS_CURVE)
    return ElementTree.parse(folder / "loss.svg").getroot()


def points(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]
        for line in svg.iter(f"{SVG}polyline")
    ]


def test_the_curve_shows_training_and_validation(tmp_path: Path) -> None:
    rows: list[dict] = [{"step": step, "loss": 8 / step} for step in range(1, 3001)]
    rows += [{"step": step, "val_loss": 9 / step} for step in range(500, 3001, 500)]
    svg = draw(tmp_path, rows)
    training, validation = points(svg)
    assert 1000 <= len(training) <= 1501 and len(validation) == 6
    assert all(0 <= x <= 720 and 0 <= y <= 360 for x, y in training + validation)
    assert training[0][1] < training[-1][1]  # falls: y grows downwards
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"training", "validation", "step", "3,000"} <= set(texts)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": math.nan}],
        [{"step": 1, "loss": 2.0}],
        [{"step": 0, "loss": 2.0}, {"step": 0, "val_loss": 2.0}],
        [{"step": 1, "loss": 1e300}],
        [{"step": 1, "loss": 1e20}, {"step": 2, "val_loss": 1e20}],
        [{"step": 1, "loss": -1.7e308}, {"step": 2, "loss": 1.7e308}, {"step": 3, "loss": 1.7e308}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}, {"sample": "x"}],
    ],
    ids=["none", "nan", "one", "step-0", "large", "flat", "far", "inf"],
)
def test_a_curve_of_little_or_strange_data_is_still_a_picture(tmp_path: Path, rows: list[dict]) -> None:
    svg = draw(tmp_path, rows)
    assert "nan" not in ElementTree.tostring(svg, "unicode")
    finite = [row for row in rows if math.isfinite(row.get("loss", math.nan))]
    assert [len(line) for line in points(svg)][:1] == ([len(finite)] if finite else [])
