"""`--data FILE[:WEIGHT]`: files of conversations read, and their shares of a mixture."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import TypeVar

from llmkit.data.examples import Encoded, Examples
from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, Message, message
from llmkit.io.records import OUTSIDE, BadRecords
from llmkit.io.remote import is_remote, open_remote

T = TypeVar("T")
E = TypeVar("E")
READ_AT_ONCE = 2048  # conversations: enough for the tokenizer's threads, little memory


@dataclass(frozen=True)
class DataFile:
    """A file of records, `-` for stdin, and its share; None shares by size."""

    path: str
    weight: float | None = None


def parse_data(wanted: Sequence[str]) -> list[DataFile]:
    """The files of `--data a.jsonl:0.8 --data b.jsonl:0.2`; none at all is stdin.

    Raises UserError for a file that is not there, a weight that is not above 0, and weights on some files only.
    """
    files = []
    for text in wanted or ("-",):
        path, separator, weight = text.rpartition(":")
        if not separator or os.path.exists(text):
            files.append(DataFile(text))
            continue
        try:
            value = float(weight)
        except ValueError:
            if os.path.exists(path):
                raise UserError(f"--data {text}: expected FILE:WEIGHT with a number, found {weight!r}") from None
            files.append(DataFile(text))
            continue
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--data {text}: expected a weight above 0, found {weight}")
        files.append(DataFile(path, value))
    for file in files:
        if is_remote(file.path):
            open_remote(file.path).close()
            continue
        if os.path.isdir(file.path):
            raise UserError(f"--data {file.path}: expected a file, found a folder")
        if file.path != "-" and not os.path.exists(file.path):
            raise UserError(f"--data {file.path}: expected a file, found no such file")
    if len({file.weight is None for file in files}) > 1:
        raise UserError("--data: expected a weight on every file or on none, found both")
    return files


def read_examples(
    name: str,
    conversations: Iterator[Conversation],
    encode: Callable[[list[Conversation]], Sequence[Encoded]],
    longest: int,
    on_long: str,
    *,
    bad: BadRecords,
    unknown: int | None = None,
    system: str | None = None,
    observe: Callable[[list[str]], object] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[Examples, str]:
    """The examples of one source, and a digest of what they are made of.

    `system` is put in front of conversations that have no system message of their own. Rejected ones are left out, and
    what `encode` refuses is a bad record; the token `unknown` is no target. `observe` receives the texts.
    """
    digest, counts = sha256(), Counter()

    def encoded() -> Iterator[tuple[str, Encoded]]:
        while chunk := list(islice(conversations, READ_AT_ONCE)):
            chosen = [_with_system(conversation, system) for conversation in chunk if not conversation.rejected]
            if rejected := len(chunk) - len(chosen):
                counts.update({"read": rejected, "rejected by its label": rejected})
            if observe is not None:
                observe([conversation.said for conversation in chosen])
            for conversation, example in encode_good(chosen, encode, name, bad):
                if unknown is not None and (outside := example.token_ids == unknown).any():
                    bad.count_unused(name, (OUTSIDE,))
                    example.trained[outside] = False  # nothing is gained by learning to say <unk>
                digest.update(example.token_ids.tobytes())
                digest.update(example.trained.tobytes())
                yield conversation.where, example
            progress(len(chunk))
        bad.report(name)

    return Examples.gather(name, encoded(), longest, on_long, counts), digest.hexdigest()


def encode_good(
    items: list[T], encode: Callable[[list[T]], Sequence[E]], name: str, bad: BadRecords
) -> Iterator[tuple[T, E]]:
    """Records of a file with what `encode` makes of them: of all at once, or, where it refuses one, of each."""
    try:
        pairs = list(zip(items, encode(items), strict=True))
    except UserError:
        pairs = []
        for item in items:
            try:
                pairs.append((item, encode([item])[0]))
            except UserError as error:
                bad.skip(error, name, was_good=True)
    yield from pairs


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    messages: tuple[Message, ...] = conversation.messages
    if system is None or conversation.document is not None or messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(message("system", system), *messages))
