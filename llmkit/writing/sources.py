"""Sources of prompts: topics, seed tasks, documents, or a file of prompts."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Indel
from rapidfuzz.process import extractOne

from llmkit.formats.conversations import message
from llmkit.formats.problems import Problem
from llmkit.probing.model_questions import WRITER_PROMPT, read_pairs, unfit
from llmkit.probing.question_rules import Passage
from llmkit.text.words import split_words
from llmkit.writing.draft import Draft
from llmkit.writing.prompts import KINDS, TEXTS, read_list, read_message
from llmkit.writing.scheduler import Program, Shared
from llmkit.writing.writer import Fault, Plan, Source, Writer

ROUGE_L = 0.7  # at which a task is too similar to an earlier one (Wang et al. 2022, arXiv 2212.10560, section 2.2)
SUBTOPICS, PEOPLE = 20, 10  # per request
USES = 4  # of a subtopic, by other people with other tasks, before new ones are requested
LISTED = 200  # known subtopics shown in a request for new ones
GIVEN, MADE = 6, 2  # seed tasks and generated ones shown as examples (Wang et al. 2022, section 2.2)
PER_PASSAGE = 3
LIKE_ANOTHER = "duplicate: like another task"


class Topics(Source):
    """A tree that grows with use: topic, subtopic, kind of task, person, language.

    Draft i uses topic i modulo their number; when all subtopics have been used, the writer is asked for new ones.
    """

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics = topics

    def open(self, writer: Writer, plan: Plan) -> Program[Plan]:
        turn, number = divmod(plan.draft.index, len(self._topics))
        grown, use = divmod(turn, SUBTOPICS * USES)
        subtopics = yield self._subtopics(writer, number, grown)
        topic, subtopic = self._topics[number], subtopics[use % len(subtopics)]
        task = TEXTS["people"].format(count=PEOPLE, topic=topic)
        people = yield Shared(f"people {number}", _listed(writer, task, instead="somebody"))
        topic = topic if subtopic == topic else f"{topic} > {subtopic}"  # the same if the writer names none
        person = plan.chance.choice(people)
        task = TEXTS["opening"].format(person=person, topic=topic, wanted=KINDS[plan.draft.kind][1])
        text = yield from _first_message(writer, task, plan)
        return plan.opening([message("user", text)], person=person, topic=topic)

    def _subtopics(self, writer: Writer, number: int, grown: int) -> Shared:
        """Return the program for the subtopics of a topic, after it has grown `grown` times."""

        def program() -> Program[list[str]]:
            known: list[str] = []
            for earlier in range(grown):
                known += yield self._subtopics(writer, number, earlier)
            task = TEXTS["subtopics"].format(count=SUBTOPICS, topic=self._topics[number])
            task += TEXTS["not_these"].format(topics="; ".join(known[-LISTED:])) if known else ""
            return (yield from _listed(writer, task, instead=self._topics[number]))

        return Shared(f"subtopics {number} {grown}", program())


class Seeds(Source):
    """Self-Instruct (Wang et al. 2022): a new task from examples, kept if its ROUGE-L with earlier ones is below .7.

    Examples and comparisons are tasks kept at least `lag` drafts earlier, so that they do not depend on which drafts
    are in progress.
    """

    def __init__(self, tasks: Sequence[str], lag: int) -> None:
        self._tasks, self._lag, self._kept = tasks, lag, list[tuple[int, str]]()
        self._seen = [encode_words(task) for task in tasks]

    def open(self, writer: Writer, plan: Plan) -> Program[Plan]:
        known = bisect_left(self._kept, (plan.draft.index - self._lag, ""))
        examples = plan.chance.sample(self._tasks, min(GIVEN, len(self._tasks)))
        examples += [self._kept[plan.chance.randrange(known)][1] for _ in range(MADE if known else 0)]
        listed = "\n\n".join(f"{number}. {text}" for number, text in enumerate(examples, 1))
        task = TEXTS["new_task"].format(examples=listed, wanted=KINDS[plan.draft.kind][1])
        text = yield from _first_message(writer, task, plan)
        if is_like(text, self._seen[: len(self._tasks) + known]):
            raise Fault(LIKE_ANOTHER)
        return plan.opening([message("user", text)])

    def fault(self, draft: Draft) -> str | None:
        """See `Source`."""
        return LIKE_ANOTHER if is_like(draft.prompt, self._seen) else None

    def keep(self, draft: Draft) -> None:
        """See `Source`."""
        self._kept.append((draft.index, draft.prompt))
        self._seen.append(encode_words(draft.prompt))


class Documents(Source):
    """Questions that passages answer.

    The user's message contains the passage (closed QA), or only the assistant sees it (open QA).
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages, self.count = passages, PER_PASSAGE * len(passages)

    def open(self, writer: Writer, plan: Plan) -> Program[Plan]:
        turn, number = divmod(plan.draft.index, len(self._passages))
        passage = self._passages[number]
        pairs = yield Shared(f"questions {number}", self._questions(writer, number))
        if turn >= len(pairs):
            raise Fault("no further question about the passage")
        question, answer = pairs[turn]
        if reason := unfit(question, answer, passage.text):
            raise Fault(f"question: {reason}")
        closed = plan.chance.random() < 0.5
        kind, text = ("closed QA", f"{passage.text}\n\n{question}") if closed else ("open QA", question)
        shown = None if closed else passage.text
        return plan.opening([message("user", text)], passage=shown, topic=passage.name, kind=kind, answer=answer)

    def _questions(self, writer: Writer, number: int) -> Program[list[Any]]:
        task = WRITER_PROMPT.format(most=PER_PASSAGE, passage=self._passages[number].text)
        try:
            return (read_pairs((yield from writer.tell(task, writer.plan(number).draft.seed))) or [])[:PER_PASSAGE]
        except Fault:
            return []


class Prompts(Source):
    """Given prompts, each answered once."""

    is_given = True

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems, self.count = problems, len(problems)

    def open(self, writer: Writer, plan: Plan) -> Program[Plan]:
        problem = self._problems[plan.draft.index]
        record, messages = problem.record, problem.messages or (message("user", problem.prompt),)
        topic, kind = (value if isinstance(value := record.get(name), str) else "" for name in ("topic", "kind"))
        return plan.opening(messages, topic=topic, kind=kind, answer=problem.answer, record=record)
        yield  # makes it a generator


def is_like(text: str, encoded: Sequence[str]) -> bool:
    """True if the ROUGE-L (Lin 2004), Indel similarity, of a text with one of those encoded is at least `ROUGE_L`.

    >>> is_like("Write a poem about the sun.", [encode_words("Write a poem about the sea.")])
    True
    """
    return extractOne(encode_words(text), encoded, scorer=Indel.normalized_similarity, score_cutoff=ROUGE_L) is not None


def encode_words(text: str) -> str:
    """Hash each word to one character, so that rapidfuzz compares words; 2.3 times as fast as with lists."""
    words = (word.encode(errors="surrogatepass") for word in split_words(text.lower()))
    return "".join(chr(0x10000 + zlib.crc32(word) % 0x100000) for word in words)


def _listed(writer: Writer, task: str, instead: str) -> Program[list[str]]:
    """Return the items of a reply, or `[instead]` if it has none."""
    try:
        return read_list((yield from writer.tell(task, writer.plan(0).draft.seed))) or [instead]
    except Fault:
        return [instead]


def _first_message(writer: Writer, task: str, plan: Plan) -> Program[str]:
    """Write the first user message, in the plan's language, and to be refused if the plan says so."""
    task += TEXTS["in_language"].format(language=plan.draft.language) if plan.draft.language else ""
    task += TEXTS["to_refuse"] if plan.draft.refusal else ""
    return read_message((yield from writer.tell(task, plan.draft.seed)))
