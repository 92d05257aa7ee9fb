"""Shares of the training tokens by source, which may change during a run.

    sources = parse_sources(["web.jsonl:0.7", "books.parquet:0.3"], ["0.9:web=1,books=4"])
    sources.names                               # ["web", "books"]
    sources.shares([5_000_000, 1_000_000])      # {0.0: [0.7, 0.3], 0.9: [0.2, 0.8]}

Shares are relative to those of the other sources. The share of an input without a weight is its size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from llmkit.data.examples import DataFile, parse_weights
from llmkit.data.shards import document_files
from llmkit.errors import UserError
from llmkit.io.files import file_path
from llmkit.io.jsonl import name_of

ENDINGS = {".jsonl", ".ndjson", ".json", ".txt", ".md", ".csv", ".tsv", ".parquet", ".gz", ".zst"}


@dataclass(frozen=True)
class Sources:
    """Inputs: each is a source if they have weights or there are phases; else they form one source without a name.

    phases: start (0 to 1, as a fraction of the run) -> relative share of each input from there on
    """

    inputs: list[DataFile]
    phases: dict[float, list[float]]

    @cached_property
    def names(self) -> list[str]:
        """The name of each source of a mixture."""
        mixed = self.phases or self.inputs[0].weight is not None
        return source_names([source.path for source in self.inputs]) if mixed else []

    @cached_property
    def files(self) -> list[list[str]]:
        """The files of each source. Raise UserError as `document_files` does."""
        paths = [source.path for source in self.inputs]
        return [document_files([path]) for path in paths] if self.names else [document_files(paths)]

    def named(self, values: Sequence[float], prefix: str = "") -> dict[str, float]:
        """Return the value of each source of a mixture by prefix and name."""
        return {prefix + name: value for name, value in zip(self.names, values, strict=False)}

    @property
    def paths(self) -> list[str]:
        """The files of all sources."""
        return list(chain.from_iterable(self.files))

    def shares(self, sizes: Sequence[int]) -> dict[float, list[float]]:
        """Return the shares of the sources, normalized to sum 1, by their start in the run; `sizes` are in tokens."""
        if not self.names:
            return {0.0: [1.0]}
        weighed = zip(self.inputs, sizes, strict=True)
        weights = [size if source.weight is None else source.weight for source, size in weighed]
        both = {0.0: weights, **self.phases}
        return {start: [share / sum(shares) for share in shares] for start, shares in both.items()}

    def mean_shares(self, sizes: Sequence[int]) -> list[float]:
        """Return the share of each source in all tokens of the run."""
        shares = self.shares(sizes)
        lengths = [stop - start for start, stop in zip(shares, [*list(shares)[1:], 1.0], strict=True)]
        return [
            sum(length * share for length, share in zip(lengths, of_source, strict=True))
            for of_source in zip(*shares.values(), strict=True)
        ]


def source_names(paths: Sequence[str]) -> list[str]:
    """Name inputs by their file names without extensions and wildcards, or by their paths if these names are equal.

    >>> source_names(["web.jsonl.gz", "s3://bucket/books-*.parquet", "data/**/*.csv", "en/chats.txt", "de/chats.txt"])
    ['web', 'books', 'data', 'en/chats.txt', 'de/chats.txt']
    >>> source_names(["https://host/web.csv?version=1"])
    ['web']
    """
    stems = [_stem(path) for path in paths]
    return [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True)]


def _stem(path: str) -> str:
    for name in reversed(Path(file_path(name_of(path))).parts):
        while (ending := Path(name).suffix) in ENDINGS:
            name = name.removesuffix(ending)
        if name := name.strip("*?-_."):
            return name
    return path


def parse_sources(inputs: Sequence[str], phases: Sequence[str]) -> Sources:
    """Parse INPUT:WEIGHT arguments, without opening them, and `--phase START:NAME=SHARE,...`; the default is stdin.

    Inputs not named in a phase have share 0 in it. Raise UserError for invalid weights and phases, phases out of order,
    and inputs that are repeated or never have a share.
    """
    weighed = parse_weights(inputs or ("-",), "INPUT", zero=True)
    paths, by_start = [source.path for source in weighed], {}
    for text in phases:
        start, shares = _parse_phase(text, paths, source_names(paths))
        if start <= (latest := max(by_start, default=0.0)):
            raise UserError(f"--phase {text}: expected a start after {latest:g}, the previous one; sort the phases")
        by_start[start] = shares
    sources = Sources(weighed, by_start)
    if not sources.names:
        return sources
    files = list(map(os.path.realpath, paths))
    if twice := next((path for path, file in zip(paths, files, strict=True) if files.count(file) > 1), None):
        raise UserError(f"{name_of(twice)}: expected each input once if there are shares; add up its weights")
    weights = [1.0 if source.weight is None else source.weight for source in weighed]
    if not 0 < sum(weights) < math.inf:
        raise UserError(f"INPUT: expected weights with a sum above 0, found {sum(weights):g}")
    for name, *of_source in zip(sources.names, weights, *by_start.values(), strict=True):
        if not any(of_source):
            raise UserError(f"{name}: its share is always 0; remove it, or name it in a --phase")
    return sources


def _parse_phase(text: str, paths: Sequence[str], names: Sequence[str]) -> tuple[float, list[float]]:
    """Parse START:NAME=SHARE,... to the start and the share of each source."""
    before, _, after = text.partition(":")
    start, shares = _number(before), dict.fromkeys(names, 0.0)
    if start is None or not 0 < start < 1:
        raise UserError(f"--phase {text}: expected START:NAME=SHARE,... with a start between 0 and 1, found {before!r}")
    seen: set[str] = set()
    for part in after.split(","):
        given, _, share = part.rpartition("=")
        name = names[paths.index(given)] if given in paths else given
        if name not in shares and (same := [path for path in paths if _stem(path) == name]):
            raise UserError(f"--phase {text}: expected one of the paths {', '.join(same)}, found the name {name!r}")
        if name not in shares:
            raise UserError(f"--phase {text}: expected NAME=SHARE with a name of {', '.join(names)}, found {part!r}")
        if (value := _number(share)) is None or value < 0:
            raise UserError(f"--phase {text}: expected a share of at least 0 for {name}, found {share!r}")
        if name in seen:
            raise UserError(f"--phase {text}: expected each name once, found {name} twice")
        seen.add(name)
        shares[name] = value
    if not 0 < sum(shares.values()) < math.inf:
        raise UserError(f"--phase {text}: expected shares with a sum above 0, found {sum(shares.values()):g}")
    return start, list(shares.values())


def _number(text: str) -> float | None:
    """Parse a finite number; return None for other texts."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def shares_table(
    names: Sequence[str], sizes: Sequence[int], shares: Mapping[int, Sequence[float]], taken: Sequence[int]
) -> str:
    """Format a table of the sources: tokens, shares by first step, trained tokens and epochs."""
    width = max(6, *map(len, names))
    heads = ["share", *(f"from step {step:,}" for step in list(shares)[1:])]
    lines = [f"  {'source':<{width}} {'tokens':>15}  {'  '.join(heads)} {'trained on':>15}   epochs"]
    for name, size, of_source, count in zip(names, sizes, zip(*shares.values(), strict=True), taken, strict=True):
        columns = "  ".join(f"{share:>{max(5, len(head))}.1%}" for head, share in zip(heads, of_source, strict=True))
        lines.append(f"  {name:<{width}} {size:>15,}  {columns} {count:>15,} {count / size:>8.2f}")
    return "the mixture:\n" + "\n".join(lines)
