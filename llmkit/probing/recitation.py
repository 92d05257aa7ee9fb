"""Measure how much of a text a model reproduces by greedy decoding, given a document's first tokens.

The procedure is that of Carlini et al. 2022 (arXiv:2202.07646). Documents that begin alike, up to the last token
that is compared, are asked once and counted: repeated text is learnt by heart.
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

PREFIX_TOKENS = 32  # of a document, which the model is given
CHARACTERS_A_TOKEN = 32  # read of a document for each token that is wanted: no vocabulary has so long ones on average
REPEATS = ((1, "once"), (2, "2 to 9 times"), (10, "10 times or more"))


@dataclass
class _Beginning:
    """The first tokens of a document, and in how many it is found."""

    name: str
    where: str
    prefix: list[int]
    following: list[int]
    repeats: int = 1


class Recital:
    """The beginnings of documents, ready to be asked for.

    sampler     of a folder; it decodes greedily and knows no end tokens, so that it says as much as is compared
    max_tokens  compared with what it says, at most
    source      names the documents in errors: UserError where none is long enough, or the context too short
    too_short   documents that end with their first `PREFIX_TOKENS` tokens, which the model is given
    """

    def __init__(self, documents: Iterable[Row], sampler: Sampler, max_tokens: int, source: str) -> None:
        tokenizer, context = sampler.tokenizer, sampler.context
        assert tokenizer is not None and context is not None
        if 1 + PREFIX_TOKENS + max_tokens > context:
            raise UserError(
                f"--max-tokens {max_tokens}: expected less than the model's context of {context} tokens, with the "
                f"{PREFIX_TOKENS} that it is given"
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
        """A record of each: `matched` tokens from the first on, the `longest` run, and the `share` that matched."""
        items = list(self._held.values())
        requests = (
            Request([self._start, *item.prefix], max_tokens=len(item.following), where=item.where) for item in items
        )
        for item, (completion,) in zip(items, self._sampler.complete(requests), strict=True):
            recited = completion.token_ids
            unlike = (index for index, token in enumerate(item.following) if recited[index] != token)
            matched = next(unlike, len(recited))
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
    """The records once they are written, with progress."""
    with Progress("recite", total=total, unit="documents", quiet=quiet) as progress:
        for record in records:
            write(record)
            yield record
            progress.advance()


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By how often a document occurs: how many there are, their mean share, and how many are recited whole."""
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
    """Describe the results of `summarise` in lines; `tokens` were asked for of each document."""
    for name, group in groups.items():
        shares = f"{group['mean_share']:.1%} of {counted(tokens, 'token')} on average, {group['whole']} recited whole"
        yield f"documents found {name}: {group['documents']}; {shares}"
