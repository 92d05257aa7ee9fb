"""Damages the state of each resumable command in many ways, resumes it, and prints a line about each.

    python damaged_states.py FOLDER [COMMAND [EVERY [FIRST]]]

Prints `outcome command damage: last line of stderr`; the outcome is `ok`, `UserError`, or what is wrong: a traceback,
several lines, the damaged file not named, a hang, a signal. Run as a program, because it forks for each command after
torch is imported and before torch has threads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kills import ended, forked

TUNING = "--learning-rate 0.001 --max-steps 9 --save-every 2 --eval-every 3 --quiet -o OUT"
COMMANDS = {
    "crawl-filter": "crawl-filter a.jsonl b.jsonl c.jsonl --only extract,exact_duplicates,near_duplicates --workers 1 "
    "--rejects OUT.rejects.jsonl -o OUT",
    "pretrain": "pretrain docs.jsonl --tokenizer tok --val val.jsonl --depth 1 --hidden-size 64 --sequence-length 64 "
    "--batch-tokens 256 --max-steps 9 --save-every 2 --eval-every 3 --sample-every 4 --dtype float32 "
    "--quiet -o OUT",
    "sft": "sft base --data chats.jsonl --val chats.jsonl --batch-tokens 384 --sequence-length 96 --patience 5 "
    f"{TUNING}",
    "train-reward": f"train-reward chat --data prefs.jsonl --val prefs.jsonl {TUNING}",
    "rl": "rl chat --data problems.jsonl --val problems.jsonl --reward format:(?s).*e.* --group 4 --batch-size 2 "
    f"--max-tokens 6 {TUNING}",
    "sample": "sample base prompts.jsonl --jsonl -n 2 --max-tokens 8 --batch-size 2 --quiet -o OUT",
    "probe-knowledge": "probe-knowledge chat --questions questions.jsonl -n 2 --max-tokens 8 --batch-size 2 --quiet "
    "--report OUT.report.jsonl -o OUT",
}
STATES = {  # where a command leaves its state, and the bytes or the checkpoint after which it is killed
    "crawl-filter": ("OUT.state", 2500),
    "pretrain": ("OUT.partial", "state/step-00000004"),
    "sft": ("OUT.partial", "state/step-00000004"),
    "train-reward": ("OUT.partial", "state/step-00000004"),
    "rl": ("OUT.partial", "state/step-00000004"),
    "sample": ("OUT.state", 2500),
    "probe-knowledge": ("OUT.state", 2500),
}
LIMIT = 40  # seconds; a command takes about one


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world() -> None:
    from pipeline import make_models, page

    make_models(Path("."))
    write("val.jsonl", [{"text": "The old ship sailed past a green island."} for _ in range(8)])
    for name in "abc":
        write(f"{name}.jsonl", [page(ord(name) * 40 + number) for number in range(30)])
    write(
        "prefs.jsonl", [{"prompt": f"Say {n}", "chosen": "sea " * (1 + n % 3), "rejected": "wall"} for n in range(24)]
    )
    write("problems.jsonl", [{"prompt": f"1+{n}", "answer": str(1 + n)} for n in range(8)])
    write("questions.jsonl", [{"question": f"Who is {n}?", "answer": "Ada"} for n in range(200)])
    write("prompts.jsonl", [{"prompt": "The old", "id": n} for n in range(200)])


def arguments(command: str, out: str, *more: str) -> list[str]:
    return [*COMMANDS[command].replace("OUT", out).split(), *more]


def leave_unfinished(command: str, out: str) -> None:
    """Kill a command when its state is worth resuming."""
    state, enough = STATES[command]
    place = Path(state.replace("OUT", out))
    process = forked(arguments(command, out), Path("."), f"{out}.log")
    while True:
        try:
            there = place.stat().st_size >= enough if isinstance(enough, int) else (place / enough).exists()
        except OSError:
            there = False
        if there:
            break
        found, _ = os.waitpid(process, os.WNOHANG)
        assert not found, Path(f"{out}.log").read_text()
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    Path(f"{place}.lock").unlink(missing_ok=True)


# ---- damage

ODD = (None, True, -1, 1, 0.5, 10**30, "", "x", [], {}, [1], {"a": 1})
CONTENTS = {
    "empty": b"",
    "a blank line": b"\n",
    "zeros": b"\0" * 200,
    "garbage": b'\xff\xfe{"\n\x00}\n',
    "{}": b"{}\n",
    "[]": b"[]\n",
    "null": b"null\n",
    "a number": b"5\n",
    "a string": b'"x"\n',
    "deep": b"[" * 5000 + b"]" * 5000 + b"\n",
}


def damages(top: Path) -> Iterator[tuple[str, Path, Callable[[], object]]]:
    """Yield (name, damaged path, function that damages it) for a state, which is a file or a folder."""
    places = [top, *sorted(top.rglob("*"))] if top.is_dir() else [top, *sorted(top.parent.glob(f"{top.name}.*"))]
    for place in places:
        if place.name.endswith((".log", ".lock")):
            continue
        name = str(place.relative_to(top.parent))
        yield f"{name} missing", place, lambda place=place: remove(place)
        yield f"{name} a dangling link", place, lambda place=place: (remove(place), place.symlink_to("nowhere"))
        if place.is_dir():
            yield f"{name} a file", place, lambda place=place: (remove(place), place.write_bytes(b""))
            yield f"{name} emptied", place, lambda place=place: (remove(place), place.mkdir())
            for more in ("step-junk", "step-00000010", "step-00000008.partial", "junk"):
                yield f"{name} with folder {more}", place, lambda place=place, more=more: (place / more).mkdir()
                yield f"{name} with file {more}", place, lambda place=place, more=more: (place / more).write_bytes(b"")
            continue
        whole = place.read_bytes()
        yield f"{name} a folder", place, lambda place=place: (remove(place), place.mkdir())
        yield f"{name} a pipe", place, lambda place=place: (remove(place), os.mkfifo(place))
        for kind, content in CONTENTS.items():
            yield f"{name} {kind}", place, lambda place=place, content=content: place.write_bytes(content)
        for kind, cut in (("cut by 1", -1), ("cut in half", len(whole) // 2), ("cut to 40 bytes", 40)):
            yield f"{name} {kind}", place, lambda place=place, cut=cut, whole=whole: place.write_bytes(whole[:cut])
        for where in (9, len(whole) // 2, len(whole) - 9) if len(whole) > 9 else ():
            flipped = whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1 :]
            yield f"{name} bit {where}", place, lambda place=place, flipped=flipped: place.write_bytes(flipped)
        if whole[:1] == b"{":
            for kind, edited in edited_json(whole):
                yield f"{name} {kind}", place, lambda place=place, edited=edited: place.write_bytes(edited)


def remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()


def edited_json(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) with one value edited: in the only object, or in the first, second and last of JSONL."""
    lines = whole.splitlines(keepends=True)
    try:
        first = json.loads(whole)
        for kind, value in edits(first):
            yield kind, json.dumps(value).encode()
        return
    except ValueError:
        pass
    for number in sorted({0, min(1, len(lines) - 1), len(lines) - 1}):
        try:
            value = json.loads(lines[number])
        except ValueError:  # a crawl's state is binary
            continue
        for content in (b"{}\n", b"[]\n", b"null\n", b"\xff{\n", b"\n"):
            yield f"line {number + 1} {content!r}", b"".join([*lines[:number], content, *lines[number + 1 :]])
        for kind, edited in edits(value):
            line = json.dumps(edited).encode() + b"\n"
            yield f"line {number + 1} {kind}", b"".join([*lines[:number], line, *lines[number + 1 :]])
    yield "line 1 doubled", b"".join([lines[0], *lines])


def edits(value: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) with one key missing or odd, at each of the upper levels."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f".{key} gone", {name: one for name, one in value.items() if name != key}
            for odd in ODD:
                yield f".{key} = {odd}", {**value, key: odd}
            if depth:
                for kind, edited in edits(inner, depth - 1):
                    yield f".{key}{kind}", {**value, key: edited}
        yield ".more", {**value, "more": 1}
    elif isinstance(value, list) and value:
        for odd in ODD:
            yield f"[0] = {odd}", [odd, *value[1:]]
        yield "[0] gone", value[1:]
        for kind, edited in edits(value[0], depth - 1) if depth else ():
            yield f"[0]{kind}", [edited, *value[1:]]


def outcome(code: int | None, said: str, names: tuple[str, ...]) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    if code is None:
        return "HANGS"
    if code < 0:
        return f"SIGNAL {-code}"
    if "Traceback" in said or code not in (0, 2):
        return f"TRACEBACK {code}"
    if code == 0:
        return "ok"
    if len(re.findall("llmkit: error", said)) != 1 or not lines[-1].startswith("llmkit: error"):
        return "SEVERAL LINES"
    return "UserError" if any(name in lines[-1] for name in names) else "UNNAMED"


def main(folder: Path, command: str, every: int, first: int) -> None:
    os.chdir(folder)
    state = STATES[command][0]
    shutil.rmtree("case", ignore_errors=True)
    remains = Path(f"left-{command}")
    if not remains.is_dir():
        Path("case").mkdir()
        leave_unfinished(command, "case/out")
        Path("case").rename(remains)
    shutil.copytree(remains, "case", symlinks=True)
    names = [name for name, _, _ in damages(Path(state.replace("OUT", "case/out")))]
    for number in range(first, len(names), every):
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree(remains, "case", symlinks=True)
        name, place, damage = next(
            one for count, one in enumerate(damages(Path(state.replace("OUT", "case/out")))) if count == number
        )
        damage()
        Path("log").unlink(missing_ok=True)
        process = forked(arguments(command, "case/out", "--resume"), Path("."), "log")
        if (code := ended(process, LIMIT)) is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        said = Path("log").read_text(errors="replace")
        named = outcome(code, said, (str(place), place.parent.name, "case/out"))
        last = said.strip().splitlines()[-1:] or [""]
        print(f"{named:12} {command} {number} {name}: {last[0][:240]}", flush=True)


if __name__ == "__main__":
    from warm import warm_up

    where = Path(sys.argv[1])
    warm_up()
    if not (where / "prompts.jsonl").exists():
        where.mkdir(exist_ok=True)
        maker = os.fork()
        if not maker:
            os.chdir(where)
            make_world()
            os._exit(0)
        assert os.waitpid(maker, 0)[1] == 0
    main(where, sys.argv[2], *map(int, [*sys.argv[3:], "1", "0"][:2]))
