"""Encoded comparisons of one source, and rows of them: a prompt, then all of its answers.

    token ids     prompt p p p | answer a a a | answer b b | next prompt ...
    branch ids           0 0 0          1 1 1          2 2          0
    positions            0 1 2          3 4 5          3 4          0

A score is read at the last token of each answer. Only the ends of rows are padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

import numpy as np

from llmkit.data.batches import best_fit, shuffled
from llmkit.data.examples import encode_good
from llmkit.errors import UserError, naming
from llmkit.formats.preferences import Comparison, read_comparison
from llmkit.io.jsonl import read_jsonl
from llmkit.io.progress import Progress, counted, quantity, say
from llmkit.io.records import OUTSIDE, BadRecords, Row
from llmkit.tokenizer.chat import ChatFormat

READ_AT_ONCE = 1024  # comparisons: enough to keep the tokenizer's threads busy, little memory
NO_RANK = np.inf  # padding of comparisons with fewer answers than others


@dataclass(frozen=True)
class Candidates:
    """A prompt and its answers as int32 ids; `ranks` of the answers, lower is better; `number` in the source.

    trained     bool, of the prompt and of each answer: tokens whose log-probability is in a policy's loss
    references  log-probability of each answer's trained tokens under the policy's reference, if known
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0
    number: int = 0
    trained: tuple[np.ndarray, ...] = ()
    references: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Number of tokens in a row."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def longest(self) -> int:
        """Number of tokens of the longest answer with its prompt."""
        return len(self.prompt) + max(map(len, self.answers))

    def spans(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield runs (first, last) of answers that fit into `tokens` with the prompt, or are a single answer."""
        first, size = 0, len(self.prompt)
        for number, answer in enumerate(self.answers):
            if number > first and size + len(answer) > tokens:
                yield first, number
                first, size = number, len(self.prompt)
            size += len(answer)
        yield first, len(self.answers)


@dataclass
class Comparisons:
    """The comparisons of one source whose answers all fit the context; `counts` of all records by outcome."""

    name: str
    candidates: list[Candidates] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, index: int) -> Candidates:
        return self.candidates[index]

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens of each comparison, (N,) int64."""
        return np.array([candidates.size for candidates in self.candidates], np.int64)

    @property
    def inputs(self) -> int:
        """Number of tokens of all comparisons."""
        return int(self.sizes.sum())

    @property
    def reasons(self) -> str:
        """Counts of the comparisons that were changed or left out, for messages."""
        return ", ".join(f"{key} {count}" for key, count in self.counts.items() if key != "read")

    def split(self, fraction: float, seed: int) -> tuple[Comparisons, Comparisons]:
        """Split into training and held-out comparisons, the latter of about a `fraction` of the prompts.

        Raises UserError if all comparisons have the same prompt.
        """
        prompts = {candidates.prompt.tobytes(): number for number, candidates in enumerate(self.candidates)}
        if len(prompts) < 2:
            raise UserError(f"{self.name}: comparisons of one prompt cannot be split; give held-out ones with --val")
        drawn = shuffled(len(prompts), seed, 0)[: min(max(1, round(fraction * len(prompts))), len(prompts) - 1)]
        names = list(prompts)
        chosen = {names[index] for index in drawn}
        halves: tuple[list[Candidates], list[Candidates]] = [], []
        for candidates in self.candidates:
            halves[candidates.prompt.tobytes() in chosen].append(candidates)
        return Comparisons(self.name, halves[0], self.counts), Comparisons(self.name, halves[1])


class ComparisonRows(NamedTuple):
    """Rows of packed comparisons: B rows of T tokens, M comparisons in a row, K answers in a comparison.

    token_ids, doc_ids, branch_ids, position_ids  int64 (B, T)
    predictors  int64 (B, T): position that predicts each trained token; -1 for other tokens
    ends        int64 (B, M, K): position of each answer's last token; 0 for padding
    ranks       float32 (B, M, K): NO_RANK for padding
    references  float32 (B, M, K): log-probabilities of the answers under a policy's reference
    margins     float32 (B, M)
    numbers     int64 (B, M): of the comparisons in their source; -1 for padding
    shares      float32 (B,): comparisons of the whole batch over the trained tokens of its prompts and best answers
    """

    token_ids: np.ndarray
    doc_ids: np.ndarray
    branch_ids: np.ndarray
    position_ids: np.ndarray
    predictors: np.ndarray
    ends: np.ndarray
    ranks: np.ndarray
    references: np.ndarray
    margins: np.ndarray
    numbers: np.ndarray
    shares: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens of each row without padding, (B,)."""
        counts = (self.numbers >= 0).sum(1, keepdims=True)
        return (self.doc_ids < counts).sum(1)

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.sizes.sum())

    def nothing(self) -> ComparisonRows:
        """Return one row without comparisons, for a rank that has run out of rows before the others."""
        row = ComparisonRows(*(array[:1] for array in self))
        return row._replace(numbers=np.full_like(row.numbers, -1), predictors=np.full_like(row.predictors, -1))

    def by_size(self) -> Iterator[ComparisonRows]:
        """Yield groups of rows of similar length, longest first, without their common padding.

        Attention is quadratic in the row length, so one row of 4,000 tokens costs as much as 61 of 512.
        """
        sizes = self.sizes
        order = np.argsort(-sizes, kind="stable")
        first = 0
        for stop in range(1, len(order) + 1):
            if stop == len(order) or 2 * sizes[order[stop]] < sizes[order[first]]:
                rows, length = order[first:stop], max(1, int(sizes[order[first]]))
                tokens = (array[rows, :length] for array in self[:5])
                yield ComparisonRows(*tokens, *(array[rows] for array in self[5:]))
                first = stop


def encode_comparisons(comparisons: Sequence[Comparison], chat: ChatFormat) -> list[Candidates]:
    """Encode prompts and answers."""
    with naming(comparisons[0].where if len(comparisons) == 1 else ""):
        encoded = chat.encode_branches([(comparison.prompt, comparison.candidates) for comparison in comparisons])
    candidates = []
    for comparison, (prompt, answers) in zip(comparisons, encoded, strict=True):
        ids, trained = tuple(ids for ids, _ in answers), (np.zeros(len(prompt), bool), *(mask for _, mask in answers))
        candidates.append(Candidates(prompt, ids, comparison.ranks, comparison.margin, trained=trained))
    return candidates


def read_comparisons(
    name: str,
    paths: Sequence[str],
    chat: ChatFormat,
    context: int,
    bad: BadRecords,
    *,
    on_long: str,
    limit: int | None = None,
    columns: Mapping[str, str] = {},
    quiet: bool = False,
    observe: Callable[[list[str]], object] | None = None,
    read: Callable[[Row], Comparison | str] = read_comparison,
) -> tuple[Comparisons, str]:
    """Read the comparisons of a source, each with `read`, and return them with a digest of their content.

    If an answer with its prompt exceeds the context, the beginning of the prompt is cut if that suffices ("truncate"),
    else the comparison is left out; a record that `chat` refuses is bad. `observe` receives the texts. Raises UserError
    if one is too long with "error", and if nothing is left.
    """
    source, digest = Comparisons(name), sha256()
    comparisons = read_jsonl(paths, limit, read, bad, columns)
    with Progress(f"read {source.name}", unit="comparisons", quiet=quiet) as progress:
        while chunk := list(islice(comparisons, READ_AT_ONCE)):
            source.counts["read"] += len(chunk)
            source.counts.update(f"skipped: {item}" for item in chunk if isinstance(item, str))
            usable = [item for item in chunk if not isinstance(item, str)]
            if observe is not None:
                observe([item.said for item in usable])
            encoded = encode_good(usable, lambda some: encode_comparisons(some, chat), bad)
            for comparison, candidates in encoded:
                texts = (candidates.prompt, *candidates.answers)
                if chat.unk_id is not None and any((ids == chat.unk_id).any() for ids in texts):
                    bad.count_unused(comparison.where, (OUTSIDE,))
                fitting = fitted(candidates, context, on_long, comparison.where, source.counts)
                if fitting is None:
                    continue
                for ids in (fitting.prompt, *fitting.answers):
                    digest.update(ids.tobytes())
                digest.update(repr((fitting.ranks, fitting.margin)).encode())
                source.candidates.append(replace(fitting, number=len(source.candidates)))
            progress.advance(len(chunk))
    bad.report_all()
    records = counted(source.counts["read"], "record")
    room = f"; answers must fit the context of {context} tokens" if source.counts["dropped: too long"] else ""
    if not source.candidates:
        raise UserError(f"{source.name}: nothing to learn from in {records} ({source.reasons or 'it is empty'}){room}")
    others = f", {source.reasons}" if source.reasons else ""
    tokens = quantity(source.inputs)
    say(f"{source.name}: {records}{others}; {counted(len(source), 'comparison')}, {tokens} tokens{room}", quiet)
    return source, digest.hexdigest()


def fitted(candidates: Candidates, context: int, on_long: str, where: str, counts: Counter[str]) -> Candidates | None:
    """Return the comparison, with its prompt cut if needed to fit every answer; None if that is not possible.

    Raises UserError with "error" if it does not fit.
    """
    excess = candidates.longest - context
    if excess <= 0:
        return candidates
    if on_long == "error":
        raise UserError(
            f"{where}: {candidates.longest} tokens are more than the context of {context}; "
            f"shorten it, or choose --on-long {'truncate or ' if excess < len(candidates.prompt) else ''}drop"
        )
    if on_long == "drop" or excess >= len(candidates.prompt):
        counts["dropped: too long"] += 1
        return None
    counts["prompt cut at its beginning"] += 1
    trained = tuple(mask[excess * (number == 0) :] for number, mask in enumerate(candidates.trained))
    return replace(candidates, prompt=candidates.prompt[excess:], trained=trained)


def packed_comparisons(rows: Sequence[Sequence[Candidates]], length: int, pad: int) -> ComparisonRows:
    """Pack comparisons into rows of `length` tokens, or longer if one needs it."""
    length = max([length, *(sum(candidates.size for candidates in row) for row in rows)])
    most = max(1, max(map(len, rows)))
    widest = max((len(candidates.answers) for row in rows for candidates in row), default=1)
    shape = len(rows), length
    token_ids, predictors = np.full(shape, pad, np.int64), np.full(shape, -1, np.int64)
    doc_ids, branch_ids, position_ids = (np.zeros(shape, np.int64) for _ in range(3))
    ends = np.zeros((len(rows), most, widest), np.int64)
    ranks, references = np.full(ends.shape, NO_RANK, np.float32), np.zeros(ends.shape, np.float32)
    margins, numbers = np.zeros(ends.shape[:2], np.float32), np.full(ends.shape[:2], -1, np.int64)
    best_tokens = 0
    for row, comparisons in enumerate(rows):
        at = 0
        for index, candidates in enumerate(comparisons):
            start, before, best = len(candidates.prompt), at + len(candidates.prompt) - 1, min(candidates.ranks)
            for branch, part in enumerate((candidates.prompt, *candidates.answers)):
                span = slice(at, at + len(part))
                token_ids[row, span], doc_ids[row, span], branch_ids[row, span] = part, index, branch
                first = start if branch else 0
                position_ids[row, span] = np.arange(first, first + len(part))
                if candidates.trained:
                    sources = np.arange(at - 1, at + len(part) - 1)
                    sources[:1] = before if branch and start else -1  # nothing predicts a first token
                    learnt = candidates.trained[branch] & (sources >= 0)
                    predictors[row, span] = np.where(learnt, sources, -1)
                    best_tokens += int(learnt.sum()) * (not branch or candidates.ranks[branch - 1] == best)
                at += len(part)
                if branch:
                    ends[row, index, branch - 1] = at - 1
            ranks[row, index, : len(candidates.ranks)] = candidates.ranks
            references[row, index, : len(candidates.references)] = candidates.references
            margins[row, index], numbers[row, index] = candidates.margin, candidates.number
        doc_ids[row, at:] = len(comparisons)
    shares = np.full(len(rows), sum(map(len, rows)) / max(1, best_tokens), np.float32)
    return ComparisonRows(
        token_ids, doc_ids, branch_ids, position_ids, predictors, ends, ranks, references, margins, numbers, shares
    )


def evaluation_rows(
    comparisons: Sequence[Candidates], tokens: int, length: int, pad: int
) -> Iterator[tuple[ComparisonRows, list[list[int]]]]:
    """Yield all comparisons in batches of about `tokens` tokens, with their indices by row.

    Rows have `length` tokens; a longer comparison has its own row, in a batch with rows of similar length.
    """
    bins = best_fit([min(candidates.size, length) for candidates in comparisons], length)
    sizes = [max(length, sum(comparisons[i].size for i in row)) for row in bins]
    order = sorted(range(len(bins)), key=lambda row: -sizes[row])
    while order:
        longest = sizes[order[0]]
        most = max(1, tokens // longest)
        chosen = [bins[row] for row in order[:most] if 2 * sizes[row] >= longest]
        order = order[len(chosen) :]
        yield packed_comparisons([[comparisons[i] for i in row] for row in chosen], longest, pad), chosen


def evaluated(
    comparisons: Sequence[Candidates],
    tokens: int,
    length: int,
    pad: int,
    compute: Callable[[ComparisonRows], np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, (K, ...)) of each comparison, from `compute` on batches of `evaluation_rows`: (B, M, K, ...)."""
    for batch, places in evaluation_rows(comparisons, tokens, length, pad):
        values = compute(batch)
        for row, numbers in enumerate(places):
            for index, number in enumerate(numbers):
                yield number, values[row, index, : len(comparisons[number].answers)]
