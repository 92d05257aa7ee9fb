"""The steps that look at one page alone, each a method from a page's journey to a reason for dropping it, or None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import thread_time
from typing import Any

from llmkit.crawl.filters.quality import Verdict, c4, fineweb_quality, gopher_quality, gopher_repetition
from llmkit.crawl.filters.urls import UrlFilter
from llmkit.crawl.funnel import READ
from llmkit.crawl.page import Page
from llmkit.crawl.recipe import OWN_FILTERS, Recipe
from llmkit.crawl.work_limit import TooMuchWork, work_limit
from llmkit.errors import UserError
from llmkit.text.words import Split
from llmkit.tools.user_code import UserFunction


@dataclass(slots=True)
class Journey:
    """One page on its way through the steps, with what is known of it so far."""

    page: Page
    text: str | None = None
    title: str | None = None
    language: str | None = None
    language_score: float | None = None
    step: str | None = None  # the one that dropped it
    reason: str | None = None
    score: float | None = None  # the measure that broke a threshold
    measures: dict[str, Mapping[str, float]] = field(default_factory=dict)  # by step
    split: Split | None = None

    def words(self) -> Split:
        """The text with its words, split once for all filters until a step changes the text."""
        if self.split is None or self.split.text is not self.text:
            self.split = Split(self.text or "")
        return self.split

    @property
    def identity(self) -> Any:
        """The record's own id, or its place."""
        page = self.page
        return page.record.get("id", f"{page.path}:{page.offset}" if page.offset else page.path)

    def document(self, tell_language: bool = True) -> dict[str, Any]:
        """The record of a kept page: ours first, then what passes through."""
        record = {"text": self.text, "id": self.identity, "url": self.page.url, "source": source_of(self.page.path)}
        own = self.page.record
        if tell_language:
            record |= {"language": self.language, "language_score": self.language_score}
            own = {key: value for key, value in own.items() if key not in record or key in ("id", "url", "source")}
        record["title"] = self.title
        return {key: value for key, value in record.items() if value is not None} | own

    def reject(self) -> dict[str, Any]:
        """The record of a dropped page, with its text where it came so far."""
        document = self.document()
        record = {key: document[key] for key in ("id", "url", "source") if key in document}
        record |= {"offset": self.page.offset, "step": self.step, "reason": self.reason, "score": self.score}
        record |= {"language": self.language, "language_score": self.language_score, "text": self.text}
        return {key: value for key, value in record.items() if value is not None}


def source_of(path: str) -> str:
    """The name of an input, as documents give it."""
    return "stdin" if path == "-" else Path(path).name


class Steps:
    """The steps of a recipe; what they need is loaded when it is first used."""

    def __init__(self, recipe: Recipe, url_filter: UrlFilter | None = None) -> None:
        """url_filter: the blocklists of the recipe, where they are loaded already."""
        self.recipe, self.url_filter = recipe, url_filter
        known: dict[str, Callable[[Journey], str | None]] = {
            "url": self.url,
            "extract": self.extract,
            "language": self.language,
            "gopher_repetition": self.gopher_repetition,
            "gopher_quality": self.gopher_quality,
            "c4": self.c4,
            "fineweb": self.fineweb,
            "own": self.own,
            "pii": self.pii,
        }
        self.in_order = [(name, known[name]) for name in recipe.taken if name in known]

    def follow(self, journey: Journey, seconds: dict[str, float]) -> None:
        """Take a page through the steps until one drops it; `seconds` of each step are added up."""
        if journey.text is None and "extract" not in self.recipe.steps:
            journey.step, journey.reason = READ, "html_not_extracted"
            return
        page = journey.page.html if journey.page.html is not None else journey.page.text
        try:
            with work_limit(len(page or "")):
                self._follow(journey, seconds)
        except TooMuchWork:
            journey.step, journey.reason, journey.page.html = journey.step or READ, "too_slow", None

    def _follow(self, journey: Journey, seconds: dict[str, float]) -> None:
        for name, step in self.in_order:
            journey.step = name  # here already, for one that takes too long
            started = thread_time()
            journey.reason = step(journey)
            seconds[name] = seconds.get(name, 0.0) + thread_time() - started
            if journey.reason:
                return
        journey.step = None

    # ---- the steps

    def url(self, journey: Journey) -> str | None:
        """Blocklists and rules for the address."""
        if self.url_filter is None:
            self.url_filter = UrlFilter(self.recipe.url.blocklists, self.recipe.url)
        return self.url_filter.reason(journey.page.url)

    def extract(self, journey: Journey) -> str | None:
        """The main text of an HTML page; text that came as text stays."""
        page = journey.page
        if page.html is None:
            return None
        extracted = self._extractor.extract(page.html, page.content_type, page.url)
        journey.text, journey.title = extracted.text, extracted.title
        page.html = None  # the biggest part of a page, and done with
        return extracted.reason

    @cached_property
    def _extractor(self) -> Any:
        from llmkit.crawl.extract.main_text import Extractor

        wanted = self.recipe.extract
        return Extractor(wanted.extractor, wanted.favour, wanted.threshold)

    def language(self, journey: Journey) -> str | None:
        """Only pages that are surely in one of the languages."""
        wanted = self.recipe.language
        self._identify(journey)
        assert journey.language_score is not None
        journey.score = journey.language_score
        if wanted.languages and journey.language not in wanted.languages:
            return "other_language"
        if wanted.min_score is not None and journey.language_score < wanted.min_score:
            return "min_score"
        journey.score = None
        return None

    def gopher_repetition(self, journey: Journey) -> str | None:
        """Too much of the page repeats."""
        return _judged(journey, "gopher_repetition", gopher_repetition(journey.words(), self.recipe.gopher_repetition))

    def gopher_quality(self, journey: Journey) -> str | None:
        """It does not look like prose in its language."""
        self._identify(journey)
        verdict = gopher_quality(journey.words(), self.recipe.gopher_quality, journey.language or "")
        return _judged(journey, "gopher_quality", verdict)

    def c4(self, journey: Journey) -> str | None:
        """Lines that are no sentences are taken out; too little is left, or a sign of no prose."""
        text, verdict = c4(journey.words(), self.recipe.c4)
        journey.score = verdict.score
        if text != journey.text:
            journey.text = text
            if not verdict.reason:  # else it was not counted to the end
                journey.split = Split(text, int(verdict.measures["words"]))
        return verdict.reason

    def fineweb(self, journey: Journey) -> str | None:
        """Its lines are those of a list, a menu or a copy."""
        return _judged(journey, "fineweb", fineweb_quality(journey.words(), self.recipe.fineweb))

    def own(self, journey: Journey) -> str | None:
        """The user's own filters, each shown the document as it would be written now."""
        for spec, reason_of in self._own:
            reason = reason_of(journey.document(), journey.identity)
            if reason is not None and not (isinstance(reason, str) and reason):
                where = f"{OWN_FILTERS}: {spec}: expected None or the reason in a string"
                raise UserError(f"{where}, found {reason!r} for {journey.identity}")
            if reason is not None:
                return reason
        return None

    @cached_property
    def _own(self) -> list[tuple[str, UserFunction]]:
        return [(spec, UserFunction(spec, f"{OWN_FILTERS}: {spec}")) for spec in self.recipe.own.filters]

    def pii(self, journey: Journey) -> str | None:
        """Personal data is replaced, or its page dropped."""
        from llmkit.crawl.filters.personal_data import redact

        text, counts = redact(journey.text or "")
        if self.recipe.pii.mode == "drop":
            journey.score = sum(counts.values()) or None
            return next((kind for kind, count in counts.items() if count), None)
        journey.text = text
        return None

    def _identify(self, journey: Journey) -> None:
        if journey.language is None:
            from llmkit.text.language import identify

            language, score = identify(journey.text or "")
            journey.language, journey.language_score = language, round(float(score), 4)


def _judged(journey: Journey, step: str, verdict: Verdict) -> str | None:
    """Note the measures of a filter, and return its reason."""
    journey.measures[step], journey.score = verdict.measures, verdict.score
    return verdict.reason
