"""Installation and start as in the README: not editable, in the clone's root and elsewhere."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documented import commands_of, made_small

ROOT = Path(__file__).parent.parent
SOURCES = ("llmkit", "kernels", "pyproject.toml", "README.md", "LICENSE")
# like the README's block: transformers probes for a package `kernels` during generation
STOCK = "import transformers.modeling_utils, transformers.generation.utils, transformers.integrations.hub_kernels"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone without ignored files."""
    folder = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def build(clone: Path, kind: str) -> Path:
    """Build a `wheel` or `sdist` of a clone and return its path."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return clone / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module", params=["clone", "wheel", "sdist"])
def site(request: pytest.FixtureRequest, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed llmkit."""
    folder = tmp_path_factory.mktemp("site")
    what = clone if request.param == "clone" else build(clone, request.param)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(folder), str(what)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def start(site: Path, folder: Path, *words: str) -> str:
    """Run Python with the installed llmkit in a folder and return its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    details = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=folder, env=environment, **details)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
    return done.stdout


def test_it_starts_in_the_clone_and_elsewhere(site: Path, clone: Path, tmp_path: Path) -> None:
    kernels = "import llmkit.kernels.triton as k; from llmkit.kernels.linear import linear; print(k.__file__)"
    assert start(site, clone, "-c", kernels).strip() == str(clone / "kernels/triton/__init__.py")
    assert start(site, tmp_path, "-c", kernels).strip() == str(site / "llmkit/kernels/triton/__init__.py")
    for folder in (clone, tmp_path):
        start(site, folder, "-c", STOCK)
        assert start(site, folder, "-m", "llmkit", "--version").startswith("llmkit ")


def test_torchrun_starts_it_in_the_clone(site: Path, clone: Path) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "llmkit"]
    stage = ["pretrain", "docs.jsonl", "--tokenizer", "tok/", "-o", "base/", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *run, *stage]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert "found no tok/" in done.stderr and "llmkit.kernels" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("site", ["clone"], indirect=True)
def test_the_first_commands_and_transformers_run_in_the_clone(
    site: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's blocks at small sizes; test_readme.py runs them verbatim."""
    readme = (ROOT / "README.md").read_text()
    shutil.copytree(ROOT / "examples", clone / "examples")
    monkeypatch.chdir(clone)
    start(site, clone, "examples/tinyworld/make.py", "world/", "--quick")
    asked = [{"prompt": f"Say {n}", "answer": "any", "pattern": "(?s).*[aeiou].*"} for n in range(8)]
    for name in ("problems", "problems-val"):  # an untrained model solves them now and then
        (clone / f"world/{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    first = readme.split("\n## A first assistant\n")[1].split("\n## ")[0]
    for command in commands_of(first, "README.md")[1:]:
        if len(command.stages) == 1:  # no pipes
            words = [path for word in command.stages[0] for path in sorted(glob.glob(word)) or [word]]
            start(site, clone, "-m", "llmkit", *made_small(words))
    loading = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert loading is not None
    shown = start(site, clone, "-c", loading[1] + "print(tokenizer.decode(model.generate(max_new_tokens=2)[0]))")
    assert shown.strip()
