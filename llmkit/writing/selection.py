"""Which drafts of a writer are kept: written, judged, and decided on in order, so that a run goes on where it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from llmkit.config import parse_quantity
from llmkit.errors import UserError
from llmkit.io.progress import Progress, counted
from llmkit.io.resume import Kept
from llmkit.writing.draft import Draft, read_draft
from llmkit.writing.judge import Judge, Scores, best_and_worst
from llmkit.writing.keep import Keeper
from llmkit.writing.scheduler import Program, run_all
from llmkit.writing.writer import Writer

WINDOW = 256  # drafts that are begun before the first of them is decided on; later ones may have examples of earlier
JUDGED = 32  # drafts that the judge is given at a time
USELESS = 200  # drafts dropped in a row, after which the run stops


@dataclass(frozen=True)
class Budget:
    """A limit, and what a token in and out takes of it; `text` as it was given."""

    text: str
    limit: float
    token_in: float = 1.0
    token_out: float = 1.0

    def is_spent(self, tokens_in: int, tokens_out: int) -> bool:
        """True if so many tokens have reached the limit."""
        return tokens_in * self.token_in + tokens_out * self.token_out >= self.limit


def parse_budget(text: str) -> Budget:
    """Read tokens, or money at prices per million tokens in and out. Raises UserError for what is neither.

    >>> parse_budget("2M").limit, parse_budget("5@0.5,2").token_out
    (2000000, 2e-06)
    """
    limit, has_prices, prices = text.partition("@")
    try:
        if not has_prices:
            return Budget(text, parse_quantity(limit, "count"))
        token_in, token_out = (float(price) / 1e6 for price in prices.split(","))
        if min(float(limit), token_in, token_out) >= 0:
            return Budget(text, float(limit), token_in, token_out)
    except ValueError:
        pass
    raise UserError(
        "--budget: expected tokens, such as 2M, or money at prices per million tokens in and out, such as 5@0.15,0.6, "
        f"found {text!r}"
    )


class Selection:
    """Drafts on their way: begun, written, judged, and decided on in order of their index.

    State has "shared KEY" for what drafts share, "draft INDEX" for each that is written, and "end INDEX" for what
    became of it: `reason`, and of the best version `best`, `scores` and `why`, and the `worst`.
    indices  of the drafts that are kept
    spent    requests, tokens in and tokens out, with those of runs before
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

    @property
    def spent(self) -> list[int]:
        """Requests, tokens in and tokens out, of the writer and the judge."""
        usages = [self.writer.sampler.usage, self._judge.usage if self._judge is not None else None]
        here = [(usage.requests, usage.prompt_tokens, usage.completion_tokens) for usage in usages if usage is not None]
        return list(map(sum, zip(*(self._before, *here), strict=True)))

    def write(self) -> None:
        """Write drafts until enough are kept, or there are no more. Raises UserError after too many useless ones."""
        shared: dict[str, Any] = {}
        for key, record in self.state.items():
            kind, _, name = key.partition(" ")
            value = orjson.loads(record)
            if kind == "shared":
                shared[name] = value["value"]
            self._before = value.get("spent", self._before)
        with self._progress:
            while (key := f"end {self.decided}") in self.state:
                draft = self.draft(self.decided)
                end = self.end(self.decided)
                self._count([*draft.versions()][end["best"]] if draft.messages else draft, end["reason"], recall=True)
            self._begun, self._useless = self.decided, 0
            run_all(self.writer.sampler, self._programs(), self._ended, shared=shared, make=self._make)

    def _lacks(self) -> int:
        """How many more are to be kept."""
        return WINDOW if self._wanted is None else self._wanted - len(self.indices)

    def draft(self, index: int) -> Draft:
        """A draft that is written."""
        return read_draft(orjson.loads(self.state[f"draft {index}"])["draft"])

    def end(self, index: int) -> dict[str, Any]:
        """What became of a draft."""
        return orjson.loads(self.state[f"end {index}"])

    def _make(self, key: str) -> Program[Any]:
        return self.writer.source.make(self.writer, key)

    def _programs(self) -> Iterator[tuple[int, Program[Draft]] | None]:
        count = self.writer.source.count
        while self._lacks() and (count is None or self._begun < count):
            if self._begun - self.decided >= min(WINDOW, self._lacks()):
                yield None
                continue
            self._begun += 1
            index = self._begun - 1
            if f"draft {index}" in self.state:
                self._written[index] = self.draft(index)
                self._decide()
            else:
                yield index, self.writer.write(index)
        self._decide()

    def _ended(self, name: Any, value: Any) -> None:
        """Keep what a program has made, and decide on the drafts whose turn it is."""
        if isinstance(name, str):
            self.state.add(f"shared {name}", {"value": value, "spent": self.spent})
            return
        self.state.add(f"draft {name}", {"draft": value.as_state(), "spent": self.spent})
        self._written[name] = value
        self._decide()
        if self._budget is not None and self._lacks() and self._budget.is_spent(self.spent[1], self.spent[2]):
            raise UserError(
                f"--budget {self._budget.text}: spent after {counted(len(self.indices), 'conversation')}; the same "
                f"command with --resume goes on with a higher one, or ends with -n {len(self.indices)}"
            )

    def _decide(self) -> None:
        """Decide on drafts in order; a judge is given several at a time, fewer where no other comes."""
        ready = []
        while (index := self.decided + len(ready)) in self._written:
            ready.append(self._written[index])
        if self._judge is not None and len(ready) < min(JUDGED, self._begun - self.decided):
            return
        versions = [[*draft.versions()] if draft.messages else [draft] for draft in ready]
        faults = [[self._keeper.check(version) for version in of_draft] for of_draft in versions]
        judged = [
            version
            for of_draft, reasons in zip(versions, faults, strict=True)
            for version, reason in zip(of_draft, reasons, strict=True)
            if reason is None
        ]
        scores = iter(self._judge.scores(judged) if self._judge is not None and judged else ())
        for of_draft, reasons in zip(versions, faults, strict=True):
            end = self._choice(
                of_draft, reasons, [next(scores, None) if reason is None else None for reason in reasons]
            )
            self._count(of_draft[end["best"]], end["reason"])
            self.state.add(f"end {of_draft[0].index}", end)
            del self._written[of_draft[0].index]
            if self._useless >= USELESS:
                raise self._stopped()

    def _choice(
        self, versions: Sequence[Draft], faults: Sequence[str | None], scores: Sequence[Scores | None]
    ) -> dict[str, Any]:
        """Choose the best and the worst of the versions of a draft, and say whether the best is kept."""
        good = [version for version, fault in enumerate(faults) if fault is None]
        best, worst = (good or [0])[0], None
        if judged := [(version, score) for version in good if (score := scores[version]) is not None]:
            first, last = best_and_worst([versions[version] for version, _ in judged], [score for _, score in judged])
            best, worst = judged[first][0], None if last is None else judged[last][0]
        wrong = next(
            (version for version, fault in enumerate(faults) if (fault or "").startswith("wrong: answer")), None
        )
        worst = wrong if good and wrong is not None else worst
        values = None if (score := scores[best]) is None else dict(score.values)
        reason = self.writer.source.fault(versions[best]) if faults[best] is None else None
        if reason is None:
            reason = self._keeper.reason(versions[best], values)
        else:
            self._keeper.recall(versions[best], reason)
        why = {} if score is None else {"why": dict(score.reasons or {})}
        return {"reason": reason, "best": best, "worst": worst if reason is None else None, "scores": values, **why}

    def _count(self, draft: Draft, reason: str | None, recall: bool = False) -> None:
        """Count a draft that is decided on; with `recall` in a run before."""
        if recall:
            self._keeper.recall(draft, reason)
        self.decided += 1
        if reason is not None:
            self.dropped[reason] += 1
            self._useless += 1
            return
        self._useless = 0
        self.indices.append(draft.index)
        self.writer.source.keep(draft)
        self._progress.advance(drafts=self.decided)

    def _stopped(self) -> UserError:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.most_common(4))
        refusal = getattr(self.writer.sampler, "refusal", "")
        return UserError(
            f"--writer: the last {USELESS} drafts of {self.writer.sampler.name} were dropped; of all "
            f"{self.decided:,}: {reasons}{f'; {refusal}' if refusal else ''}; the same command with --resume goes on"
        )

    def describe(self) -> Iterator[str]:
        """Describe what became of the drafts, in lines."""
        yield f"kept {counted(len(self.indices), 'conversation')} of {counted(self.decided, 'draft')}"
        for reason, count in self.dropped.most_common():
            yield f"dropped {count:,}: {reason}"
        if self._wanted is not None and self._lacks():
            yield f"fewer than -n {self._wanted:,}: there are no more prompts"
