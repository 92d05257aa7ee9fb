"""The kernels compiled ahead of time for several GPUs: the rules of lint.py, and the golden figures."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import lint

TARGETS = list(lint.SHARED_BYTES)


def compile_kernels(*options: str) -> dict[str, dict]:
    """Return the figures of the cases selected by the options, from a process whose Triton compiles."""
    if sys.platform != "linux" or not (version := triton_version()):
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LLMKIT_KERNELS")}
    command = [sys.executable, lint.__file__, "--json", *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["triton"] == version
    return found["kernels"]


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def golden() -> dict[str, dict]:
    """The stored figures of this version of Triton; empty for an unknown version."""
    version = triton_version()
    path = lint.golden_path(version) if version else None
    return json.loads(path.read_text()) if path and path.exists() else {}


def check(found: dict[str, dict]) -> None:
    known, this = golden(), lint.golden_name(triton_version() or "")
    for name, figure in found.items():
        assert lint.broken_rules(name, figure) <= lint.excused(name, this), (name, figure)
        assert not known or figure == known.get(name), f"{name}: lint.py --write makes the golden file anew"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_training_and_decoding_obey_the_rules(target):
    found = compile_kernels("--representative", "--target", target)
    assert len({name.partition(":")[0] for name in found}) == len(lint.REPRESENTATIVE[target])
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_golden_figure_is_had_again(target):
    if not golden():
        pytest.skip("no golden file for this Triton")
    found = compile_kernels("--golden", "--target", target)
    check(found)
    assert set(found) == {name for name in golden() if name.startswith(target)}


@pytest.mark.parametrize("path", sorted(lint.FOLDER.glob("triton-*.json")), ids=lambda path: path.stem)
def test_golden_figures_obey_the_rules_or_are_excused_by_name(path):
    for name, figure in json.loads(path.read_text()).items():
        assert lint.broken_rules(name, figure) <= lint.excused(name, path.stem), (name, figure)


def test_no_excuse_is_left_over():
    broken = {
        (name, path.stem, rule)
        for path in lint.FOLDER.glob("triton-*.json")
        for name, figure in json.loads(path.read_text()).items()
        for rule in lint.broken_rules(name, figure)
    }
    for pattern, rules in lint.exceptions().items():
        for rule in rules:
            found = [name for name, stem, which in broken if which == rule and lint.excuses(pattern, name, stem)]
            assert found, (pattern, rule)


def test_loops_of_backward_in_16_bits_keep_out_of_local_memory():
    """Even with exceptions; the maximum is eight accesses per iteration (key gradients, head size 256, sm_90)."""
    known = json.loads(lint.golden_path("3.9").read_text())
    backward = {n: x for n, x in known.items() if n.endswith(lint.BACKWARD) and "float32" not in n}
    assert len({name.split()[0] for name in backward}) == 3
    hopper = {name: figure["loops"] for name, figure in backward.items() if name.startswith("sm_90")}
    assert all(loop["local"] <= 8 for loops in hopper.values() for loop in loops)
    assert all(figure["spills"] <= 36 for name, figure in backward.items() if name not in hopper)


@pytest.mark.parametrize("lost", [{"warps": 8}, {"loops": []}, {"reallocations": None}])
def test_a_lost_specialization_is_found(lost):
    loop = {"matrix": {"64x128x16": 16}, "products": 2, "waits": 2, "tma": 0, "local": 0}
    good = {"warps": 12, "shared": 180_608, "registers": 168, "spills": 0, "matrix": {"HGMMA": 32},
            "loads": {"TMA": 4}, "stores": {"16": 16, "4": 2}, "reallocations": 8, "loops": [loop, loop]}  # fmt: skip
    name = "sm_90 attention packed specialized 128 bfloat16: attention_forward"
    assert lint.broken_rules(name, good) == set()
    figure = {key: value for key, value in (good | lost).items() if value is not None}
    assert "specialized" in lint.broken_rules(name, figure)


LOOP = {"matrix": {"64x128x16": 24}, "products": 3, "waits": 2, "tma": 2, "local": 0}


def test_the_rows_of_logits_in_flight_fit_the_cache_of_an_h200():
    """It has 132 multiprocessors with 65,536 registers each, and 50 MB of L2 cache."""
    figure = json.loads(lint.golden_path("3.9").read_text())["sm_90 loss and gradient 128256 bfloat16: cross_entropy"]
    registers = -(-figure["registers"] // 8) * 8 * 32 * figure["warps"]
    assert 65_536 // registers * 132 * 128_256 * 2 < 50e6


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shared": 232_449}, "shared"),
        ({"spills": 8}, "spills"),
        ({"matrix": {"HMMA": 4, "HGMMA": 4}}, "matrix"),
        ({"matrix": {}}, "matrix"),
        ({"loads": {"8": 24, "4": 4}}, "loads"),
        ({"stores": {"2": 64}}, "stores"),
        ({"loops": [LOOP, LOOP | {"local": 4}]}, "local"),
        ({"loops": [LOOP, LOOP | {"tma": 0}]}, "tma"),
        ({"loops": [LOOP | {"waits": 3}, LOOP]}, "waits"),
    ],
)
def test_a_kernel_that_breaks_a_rule_is_found(change, rule):
    good = {"warps": 8, "shared": 232_448, "registers": 255, "spills": 0, "matrix": {"HGMMA": 4},
            "loads": {"16": 24, "4": 4}, "stores": {"16": 8}}  # fmt: skip
    if "loops" in change:
        good |= {"loops": [LOOP, LOOP], "loads": {"TMA": 4}}
    name = "sm_90 attention packed 128 bfloat16: attention_grad_query"
    assert lint.broken_rules(name, good) == set()
    assert lint.broken_rules(name, good | change) == {rule}
