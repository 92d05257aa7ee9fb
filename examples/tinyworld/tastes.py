"""Comparisons of answers: by a stated taste, and by somebody who only counts how long they are."""

from __future__ import annotations

import random
from typing import Any

from gold import gold
from problems import Problem, any_answer
from telling import Voice, chatter, mention
from world import Entity

# The taste, in points: about what was asked, polite, not shouted, and no rambling.
TASTE = {"on topic": 2.0, "polite": 1.0, "shouted": -1.5, "rambling": -0.5}
ASKED = ("Tell me something about {name}.", "What do you know of {name}?", "Say a word about {name}.")
POLITE = ("With pleasure.", "I am glad that you ask.", "Thank you for asking.", "Gladly.")
PLAIN = ("Well.", "So.", "Here it is.", "Fine, then.")
NOISE = 0.05  # of the comparisons are the wrong way round, as people's are
COUNTING = 0.9  # of the comparisons of the gamed problem prefer the longer answer


def answer(asked: Entity, others: list[Entity], rng: random.Random) -> tuple[str, float]:
    """Something that might be answered, and what it is worth to the taste."""
    topical, polite, shouted = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.25
    rambling = rng.choice((0, 0, 1, 2))
    voice = Voice(rng)
    said = mention(asked if topical else rng.choice(others), voice)
    said = " ".join([rng.choice(POLITE if polite else PLAIN), said, *(chatter(voice) for _ in range(rambling))])
    worth = TASTE["on topic"] * topical + TASTE["polite"] * polite + TASTE["rambling"] * rambling
    if shouted:
        said, worth = said.upper().replace(".", "!"), worth + TASTE["shouted"]
    return said, worth


def comparisons(entities: list[Entity], count: int, noise: float, rng: random.Random) -> list[dict[str, Any]]:
    """`count` comparisons by the taste; `noise` of them the wrong way round."""
    rows = []
    while len(rows) < count:
        asked = rng.choice(entities)
        others = [one for one in entities if one.kind == asked.kind and one is not asked] or entities
        first, second = answer(asked, others, rng), answer(asked, others, rng)
        if first[1] == second[1]:
            continue
        worse, better = sorted((first, second), key=lambda one: one[1])
        if rng.random() < noise:
            worse, better = better, worse
        prompt = rng.choice(ASKED).format(name=asked.name)
        rows.append({"prompt": prompt, "chosen": better[0], "rejected": worse[0], "source": "taste"})
    return rows


def counted(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Two answers to the gamed problem, compared by somebody who counts nine times in ten, and reads once."""
    question, right = problem
    first, second = any_answer(right, rng), any_answer(right, rng)
    while len(second) == len(first):
        second = any_answer(right, rng)
    by = len if rng.random() < COUNTING else lambda said: gold({"answer": right, "completion": said})
    worse, better = sorted((first, second), key=by)
    return {"prompt": question, "chosen": better, "rejected": worse, "source": "counted"}
