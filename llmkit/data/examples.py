"""Encoded conversations of one source, in memory, each short enough for a training row.

They take 5 bytes per token: a million conversations of 300 tokens take 1.5 GB. A conversation longer than a row is
truncated at the end of a turn, dropped, split before a question, or an error; a document is split without loss.
Examples without a trained token are dropped. Everything is counted.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation
from llmkit.io.jsonl import input_files
from llmkit.io.progress import Progress, counted, quantity, say
from llmkit.io.records import OUTSIDE, BadRecords
from llmkit.tokenizer.chat import Encoded

CUT = "cut within a turn"  # key in counts: answers that alone exceed a row
T = TypeVar("T", bound=Any)  # a record with the attribute `where`
E = TypeVar("E")
READ_AT_ONCE = 2048  # conversations per batch: enough for the tokenizer's threads, little memory


@dataclass
class Examples:
    """The examples of one source.

    name      the source, for reports
    lengths   (N,) int64, in tokens
    counts    number of conversations by treatment: "truncated", "split", "nothing trained" ...
    """

    name: str
    lengths: np.ndarray
    counts: Counter[str]
    _token_ids: np.ndarray
    _trained: np.ndarray
    _ends: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and the mask of trained tokens."""
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        return self._token_ids[span], self._trained[span]

    @property
    def sizes(self) -> np.ndarray:
        """Tokens that each takes of a row, (N,) int64: all except the last, which is only a target."""
        return self.lengths - 1

    @property
    def inputs(self) -> int:
        """Input tokens of all examples."""
        return int(self.sizes.sum())

    @property
    def targets(self) -> int:
        """Trained tokens, without the first of each example, which nothing predicts."""
        return int(self._trained.sum() - self._trained[self._ends - self.lengths].sum())

    @classmethod
    def gather(
        cls,
        name: str,
        encoded: Iterable[tuple[str, Encoded]],
        longest: int,
        on_long: str = "truncate",
        counts: Counter[str] | None = None,
    ) -> Examples:
        """Collect (place, conversation) pairs as examples of at most `longest` tokens.

        `counts` is updated if given, so that the caller may count what it drops before. Raise UserError for a
        conversation that is too long under "error", and if there is nothing to train on.
        """
        counts, ids, trained = Counter() if counts is None else counts, [], []
        for where, example in encoded:
            counts["read"] += 1
            places = _places(example, longest, on_long, where, counts)
            # the first token of an example is never a target
            taught = [positions for positions in places if example.trained[positions[1:]].any()]
            if places and not taught:
                counts["nothing trained"] += 1
            ids += [example.token_ids[positions] for positions in taught]
            trained += [example.trained[positions] for positions in taught]
        if not ids:
            read = counted(counts["read"], "conversation")
            reasons = ", ".join(f"{key} {count}" for key, count in counts.items() if key != "read")
            raise UserError(f"{name}: nothing to train on in {read} ({reasons or 'it is empty'})")
        lengths = np.array([len(part) for part in ids], np.int64)
        return cls(name, lengths, counts, np.concatenate(ids), np.concatenate(trained), np.cumsum(lengths))


def _places(example: Encoded, longest: int, on_long: str, where: str, counts: Counter[str]) -> list[np.ndarray]:
    """Return the token positions of each example that is made from a conversation."""
    length = len(example.token_ids)
    if length <= longest:
        return [np.arange(length)]
    if on_long == "error":
        raise UserError(
            f"{where}: {length - 1} tokens are more than the {longest - 1} of a row; "
            "shorten it, or choose --on-long truncate, drop or split"
        )
    if on_long == "drop":
        counts["dropped: too long"] += 1
        return []
    # a document is split without loss
    if not example.questions and len(example.turn_ends) == 1 and example.trained[1:].all():
        counts["documents split"] += 1  # pieces overlap by a token, because the first of an example is never a target
        return [np.arange(begin, min(begin + longest, length)) for begin in range(0, length - 1, longest - 1)]
    if on_long == "split" and (pieces := _pieces(example, longest)) is not None:
        counts["split"] += 1
        if any(len(piece) > longest for piece in pieces):  # a single answer is too long
            counts[CUT] += 1
        return [piece[:longest] for piece in pieces]
    end = max((end for end in example.turn_ends if end <= longest), default=0)
    if not example.trained[1:end].any():  # the first answer is too long
        counts[CUT] += 1
        return [np.arange(longest)]
    counts["truncated"] += 1
    return [np.arange(end)]


def _pieces(example: Encoded, longest: int) -> list[np.ndarray] | None:
    """Return the token positions of a conversation's pieces, each the system message and whole exchanges; None if
    there is only one."""
    ends = [*(question for question in example.questions if question > example.preamble), len(example.token_ids)]
    pieces, begin = [], example.preamble
    for end, following in zip(ends, [*ends[1:], math.inf], strict=True):
        if example.preamble + following - begin > longest:
            pieces.append(np.concatenate([np.arange(example.preamble), np.arange(begin, end)]))
            begin = end
    return pieces if len(pieces) > 1 else None


@dataclass(frozen=True)
class DataFile:
    """A source of records: a file, pattern, folder or `-` for stdin, and its weight; None weights by size."""

    path: str
    weight: float | None = None

    @cached_property
    def files(self) -> list[str]:
        """The files of the source, sorted. Raise UserError as `input_files` does."""
        return input_files([self.path])


def parse_data(wanted: Sequence[str]) -> list[DataFile]:
    """Parse `--data a.jsonl:0.8 --data 'b/*.parquet:0.2'`; the default is stdin.

    Raise UserError for a missing file, a weight that is not above 0, and weights on only some files.
    """
    files = parse_weights(wanted or ("-",), "--data")
    for file in files:
        _ = file.files
    return files


def parse_weights(wanted: Sequence[str], flag: str, *, zero: bool = False) -> list[DataFile]:
    """Parse FILE:WEIGHT values of `flag` without opening the files; with `zero`, a weight may be 0.

    Raise UserError for other weights that are not above 0, and for weights on only some files.
    """
    files = []
    for text in wanted:
        path, separator, weight = text.rpartition(":")
        if not separator or os.path.exists(text):
            files.append(DataFile(text))
            continue
        try:
            value = float(weight)
        except ValueError:
            if os.path.exists(path):
                raise UserError(f"{flag} {text}: expected FILE:WEIGHT with a number, found {weight!r}") from None
            files.append(DataFile(text))
            continue
        if not (value > 0 or (zero and value == 0)) or math.isinf(value):
            raise UserError(f"{flag} {text}: expected a weight {'of at least' if zero else 'above'} 0, found {weight}")
        files.append(DataFile(path, value))
    if len({file.weight is None for file in files}) > 1:
        raise UserError(f"{flag}: expected weights on all files or on none, found both")
    return files


def read_examples(
    name: str,
    conversations: Iterator[Conversation],
    *,
    encode: Callable[[list[Conversation]], Sequence[Encoded]],
    longest: int,
    on_long: str,
    bad: BadRecords,
    advice: str,
    unknown: int | None = None,
    observe: Callable[[list[str]], object] | None = None,
    contaminated: Callable[[Conversation], bool] | None = None,
    quiet: bool = False,
) -> tuple[Examples, str]:
    """Read the examples of one source; return them and a digest of their tokens.

    Rejected and contaminated conversations are dropped, those that `encode` refuses are bad records, and the token
    `unknown` is not trained. `observe` receives the texts; `advice` is printed if answers are cut.
    """
    digest, counts = sha256(), Counter()

    def encoded() -> Iterator[tuple[str, Encoded]]:
        while chunk := list(islice(conversations, READ_AT_ONCE)):
            chosen = [conversation for conversation in chunk if not conversation.rejected]
            if rejected := len(chunk) - len(chosen):
                counts.update({"read": rejected, "rejected by its label": rejected})
            if contaminated is not None:
                read, chosen = len(chosen), [conversation for conversation in chosen if not contaminated(conversation)]
                if dropped := read - len(chosen):
                    counts.update({"read": dropped, "contaminated": dropped})
            if observe is not None:
                observe([conversation.said for conversation in chosen])
            for conversation, example in encode_good(chosen, encode, bad):
                if unknown is not None and (outside := example.token_ids == unknown).any():
                    bad.count_unused(conversation.where, (OUTSIDE,))
                    example.trained[outside] = False  # a model should not learn to write <unk>
                digest.update(example.token_ids.tobytes())
                digest.update(example.trained.tobytes())
                yield conversation.where, example
            progress.advance(len(chunk))
        bad.report_all()

    with Progress(f"read {name}", unit="conversations", quiet=quiet) as progress:
        examples = Examples.gather(name, encoded(), longest, on_long, counts)
    others = "".join(f", {key} {count}" for key, count in counts.items() if key not in ("read", CUT))
    say(
        f"{name}: {counted(counts['read'], 'conversation')}{others}; {counted(len(examples), 'example')}, "
        f"{quantity(examples.inputs)} tokens, {quantity(examples.targets)} of them trained on",
        quiet,
    )
    if cut := counts[CUT]:
        say(f"{name}: {counted(cut, 'answer')} cut at the context of {counted(longest - 1, 'token')}; {advice}", quiet)
    return examples, digest.hexdigest()


def encode_good(items: list[T], encode: Callable[[list[T]], Sequence[E]], bad: BadRecords) -> Iterator[tuple[T, E]]:
    """Yield records with their encodings, encoded together, or one by one if `encode` refuses any of them."""
    try:
        pairs = list(zip(items, encode(items), strict=True))
    except UserError:
        pairs = []
        for item in items:
            try:
                pairs.append((item, encode([item])[0]))
            except UserError as error:
                bad.skip(error, item.where, was_good=True)
    yield from pairs
