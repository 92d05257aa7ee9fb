"""Kills every stage at random moments, resumes it, and compares the output with an uninterrupted run.

    python tests/helpers/kills.py 20              # 20 kills per stage: kill -9, then --resume
    python tests/helpers/kills.py 20 pretrain rl --seed 7

Two stages read from URLs and write to a bucket of local servers.

Each run is forked from a process that has imported everything, so that the kills hit the work and not start-up. The
bytes of all outputs are compared, except seconds, rates, the time of day and notes of resumption. Exits with 1 if a
trial differs, leaves temporary files or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from object_store import bucket_of, empty_bucket, environment

ROOT = Path(__file__).parents[2]
OFTEN = "--max-steps 8 --save-every 1"
ROWS = "--sequence-length 64 --batch-tokens 256 --dtype float32"
CHOSEN = "language,extract,pii,exact_duplicates,near_duplicates"
STAGES = {
    "crawl-filter": f"pages.jsonl --workers 2 --only {CHOSEN} --rejects out.rejects.jsonl -o out.jsonl",
    "train-bpe": "docs.jsonl --vocab-size 448 -o out",
    "pretrain": "docs.jsonl:0.7 val.jsonl:0.3 --phase 0.5:docs=0.4,val=0.6 --val val.jsonl --tokenizer tok --depth 1 "
    f"--hidden-size 64 --eval-every 4 --sample-every 6 {ROWS} {OFTEN} -o out",
    "sft": f"base --data chats.jsonl --val chats.jsonl --eval-every 4 {ROWS} {OFTEN} -o out",
    "sft-preferences": "chat --data prefs.jsonl --loss dpo --val prefs.jsonl --eval-every 4 --gold length "
    f"{ROWS} {OFTEN} -o out",
    "train-reward": f"chat --data prefs.jsonl --lora-rank 4 --quantize nf4 --dtype float32 {OFTEN} -o out",
    "rl": f"chat --data problems.jsonl --reward format:(?s).*e.* --group 4 --batch-size 2 "
    f"--max-tokens 6 {OFTEN} -o out",
    "sample": "chat --jsonl prompts.jsonl -n 2 --batch-size 4 --max-tokens 24 -o out.jsonl",
    "probe-knowledge": "chat --questions questions.jsonl --samples 2 --max-tokens 8 --batch-size 4 "
    "--report out.report.jsonl -o out.jsonl",
    "write-chats": "--guide guide.md --mix guide=0 --answer prompts.jsonl --writer chat --samples 2 --batch-size 4 "
    "--max-tokens 48 --pairs out.pairs.jsonl -o out.jsonl",
}
AT_ADDRESSES = {
    "crawl-filter": "s3://inputs/0.warc.gz WEB/1.warc.gz s3://inputs/2.jsonl --workers 2 "
    f"--only {CHOSEN} --rejects s3://bucket/out.rejects.jsonl -o s3://bucket/out.jsonl.gz",
    "sample": "chat --jsonl s3://inputs/prompts.jsonl -n 2 --batch-size 4 --max-tokens 24 -o s3://bucket/out.jsonl",
}
REMOTE, PREFERENCES = "-at-addresses", "-preferences"
STAGES |= {f"{stage}{REMOTE}": words for stage, words in AT_ADDRESSES.items()}
STARTS_ANEW = ("train-bpe",)  # has no --resume: starts from the beginning


def make_inputs(folder: Path) -> None:
    """Write the stages' inputs: those of tests/helpers/pipeline.py and a few more."""
    from pipeline import WORDS, documents, make_models, page, write
    from web import Record, write_warc

    make_models(folder)
    write(folder / "pages.jsonl", [page(number % 350) for number in range(400)])
    write(folder / "docs.jsonl", documents(600, seed=0))
    write(folder / "val.jsonl", documents(60, seed=1))
    write(
        folder / "prefs.jsonl",
        [{"prompt": f"Say {i}", "chosen": "sea " * (1 + i % 3), "rejected": "no"} for i in range(40)],
    )
    write(folder / "problems.jsonl", [{"prompt": f"1+{i}", "answer": str(1 + i)} for i in range(8)])
    write(folder / "questions.jsonl", [{"question": f"Who is {word}?", "answer": "Ada"} for word in 3 * WORDS.split()])
    (folder / "guide.md").write_text("Answer in a few words.")
    write(folder / "prompts.jsonl", [{"prompt": f"The {word}", "id": i} for i, word in enumerate(4 * WORDS.split())])
    (folder / "remote").mkdir()
    for number in range(2):
        records = [Record(row["url"], row["html"]) for row in map(page, range(150 * number, 150 * number + 200))]
        write_warc(folder / "remote" / f"{number}.warc.gz", records)
    write(folder / "remote" / "2.jsonl", [page(number % 350) for number in range(300, 400)])
    shutil.copy(folder / "prompts.jsonl", folder / "remote")


def start(stage: str, place: Path, inputs: Path) -> int:
    """Start a stage in a new folder with links to the inputs; return its pid."""
    if REMOTE in stage and not place.exists():
        empty_bucket(os.environ["AWS_ENDPOINT_URL"])
    place.mkdir(exist_ok=True)
    for path in inputs.iterdir():
        if not os.path.lexists(place / path.name):
            os.symlink(path, place / path.name)
    more = ["--force"] if stage in STARTS_ANEW else ["--resume"]
    words = STAGES[stage].replace("WEB/", os.environ.get("WEB", "")).split()
    return forked([stage.removesuffix(REMOTE).removesuffix(PREFERENCES), *words, "--quiet", *more], place, "log")


def forked(words: list[str], place: Path, log: str) -> int:
    """Start a command in a folder, appending its output to a log there; return its pid."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()  # detached from the terminal's signals
        os.chdir(place)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["llmkit", *words]

        from llmkit.cli import run_command_line

        code = run_command_line(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Return the exit code of a child, or None if it is still running after this many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def contents(place: Path) -> dict[str, bytes]:
    """Return the files of a run, without seconds."""
    for name, data in (bucket_of(os.environ["AWS_ENDPOINT_URL"]) if REMOTE in place.name else {}).items():
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / name).write_bytes(data)
    found = {}
    for path in sorted(place.rglob("out*")) + sorted((place / "out").rglob("*")):
        if path.is_file():
            name, data = str(path.relative_to(place)), path.read_bytes()
            if path.suffix in (".json", ".jsonl") and path.name != "out.jsonl":
                lines = data.splitlines() if path.suffix == ".jsonl" else [data]
                data = b"\n".join(json.dumps(without_seconds(json.loads(line))).encode() for line in lines)
            elif path.suffix == ".md":
                data = b"\n".join(line for line in data.splitlines() if b"seconds" not in line)
            found[name] = data
    return found


def without_seconds(value: Any) -> Any:
    """Remove times and rates from a JSON value."""
    if isinstance(value, dict):
        clock = ("created", "mfu", "elapsed", "seal", "resume")  # the seal covers the state's seconds
        return {k: without_seconds(v) for k, v in value.items() if "second" not in k and k not in clock}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value


def trials(stage: str, moments: int, seed: int, folder: Path, say: Callable[[str], object]) -> list[str]:
    """Kill and resume a stage `moments` times; return the failures."""
    rng = random.Random(f"{seed} {stage}")
    inputs, faults = folder / "inputs", []
    whole = folder / f"{stage}-whole"
    began = time.monotonic()
    code = ended(start(stage, whole, inputs), 600)
    length = time.monotonic() - began
    if code != 0:
        return [f"{stage}: the uninterrupted run ended with {code}: {(whole / 'log').read_text()[-1000:]}"]
    wanted, names = contents(whole), sorted(one.name for one in whole.iterdir())
    kills = equal = trial = 0
    while kills < moments:
        trial += 1
        place, told = folder / f"{stage}-{trial}", []
        for again in (False, True):  # resumed runs are sometimes killed, too
            moment = rng.uniform(0, length)
            if kills == moments or (again and rng.random() < 0.6):
                break
            child = start(stage, place, inputs)
            if (code := ended(child, moment)) is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            told.append(f"{moment:.2f}")
        if not told:
            shutil.rmtree(place)  # it ended before the kill
            continue
        code = ended(start(stage, place, inputs), 600)
        stood = code == 2 and "already exists" in (place / "log").read_text()  # it had finished before the kill
        if code != 0 and not stood:
            faults.append(f"{stage}: killed at {told} of {length:.2f} s, --resume ended with {code}")
            faults[-1] += f": {(place / 'log').read_text()[-1000:]}"
            continue
        found, left = contents(place), sorted(one.name for one in place.iterdir())
        unlike = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        log = (place / "log").read_text()
        if unlike or left != names or "Traceback" in log:
            more = sorted(set(left) ^ set(names))
            faults.append(f"{stage}: killed at {told} of {length:.2f} s: differ {unlike}, left {more}: {log[-500:]}")
        else:
            equal += 1
            shutil.rmtree(place)
    say(f"{stage}: killed at {kills} moments of {length:.2f} s in {trial} trials, {equal} equal, {len(faults)} not")
    return faults


@contextmanager
def servers(folder: Path) -> Iterator[None]:
    """Run an S3 server and a web server, in separate processes, with the files of a folder."""
    files = sorted(map(str, folder.iterdir()))
    commands = [["object_store.py", "inputs", *files], ["file_server.py", "--ways", "cut", *files]]
    with ExitStack() as stack:
        addresses = []
        for name, *arguments in commands:
            command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            addresses.append(process.stdout.readline().strip())
        os.environ |= environment(addresses[0]) | {"WEB": addresses[1]}
        import s3fs  # noqa: F401 -- so that no trial waits for it

        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("moments", type=int, help="moments of each stage")
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(STAGES)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    from warm import warm_up

    warm_up()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    (folder / "inputs").mkdir()
    maker = os.fork()
    if maker == 0:
        make_inputs(folder / "inputs")
        os._exit(0)
    if ended(maker, 600) != 0:
        return 1
    print(f"seed {asked.seed}", flush=True)
    stages = asked.stages or list(STAGES)
    with servers(folder / "inputs" / "remote") if any(REMOTE in stage for stage in stages) else nullcontext():
        faults = [
            fault
            for stage in stages
            for fault in trials(stage, asked.moments, asked.seed, folder, lambda line: print(line, flush=True))
        ]
    for fault in faults:
        print(fault)
    if not faults:
        shutil.rmtree(folder)
    else:
        print(f"what is left lies in {folder}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
