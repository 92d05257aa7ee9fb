"""Output is complete or absent: after an error, on a full disk, after kill -9."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmkit.errors import UserError
from llmkit.io.files import (
    _exchange,
    atomic_file,
    atomic_folder,
    check_output,
    cut_torn_line,
    remove,
    sole_writer,
)
from llmkit.io.jsonl import open_output, read_object, write_json


def test_a_pipe_is_never_deleted(tmp_path: Path) -> None:
    """Root may delete a device, too: an export to /dev/null once did."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for name, target in (("link", "pipe"), ("gone", "nowhere")):
        (tmp_path / name).symlink_to(target)
    for name in ("pipe", "link", "gone", "file"):
        remove(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_an_error_leaves_the_former_output_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    (tmp_path / "out.partial").mkdir()  # left by a killed run
    (tmp_path / "out.partial" / "old shard").write_text("half")
    with pytest.raises(KeyboardInterrupt), open_output(str(tmp_path / "out.jsonl"), force=True) as put:
        put({"a": 1})
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "manifest.json").write_text("new")
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["out", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}")
    for name in ("file", "mine", "model"):
        with pytest.raises(UserError, match="already exists; --force replaces it"):
            check_output(str(tmp_path / name), force=False)
        check_output(str(tmp_path / name), force=False, resume=True)
    check_output(str(tmp_path / "model"), force=True)
    check_output(str(tmp_path / "file"), force=True)
    with pytest.raises(UserError, match="not a folder that llmkit wrote"):
        check_output(str(tmp_path / "mine"), force=True)
    check_output(str(tmp_path / "no" / "such"), force=False)
    check_output(str(tmp_path / "tok_a.csv"), force=False)  # a folder may have any name
    (tmp_path / "empty").mkdir()
    check_output(str(tmp_path / "empty"), force=False)
    with pytest.raises(UserError, match=r"file/such: expected a folder at .*/file, found a file"):
        check_output(str(tmp_path / "file" / "such"), force=False)
    (tmp_path / "link").symlink_to("nowhere/at/all")
    with pytest.raises(UserError, match=r"link: a link to .*/nowhere/at/all, whose folder does not exist"):
        check_output(str(tmp_path / "link"), force=True)
    with pytest.raises(UserError, match="/proc: a mount point cannot be replaced"):
        check_output("/proc", force=True)
    with pytest.raises(UserError, match="expected a file, found a folder"), open_output(str(tmp_path / "model"), True):
        pass
    with pytest.raises(UserError, match="expected a folder, found a file"), atomic_folder(tmp_path / "file", True):
        pass


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out.jsonl.partial").symlink_to("mine")
    with open_output(str(tmp_path / "out.jsonl")) as write:
        write({"a": 1})
    assert (tmp_path / "out.jsonl").read_text() == '{"a":1}\n'
    (tmp_path / "next.partial.lock").symlink_to("mine")
    with pytest.raises(UserError, match=r"next.partial.lock: a link"), sole_writer(str(tmp_path / "next")):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_missing_parent_is_made_and_goes_when_nothing_came(tmp_path: Path) -> None:
    out = str(tmp_path / "a" / "b" / "out.jsonl")
    with sole_writer(out):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []
    with sole_writer(out), open_output(out) as write:
        write({"a": 1})
    assert os.listdir(tmp_path / "a" / "b") == ["out.jsonl"]


def test_a_link_is_followed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real").mkdir()
    os.symlink("real.txt", tmp_path / "link.txt")
    os.symlink("real", tmp_path / "link")
    with atomic_file(tmp_path / "link.txt", "w") as handle:
        handle.write("new")
    for exchange in (_exchange, lambda first, second: False):  # a file system that cannot exchange two names
        monkeypatch.setattr("llmkit.io.files._exchange", exchange)
        (tmp_path / "real" / "former").write_text("old")
        with atomic_folder(f"{tmp_path}/link/", force=True) as folder:
            (folder / "x").write_text("new")
        assert os.listdir(tmp_path / "real") == ["x"]
    assert (tmp_path / "real.txt").read_text() == (tmp_path / "real" / "x").read_text() == "new"
    assert os.path.islink(tmp_path / "link.txt") and os.path.islink(tmp_path / "link")
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["file", "folder", "safetensors"])
def test_no_space_leaves_the_former_output_whole(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.write_text("old") if kind == "file" else out.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # simulates a full disk
    try:
        with pytest.raises(UserError, match=rf"^{out}: no space left on disk; free some and run it again$"):
            if kind == "file":
                with atomic_file(out) as handle:
                    handle.write(bytes(100_000))
            else:
                with atomic_folder(out, force=True) as folder:
                    if kind == "folder":
                        (folder / "big").write_bytes(bytes(100_000))
                    else:
                        save_file({"a": np.zeros(100_000)}, folder / "big.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["out"]
    assert out.read_text() == "old" if kind == "file" else os.listdir(out) == []


def test_an_output_that_cannot_be_written_is_named_as_it_was_given() -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    for write in (atomic_file, atomic_folder):
        with pytest.raises(UserError, match=r"^/proc/nobody: cannot be written: .*; choose another place"):
            write("/proc/nobody").__enter__()


def test_a_json_file_holds_one_object_and_says_what_it_holds_instead(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1, "b": [math.nan], "c": "ü"})
    assert read_object(path) == {"a": 1, "b": [None], "c": "ü"}
    path.write_text('{"a": 1,\n "b"}')
    with pytest.raises(UserError, match=r"a\.json:2: expected JSON, found .*; fix or replace the file"):
        read_object(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json: expected a JSON object, found a list"):
        read_object(path)


@pytest.mark.parametrize(
    ("held", "left"),
    [(b"", b""), (b"torn", b""), (b"a\n", b"a\n"), (b"a\nb\nc", b"a\nb\n"), (b"a\n" + b"long" * 99_999, b"a\n")],
)
def test_a_line_that_a_kill_cut_in_two_is_removed_and_the_next_follows(
    tmp_path: Path, held: bytes, left: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(held)
    for mode in ("r+b", "a+b"):
        with path.open(mode) as handle:
            cut_torn_line(handle)
            handle.write(b"next\n")
    assert path.read_bytes() == left + b"next\n" * 2


SAVE_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from llmkit.io.files import atomic_folder
from llmkit.io.jsonl import open_output
out = Path(sys.argv[1])
print("ready", flush=True)
for turn in range(10**9):
    with atomic_folder(out / "model", force=True) as folder:
        for part in range(4):
            (folder / f"part-{part}").write_text(f"{turn} " * 5000)
    with open_output(str(out / "records.jsonl"), force=True) as put:
        for _ in range(200):
            put({"turn": turn})
"""


def test_kill_9_while_saving_leaves_the_output_whole(tmp_path: Path) -> None:
    rng = random.Random(1)
    command = [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(tmp_path)]
    seen = set()
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "model").exists():
            parts = [(tmp_path / "model" / f"part-{part}").read_text() for part in range(4)]
            turn = parts[0].split()[0]
            assert parts == [f"{turn} " * 5000] * 4
            seen.add(turn)
        if (tmp_path / "records.jsonl").exists():
            turns = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
            assert len(turns) == 200
            assert all(row == turns[0] for row in turns)
    assert len(seen) > 1  # the kills hit different moments
