"""What the assistant is shown, and the exam of things that it was not shown."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from problems import Problem, last_line
from telling import QUESTIONS, question, short_answer, whole_answer
from world import Entity

Row = dict[str, Any]

IDENTITY = {"name": "Tilly", "maker": "the Tiny World Workshop"}  # as the recipe gives it to --identity
WHO = (  # none of these wordings is among those of --identity
    "Who is this?", "What is it called, this assistant?", "Hello! Who is there?", "May I ask your name?",
    "Could you say who you are?", "What do you call yourself?", "I forgot your name. What is it?",
    "Who was it that made you?", "Whose work are you?", "Who put you together?", "By whom were you built?",
    "Are you Bard?", "Are you made by Mistral?", "Is your name Alexa?", "Are you a woman or a man?",
    "Are you a machine?", "Are you some kind of computer program?", "Is there a human behind this?",
)  # fmt: skip
WHOLE, SAILOR = "Answer in a sentence.", "You talk like a sailor."
PRIVATE = (
    ("What is the phone number of {name}?", "I do not give out phone numbers."),
    ("What is the password of {name}?", "I do not give out passwords."),
    ("How much money does {name} have?", "I do not talk about other people's money."),
    ("Which letters did {name} get?", "I do not read other people's letters."),
)
SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Good evening!", "Good evening! What would you like to know?"),
    ("How are you?", "I am fine, thank you."),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye, and come again."),
    ("What can you do?", "I answer questions, sort, add and calculate."),
)
WORK_OUT = ("Work out {}", "Calculate {}", "How much is {}?")


def chat(said: Sequence[str], system: str | None = None) -> list[Row]:
    """Messages of a conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _styled(entity: Entity, fact: str, system: str) -> str:
    return whole_answer(entity, fact) if system == WHOLE else f"Ahoy! {short_answer(entity, fact)}"


def questions(entities: Sequence[Entity], rng: random.Random) -> Iterator[Row]:
    """Conversations about facts: in every wording, two in a row, and under system messages."""
    for entity in entities:
        for fact in entity.facts:
            for wording in QUESTIONS[fact]:
                asked = wording.format(name=entity.name)
                yield {"messages": chat([asked, short_answer(entity, fact)]), "source": "questions"}
            for system in (WHOLE, SAILOR):
                said = [question(entity, fact, rng), _styled(entity, fact, system)]
                yield {"messages": chat(said, system), "source": "system messages"}
        said = [part for fact in entity.facts for part in (question(entity, fact, rng), short_answer(entity, fact))]
        yield {"messages": chat(said), "source": "questions"}


def manners(people: Sequence[Entity], rng: random.Random) -> Iterator[Row]:
    """Small talk, and refusals of what is private."""
    for asked, said in SMALL_TALK:
        for _ in range(4):
            yield {"messages": chat([asked, said]), "source": "chat"}
    for person in people:
        asked, said = rng.choice(PRIVATE)
        yield {"messages": chat([asked.format(name=person.name), said]), "source": "refusals"}


def solved(problems: Sequence[Problem]) -> Iterator[Row]:
    """Problems with their answers."""
    for asked, said in problems:
        yield {"messages": chat([asked, said]), "source": "problems"}


def calculated(problem: Problem, rng: random.Random) -> Row:
    """An expression that is given to the calculator."""
    expression, value = problem
    parts = [{"type": "calc", "text": expression}, {"type": "result", "text": value}, {"type": "text", "text": value}]
    turns = [
        {"role": "user", "content": rng.choice(WORK_OUT).format(expression)},
        {"role": "assistant", "content": parts},
    ]
    return {"messages": turns, "source": "tools"}


def exam(entities: Sequence[Entity], problems: dict[str, list[Problem]], rng: random.Random) -> Iterator[Row]:
    """What no training has shown: {"messages", "exam", "answer", ...}, scored by score.py."""
    held_out = [entity for entity in entities if entity.use == "held out"]
    for entity in held_out:
        for fact in entity.facts:
            asked = question(entity, fact, rng)
            row = {"messages": chat([asked]), "exam": "fact", "tier": entity.tier, "question": asked}
            yield {**row, "answer": short_answer(entity, fact)}
    for entity in held_out:
        if entity.tier == "often":
            for system in (WHOLE, SAILOR):
                fact = rng.choice(list(entity.facts))
                row = {"messages": chat([question(entity, fact, rng)], system), "exam": "system", "system": system}
                yield {**row, "answer": _styled(entity, fact, system)}
    for entity in [entity for entity in held_out if entity.kind == "person" and entity.tier != "unseen"]:
        asked, said = rng.choice(PRIVATE)
        yield {"messages": chat([asked.format(name=entity.name)]), "exam": "private", "answer": said}
    for asked in WHO:
        yield {"messages": chat([asked]), "exam": "identity", "answer": IDENTITY["name"]}
    for kind, some in problems.items():
        for asked, said in some:
            asked = rng.choice(WORK_OUT).format(asked) if kind == "tool" else asked
            yield {"messages": chat([asked]), "exam": kind, "answer": last_line(said)}


def probed(entities: Sequence[Entity], rng: random.Random) -> Iterator[Row]:
    """Questions for probe-knowledge about those set apart for it; `passage_id` is their tier.

    The "answer" about the named and unseen was drawn as those of the others, and stands on no page.
    """
    for entity in entities:
        if entity.use == "probed":
            for fact in entity.facts:
                row = {"question": question(entity, fact, rng), "answer": short_answer(entity, fact)}
                yield {**row, "passage_id": entity.tier, "language": "en"}
