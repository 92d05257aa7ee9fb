"""Checks of files that other people made: the types, sizes and ranges of their values.

Files of unknown origin may contain anything. A bad value raises UserError with the file, the expected and the found
value, before memory or time is spent on it.
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
    """Raise UserError if the folder contains an adapter instead of a complete model."""
    adapter = Path(folder)
    if not (adapter / "adapter_config.json").is_file() or (adapter / "config.json").is_file():
        return
    merged = adapter.absolute().parent
    if (merged / "config.json").is_file():
        way = f"use the merged model, {os.path.relpath(merged)}; llmkit export --format adapter copies the adapter"
    else:
        way = (
            "use the merged model that llmkit sft --lora-rank R --keep-adapter writes, or merge it with peft's "
            "merge_and_unload and save_pretrained"
        )
    raise UserError(f"{folder}: expected a complete model, found an adapter without its base; {way}")


# ---- values


def integer(
    values: Mapping[str, Any],
    name: str,
    where: str,
    default: Any = None,
    at_least: int = 1,
    at_most: int = LARGEST_SIZE,
) -> Any:
    """Return an integer field within bounds, or `default` if it is null or missing. Raise UserError."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise UserError(f"{where}: expected an integer from {at_least} to {at_most} for {name}, found {shown(value)}")
    return value


def number(values: Mapping[str, Any], name: str, where: str, default: Any = None, above: float = 0.0) -> Any:
    """Return a finite number above `above`, or `default` if it is null or missing. Raise UserError."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e30:
        raise UserError(f"{where}: expected a number above {above:g} for {name}, found {shown(value)}")
    return float(value)


def switch(values: Mapping[str, Any], name: str, where: str) -> bool:
    """Return a boolean field, or False if it is null or missing. Raise UserError."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: expected true or false for {name}, found {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """Format a value for a message: on one line, of at most 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value) if not isinstance(value, list | dict | tuple) or len(value) < 8 else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:56]}..."


# ---- a tokenizer.json


def check_tokenizer(spec: Any, where: str) -> None:
    """Raise UserError for a parsed tokenizer.json whose ids, steps or texts would make the library abort."""
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{where}: not a tokenizer.json that tokenizers can read: it has no 'model'")
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
            raise UserError(f"{where}: expected text and id of each added token, found {shown(token)}")
        if not isinstance(token.get("special"), bool):
            raise UserError(f"{where}: expected true or false for special of {shown(token['content'])}")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if not isinstance(spec.get(name), dict | None):
            raise UserError(f"{where}: expected an object or null for {name}, found {shown(spec[name])}")
        _check_steps(spec.get(name), f"{where}: {name}")


def _check_steps(step: Any, where: str) -> None:
    """Raise UserError for too many nested or consecutive steps, and for replacements that multiply a text."""
    waiting, count, growth = [step], 0, 1
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
            count += 1
        if isinstance(node, dict):
            for key in ("content", "prepend"):  # text that Replace and Prepend insert at each match
                growth *= max(1, len(node[key])) if isinstance(node.get(key), str) else 1
            texts = [value for key, value in node.items() if isinstance(value, str) and key != "precompiled_charsmap"]
            if max(map(len, texts), default=0) > LARGEST_TEXT:
                raise UserError(f"{where}: expected texts of at most {LARGEST_TEXT} characters")
        if count > MOST_STEPS or growth > LARGEST_GROWTH:
            raise UserError(
                f"{where}: expected at most {MOST_STEPS} steps, and replacements that make a text at most "
                f"{LARGEST_GROWTH} times as long"
            )


# ---- libraries


@contextmanager
def no_panic(where: object, what: str) -> Iterator[None]:
    """Turn the panic of a Rust library, which does not derive from Exception, into a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{where}: {what}: {reason}") from None
