"""Read files from elsewhere behind checks of kind and size, and of the types and sizes of their values.

A folder that somebody else made may hold anything. A fault raises UserError, with the file, the expected and the found,
before memory or time is spent on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.errors import UserError

LARGEST_TOKENIZER = 192 << 20  # bytes; Gemma's tokenizer.json has 33 MB
LARGEST_SIZE = 2**31 - 1
LARGEST_VOCABULARY = 2**22  # ids of a tokenizer: the largest known has 1.0 million
MOST_STEPS, LARGEST_TEXT, LARGEST_GROWTH = 1000, 20_000, 1000


def check_no_adapter(folder: str | os.PathLike[str]) -> None:
    """Raise UserError for the folder of an adapter, where a whole model is wanted."""
    adapter = Path(folder)
    if not (adapter / "adapter_config.json").is_file() or (adapter / "config.json").is_file():
        return
    merged = adapter.absolute().parent
    if (merged / "config.json").is_file():
        way = f"give {os.path.relpath(merged)}, into which it is merged; llmkit export --format adapter copies it alone"
    else:
        way = (
            "give the folder of llmkit sft --lora-rank R --keep-adapter, into which it is merged, or merge it by "
            "peft's merge_and_unload and save_pretrained"
        )
    raise UserError(f"{folder}: expected a whole model, found an adapter without its base; {way}")


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


# ---- a tokenizer.json


def check_tokenizer(spec: Any, where: str) -> None:
    """Raise UserError for a parsed tokenizer.json with ids, steps or texts at which the library ends the process."""
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{where}: not a tokenizer.json that tokenizers can read: it has no model")
    vocabulary = spec["model"].get("vocab")
    if isinstance(vocabulary, dict):
        odd = next(
            (item for item in vocabulary.values() if type(item) is not int or not 0 <= item < LARGEST_VOCABULARY), None
        )
        if odd is not None:
            raise UserError(f"{where}: expected ids from 0 to {LARGEST_VOCABULARY - 1} in vocab, found {shown(odd)}")
    elif not isinstance(vocabulary, list) or len(vocabulary) > LARGEST_VOCABULARY:
        raise UserError(f"{where}: not a tokenizer.json that tokenizers can read: its vocab is {shown(vocabulary)}")
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError(f"{where}: expected a list of objects for added_tokens, found {shown(added)}")
    for token in added:
        if (
            not isinstance(token.get("content"), str)
            or integer(token, "id", where, None, 0, LARGEST_VOCABULARY) is None
        ):
            raise UserError(f"{where}: expected a text and an id of each added token, found {shown(token)}")
        if not isinstance(token.get("special"), bool):
            raise UserError(f"{where}: expected true or false for special of {shown(token['content'])}")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if not isinstance(spec.get(name), dict | None):
            raise UserError(f"{where}: expected an object or null for {name}, found {shown(spec[name])}")
        _check_steps(spec.get(name), f"{where}: {name}")


def _check_steps(step: Any, where: str) -> None:
    """Raise UserError for too many steps, one within the other or in a row, and for texts that multiply."""
    waiting, count, growth = [step], 0, 1
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
            count += 1
        if isinstance(node, dict):
            for key in ("content", "prepend"):  # what Replace and Prepend put in a text, for each place of it
                growth *= max(1, len(node[key])) if isinstance(node.get(key), str) else 1
            texts = [value for key, value in node.items() if isinstance(value, str) and key != "precompiled_charsmap"]
            if max(map(len, texts), default=0) > LARGEST_TEXT:
                raise UserError(f"{where}: expected texts of at most {LARGEST_TEXT} characters")
        if count > MOST_STEPS or growth > LARGEST_GROWTH:
            raise UserError(
                f"{where}: expected at most {MOST_STEPS} steps, whose replacements make a text at most "
                f"{LARGEST_GROWTH} times as long"
            )


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
