"""What comes from elsewhere, read behind checks: the kind of a file, its size, the types and sizes of its values.

A folder that somebody else made may hold anything. What is wrong with it is a UserError that names the file, what was
expected and what was found, before memory or time is spent on it.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.files import parse_json

LARGEST_CONFIG, LARGEST_TOKENIZER = 16 << 20, 192 << 20  # bytes; Gemma's tokenizer.json has 33 MB
LARGEST_SIZE = 2**31 - 1
DEEPEST = 200  # levels of a JSON value: orjson writes 254
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: str | os.PathLike[str], largest: int | None = None) -> None:
    """Raise UserError where a file is a folder, a pipe, a Git LFS pointer or too large, OSError where there is none."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise UserError(f"{path}: expected a file, found {kind}; replace it by the file itself")
    if largest is not None and found.st_size > largest:
        raise UserError(f"{path}: expected at most {largest >> 20} MB, found {found.st_size >> 20} MB")
    with open(path, "rb") as handle:
        if handle.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{path}: a Git LFS pointer, which stands for a file that was not downloaded; "
                "run git lfs pull in its folder"
            )


def read_file(path: Path, largest: int = LARGEST_CONFIG) -> bytes:
    """The content of a file of at most so many bytes. Raises UserError as `check_file` does."""
    check_file(path, largest)
    return path.read_bytes()


def read_object(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The JSON object that is a file's content, as `files.read_json` does, of a file that may be anything."""
    value = parse_json(path, read_file(path, largest))
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for many in inner for one in many if isinstance(one, dict | list)]
        if not level:
            return value
    raise UserError(f"{path}: expected at most {DEEPEST} levels of lists and objects, found more")


# ---- values


def integer(
    values: Mapping[str, Any],
    name: str,
    where: str,
    default: Any = None,
    at_least: int = 1,
    at_most: int = LARGEST_SIZE,
) -> Any:
    """An integer field within bounds; null and a missing one are `default`. Raises UserError."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise UserError(f"{where}: expected an integer from {at_least} to {at_most} for {name}, found {shown(value)}")
    return value


def number(values: Mapping[str, Any], name: str, where: str, default: Any = None, above: float = 0.0) -> Any:
    """A finite number above `above`; null and a missing one are `default`. Raises UserError."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e30:
        raise UserError(f"{where}: expected a number above {above:g} for {name}, found {shown(value)}")
    return float(value)


def switch(values: Mapping[str, Any], name: str, where: str) -> bool:
    """A field that is true or false; null and a missing one are false. Raises UserError."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: expected true or false for {name}, found {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and no longer than that."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value) if not isinstance(value, list | dict | tuple) or len(value) < 8 else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:56]}..."


# ---- libraries


@contextmanager
def no_panic(where: object, what: str) -> Iterator[None]:
    """Make a panic of a library in Rust, which is no Exception and passes every handler, a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{where}: {what}: {reason}") from None
