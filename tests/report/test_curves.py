"""The curves in a run folder: self-contained images for any metrics."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from made_runs import write_lines

from llmkit.report.page import write_curves

SVG = "{http://www.w3.org/2000/svg}"


def draw(folder: Path, rows: list[dict]) -> ElementTree.Element:
    write_lines(folder / "metrics.jsonl", [re.sub("-?Infinity|NaN", "null", json.dumps(row)) for row in rows])
    write_curves(folder, {})
    return ElementTree.parse(folder / "loss.svg").getroot()


def points(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    numbers = [[float(n) for n in re.findall(r"-?[\d.]+", line.attrib["d"])] for line in svg.iter(f"{SVG}path")]
    return [list(zip(line[::2], line[1::2], strict=True)) for line in numbers]


def test_the_curve_shows_training_and_validation(tmp_path: Path) -> None:
    rows: list[dict] = [{"step": step, "loss": 8 / step} for step in range(1, 3001)]
    rows += [{"step": step, "val_loss": 9 / step} for step in range(500, 3001, 500)]
    svg = draw(tmp_path, rows)
    values, average, validation = points(svg)
    assert 200 <= len(values) <= 240 and len(average) <= 240 and len(validation) == 6
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in values + average + validation)
    assert values[0][1] < values[-1][1]  # the curve falls, because y points down
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"training", "validation", "step", "3,000"} <= set(texts)


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        ([], 1),
        ([{"step": 1, "loss": math.nan}], 1),
        ([{"step": 1, "loss": 2.0}], 1),
        ([{"step": 0, "loss": 2.0}, {"step": 0, "val_loss": 2.0}], 2),
        ([{"step": 1, "loss": 1e300}], 1),
        ([{"step": 1, "loss": 1e20}, {"step": 2, "val_loss": 1e20}], 2),
        ([{"step": 1, "loss": -1.7e308}, {"step": 2, "loss": 1.7e308}, {"step": 3, "loss": 1.7e308}], 1),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}, {"sample": "x"}], 1),
    ],
    ids=["none", "nan", "one", "step-0", "large", "flat", "far", "inf"],
)
def test_a_curve_of_little_or_strange_data_is_still_a_picture(tmp_path: Path, rows: list[dict], drawn: int) -> None:
    svg = draw(tmp_path, rows)
    text = ElementTree.tostring(svg, "unicode")
    assert "nan" not in text and "inf" not in text
    marks = [*svg.iter(f"{SVG}path"), *svg.iter(f"{SVG}circle")]
    assert len(marks) == drawn
