"""Several processes train like one: equal losses, resuming on any world size, and clean exits.

Everything runs on the CPU (gloo) under torchrun, as a user would start it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_folder

from llmkit.errors import UserError
from llmkit.io.ranks import Launch, read_launch
from llmkit.training import failures
from llmkit.training.distributed import World
from llmkit.training.failures import verdict

WORDS = ["old", "ship", "sailed", "past", "green", "island", "small", "birds", "sang", "over", "stones", "water"]
PRETRAIN = ["--hidden-size", 32, "--depth", 2, "--num-attention-heads", 2, "--sequence-length", 32, "--device", "cpu"]
PRETRAIN += ["--batch-tokens", 13 * 32, "--micro-batch-size", 4, "--dtype", "float32"]  # no world size divides 13 rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a base model, documents, conversations, preferences and problems."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words: int) -> str:
        return " ".join(generator.choices(WORDS, k=words))

    def write(name: str, rows: list[dict]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    save_folder(folder / "base")
    write("docs", [{"text": text(generator.randint(5, 60))} for _ in range(60)])
    write("val", [{"text": text(40)} for _ in range(5)])
    write("chats", [{"prompt": text(3), "completion": text(generator.randint(1, 6))} for _ in range(40)])
    write("prefs", [{"prompt": text(3), "chosen": f"{text(2)}!", "rejected": text(2)} for _ in range(60)])
    write("problems", [{"prompt": text(2), "answer": "no"} for _ in range(8)])
    write("asked", [{"query": text(3), "choices": [text(1), text(2)], "gold": n % 2} for n in range(6)])
    scores = "def reward(record):\n    return sum(letter < 'n' for letter in record['completion'])\n"
    (folder / "early.py").write_text(scores)
    return folder


def processes(count: int, *arguments: object, launcher: tuple[str, ...] = ()) -> list[str]:
    """Return the command that starts llmkit in `count` processes; a single one without torchrun."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *launcher] if count > 1 else []
    return [sys.executable, *start, "-m", "llmkit", *map(str, arguments)]


def run(count: int, *arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = processes(count, *arguments, launcher=launcher)
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment())


def environment(**more: object) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in more.items()}


def pretrain(data: Path, out: Path, *more: object) -> list[object]:
    files = [data / "docs.jsonl", "--tokenizer", data / "base", "--val", data / "val.jsonl"]
    return ["pretrain", *files, *PRETRAIN, "-o", out, *more]


def figures(folder: Path, *names: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in names if name in row]


def differences(one: Path, other: Path, *names: str) -> tuple[float, float]:
    """Return the largest difference between the metrics of two runs, and between their final parameters."""
    first, second = figures(one, *names), figures(other, *names)
    assert len(first) == len(second) > 0
    parameters, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert parameters.keys() == others.keys()
    apart = max(float((parameters[name] - others[name]).abs().max()) for name in parameters)
    return max(abs(a - b) for a, b in zip(first, second, strict=True)), apart


def equal(count: int, tmp_path: Path, names: tuple[str, ...], *arguments: object) -> None:
    """Assert that one process and `count` processes make the same run."""
    for number in (1, count):
        done = run(number, *arguments, "-o", tmp_path / str(number))
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / str(count))  # one line, from rank 0
    loss, parameter = differences(tmp_path / "1", tmp_path / str(count), *names)
    print(f"losses within {loss:.0e}, parameters within {parameter:.0e}")
    assert loss < 1e-5 and parameter < 1e-4


def test_two_processes_pretrain_as_one(data, tmp_path):
    command = pretrain(data, tmp_path / "out", "--max-steps", 20, "--eval-every", 10, "--sample-every", 10)
    command += ["--evaluate", data / "asked.jsonl"]
    equal(2, tmp_path, ("loss", "val_loss", "grad_norm", "task/asked"), *command)
    rows = (tmp_path / "2" / "metrics.jsonl").read_text()
    assert '"sample"' in rows and '"targets":416' in rows


TUNING = ["--max-steps", "20", "--dtype", "float32", "--device", "cpu"]


@pytest.mark.slow
def test_more_processes_pretrain_as_one(data, tmp_path):
    command = pretrain(data, tmp_path / "out", "--max-steps", 20, "--eval-every", 10, "--sample-every", 10)
    equal(4, tmp_path, ("loss", "val_loss", "grad_norm"), *command)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [(), ("--lora-rank", 4), ("--lora-rank", 4, "--quantize", "nf4")], ids=len)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_tune_as_one(data, tmp_path, count, adapter):
    options = ["--sequence-length", 64, "--batch-tokens", 320, "--eval-every", 10, "--sample-every", 10, *adapter]
    options += ["--evaluate", data / "asked.jsonl"]
    files = [data / "base", "--data", data / "chats.jsonl", "--val", data / "chats.jsonl"]
    equal(count, tmp_path, ("loss", "val_loss", "task/asked"), "sft", *files, *options, *TUNING)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_judge_as_one(data, tmp_path, count):
    files = [data / "base", "--data", data / "prefs.jsonl"]
    equal(count, tmp_path, ("loss", "val_loss"), "train-reward", *files, "--eval-every", 10, *TUNING)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_try_problems_as_one(data, tmp_path, count):
    files = [data / "base", "--data", data / "problems.jsonl", "--val", data / "problems.jsonl"]
    options = ["--reward", f"py:{data}/early.py:reward", "--batch-size", 5, "--group", 4, "--max-tokens", 6]
    options += ["--eval-every", 10, "--max-kl", 1000, "--evaluate", data / "asked.jsonl", *TUNING]
    equal(count, tmp_path, ("loss", "reward", "val_reward", "kl", "task/asked"), "rl", *files, *options)
    one, other = ((tmp_path / str(number) / "rollouts.jsonl").read_text().splitlines() for number in (1, count))
    # after 20 updates log-probabilities differ in the sixth digit; the texts and their ranks are the same
    assert [json.loads(line)["token_ids"] for line in one] == [json.loads(line)["token_ids"] for line in other]


# ---- exits


class Running:
    """A background job that the test ends at a given step."""

    def __init__(
        self, count: int, out: Path, arguments: list[object], launcher: tuple[str, ...] = (), **more: object
    ) -> None:
        command = processes(count, *arguments, launcher=launcher)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process, self.out = subprocess.Popen(command, env=environment(**more), **pipes), out

    def wait_for_step(self, step: int) -> None:
        log = Path(f"{self.out}.partial/metrics.jsonl")
        while not log.exists() or log.read_bytes().count(b"\n") < step:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.005)

    def worker(self, rank: int) -> int:
        """Return the pid of a rank, a child of torchrun."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}":
                return int(child)
        raise AssertionError(f"no rank {rank}")

    def end(self) -> list[str]:
        """Wait for the end of the job; return llmkit's lines on stderr."""
        _, said = self.process.communicate(timeout=300)
        return [line for line in said.splitlines() if line.startswith("llmkit: error")]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "whole"
    done = run(1, *pretrain(data, out, "--max-steps", 60))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 4), (4, 2)])
def test_any_number_of_processes_resumes(data, tmp_path, whole, before, after):
    command = pretrain(data, tmp_path / "out", "--max-steps", 60)
    job = Running(before, tmp_path / "out", command)
    job.wait_for_step(5)
    job.process.send_signal(signal.SIGTERM)
    assert len(said := job.end()) == 1 and "--resume continues" in said[0]
    assert len(list((tmp_path / "out.partial" / "state").glob("step-*/*.safetensors"))) == before
    done = run(after, *command, "--resume")
    assert done.returncode == 0, done.stderr
    assert max(differences(whole, tmp_path / "out", "loss")) < 1e-5


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_job_resumes_bit_for_bit(data, tmp_path):
    command = pretrain(data, tmp_path / "out", "--max-steps", 60, "--save-every", 4)
    assert run(2, *command).returncode == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    job = Running(2, tmp_path / "out", command)
    job.wait_for_step(10)
    os.kill(job.worker(1), signal.SIGKILL)
    assert job.end() == ["llmkit: error: rank 1: no answer: killed, stopped or cut off; --resume continues"]
    done = run(2, *command, "--resume")
    assert done.returncode == 0, done.stderr
    assert differences(tmp_path / "whole", tmp_path / "out", "loss") == (0, 0)


FAULTS = {  # in rank 1 after 6 steps: where, what, and the message
    "a batch": ("next", "OSError(5, 'Input/output error', 'shard-3')", "shard-3: input/output error"),
    "memory": ("_backward", "torch.OutOfMemoryError('CUDA out of memory')", "memory runs out with 4 rows at a time"),
    "a mistake": ("next", "UserError('docs.jsonl:7: expected text, found a number')", "docs.jsonl:7: expected text"),
    "a bug": ("next", "KeyError('x')", "a bug in llmkit"),
    "an update": ("_directions", "MemoryError()", "not enough memory"),
}
FAULTY = """
import sys, torch
from llmkit.__main__ import main
from llmkit.training import distributed, optimizer, trainer
from llmkit.errors import UserError

where, error = sys.argv.pop(1), sys.argv.pop(1)
running = []

def failing(function):
    def call(*arguments, **options):
        if distributed.world().rank == 1 and running and running[0].step == 6:
            raise eval(error)
        return function(*arguments, **options)
    return call

class Trainer(trainer.Trainer):
    def fit(self, batches, **options):
        running.append(self)
        if where == "next":
            batches = map(failing(lambda batch: batch), batches)
        return super().fit(batches, **options)

if where == "_backward":
    torch.Tensor.backward = failing(torch.Tensor.backward)
elif where == "_directions":
    optimizer._Stack._directions = failing(optimizer._Stack._directions)
trainer.Trainer = Trainer
main()
"""


@pytest.fixture(scope="module")
def twelve_steps(data, tmp_path_factory) -> Path:
    """An uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("twelve") / "steps"
    assert run(2, *pretrain(data, out, "--max-steps", 12)).returncode == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_one_rank_saves_the_steps_of_all(data, tmp_path, twelve_steps, fault):
    where, error, told = FAULTS[fault]
    command = pretrain(data, tmp_path / "out", "--max-steps", 12)
    (tmp_path / "faulty.py").write_text(FAULTY)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "faulty.py")]
    said = subprocess.run(
        [*start, where, error, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment()
    ).stderr
    errors = [line for line in said.splitlines() if line.startswith("llmkit: error")]
    assert len(errors) == 1 and errors[0].startswith(f"llmkit: error: rank 1: {told}"), said
    kept = sorted(place.name for place in (tmp_path / "out.partial" / "state").glob("step-*"))
    if fault == "an update":  # half of the weights are updated
        assert kept == []
        return
    assert kept == ["step-00000006"] and "saved after step 6" in said, said
    assert run(2, *command, "--resume").returncode == 0
    assert differences(twelve_steps, tmp_path / "out", "loss") == (0, 0)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(data, tmp_path):
    job = Running(2, tmp_path / "out", pretrain(data, tmp_path / "out", "--max-steps", 5000), LLMKIT_PROCESS_TIMEOUT=5)
    job.wait_for_step(5)
    hanging = job.worker(1)
    os.kill(hanging, signal.SIGSTOP)
    time.sleep(15)
    os.kill(hanging, signal.SIGCONT)  # so that torchrun can end it without waiting
    assert len(said := job.end()) == 1 and "rank 1: no answer" in said[0]


@pytest.mark.slow
def test_torchrun_starts_a_failed_job_again(data, tmp_path, whole):
    command = pretrain(data, tmp_path / "out", "--max-steps", 60, "--save-every", 4)
    job = Running(2, tmp_path / "out", command, launcher=("--max-restarts", "1"))
    job.wait_for_step(10)
    os.kill(job.worker(1), signal.SIGKILL)
    stdout, stderr = job.process.communicate(timeout=600)
    assert job.process.returncode == 0, stderr
    assert "resuming after step" in stderr and json.loads(stdout.splitlines()[-1])["steps"] == 60
    assert max(differences(whole, tmp_path / "out", "loss")) < 1e-5


# ---- user errors


def by_hand(first: list[object], second: list[object], *folders: Path) -> list[tuple[int, list[str], str]]:
    """Start two ranks with separate commands in separate folders; return exit code, errors and stdout of both."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = []
    for rank, arguments in enumerate((first, second)):
        place = environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        where = folders[rank] if folders else None
        jobs.append(subprocess.Popen(processes(1, *arguments), env=place, cwd=where, **pipes))
    ended = [(*job.communicate(timeout=300), job.returncode) for job in jobs]
    return [(code, [line for line in err.splitlines() if "error" in line], out) for out, err, code in ended]


@pytest.mark.slow
def test_ranks_with_different_options_or_data_are_refused(data, tmp_path):
    out = tmp_path / "out"
    command = pretrain(data, out, "--max-steps", 3)
    (first, said, _), (second, more, _) = by_hand(command, [*command, "--save-every", 3])
    assert (first, second) == (2, 2) and len([*said, *more]) == 1
    assert "rank 1: --save-every is 3 here and None at rank 0" in [*said, *more][0]
    for folder, text in (("here", "a"), ("there", "b")):  # same name, different files
        (tmp_path / folder).mkdir()
        row = {"prompt": "who?", "completion": text}
        (tmp_path / folder / "chats.jsonl").write_text(json.dumps(row) + "\n")
    command = ["sft", data / "base", "--data", "chats.jsonl", "--max-steps", 3, "-o", out]
    said = [line for _, lines, _ in by_hand(command, command, tmp_path / "here", tmp_path / "there") for line in lines]
    assert len(said) == 1 and "rank 1: the data is " in said[0]
    assert not out.exists() and not Path(f"{out}.partial").exists()


@pytest.mark.slow
def test_a_folder_that_one_rank_does_not_see_is_refused(data, tmp_path):
    for folder in ("here", "there"):  # like machines without a shared disk
        (tmp_path / folder).mkdir()
    command = ["sft", data / "base", "--data", data / "chats.jsonl", "--max-steps", 3, "-o", "out"]
    ended = by_hand(command, command, tmp_path / "here", tmp_path / "there")
    said = [line for _, lines, _ in ended for line in lines]
    assert [code for code, _, _ in ended] == [2, 2] and len(said) == 1
    assert "rank 1: out.partial: not visible from here" in said[0]
    assert not any((tmp_path / "here").iterdir())


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once_and_without_a_rank(data, tmp_path):
    done = run(2, *pretrain(data, tmp_path / "out", "--max-steps", 3, "--batch-tokens", 32))
    said = [line for line in done.stderr.splitlines() if line.startswith("llmkit: error")]
    expected = "--batch-tokens: rows of 32 tokens: expected at least 2 in a batch, one per process, found 1"
    assert done.returncode == 1 and done.stdout == "" and said == [f"llmkit: error: {expected}"]
    assert not Path(f"{tmp_path}/out.partial").exists()


def test_the_verdict_from_the_notes_of_processes():
    error, ended = {"kind": "error", "message": "no x", "code": 2}, {"kind": "ended", "place": None}
    lost = {"kind": "lost", "message": "gloo: timed out", "code": 2}
    assert verdict({0: error, 1: error}, 2) == ("no x", 2)
    assert verdict({0: error, 1: {"kind": "done"}}, 2) == ("no x", 2)
    assert verdict({0: ended, 1: error}, 2) == ("rank 1: no x", 2)
    assert verdict({0: lost, 2: ended}, 4)[0].startswith("ranks 1, 3: no answer")
    assert verdict({0: lost, 1: {"kind": "ended", "place": "data/batches.py:88"}}, 2)[0] == (
        "rank 1: the others waited in vain while it ran data/batches.py:88"
    )
    interrupted = {"kind": "interrupted", "message": "interrupted", "code": 130}
    assert verdict({0: interrupted, 1: interrupted}, 2) == ("interrupted", 130)
    assert "rank 1" in verdict({0: interrupted}, 2)[0]


def test_a_process_that_cannot_save_tells_soon_why_it_failed(monkeypatch):
    """Regression: it waited for the saving thread as long as for another process."""
    monkeypatch.setattr(failures, "SAVING_SECONDS", 0.2)
    monkeypatch.setattr(failures, "connect", lambda me, timeout: None)
    watch, stuck = failures.Watch(Launch(0, 2), 600.0), threading.Event()
    watch.save = lambda all_have: stuck.wait(300)  # hangs, like a device that waits for a dead rank
    began = time.monotonic()
    assert not watch.save_together() and time.monotonic() - began < 60
    stuck.set()


def test_a_process_knows_its_place_from_torchrun_alone():
    assert read_launch({}) == read_launch({"WORLD_SIZE": "8", "RANK": "3"}) == Launch()
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert read_launch(place | {"TORCHELASTIC_RESTART_COUNT": "2"}) == Launch(3, 4, 1, 2, "none@a:7")
    with pytest.raises(UserError, match="expected the numbers that torchrun sets"):
        read_launch(place | {"RANK": "first"})


def test_shares_are_all_of_it_and_differ_by_one():
    for rows, size in ((13, 4), (4, 4), (2, 4), (64, 3)):
        shares = [World(rank, size).share(rows) for rank in range(size)]
        assert [i for start, stop in shares for i in range(start, stop)] == list(range(rows))
        assert max(stop - start for start, stop in shares) == -(-rows // size)


def test_collectives_of_a_single_process_are_identities():
    alone, tensor = World(), torch.ones(2)
    alone.all_reduce(tensor)
    assert alone.sum(1.5, 2) == (1.5, 2) and alone.gather("a") == ["a"] and alone.broadcast(None) is None
    assert list(alone.deal([1, 2])) == [1, 2] and alone.share(7) == (0, 7) and tensor.tolist() == [1, 1]
    with alone.in_turn():
        alone.check_same({"x": 1})
