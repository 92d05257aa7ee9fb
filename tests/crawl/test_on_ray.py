"""`--engine ray` gives the same bytes as the local engine, on two real workers, one of which is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from web import Record, html, mixed_pages, prose, write_warc

from llmkit.crawl import on_ray
from llmkit.errors import UserError

has_ray = importlib.util.find_spec("ray") is not None
with_ray = pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install 'ray>=2.60'")


def descendants(parent: int) -> list[tuple[int, bytes]]:
    """Return the descendants of a process, with their names."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            process = int(folder.name)
            names[process] = (folder / "cmdline").read_bytes()
            parents[process] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {parent}
    while more := {process for process, above in parents.items() if above in found} - found:
        found |= more
    return [(process, names[process]) for process in found - {parent}]


@with_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for Ray's workers in /proc")
def test_one_of_several_workers_is_killed_in_the_middle_and_the_bytes_are_those_of_the_local_engine(tmp_path, llmkit):
    noise = lambda: f"<!-- {os.urandom(75_000).hex()} -->"  # noqa: E731 -- does not compress: makes several batches
    pages = [Record(f"https://many.example/{n}", html(f"Page {n}", prose(n % 50), noise())) for n in range(200)]
    for number in range(5):
        write_warc(tmp_path / f"many-{number}.warc.gz", pages[40 * number : 40 * number + 40])
    write_warc(tmp_path / "mixed.warc.gz", mixed_pages())
    inputs = [str(path) for path in sorted(tmp_path.glob("*.warc.gz"))]
    outputs = {
        name: ("-o", f"{tmp_path}/{name}.jsonl", "--rejects", f"{tmp_path}/{name}.r") for name in ("local", "ray")
    }
    done = llmkit("crawl-filter", *inputs, *outputs["local"], "--workers", "2")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "llmkit", "crawl-filter", *inputs, *outputs["ray"], "--engine", "ray"]
    with subprocess.Popen([*command, "--workers", "3"], stderr=subprocess.PIPE, text=True) as run:
        killed, until = None, time.monotonic() + 240
        while killed is None and run.poll() is None and time.monotonic() < until:
            working = [process for process, name in descendants(run.pid) if name.startswith(b"ray::_work_on")]
            if len(working) > 1:
                killed = working[0]
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.005)
        _, said = run.communicate(timeout=240)
    assert run.returncode == 0, said
    assert killed is not None, "all was done before one could be killed"
    for ending in ("jsonl", "r"):
        assert (tmp_path / f"ray.{ending}").read_bytes() == (tmp_path / f"local.{ending}").read_bytes() != b""
    assert not list(tmp_path.glob("*state*"))


def fails_to_start(**options):
    raise Exception("The current node timed out during startup.")  # like Ray 2.60


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"--engine ray: .*pip install 'ray>=2.60'"),  # not installed
        (SimpleNamespace(init=fails_to_start), "--engine ray: Ray does not start: The current node timed out"),
    ],
)
def test_a_ray_that_is_not_there_or_does_not_start_is_named(monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "ray", module)
    with pytest.raises(UserError, match=message):
        next(on_ray.in_order(range(1), pytest.fail, None, finished=bool))


def test_a_table_without_the_column_is_refused_as_by_the_local_engine(tmp_path):
    (tmp_path / "docs.csv").write_text("content\nOnce upon a time\n")
    (files,) = on_ray.files_of([str(tmp_path / "docs.csv")])
    worker = on_ray.FilesWorker(lambda: lambda batch: [], strict=True, columns={"text": "body"})
    with pytest.raises(UserError, match=r"docs\.csv: expected column 'body' \(--columns\), found content"):
        worker(files)


def test_ray_needs_files_on_both_ends(tmp_path, llmkit):
    write_warc(tmp_path / "mixed.warc.gz", mixed_pages())
    for arguments in ((tmp_path / "mixed.warc.gz",), ("-", "-o", tmp_path / "docs.jsonl")):
        done = llmkit("crawl-filter", *arguments, "--engine", "ray")
        assert done.returncode == 2 and "all machines share" in done.stderr
