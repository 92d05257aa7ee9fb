"""Measure how much of a text a model reproduces by greedy decoding, given a document's first tokens.

The procedure is that of Carlini et al. 2022 (arXiv:2202.07646). Documents with the same beginning, up to the last
compared token, are tested once and counted, because repeated text is memorised more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from llmkit.errors import UserError
from llmkit.generation.requests import Request
from llmkit.generation.sampler import Sampler
from llmkit.io.progress import Progress, counted
from llmkit.io.records import Row

PREFIX_TOKENS = 32  # of a document, given to the model
CHARACTERS_A_TOKEN = 32  # read per token: no vocabulary has such long tokens on average
REPEATS = ((1, "once"), (2, "2 to 9 times"), (10, "10 times or more"))


@dataclass
class _Beginning:
    """The first tokens of a document, and the number of documents that begin with them."""

    name: str
    where: str
    prefix: list[int]
    following: list[int]
    repeats: int = 1


class Recital:
    """The beginnings of documents, to compare with the model's continuations.

    sampler     of a folder, greedy and without end tokens, so that it generates as much as is compared
    max_tokens  limit of compared tokens
    source      name of the documents for UserError, if none is long enough, or the context is too short
    too_short   number of documents without a token after the first `PREFIX_TOKENS`
    """

    def __init__(self, documents: Iterable[Row], sampler: Sampler, max_tokens: int, source: str) -> None:
        tokenizer, context = sampler.tokenizer, sampler.context
        assert tokenizer is not None and context is not None
        if 1 + PREFIX_TOKENS + max_tokens > context:
            raise UserError(
                f"--max-tokens {max_tokens}: expected less than the model's context of {context} tokens, with the "
                f"{PREFIX_TOKENS} of the prefix"
            )
        self._start, self._tokenizer, self._sampler = tokenizer.document_bounds()[0], tokenizer, sampler
        self._held: dict[tuple[int, ...], _Beginning] = {}
        self.too_short = 0
        wanted = PREFIX_TOKENS + max_tokens
        for number, row in enumerate(documents, 1):
            ids = tokenizer.encode(row.value["text"][: wanted * CHARACTERS_A_TOKEN])[:wanted]
            if len(ids) <= PREFIX_TOKENS:
                self.too_short += 1
            elif known := self._held.get(tuple(ids)):
                known.repeats += 1
            else:
                name = str(row.value.get("id") or row.value.get("url") or number)
                self._held[tuple(ids)] = _Beginning(name, row.where, ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS:])
        if not self._held:
            raise UserError(f"{source}: expected documents of more than {counted(PREFIX_TOKENS, 'token')}, found none")

    def __len__(self) -> int:
        return len(self._held)

    def recite(self) -> Iterator[dict[str, Any]]:
        """Yield a record per document: `matched` leading tokens, the `longest` run, and the `share` that matched."""
        items = list(self._held.values())
        requests = (
            Request([self._start, *item.prefix], max_tokens=len(item.following), where=item.where) for item in items
        )
        for item, (completion,) in zip(items, self._sampler.complete(requests), strict=True):
            recited = completion.token_ids
            differing = (index for index, token in enumerate(item.following) if recited[index] != token)
            matched = next(differing, len(recited))
            longest = SequenceMatcher(None, recited, item.following, autojunk=False).find_longest_match()
            yield {
                "id": item.name,
                "repeats": item.repeats,
                "tokens": len(item.following),
                "matched": matched,
                "longest": longest.size,
                "share": round(matched / len(item.following), 4),
                "prefix": self._tokenizer.decode(item.prefix),
                "completion": completion.text,
                "where": item.where,
            }


@dataclass(frozen=True)
class Recited:
    """Figures that the command prints when the records went to a file; see `summarise`."""

    path: str
    documents: int
    by_repeats: dict[str, dict[str, float]]
    too_short: int


def written(
    records: Iterable[dict[str, Any]], write: Callable[[dict[str, Any]], object], total: int, quiet: bool
) -> Iterator[dict[str, Any]]:
    """Write the records, with progress, and yield them."""
    with Progress("recite", total=total, unit="documents", quiet=quiet) as progress:
        for record in records:
            write(record)
            yield record
            progress.advance()


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Group by how often a document occurs: number of documents, mean share, and number recited completely."""
    counts: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for record in records:
        (*_, group) = (name for least, name in REPEATS if record["repeats"] >= least)
        counts[group] += 1
        shares[group] += record["share"]
        whole[group] += record["share"] == 1
    return {
        name: {"documents": counts[name], "mean_share": round(shares[name] / counts[name], 4), "whole": whole[name]}
        for _, name in REPEATS
        if counts[name]
    }


def describe(groups: dict[str, dict[str, float]], tokens: int) -> Iterator[str]:
    """Describe the results of `summarise` in lines; `tokens` were compared per document."""
    for name, group in groups.items():
        shares = f"{group['mean_share']:.1%} of {counted(tokens, 'token')} on average, {group['whole']} recited in full"
        yield f"documents found {name}: {group['documents']}; {shares}"
