"""`llmkit train-reward --score`: a filter that adds rewards to a stream of completions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np

from llmkit.errors import naming
from llmkit.formats.conversations import Message
from llmkit.formats.preferences import Comparison, read_answers, read_prompt
from llmkit.io.records import Row, with_made
from llmkit.reward_model.comparisons import Candidates, encode_comparisons, fitted
from llmkit.reward_model.head import ROW_TOKENS, RewardModel, score_comparisons
from llmkit.tokenizer.chat import ChatFormat

RECORDS_AT_ONCE = 256  # enough records to fill batches, few enough for low latency


@dataclass
class _Group:
    """Neighbouring records with the same prompt, all their answers, and the `counts` of answers by record."""

    prompt: tuple[Message, ...]
    rows: list[Row]
    answers: list[tuple[Message, ...]]
    counts: list[int]


class Scorer:
    """Computes rewards of completions; successive completions of one prompt share its computation.

    counts  of completions: "scored", "prompt cut at its beginning", and "dropped: too long" if one does not fit the
            model's context, which gives a null reward
    """

    def __init__(self, model: RewardModel, chat: ChatFormat, pad: int) -> None:
        self.model, self.chat, self.pad = model, chat, pad
        self.counts: Counter[str] = Counter()

    def score(self, rows: Iterable[Row], *, rank: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the records with `reward`, and `reward_std` with several heads; as lists for `completions`.

        With `rank` the records of a prompt come best first, with `rank` from 1; those with `completions` get `ranking`.
        Raises UserError for a record without prompt or completion.
        """
        groups: list[_Group] = []  # complete prompts, with at least RECORDS_AT_ONCE records
        for group in chain(_grouped(rows), [None]):
            groups += [group] if group else []
            if groups and (group is None or sum(len(each.rows) for each in groups) >= RECORDS_AT_ONCE):
                for each, scores in zip(groups, self._scores(groups), strict=True):
                    yield from _records(each, scores, rank)
                groups = []

    def checked(self, row: Row) -> Row:
        """Return the row. Raises UserError, with its place, if it lacks prompt or completion, or cannot be encoded."""
        prompt = read_prompt(row)
        for answer in read_answers(row):
            if type(self.chat) is not ChatFormat:  # a foreign template may refuse it
                with naming(row.where):
                    self.chat.encode_branches([(prompt, [answer])])
        return row

    def _scores(self, groups: Sequence[_Group]) -> list[list[np.ndarray | None]]:
        """Return the scores (heads,) of each answer of each group, None if it is too long."""
        context = self.model.config.max_position_embeddings
        compared = [Comparison(group.prompt, tuple(group.answers), (0,) * len(group.answers)) for group in groups]
        scores: list[list[np.ndarray | None]] = [[None] * len(group.answers) for group in groups]
        units: list[tuple[Candidates, list[tuple[int, int]]]] = []  # candidates, and (group, answer) of each score
        for group, whole in enumerate(encode_comparisons(compared, self.chat)):
            for first, last in whole.spans(max(ROW_TOKENS, context)):  # attention is quadratic in the row
                part = Candidates(whole.prompt, whole.answers[first:last], whole.ranks[first:last])
                places = [(group, answer) for answer in range(first, last)]
                if part.longest <= context:
                    units.append((part, places))
                    continue
                for place, answer in zip(places, part.answers, strict=True):  # each with as much prompt as fits
                    fits = fitted(Candidates(whole.prompt, (answer,), (0,)), context, "truncate", "", self.counts)
                    units += [] if fits is None else [(fits, [place])]
        for unit, values in score_comparisons(self.model, [part for part, _ in units], ROW_TOKENS, self.pad):
            self.counts["scored"] += len(values)
            for (group, answer), score in zip(units[unit][1], values, strict=True):
                scores[group][answer] = score
        return scores


def _grouped(rows: Iterable[Row]) -> Iterator[_Group]:
    """Group neighbours with the same prompt and the same format: one completion per record, or several."""
    read = ((read_prompt(row), "completions" in row.value, row, read_answers(row)) for row in rows)
    for (prompt, _), neighbours in groupby(read, key=itemgetter(0, 1)):
        records = list(neighbours)
        answers = [answer for *_, some in records for answer in some]
        yield _Group(prompt, [row for _, _, row, _ in records], answers, [len(some) for *_, some in records])


def _records(group: _Group, scores: Sequence[np.ndarray | None], rank: bool) -> Iterator[dict[str, Any]]:
    remaining = iter(scores)
    records = []
    for row, count in zip(group.rows, group.counts, strict=True):
        own = list(islice(remaining, count))
        means = [None if values is None else round(float(values.mean()), 6) for values in own]
        spreads = [None if values is None else round(float(values.std()), 6) for values in own]
        several = any(values is not None and len(values) > 1 for values in own)
        if "completions" in row.value:
            fields: dict[str, Any] = {"rewards": means} | ({"reward_stds": spreads} if several else {})
            fields |= {"ranking": _ranking(means)} if rank else {}
        else:
            fields = {"reward": means[0]} | ({"reward_std": spreads[0]} if several else {})
        records.append(with_made(row.value, fields))
    if not rank or "completions" in group.rows[0].value:
        return iter(records)
    ranking = _ranking([record["reward"] for record in records])
    order = sorted(range(len(records)), key=lambda i: ranking[i])
    return iter([{**records[i], "rank": ranking[i]} for i in order])


def _ranking(rewards: Sequence[float | None]) -> list[int]:
    """Rank from 1, the highest reward; equal ones share a rank, None comes last."""
    known = [-math.inf if reward is None else reward for reward in rewards]
    return [1 + sum(other > reward for other in known) for reward in known]
