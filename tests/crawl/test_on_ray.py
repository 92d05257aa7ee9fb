"""`--engine ray` gives the same bytes as the local engine, on two real workers, one of which is killed on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from web import Record, html, mixed_pages, prose, write_warc

from llmkit.crawl.output import Collector, collect
from llmkit.crawl.page import Outcome, Part, Span
from llmkit.crawl.recipe import Recipe
from llmkit.crawl.state import State
from llmkit.errors import UserError

has_ray = importlib.util.find_spec("ray") is not None
with_ray = pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install 'ray>=2.60'")


@with_ray
@pytest.mark.slow
def test_the_bytes_are_those_of_the_local_engine(tmp_path, llmkit):
    """Several spans, duplicates within and across the files, every kind of reject."""
    write_warc(tmp_path / "mixed.warc.gz", mixed_pages())
    noise = lambda: f"<!-- {os.urandom(75_000).hex()} -->"  # noqa: E731 -- does not compress: makes several spans
    pages = [Record(f"https://many.example/{n}", html(f"Page {n}", prose(n % 50), noise())) for n in range(70)]
    write_warc(tmp_path / "many.warc.gz", pages)
    write_warc(tmp_path / "again.warc.gz", mixed_pages())
    inputs = [tmp_path / f"{name}.warc.gz" for name in ("mixed", "many", "again")]
    for engine in ("local", "ray"):
        out = tmp_path / engine
        out.mkdir()
        options = ("-o", out / "docs.jsonl", "--rejects", out / "rejects.jsonl", "--engine", engine, "--workers", "2")
        done = llmkit("crawl-filter", *inputs, *options)
        assert done.returncode == 0, done.stderr
    for name in ("docs", "rejects"):
        local, ray = ((tmp_path / engine / f"{name}.jsonl").read_bytes() for engine in ("local", "ray"))
        assert local and local == ray, name
    told = [json.loads(line) for line in (tmp_path / "ray" / "rejects.jsonl").read_bytes().splitlines()]
    repeated = [reject for reject in told if "repeats" in reject]
    assert {reject["source"] for reject in repeated} == {"mixed.warc.gz", "many.warc.gz", "again.warc.gz"}
    assert not list(tmp_path.glob("ray/*state*"))


def descendants(parent: int) -> list[tuple[int, bytes]]:
    """The processes below one, and what they call themselves."""
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
    noise = lambda: f"<!-- {os.urandom(75_000).hex()} -->"  # noqa: E731 -- several spans, as above
    pages = [Record(f"https://many.example/{n}", html(f"Page {n}", prose(n % 50), noise())) for n in range(200)]
    write_warc(tmp_path / "many.warc.gz", pages)
    write_warc(tmp_path / "mixed.warc.gz", mixed_pages())
    inputs = [str(tmp_path / f"{name}.warc.gz") for name in ("many", "mixed")]
    done = llmkit("crawl-filter", *inputs, "-o", tmp_path / "local.jsonl", "--workers", "2")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "llmkit", "crawl-filter", *inputs, "-o", str(tmp_path / "ray.jsonl")]
    with subprocess.Popen([*command, "--engine", "ray", "--workers", "3"], stderr=subprocess.PIPE, text=True) as run:
        killed, until = None, time.monotonic() + 240
        while killed is None and run.poll() is None and time.monotonic() < until:
            finished = list(tmp_path.glob("ray.jsonl.partial-state/span-*"))
            working = [process for process, name in descendants(run.pid) if name.startswith(b"ray::_work_on")]
            if len(working) > 1 and finished:
                killed = working[0]
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.005)
        _, said = run.communicate(timeout=240)
    assert run.returncode == 0, said
    assert killed is not None, "all was done before one could be killed"
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes() != b""


def killed_once(mark: str) -> Deadly:
    return Deadly(mark)


class Deadly:
    """Kills its own process at span 1, the first time it comes there."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def parts(self, span: Span):
        if span.index == 1 and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if span.index == 5:
            raise UserError("a.html:5: wrong")
        time.sleep(0.05 if span.index % 2 else 0)
        yield Part(1, [Outcome(None, None, 0, b'{"id":"%d"}\n' % span.index)])


def html_spans(count: int) -> list[Span]:
    return [Span("a", index, "html", files=(f"a/{index}.html",)) for index in range(count)]


@with_ray
@pytest.mark.slow
def test_what_a_killed_worker_did_is_done_again_and_a_mistake_is_told(tmp_path, monkeypatch):
    from llmkit.crawl.on_ray import work_on_ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # so that workers find this file
    state = State(str(tmp_path / "out"), {})
    make, recipe = partial(killed_once, str(tmp_path / "killed")), Recipe(steps=())
    with pytest.raises(UserError, match=r"a\.html:5: wrong"):
        work_on_ray(html_spans(6), make, state, recipe, workers=2)
    assert (tmp_path / "killed").exists()
    lines: list[bytes] = []
    with Collector(recipe, lines.append) as collector:  # all finished: there is nothing left to do for a worker
        collect(html_spans(5), pytest.fail, 1, collector, state)
    assert lines == [b'{"id":"%d"}\n' % index for index in range(5)]


def test_without_ray_the_message_says_what_to_install(tmp_path, monkeypatch):
    from llmkit.crawl.on_ray import work_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--engine ray: .*pip install 'ray>=2.60'"):
        work_on_ray(html_spans(1), pytest.fail, State(str(tmp_path / "out"), {}), Recipe())
    assert not list(tmp_path.iterdir())


def test_a_ray_that_does_not_start_is_named(tmp_path, monkeypatch):
    from llmkit.crawl.on_ray import work_on_ray

    def init(**options):
        raise Exception("The current node timed out during startup.")  # as Ray 2.60 raises it

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(UserError, match="--engine ray: Ray does not start: The current node timed out"):
        work_on_ray(html_spans(1), pytest.fail, State(str(tmp_path / "out"), {}), Recipe())


def test_ray_needs_files_on_both_ends(tmp_path, llmkit):
    write_warc(tmp_path / "mixed.warc.gz", mixed_pages())
    for arguments in ((tmp_path / "mixed.warc.gz",), ("-", "-o", tmp_path / "docs.jsonl")):
        done = llmkit("crawl-filter", *arguments, "--engine", "ray")
        assert done.returncode == 2 and "all machines share" in done.stderr


@pytest.mark.parametrize("ranges", [1, 3])
def test_ranges_of_keys_find_what_the_online_index_finds(tmp_path, ranges):
    """The files of all columns and ranges, joined, against `Duplicates`, which sees one document after the other."""
    from llmkit.crawl.dedup.duplicates import Duplicates, join, keys, signatures
    from llmkit.crawl.on_ray import write_firsts

    texts = [" ".join(prose(number % 40)) + " again" * (number % 3) for number in range(150)]
    found = signatures(texts)
    firsts = np.repeat(np.arange(len(found))[:, None], keys(found).shape[1], 1)
    for column, column_keys in enumerate(keys(found).T):
        column_keys.tofile(tmp_path / f"keys-{column}")
        for part in range(ranges):
            file = write_firsts(str(tmp_path), column, part, ranges)
            rows, first = np.load(file)
            firsts[rows, column] = first
    expected = Duplicates().add(found)
    assert join(firsts, found) == expected
    assert sum(repeat is not None for repeat in expected) > 50
