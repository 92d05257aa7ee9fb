"""Resumption: the identity of a run, notes with a checksum, and records that survive a kill.

kept = Kept(Path("out.jsonl.state"), {"--seed": 0}, resume=True)
for question in kept.missing(questions, key_of):
    kept.add(key_of(question), answer(question))
write(kept.values())
kept.remove()
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from llmkit.errors import Interrupted, UserError
from llmkit.io.files import check_file, create, errors_name
from llmkit.io.jsonl import JSON_LINE, read_object, write_json
from llmkit.io.progress import say

STATE = ".state"  # appended to --out: the state of an unfinished run that writes a file
WEIGHTS_READ = 1 << 20  # bytes hashed at the end of a weights file

T = TypeVar("T")


class Kept:
    """Records of an unfinished run, in the order in which they were added; without a path, in memory.

    The file has a line {"run": identity}, then for each record a line [key, bytes, checksum], its bytes and a newline.
    A record survives a kill of the process as soon as `add` returns; a truncated last one is dropped.

    identity: the options and inputs that determine the records, JSON values by flag or another name that users know.
    Raise UserError for a run with another identity, and for a damaged file.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._places: list[tuple[str, int, int, str]] = []  # key, offset, bytes, checksum
        self._newest: dict[str, int] = {}  # key to index in _places
        begun = resume and path is not None and path.exists()
        if begun:
            check_file(str(path))
        elif resume:
            say(f"--resume: nothing at {path} yet: starting a new run")
        self._file: IO[bytes] = io.BytesIO()
        if path is not None:
            with errors_name(path, path):
                self._file = path.open("r+b") if begun else create(path, "w+b")
        if not (begun and self._take_over(identity)):
            self._write(orjson.dumps({"run": identity}) + b"\n")

    def _take_over(self, identity: Mapping[str, Any]) -> bool:
        """Index the records of the file; return False if its first line is incomplete."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        first = self._file.readline()
        if not first.endswith(b"\n"):
            self._file.truncate(self._file.seek(0))
            return False
        try:
            noted = dict(orjson.loads(first)["run"])
        except (ValueError, TypeError, LookupError):
            raise UserError(f"{self.path}: not the state of an unfinished run; start over with --force") from None
        check_identity(str(self.path), noted, identity)
        end = len(first)
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                head = orjson.loads(line)
            except ValueError:
                head = None
            match head:
                case [str(key), int(length), str(checksum)] if length >= 0:
                    start = end + len(line)
                case _:
                    raise self._damaged(len(self))
            if start + length >= size:
                break  # truncated by a kill
            self._note(key, start, length, checksum)
            end = self._file.seek(start + length + 1)
        self._file.truncate(end)
        return True

    def _note(self, key: str, start: int, length: int, checksum: str) -> None:
        self._newest[key] = len(self._places)
        self._places.append((key, start, length, checksum))

    def _damaged(self, index: int) -> UserError:
        return UserError(f"{self.path}: record {index + 1}: damaged or edited; start over with --force")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._newest

    def __getitem__(self, key: str) -> bytes:
        """Return the newest record of a key."""
        return self._read(self._newest[key])

    def items(self) -> Iterator[tuple[str, bytes]]:
        """Yield the key and the bytes of each record."""
        for index in range(len(self._places)):
            yield self._places[index][0], self._read(index)

    def values(self) -> Iterator[Any]:
        """Yield the records, parsed as JSON."""
        for _, record in self.items():
            yield orjson.loads(record)

    def _read(self, index: int) -> bytes:
        key, start, length, checksum = self._places[index]
        self._file.seek(start)
        record = self._file.read(length)
        if _checksum(key, record) != checksum:
            raise self._damaged(index)
        return record

    def missing(self, items: Sequence[T], key: Callable[[T], str]) -> Iterator[T]:
        """Yield the items without a record; items with equal keys need one each. Raise UserError for extra records."""
        left = Counter(known for known, *_ in self._places)
        if strange := left - Counter(map(key, items)):
            where = next(iter(strange))
            raise UserError(f"{self.path}: has a record that is not in the input: {where}; start over with --force")
        for item in items:
            if left[key(item)]:
                left[key(item)] -= 1
            else:
                yield item

    def add(self, key: str, record: bytes | Mapping[str, Any]) -> None:
        """Append a record: bytes, or an object as JSON."""
        record = record if isinstance(record, bytes) else orjson.dumps(record)
        checksum = _checksum(key, record)
        head = orjson.dumps([key, len(record), checksum]) + b"\n"
        start = self._file.seek(0, os.SEEK_END) + len(head)
        self._write(head + record + b"\n")
        self._note(key, start, len(record), checksum)

    def _write(self, content: bytes) -> None:
        with errors_name(self.path or "memory", self.path or "memory"):
            self._file.write(content)
            self._file.flush()

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """If the work fails, add to the error how to resume; delete a file without records."""
        try:
            yield
        except BaseException as error:
            if not self:
                self.remove()
            advice = f"the same command with --resume continues ({self.path})"
            is_said = (
                self.path is None or not self or any(word in str(error) for word in ("--resume continues", "--force"))
            )
            if isinstance(error, KeyboardInterrupt) and not is_said:
                raise Interrupted(f"interrupted; {advice}") from None
            if isinstance(error, UserError) and not is_said:
                raise UserError(f"{error}; {advice}") from error
            raise

    def remove(self) -> None:
        """Delete the file: the work is done."""
        with suppress(OSError):  # a full disk, which was already reported
            self._file.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self._places.clear()
        self._newest.clear()


def _checksum(key: str, record: bytes) -> str:
    digest = hashlib.blake2b(key.encode() + b"\n", digest_size=8)
    digest.update(record)
    return digest.hexdigest()


# ---- what identifies a run


def check_identity(path: str | Path, noted: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError naming the first value, possibly nested, in which the identity of a resumed run has changed."""
    now = orjson.loads(orjson.dumps(now))  # tuples become lists, as in what was noted
    waiting = [(name, noted.get(name), new) for name, new in now.items()]
    for name, former, new in waiting:
        if isinstance(former, dict) and isinstance(new, dict):
            waiting += [(f"{name}.{key}", former.get(key), new.get(key)) for key in {**new, **former}]
        elif former != new:
            former, new = ("none" if value is None else str(value)[:200] for value in (former, new))
            raise UserError(
                f"{path}: another run: {name} was {former} and is now {new}; "
                "resume with the same options and inputs, or start over with --force"
            )


def fingerprint(folder: Path) -> str:
    """Identify a model by a hash of its configuration, its tokenizer and the last megabyte of each weights file."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "tokenizer.json") or path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as handle:
                handle.seek(max(0, path.stat().st_size - WEIGHTS_READ))
                digest.update(handle.read())
    return digest.hexdigest()[:16]


# ---- notes that users are not meant to edit


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of its values, for `read_sealed`."""
    write_json(path, {**values, "seal": _seal(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the values that `write_sealed` wrote. Raise UserError if the checksum differs."""
    values = read_object(path)
    if values.pop("seal", None) != _seal(values):
        raise UserError(f"{path}: damaged or edited: its checksum does not match")
    return values


def _seal(values: Mapping[str, Any]) -> str:
    content = orjson.dumps(dict(values), option=orjson.OPT_SORT_KEYS | JSON_LINE)
    return hashlib.sha256(content).hexdigest()[:32]
