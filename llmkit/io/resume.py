"""Keep a run's records in a file that outlives a kill: a line that identifies the run, then a line for each record.

state = RunState(Path("out.jsonl.state"), {"--seed": 0}, resume=True)
for question in state.remaining(questions, made_of):
    state.append(answer(question))
write(state.records())
state.remove()
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from llmkit.errors import Interrupted, ServerError, UserError
from llmkit.io.files import create, cut_torn_line, errors_name
from llmkit.io.foreign import check_file, sealed, unsealed
from llmkit.io.progress import say
from llmkit.io.run_folder import check_identity

WEIGHTS_READ = 1 << 20  # bytes at the end of a file of weights that tell it from another

T = TypeVar("T")


class RunState:
    """The records of a run on their way; without a path, in memory.

    identity  what decides the records; a resumed run must have the same. Raises UserError for another
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], resume: bool) -> None:
        self.path = path
        begun = resume and path is not None and path.exists()
        if begun:
            check_file(str(path))
        if resume and not begun:
            say(f"--resume: nothing stands at {path} yet, so the run starts")
        self._file: IO[bytes] = io.BytesIO()
        if path is not None:
            self._file = path.open("r+b") if begun else create(path, "w+b")
        self._start, self.kept = self._take_over(identity) if begun else (0, 0)
        if not self._start:  # a new one, or killed before its first line was whole
            self._start = self._write(orjson.dumps({"run": identity}) + b"\n")

    def _take_over(self, identity: dict[str, Any]) -> tuple[int, int]:
        """Check the file's first line; return the offset of the first record and the number of records."""
        cut_torn_line(self._file)
        self._file.seek(0)
        first = self._file.readline()
        if first:
            try:
                noted = dict(orjson.loads(first)["run"])
            except (ValueError, TypeError, LookupError):
                raise UserError(f"{self.path}: does not begin as an unfinished run; start again with --force") from None
            check_identity(str(self.path), noted, identity)
        return self._file.tell(), sum(1 for _ in iter(self._file.readline, b""))

    def remaining(self, given: Sequence[T], made_of: Callable[[dict[str, Any], T], bool]) -> Iterator[T]:
        """Yield the items after the last that has a record, by `made_of`. Raises UserError for a record of no item."""
        left = iter(given)
        for record in list(self.records()):
            if next((item for item in left if made_of(record, item)), None) is None:
                raise UserError(
                    f"{self.path}: has a record that the input does not: {record['where']}; start again with --force"
                )
        yield from left

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is there as soon as this returns, whatever becomes of the process."""
        self._file.seek(0, os.SEEK_END)
        self._write(orjson.dumps(sealed(record)) + b"\n")

    def _write(self, line: bytes) -> int:
        with errors_name(self.path or "memory", self.path or "memory"):
            self._file.write(line)
            self._file.flush()
        return len(line)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, from the first."""
        self._file.seek(self._start)
        for number, line in enumerate(iter(self._file.readline, b""), 2):
            try:
                record = unsealed(dict(orjson.loads(line)), "")
            except (ValueError, TypeError):
                raise UserError(
                    f"{self.path}:{number}: damaged or edited; keep the lines before it alone, "
                    "or start again with --force"
                ) from None
            yield record

    def remove(self) -> None:
        """The work is done."""
        with suppress(OSError):  # a full disk, which has been told
            self._file.close()
        if self.path is not None:
            self.path.unlink()


@contextmanager
def resumable(*paths: Path | None) -> Iterator[None]:
    """Say, where Ctrl-C or a server ends the work, how to resume from the first of the files that exists."""
    try:
        yield
    except (KeyboardInterrupt, ServerError) as error:
        there = [path for path in paths if path is not None and path.exists()]
        if not there:
            raise
        advice = f"{there[0]} has what was asked, and --resume goes on with it"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {advice}") from None
        raise UserError(f"{error}; {advice}") from error


def fingerprint(folder: str) -> str:
    """Hash a model's configuration, tokenizer and the ends of its weights, which tell it from another model."""
    digest = sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in ("config.json", "tokenizer.json") or path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as handle:
                handle.seek(max(0, path.stat().st_size - WEIGHTS_READ))
                digest.update(handle.read())
    return digest.hexdigest()[:16]
