"""The work of one process: parse frames into pages, and run each page through the steps that need no other page.

    judge = Judge(Recipe())
    judge(page)             # Document | Dropped
    Worker(Recipe())(batch)     # the part of a batch of frames

The result depends on the record and the recipe only, so any process can do the work. Duplicates depend on other
records; `llmkit.crawl.output` finds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from time import thread_time
from typing import Any

import orjson

from llmkit.crawl.filters.classifier import Classifier
from llmkit.crawl.filters.contamination import Contamination
from llmkit.crawl.filters.quality import Verdict, c4, fineweb_quality, gopher_quality, gopher_repetition
from llmkit.crawl.filters.urls import UrlFilter
from llmkit.crawl.page import READ, Batch, Document, Dropped, Outcome, Page, Part, Skipped, TooMuchWork, work_limit
from llmkit.crawl.read.pages import page_of
from llmkit.crawl.recipe import ALONE, DUPLICATES, OWN_FILTERS, Recipe
from llmkit.errors import UserError
from llmkit.io.jsonl import JSON_LINE
from llmkit.text.words import Split
from llmkit.tools.user_code import UserFunction

Reason = tuple[str, float | None] | None  # why a page is dropped, and the measure that broke a threshold; None: kept
OnStep = Callable[[str, Document, Reason, float], object]  # step, the document after it, its verdict, seconds


class Judge:
    """The steps of a recipe, each a method that returns the reason to drop a document, or None."""

    def __init__(self, recipe: Recipe, url_filter: UrlFilter | None = None, items: Contamination | None = None) -> None:
        """url_filter, items: the recipe's blocklists and evaluation items, if already loaded."""
        self.recipe, self.url_filter, self.items = recipe, url_filter, items
        self.steps: list[tuple[str, Callable[[Document], Reason]]] = [
            (name, getattr(self, name)) for name in recipe.taken if name in ALONE
        ]

    def __call__(self, page: Page, on_step: OnStep = lambda *of_step: None) -> Document | Dropped:
        """Run a page through the steps until one drops it. on_step is called after each, with its CPU seconds."""
        document, name = Document(page, page.text), READ
        if document.text is None and "extract" not in self.recipe.steps:
            return Dropped(document, READ, "html_not_extracted")
        try:
            with work_limit(len(page.text if page.html is None else page.html)):  # pyright: ignore[reportArgumentType]
                for name, step in self.steps:
                    started = thread_time()
                    reason = step(document)
                    on_step(name, document, reason, thread_time() - started)
                    if reason is not None:
                        return Dropped(document, name, reason[0], reason[1])
        except TooMuchWork:
            page.html = None
            return Dropped(document, name, "too_slow")
        return document

    # ---- the steps

    def url(self, document: Document) -> Reason:
        """Check the URL against blocklists and rules."""
        if self.url_filter is None:
            self.url_filter = UrlFilter(self.recipe.url.blocklists, self.recipe.url)
        reason = self.url_filter.reason(document.page.url)
        return (reason, None) if reason else None

    def extract(self, document: Document) -> Reason:
        """Extract the main text of an HTML page; plain text is kept as it is."""
        page = document.page
        if page.html is None:
            return None
        extracted = self._extractor.extract(page.html, page.content_type, page.url)
        document.text, document.title = extracted.text, extracted.title
        page.html = None  # frees most of the page's memory
        return (extracted.reason, None) if extracted.reason else None

    @cached_property
    def _extractor(self) -> Any:
        from llmkit.crawl.extract.main_text import Extractor

        wanted = self.recipe.extract
        return Extractor(wanted.extractor, wanted.favour, wanted.threshold)

    def language(self, document: Document) -> Reason:
        """Drop pages that are not confidently identified as one of the languages."""
        wanted, score = self.recipe.language, self._identified(document)
        if wanted.languages and document.language not in wanted.languages:
            return "other_language", score
        return ("min_score", score) if wanted.min_score is not None and score < wanted.min_score else None

    def _identified(self, document: Document) -> float:
        """Identify the language of the current text, unless already done, and return its score."""
        if document.language_score is None:
            from llmkit.text.language import identify

            document.language, score = identify(document.text or "")
            document.language_score = round(float(score), 4)
        return document.language_score

    def gopher_repetition(self, document: Document) -> Reason:
        """Apply Gopher's repetition rules."""
        verdict = gopher_repetition(document.words(), self.recipe.gopher_repetition)
        return _noted(document, "gopher_repetition", verdict)

    def gopher_quality(self, document: Document) -> Reason:
        """Apply Gopher's quality rules for the page's language."""
        self._identified(document)
        verdict = gopher_quality(document.words(), self.recipe.gopher_quality, document.language or "")
        return _noted(document, "gopher_quality", verdict)

    def c4(self, document: Document) -> Reason:
        """Apply C4's rules: remove lines, and drop the page if too little is left or a line disqualifies it."""
        text, verdict = c4(document.words(), self.recipe.c4)
        if text != document.text:
            document.text = text
            if not verdict.reason:  # of a dropped page the words are not all counted
                document.split = Split(text, int(verdict.measures["words"]))
        return (verdict.reason, verdict.score) if verdict.reason else None

    def fineweb(self, document: Document) -> Reason:
        """Apply FineWeb's line rules."""
        return _noted(document, "fineweb", fineweb_quality(document.words(), self.recipe.fineweb))

    def classifier(self, document: Document) -> Reason:
        """Apply the thresholds on fastText scores."""
        for classifier in self._classifiers:
            score = classifier.score(document.text or "")
            scores = document.measures.get("classifier", {})
            document.measures["classifier"] = {**scores, classifier.label.removeprefix("__label__"): round(score, 4)}
            if not classifier.keeps(score):
                return classifier.label.removeprefix("__label__"), score
        return None

    @cached_property
    def _classifiers(self) -> list[Classifier]:
        return [Classifier(spec) for spec in self.recipe.classifier.models]

    def own(self, document: Document) -> Reason:
        """Apply the user's filters to the record as it would be written now."""
        for spec, reason_of in self._own:
            reason = reason_of(document.record(), document.identity)
            if reason is not None and not (isinstance(reason, str) and reason):
                where = f"{OWN_FILTERS}: {spec}: expected None or a reason (str)"
                raise UserError(f"{where}, found {reason!r} for {document.identity}")
            if reason is not None:
                return reason, None
        return None

    @cached_property
    def _own(self) -> list[tuple[str, UserFunction]]:
        return [(spec, UserFunction(spec, f"{OWN_FILTERS}: {spec}")) for spec in self.recipe.own.filters]

    def contamination(self, document: Document) -> Reason:
        """Drop or redact text that contains an evaluation item; the reason is the item's file."""
        if self.items is None:
            self.items = Contamination(self.recipe.contamination)
        document.items = self.items.find(document.text or "")
        if not document.items:
            return None
        if self.recipe.contamination.mode == "redact":
            document.text = self.items.redact(document.text or "")
            return None
        item, score = document.items[0]
        return item.rpartition(":")[0], score

    def pii(self, document: Document) -> Reason:
        """Redact personal data, or drop its page."""
        from llmkit.crawl.filters.personal_data import redact

        text, counts = redact(document.text or "")
        if self.recipe.pii.mode == "drop":
            kind = next((kind for kind, count in counts.items() if count), None)
            return (kind, sum(counts.values())) if kind else None
        document.text = text
        return None


def _noted(document: Document, step: str, verdict: Verdict) -> Reason:
    """Store the measures of a filter in the document, and return its reason."""
    document.measures[step] = verdict.measures
    return (verdict.reason, verdict.score) if verdict.reason else None


class Worker:
    """Turns a batch of frames into a part: the outcome of each record, and the signatures of kept documents."""

    def __init__(
        self,
        recipe: Recipe,
        url_filter: UrlFilter | None = None,
        items: Contamination | None = None,
        rejects: bool = False,
        columns: Mapping[str, str] = {},
    ) -> None:
        """rejects: write --rejects entries; columns: as in `page_of`; others as for `Judge`."""
        self.judge, self.rejects, self.columns = Judge(recipe, url_filter, items), rejects, columns
        self.near = recipe.near_duplicates
        self.duplicates = [step for step in DUPLICATES if step in recipe.steps]
        self.tell_language = "language" in recipe.steps

    def __call__(self, batch: Batch) -> tuple[Part]:
        """Return the part of a batch."""
        part, texts = Part([], seconds={READ: batch.seconds}), []

        def on_step(step: str, document: Document | None, reason: Reason, seconds: float) -> None:
            part.seconds[step] = part.seconds.get(step, 0.0) + seconds

        for frame in batch.frames:
            started = thread_time()
            page = page_of(frame, columns=self.columns)
            on_step(READ, None, None, thread_time() - started)
            judged = self.judge(page, on_step) if isinstance(page, Page) else page
            if isinstance(judged, Document):
                texts.append(judged.text or "")
                line = _line(judged.record(self.tell_language))
                outcome = Outcome(None, None, frame.path, frame.offset, line)
            else:
                step = READ if isinstance(judged, Skipped) else judged.step
                line = _line(judged.reject()) if self.rejects else b""
                outcome = Outcome(step, judged.reason, frame.path, frame.offset, line)
            if not isinstance(judged, Skipped):
                document = judged.document if isinstance(judged, Dropped) else judged
                if document.items:
                    outcome.identity = document.identity
                    outcome.items = [(item, score) for item, score in document.items]
            part.outcomes.append(outcome)
        if self.duplicates and texts:
            from llmkit.crawl.dedup.duplicates import signatures

            started = thread_time()
            part.signatures = signatures(texts, self.near.bands, self.near.rows)
            on_step(self.duplicates[-1], None, None, thread_time() - started)
        return (part,)


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(record, option=JSON_LINE)
    except TypeError:  # a lone surrogate, which UTF-8 cannot encode
        text = json.dumps(record, ensure_ascii=False)
        return text.encode("utf-8", "replace") + b"\n"
