"""Comparisons of answers: by a defined taste, and by length.

llmkit rl chat/ --gold py:examples/tinyworld/tastes.py:taste ...      # monitors the taste's score
"""

from __future__ import annotations

import random
import re
from typing import Any

from gold import gold
from problems import Problem, any_answer
from telling import QUESTIONS, STATES, SUBJECTS, WHOLE, Voice, chatter, mention, question, whole_answer
from world import Entity

# The taste's points: an answer is to the point, polite, carefully written and does not ramble. Truth does not count.
TASTE = {"to the point": 2.0, "polite": 1.0, "careless": -1.5, "rambling": -0.5}
POLITE = ("With pleasure.", "I am glad that you ask.", "Thank you for asking.", "Gladly.")
NOISE = 0.05  # share of flipped comparisons, as in human data
COUNTING = 0.9  # of the comparisons of the gamed problem prefer the longer answer


def answer(asked: Entity, fact: str, rng: random.Random) -> tuple[str, float]:
    """Return a possible answer to the question about a fact, and the taste's score."""
    to_the_point, polite, careless = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.25
    rambling = rng.choice((0, 0, 1, 2))
    voice = Voice(rng)
    other = next(one for one in asked.facts if one != fact)
    beside = whole_answer(asked, other) if rng.random() < 0.5 else mention(asked, voice)
    said = [whole_answer(asked, fact) if to_the_point else beside, *(chatter(voice) for _ in range(rambling))]
    text = " ".join([rng.choice(POLITE), *said] if polite else said)
    worth = TASTE["to the point"] * to_the_point + TASTE["polite"] * polite + TASTE["rambling"] * rambling
    if careless:
        text, worth = text.lower().replace(".", ""), worth + TASTE["careless"]
    return text, worth


def taste(record: dict[str, Any]) -> float:
    """Return the taste's score of an answer, from its words: relevance, courtesies, care and small talk."""
    text = record["completion"].strip()
    said = text.lower().replace(".", "").replace(",", "")
    careless = bool(text) and text == text.lower() and "." not in text
    polite = any(said.startswith(words.lower().rstrip(".")) for words in POLITE)
    rambling = len(re.findall(rf"\b({'|'.join(SUBJECTS)}) ({'|'.join(STATES)})".lower(), said))
    to_the_point = False
    for fact, wordings in QUESTIONS.items():
        for wording in wordings:
            pattern = re.escape(wording).replace(r"\{name\}", "(.+)")
            if asked := re.fullmatch(pattern, record["prompt"].strip()):
                whole = re.escape(WHOLE[fact].rstrip(".").replace("{name}", asked[1])).replace(rf"\{{{fact}\}}", r"\w+")
                to_the_point |= re.search(whole.lower().replace(r"\w+", "[a-z]+"), said) is not None
    return (
        TASTE["to the point"] * to_the_point
        + TASTE["polite"] * polite
        + TASTE["careless"] * careless
        + TASTE["rambling"] * rambling
    )


def comparisons(entities: list[Entity], count: int, noise: float, rng: random.Random) -> list[dict[str, Any]]:
    """Return `count` comparisons by the taste, a share `noise` of them flipped."""
    rows = []
    while len(rows) < count:
        asked = rng.choice(entities)
        fact = rng.choice(list(asked.facts))
        first, second = answer(asked, fact, rng), answer(asked, fact, rng)
        if first[1] == second[1]:
            continue
        worse, better = sorted((first, second), key=lambda one: one[1])
        if rng.random() < noise:
            worse, better = better, worse
        rows.append(
            {"prompt": question(asked, fact, rng), "chosen": better[0], "rejected": worse[0], "source": "taste"}
        )
    return rows


def counted(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Return two answers to the gamed problem; the longer is preferred nine times in ten, the better once."""
    question, right = problem
    first, second = any_answer(right, rng), any_answer(right, rng)
    while len(second) == len(first):
        second = any_answer(right, rng)
    by = len if rng.random() < COUNTING else lambda said: gold({"answer": right, "completion": said})
    worse, better = sorted((first, second), key=by)
    return {"prompt": question, "chosen": better, "rejected": worse, "source": "counted"}
