"""State of an unfinished run on disk for --resume: one file for each finished span."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from llmkit.crawl.page import Part, read_parts, write_part
from llmkit.errors import UserError
from llmkit.io.files import atomic_file, check_unfinished, remove
from llmkit.io.progress import say
from llmkit.io.resume import read_sealed, write_sealed

SUFFIX = ".partial-state"


class State:
    """The folder `OUT.partial-state/`: `run.json`, which says what is being made of what, and `span-NNNNNN`.

    A span's file appears whole or not at all. The folder is made when the first span is saved.
    """

    def __init__(self, out: str, run: Mapping[str, Any]) -> None:
        self.folder = Path(f"{out}{SUFFIX}")
        self.same: set[str] | None = None  # the inputs that are what they were; None for all
        self.run = orjson.loads(orjson.dumps(run))  # as JSON will give it back

    def begin(self, resume: bool, force: bool) -> int:
        """Check what is there; the number of spans that need no work.

        Raises UserError when there is an unfinished run and neither resume nor force, or when it was made
        from another input or with other options.
        """
        if resume and self.folder.is_dir():
            self._check_same_run()
            return len(list(self.folder.glob("span-*[0-9]")))
        if resume:
            say(f"--resume: nothing stands at {self.folder} yet, so the run starts")
            return 0
        check_unfinished(force, resume, self.folder)
        remove(self.folder)
        return 0

    def _check_same_run(self) -> None:
        path = self.folder / "run.json"
        try:
            before = read_sealed(path)
        except FileNotFoundError:
            raise UserError(f"{path}: missing, so that nobody knows what was begun; start again with --force") from None
        except UserError as error:
            raise UserError(f"{error}; start again with --force") from None
        self._keep_what_is_the_same(before)
        for key in {**before, **self.run}:
            if before.get(key) != self.run.get(key):
                where = _difference(key, before.get(key), self.run.get(key))
                raise UserError(f"{self.folder}: the unfinished run had {where}; start again with --force")

    def _keep_what_is_the_same(self, before: dict[str, Any]) -> None:
        """Go on with other inputs than before, such as a mended file, from the first one that is another."""
        was, now = before.get("inputs"), self.run["inputs"]
        if was == now or not isinstance(was, list):
            return
        same = next(
            (n for n, (old, new) in enumerate(zip(was, now, strict=False)) if old != new), min(len(was), len(now))
        )
        if same and all(before.get(key) == self.run.get(key) for key in {**before, **self.run} if key != "inputs"):
            self.same = {file["path"] for file in now[:same]}
            before["inputs"] = now

    def has(self, span: Any) -> bool:
        """True if the span's file is there. Raises UserError when it was made of other bytes."""
        path = self.path(span)
        if self.same is not None and span.path not in self.same:
            path.unlink(missing_ok=True)  # of an input that is not what it was
            return False
        if not path.exists():
            return False
        with open(path, "rb") as handle:
            if handle.read(32) != _digest(span):
                name = "stdin" if span.path == "-" else span.path
                raise UserError(f"{name}: not what the unfinished run has read; start again with --force")
        return True

    def load(self, span: Any) -> Iterator[Part]:
        """The parts of a span that needs no work."""
        with open(self.path(span), "rb") as handle:
            handle.seek(32)
            yield from read_parts(handle)

    def saving(self, span: Any, parts: Iterable[Part]) -> Iterator[Part]:
        """Pass the parts of a span through, keeping them; the file appears after the last."""
        self.start()
        yield from write_span(self.path(span), span, parts)

    def start(self) -> None:
        """Make the folder, where it is not there."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_sealed(self.folder / "run.json", self.run)

    def remove(self) -> None:
        """The run is finished, and its output in place."""
        remove(self.folder)

    def path(self, span: Any) -> Path:
        """The span's file."""
        return self.folder / f"span-{span.index:06d}"


def write_span(path: Path, span: Any, parts: Iterable[Part]) -> Iterator[Part]:
    """Pass the parts of a span through, writing them to its file, which appears after the last."""
    with atomic_file(path) as handle:
        handle.write(_digest(span))
        for part in parts:
            write_part(handle, part)
            yield part


def files_of(paths: Iterable[str]) -> list[Path]:
    """The files named, and those in the folders named."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files


def identities(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Identify files by path, size and time of change, to compare them on resuming."""
    files = []
    for path in files_of(paths):
        status = path.stat() if path.is_file() else None
        known = {"bytes": status.st_size, "modified": status.st_mtime_ns} if status else {}
        files.append({"path": str(path), **known})
    return files


def _digest(span: Any) -> bytes:
    """Hash the content of a pipe's span; files are identified by path, size and time in run.json."""
    return hashlib.sha256(span.payload).digest()


def _difference(key: str, before: Any, now: Any) -> str:
    """The first place where two JSON values differ, as "recipe.c4.min_lines 5, this one has 3"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return _difference(f"{key}.{name}", before.get(name), now.get(name))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                return _difference(f"{key}[{number}]", old, new)
    elif isinstance(before, list) and isinstance(now, list):
        before, now = [x for x in before if x not in now], [x for x in now if x not in before]
    return f"{key} {_short(before)}, this one has {_short(now)}"


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
