"""Write drafts, judge them, and keep or drop them in order, so that a run can be resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any

import orjson

from llmkit.config import parse_quantity
from llmkit.errors import UserError
from llmkit.generation.served_models import SCHEME
from llmkit.io.progress import Progress, counted
from llmkit.io.resume import Kept
from llmkit.writing.draft import Draft, read_draft
from llmkit.writing.judge import Judge, Scores, best_and_worst
from llmkit.writing.keep import Keeper
from llmkit.writing.scheduler import Program, run_all
from llmkit.writing.writer import TOO_LONG, Writer

WINDOW = 256  # drafts begun before the first of them is decided; later ones may use earlier ones as examples
JUDGED = 32  # drafts per call of the judge
RESUMES = "the same command with --resume continues"  # where there is an --out, and so a state
USELESS = 200  # consecutive dropped drafts that stop the run


class Budget:
    """A limit in tokens, or in money with prices per million input and output tokens; `text` as given.

    Raises UserError for any other text.

    >>> Budget("2M").is_spent(1_500_000, 500_000), Budget("5@0.5,2").is_spent(1_500_000, 2_000_000)
    (True, False)
    """

    def __init__(self, text: str) -> None:
        self.text, self._prices = text, [1.0, 1.0]
        limit, has_prices, prices = text.partition("@")
        try:
            self._limit = float(limit) if has_prices else parse_quantity(limit, "count")
            if has_prices:
                self._prices = [float(price) / 1e6 for price in prices.split(",")]
            if len(self._prices) == 2 and min([self._limit, *self._prices]) >= 0:
                return
        except ValueError:
            pass
        raise UserError(
            "--budget: expected tokens, such as 2M, or money at prices per million input and output tokens, such as "
            f"5@0.15,0.6, found {text!r}"
        )

    def is_spent(self, tokens_in: int, tokens_out: int) -> bool:
        """True if these tokens reach the limit."""
        return tokens_in * self._prices[0] + tokens_out * self._prices[1] >= self._limit


class Selection:
    """Writes and judges drafts, and keeps or drops them in order of their index.

    The state has "shared KEY" for results that drafts share, "draft INDEX" for each written draft, and "end INDEX" for
    its outcome: `reason`, the number of the `best` version with its `scores` and `why`, and of the `worst`.
    `indices` are those of the kept drafts.
    """

    def __init__(
        self,
        writer: Writer,
        keeper: Keeper,
        judge: Judge | None,
        state: Kept,
        *,
        wanted: int | None,
        budget: Budget | None = None,
        quiet: bool = False,
    ) -> None:
        self.writer, self._keeper, self._judge, self.state = writer, keeper, judge, state
        self._wanted, self._budget = wanted, budget
        self.indices: list[int] = []
        self.dropped = Counter[str]()
        self.decided = self._begun = self._useless = 0
        self._written: dict[int, Draft] = {}
        self._progress = Progress("write", total=wanted, unit="chats", quiet=quiet)
        self._before = [0, 0, 0]
        self._batch: tuple[list[tuple[list[Draft], list[str | None]]], Any] | None = None  # at the judge
        self._judges = ThreadPool(1)  # a daemon: an interrupt does not wait for a server
        self._waits = judge is None or not judge.name.startswith(SCHEME)  # two models on one machine slow each other

    @property
    def spent(self) -> list[int]:
        """Requests, input and output tokens of the writer and the judge, with those of earlier runs."""
        usages = [self.writer.sampler.usage, self._judge.usage if self._judge else None]
        here = [(usage.requests, usage.prompt_tokens, usage.completion_tokens) for usage in usages if usage is not None]
        return list(map(sum, zip(*(self._before, *here), strict=True)))

    def write(self) -> None:
        """Write drafts until enough are kept or none are left. Raises UserError after too many dropped ones."""
        shared: dict[str, Any] = {}
        for key, record in self.state.items():
            kind, _, name = key.partition(" ")
            value = orjson.loads(record)
            if kind == "shared":
                shared[name] = value["value"]
            self._before = value.get("spent", self._before)
        with self._progress:
            while self._lacks() and f"end {self.decided}" in self.state:
                versions, end = self._outcome(self.decided)
                self._keeper.recall(versions[end["best"]], end["reason"])
                self._count(versions[end["best"]], end["reason"])
            self._begun, self._useless = self.decided, 0
            run_all(self.writer.sampler, self._programs(), shared, self._ended)
            while self._written:
                self._decide(wait=True)
        if not self.indices:
            self.state.remove()  # nothing to resume
            drafts = f"{counted(self.decided, 'draft')} of {self.writer.sampler.name}"
            raise UserError(f"--writer: none of {drafts} is kept: {self._reasons()}; use another, or other prompts")

    def _lacks(self) -> int:
        """Return how many more drafts are to be kept."""
        return WINDOW if self._wanted is None else self._wanted - len(self.indices)

    def kept(self) -> Iterator[tuple[Draft, Draft | None, dict[str, Any]]]:
        """Yield the best version of each kept draft, the worst or None, and its outcome."""
        for index in self.indices:
            versions, end = self._outcome(index)
            yield versions[end["best"]], None if end["worst"] is None else versions[end["worst"]], end

    def _outcome(self, index: int) -> tuple[list[Draft], dict[str, Any]]:
        return self._draft(index).versions(), orjson.loads(self.state[f"end {index}"])

    def _draft(self, index: int) -> Draft:
        return read_draft(orjson.loads(self.state[f"draft {index}"])["draft"])

    def _programs(self) -> Iterator[tuple[int, Program[Draft]] | None]:
        count = self.writer.source.count
        while self._lacks() and (count is None or self._begun < count):
            if self._begun - self.decided >= min(WINDOW, self._lacks()):
                if len(self._written) == self._begun - self.decided:  # all wait for the judge
                    self._decide(wait=True)
                else:
                    yield None
                continue
            self._begun += 1
            index = self._begun - 1
            if f"draft {index}" in self.state:
                self._written[index] = self._draft(index)
                self._decide()
            else:
                yield index, self.writer.write(index)

    def _ended(self, name: Any, value: Any) -> None:
        """Save the result of a program, and decide on the next drafts."""
        if isinstance(name, str):
            self.state.add(f"shared {name}", {"value": value, "spent": self.spent})
            return
        self.state.add(f"draft {name}", {"draft": value.as_state(), "spent": self.spent})
        self._written[name] = value
        self._decide()
        is_done = not self._lacks() or self.decided == self.writer.source.count
        if self._budget is not None and not is_done and self._budget.is_spent(self.spent[1], self.spent[2]):
            ends = f", or ends with -n {len(self.indices)}" if self.indices else ""
            how = f"{RESUMES} with" if self.state.path else "start again with"
            raise UserError(
                f"--budget {self._budget.text}: spent after {counted(len(self.indices), 'conversation')}; "
                f"{how} a higher one{ends if self.state.path else ''}"
            )

    def _decide(self, wait: bool = False) -> None:
        """Decide on drafts in order; the judge gets batches, smaller ones at the end.

        A judge on a server works while drafts are written; `wait` blocks until its scores arrive.
        """
        while True:
            if self._batch is None:
                ready: list[Draft] = []
                while (draft := self._written.get(self.decided + len(ready))) is not None:
                    ready.append(draft)
                if not ready or (self._judge and len(ready) < min(JUDGED, self._begun - self.decided)):
                    return
                every = [draft.versions() for draft in ready]
                checked = [(versions, [self._keeper.check(version) for version in versions]) for versions in every]
                pairs = [pair for versions, faults in checked for pair in zip(versions, faults, strict=True)]
                good = [version for version, fault in pairs if fault is None]
                judged = self._judge.scores if self._judge else lambda drafts: []
                self._batch = checked, self._judges.apply_async(judged, (good,))
            checked, scores = self._batch
            if not (wait or self._waits or scores.ready()):
                return
            given = iter(scores.get())
            self._batch = None
            for versions, faults in checked:
                index, end = versions[0].index, self._choice(versions, faults, [*islice(given, faults.count(None))])
                self._count(versions[end["best"]], end["reason"])
                self.state.add(f"end {index}", end)
                del self._written[index]
                if self._useless < USELESS:
                    continue
                too_long = self.dropped.most_common(1)[0][0] == f"form: {TOO_LONG}"
                advice = RESUMES if self.state.path else "use another, or other prompts"
                advice = "use a writer with more context" if too_long else advice
                raise UserError(
                    f"--writer: the last {USELESS} drafts of {self.writer.sampler.name} were dropped; of all "
                    f"{self.decided:,}: {self._reasons()}; {advice}"
                )

    def _choice(
        self, versions: Sequence[Draft], faults: Sequence[str | None], scores: Sequence[Scores]
    ) -> dict[str, Any]:
        """Choose the best and the worst version of a draft, and decide on the best.

        scores  of the versions without a fault; empty without a judge
        """
        good = [version for version, fault in enumerate(faults) if fault is None]
        best, worst, score = (good or [0])[0], None, None
        if scores:
            first, last = best_and_worst([versions[version] for version in good], scores)
            best, worst, score = good[first], None if last is None else good[last], scores[first]
        if good and "wrong: answer" in faults:
            worst = faults.index("wrong: answer")
        values = None if score is None else dict(score.values)
        fault = faults[best] or self.writer.source.fault(versions[best])
        reason = self._keeper.decide(versions[best], fault, values)
        why = {} if score is None else {"why": dict(score.reasons)}
        return {"reason": reason, "best": best, "worst": worst if reason is None else None, "scores": values, **why}

    def _count(self, draft: Draft, reason: str | None) -> None:
        """Count a decided draft."""
        self.decided += 1
        if reason is not None:
            self.dropped[reason] += 1
            self._useless += 1
            return
        self._useless = 0
        self.indices.append(draft.index)
        self.writer.source.keep(draft)
        self._progress.advance(drafts=self.decided)

    def _reasons(self) -> str:
        """Describe the most common reasons with their counts, and the server's last refusal."""
        counts = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.most_common(4))
        return "; ".join(filter(None, [counts, getattr(self.writer.sampler, "refusal", "")]))

    def describe(self) -> Iterator[str]:
        """Describe the outcomes of the drafts, in lines."""
        yield f"kept {counted(len(self.indices), 'conversation')} of {counted(self.decided, 'draft')}"
        for reason, count in self.dropped.most_common():
            yield f"dropped {count:,}: {reason}"
        if self._wanted is not None and self._lacks():
            yield f"fewer than -n {self._wanted:,}: there are no more prompts"
