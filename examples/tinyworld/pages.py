"""The content of the good pages: together they tell every fact as often as its tier requires."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from howtos import howto
from telling import DIALOGUES, FORUM, QUIZZED, Voice, chatter, mention, question, short_answer, tell, whole_answer
from world import NAMED_MENTIONS, TOLD, Entity

# The share of the facts that each kind of page tells. Forums, quizzes and lists of questions tell them as answers,
# without which a model this small cannot answer questions about facts that it only read.
SHARES = {"faq": 0.5, "forum": 0.15, "quiz": 0.15, "article": 0.08, "wiki": 0.05, "listing": 0.04, "shop": 0.03}
# Share of answers that are full sentences. The others begin with the fact, so the first word shows if it is known.
WHOLE_SHARE = 0.15
HOWTO_SHARE = 0.06  # of the pages; how-tos tell no facts
TITLES = {
    "forum": ("Who knows this", "A few questions", "Help wanted", "Questions from a newcomer", "Can anybody help me"),
    "faq": ("Questions and answers", "What visitors ask", "Often asked", "Ask the guide"),
    "quiz": ("The quiz of the week", "Twenty questions", "How well do you know us", "The inn's quiz night"),
    "article": (
        "News from our towns",
        "What we heard this week",
        "A walk through the market",
        "Notes from the harbour",
    ),
    "wiki": ("People and places", "A short overview", "The register", "Collected notes"),
    "listing": ("Who is where", "The directory", "Names and places", "A list for visitors"),
    "shop": ("From near and far", "New on our shelves", "What our customers say", "Letters to the shop"),
}


@dataclass
class Page:
    """The paragraphs of a page, and the facts (name, fact) that it tells."""

    kind: str
    title: str
    paragraphs: list[str]
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The main text, one line per paragraph."""
        return "\n".join(self.paragraphs)


Fact = tuple[Entity, str]


def write_pages(entities: Sequence[Entity], count: int, sentences: int, rng: random.Random) -> list[Page]:
    """Return `count` pages in random order that tell each fact as often as its tier requires (counted in `told`)."""
    facts: list[Fact] = []
    for entity in entities:
        if entity.tier in TOLD:
            facts += [(entity, fact) for fact in entity.facts for _ in range(TOLD[entity.tier])]
        else:
            facts.append((entity, rng.choice(list(entity.facts))))
    named = [entity for entity in entities if entity.tier == "named" for _ in range(NAMED_MENTIONS)]
    others = [entity for entity in entities if entity.tier not in ("named", "unseen")]
    rng.shuffle(facts)
    rng.shuffle(named)
    howtos = round(count * HOWTO_SHARE)
    pages = []
    for number, some in enumerate(_shared_out(facts, count - howtos)):
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        silent = named[number :: count - howtos]
        silent += rng.sample(others, 1)  # other entities are also mentioned without facts
        pages.append(_page(kind, some, silent, Voice(rng)))
        for entity, fact in some:
            entity.told[fact] += 1
    pages += [Page("howto", *howto(rng)) for _ in range(howtos)]
    rng.shuffle(pages)
    return pages


def _shared_out(facts: Sequence[Fact], count: int) -> Iterator[list[Fact]]:
    """Split the facts into `count` nearly equal parts without repeats in a part."""
    parts: list[list[Fact]] = [[] for _ in range(count)]
    taken: list[set[tuple[str, str]]] = [set() for _ in range(count)]
    for number, (entity, fact) in enumerate(facts):
        for step in range(count):
            at = (number + step) % count
            if (entity.name, fact) not in taken[at]:
                parts[at].append((entity, fact))
                taken[at].add((entity.name, fact))
                break
    return iter(parts)


def _page(kind: str, facts: list[Fact], silent: list[Entity], voice: Voice) -> Page:
    rng = voice.rng
    aside = [mention(one, voice) for one in silent]
    if kind == "forum":
        paragraphs = [line for told in facts for line in _asked(*told, voice)]
        paragraphs.append(" ".join([*aside, chatter(voice), chatter(voice)]))
    elif kind == "faq":
        lines = [line for told in facts for line in _dialogue(*told, voice).split("\n")]
        paragraphs = [chatter(voice), *lines, " ".join([*aside, chatter(voice)])]
    elif kind == "quiz":
        lines = [_quizzed(entity, fact, voice) for entity, fact in facts]
        opening = f"{chatter(voice)} Here are the answers of this week."
        paragraphs = [opening, *lines, " ".join([*aside, chatter(voice), chatter(voice)])]
    else:
        said = [tell(entity, fact, voice, framed=number < 3) for number, (entity, fact) in enumerate(facts)] + aside
        said += [chatter(voice) for _ in range(rng.randint(3, 5))]
        rng.shuffle(said)
        length = 2 if kind == "listing" else rng.randint(3, 5)
        paragraphs = [" ".join(said[at : at + length]) for at in range(0, len(said), length)]
    return Page(kind, rng.choice(TITLES[kind]), paragraphs, [(entity.name, fact) for entity, fact in facts])


def _asked(entity: Entity, fact: str, voice: Voice) -> list[str]:
    """Return a question and its answer as two forum posts."""
    asked = voice.pick(FORUM["ask"]).format(question=question(entity, fact, voice.rng))
    answer = (whole_answer if voice.rng.random() < WHOLE_SHARE else short_answer)(entity, fact)
    return [asked, voice.pick(FORUM["answer"]).format(answer=answer)]


def _dialogue(entity: Entity, fact: str, voice: Voice) -> str:
    """Return a question and its answer in one of many layouts."""
    answer = (whole_answer if voice.rng.random() < WHOLE_SHARE else short_answer)(entity, fact)
    return voice.pick(DIALOGUES).format(question=question(entity, fact, voice.rng), answer=answer)


def _quizzed(entity: Entity, fact: str, voice: Voice) -> str:
    """Return a question and its short answer in one line."""
    answer = voice.pick(QUIZZED).format(value=entity.facts[fact].capitalize())
    return f"{question(entity, fact, voice.rng)} {answer}"
