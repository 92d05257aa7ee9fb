"""Finished outputs survive a power cut: tested by the order of system calls, and on a disk that is shut down."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.training.checkpoint import Checkpoints

# Runs commands and watches their renames: a file that gets its final name must be synced before, and nothing may be
# deleted until the new name is synced. Violations go to the file WATCH.
WATCHED = """
import json, os, shutil, stat, sys
from llmkit.io import files
from llmkit.cli import run_command_line
problems, synced, unsynced_names = open(os.environ["WATCH"], "w"), {}, set()

def told(status):
    return status.st_ino, status.st_size, status.st_mtime_ns

def fsync(handle, original=os.fsync):
    number = handle if isinstance(handle, int) else handle.fileno()
    original(number)
    status = os.fstat(number)
    synced[status.st_dev, status.st_ino] = told(status)
    if stat.S_ISDIR(status.st_mode):
        unsynced_names.discard(os.path.realpath(os.readlink(f"/proc/self/fd/{number}")))

def check(new, old):
    for place in [new, *(os.path.join(folder, name) for folder, folders, names in os.walk(new)
                         for name in folders + names)]:
        status = os.lstat(place)
        if synced.get((status.st_dev, status.st_ino)) != told(status):
            print(f"{place}: not on the disk when it becomes {old}", file=problems, flush=True)

def watch(owner, name):
    original = getattr(owner, name)
    def renamed(new, old, *rest, **named):
        check(new, old)
        done = original(new, old, *rest, **named)
        unsynced_names.add(os.path.realpath(os.path.dirname(os.path.abspath(old))))
        return done
    setattr(owner, name, renamed)

def rmtree(place, *rest, original=shutil.rmtree, **named):
    if unsynced_names and not str(place).startswith("/tmp/tmp"):
        print(f"{place}: deleted before the names in {unsynced_names} were on the disk", file=problems, flush=True)
    return original(place, *rest, **named)

os.fsync, shutil.rmtree = fsync, rmtree
for owner, name in ((os, "replace"), (os, "rename"), (files, "_exchange")):
    watch(owner, name)
for command in json.loads(sys.argv[1]):
    sys.argv = ["llmkit", *command]
    if code := run_command_line(command):
        sys.exit(code)
"""
TEXT = "the old ship sailed past a green island while small birds sang over warm grey stones"
WORDS = TEXT.split()
TINY = ["--depth", "1", "--hidden-size", "64", "--sequence-length", "32", "--batch-tokens", "256", "--seed", "0"]
TRAIN_BPE = ["train-bpe", "docs.jsonl", "--vocab-size", "300", "-o", "tok"]
PRETRAIN = ["pretrain", "docs.jsonl", "--tokenizer", "tok", *TINY, "--max-steps", "4", "--save-every", "1"]
SFT = ["sft", "base", "--data", "chats.jsonl", "--max-steps", "2", "--save-every", "1"]
EXIT = 0x8004587D  # EXT4_IOC_SHUTDOWN; with 2, pending writes are lost


def write_inputs(folder: Path) -> None:
    texts = [" ".join(WORDS[at:] + WORDS[:at]) + "." for at in range(len(WORDS))] * 8
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = [{"prompt": f"Say {word}", "completion": word} for word in WORDS * 8]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def run(folder: Path, *commands: list[str]) -> None:
    """Run commands in one watched process."""
    environment = {**os.environ, "WATCH": str(folder / "watched"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCHED, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def test_outputs_are_synced_before_they_get_their_names(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run(
        tmp_path,
        TRAIN_BPE,
        [*PRETRAIN, "-o", "base"],
        [*PRETRAIN, "-o", "base", "--force"],
        [*SFT, "-o", "chat"],
        ["sample", "base", "-p", "the", "--max-tokens", "4", "-o", "said.jsonl"],
        ["export", "base", "--format", "hf", "-o", "copy"],
    )
    assert (tmp_path / "watched").read_text() == ""
    weights = [path for path in tmp_path.rglob("*.safetensors") if path.is_file()]
    modes = {path.stat().st_mode & 0o777 for path in [*weights, tmp_path / "base" / "config.json"]}
    assert len(modes) == 1  # the umask's, although safetensors uses another


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 file system in a mount namespace that disappears with the test."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as handle:
        handle.truncate(200 << 20)
    tools = shutil.which("mkfs.ext4"), shutil.which("mount")
    if os.geteuid() != 0 or None in tools:
        pytest.skip("a disk to cut needs root, mkfs.ext4 and mount")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True).returncode:
        pytest.skip("no loop device can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)])


def cut(disk: Path) -> None:
    """Simulate a power cut and a reboot."""
    handle = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(handle, EXIT, struct.pack("I", 2))
    os.close(handle)


def back(disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk.with_name("disk.img")), str(disk)], check=True)


def test_a_power_cut_leaves_what_was_finished_and_two_checkpoints(disk: Path) -> None:
    write_inputs(disk)
    run(disk, TRAIN_BPE, [*PRETRAIN, "-o", "base"])
    whole = {path.name: path.read_bytes() for path in sorted((disk / "base").iterdir()) if path.is_file()}
    tokenizer = (disk / "tok" / "tokenizer.json").read_bytes()
    for name in ("docs.jsonl", "chats.jsonl"):  # written by this test, not by llmkit
        with (disk / name).open("rb") as handle:
            os.fsync(handle.fileno())
    command = [sys.executable, "-m", "llmkit", *PRETRAIN, "--max-steps", "100000", "-o", "long"]
    process = subprocess.Popen(command, cwd=disk, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state, until = disk / "long.partial" / "state", time.monotonic() + 120
    while len(seen := sorted(state.glob("step-*[0-9]"))) < 2 or seen[0].name < "step-00000003":
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    cut(disk)
    process.kill()
    process.wait()
    back(disk)
    assert {path.name: path.read_bytes() for path in sorted((disk / "base").iterdir()) if path.is_file()} == whole
    assert (disk / "tok" / "tokenizer.json").read_bytes() == tokenizer
    last = max(int(path.name[5:]) for path in state.glob("step-*[0-9]"))
    assert last >= int(seen[-1].name[5:])
    found = Checkpoints(state).load()
    assert found is not None and found[1]["step"] == last


def test_sighup_saves_and_resume_starts_or_continues(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run(tmp_path, [*TRAIN_BPE[:-1], "made/here/tok"])  # creates parent folders
    os.rename(tmp_path / "made" / "here" / "tok", tmp_path / "tok")
    (tmp_path / "base").mkdir()  # an empty folder is accepted
    command = [sys.executable, "-m", "llmkit", *PRETRAIN, "--max-steps", "80", "--resume", "-o", "base"]
    details = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, **details)
    until = time.monotonic() + 120
    while not list((tmp_path / "base.partial" / "state").glob("step-*[0-9]")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)  # closing the terminal
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume continues" in said
    assert "--resume: nothing at base.partial yet: starting a new run" in said
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
