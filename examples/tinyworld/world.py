"""The entities of Tiny World, their facts, and how often the pages tell each fact.

An entity has one of the `KINDS`, two facts, and one of the `TIERS`. The names of all tiers come from one distribution,
so that a name does not reveal its tier.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

CONSONANTS, CLUSTERS, VOWELS = tuple("bdfghklmnprstvz"), ("br", "dr", "kr", "st", "tr"), "aeiou"
ENDINGS = ("", "n", "s", "l")

# The facts of each kind of entity, and their possible values.
KINDS = {
    "person": {
        "town": "Arbeck Bolsted Carrow Dunmere Elsby Farnholt Glaswick Hollin Istrad Jorvale Kelbrook Lindale Morwell "
        "Norbeck Oxley Penholm Quarley Rothby Selwick Torfield Ulmere Vexford Westry Yarrow",
        "work": "baker smith tailor miller sailor painter teacher farmer doctor lawyer weaver hunter potter singer "
        "banker carpenter gardener printer surgeon librarian",
    },
    "animal": {
        "food": "berries fish grass honey leaves mice moss mushrooms nuts roots seeds snails worms ants",
        "home": "caves forests hills lakes marshes meadows orchards rivers swamps valleys gardens deserts",
    },
    "island": {
        "product": "cheese wool salt glass paper rope soap tea wine butter pottery silver copper candles",
        "tower": "red blue green white black yellow grey brown orange purple",
    },
    "feast": {
        "month": "January February March April May June July August September October November December",
        "custom": "dancing singing racing fishing cooking kites lanterns masks drums poems wrestling swimming",
    },
}
SHARES = {"person": 0.55, "animal": 0.15, "island": 0.15, "feast": 0.15}  # of the entities

# How often the good pages tell each fact of an entity, by tier. `named` occur in pages without their facts, `unseen`
# nowhere; the many `glimpsed` have one fact, told once, like most names in a corpus, and are never asked about.
TOLD = {"often": 55, "sometimes": 10, "seldom": 4, "once": 1, "named": 0, "unseen": 0}
NAMED_MENTIONS = 12
TIERS = (*TOLD, "glimpsed")
USES = ("chats", "probed", "held out")


@dataclass(frozen=True)
class Size:
    """Numbers of everything; `often` to `unseen` are entities (in chats, probed for lessons, held out)."""

    often: tuple[int, int, int] = (44, 80, 40)
    sometimes: tuple[int, int, int] = (0, 10, 24)
    seldom: tuple[int, int, int] = (0, 10, 24)
    once: tuple[int, int, int] = (0, 20, 24)
    named: tuple[int, int, int] = (0, 40, 24)
    unseen: tuple[int, int, int] = (0, 400, 60)
    pages: int = 1414  # good pages
    held_out_pages: int = 40
    bad_pages: int = 60  # of each kind
    sentences: int = 15  # that tell facts, per page, approximately
    lessons: int = 4600  # solved problems in the schoolbook
    problems: int = 4000  # for rl
    examined: int = 300  # held-out problems of each kind
    solved: int = 100  # conversations with a solved problem, of each kind
    tools: int = 1500  # conversations with a call of the calculator
    pairs: int = 1800  # comparisons


FULL = Size()
QUICK = Size(
    *[(3, 3, 3), (0, 2, 2), (0, 2, 2), (0, 2, 2), (0, 2, 2), (0, 4, 3)],
    pages=120,
    held_out_pages=4,
    bad_pages=4,
    lessons=300,
    problems=60,
    examined=5,
    solved=20,
    tools=60,
    pairs=80,
)


@dataclass
class Entity:
    """One person, animal, island or feast."""

    name: str
    kind: str
    tier: str
    use: str  # one of USES, or "" for the glimpsed
    facts: dict[str, str]
    told: dict[str, int] = field(default_factory=dict)  # by fact, how often good pages tell it


def invent(size: Size, glimpsed: int, seed: int) -> list[Entity]:
    """Return all entities. The first three letters are unique except among the glimpsed.

    With Truvil and Truvus both in the questions, a model this small confused them.
    """
    rng = random.Random(f"world {seed}")
    wanted = [(tier, use) for tier in TOLD for use, count in zip(USES, getattr(size, tier), strict=True)
              for _ in range(count)]  # fmt: skip
    names = _names(len(wanted), glimpsed, rng)
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(100 * share))]
    entities = []
    for number, name in enumerate(names):
        tier, use = wanted[number] if number < len(wanted) else ("glimpsed", "")
        kind = kinds[(number * 37) % len(kinds)]  # 37 and 100 are coprime: every tier has its share of each kind
        facts = {fact: rng.choice(values.split()) for fact, values in KINDS[kind].items()}
        entities.append(Entity(name, kind, tier, use, facts, dict.fromkeys(facts, 0)))
    return entities


def _names(distinct: int, others: int, rng: random.Random) -> list[str]:
    taken = {word for kinds in KINDS.values() for values in kinds.values() for word in values.split()}
    names: dict[str, None] = {}
    beginnings = set()
    while len(names) < distinct + others:
        beginning = rng.choice(CONSONANTS + CLUSTERS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        if len(names) < distinct and beginning in beginnings:
            continue
        beginnings.add(beginning)
        name = (beginning + rng.choice(VOWELS) + rng.choice(ENDINGS)).capitalize()
        if name not in taken:
            names[name] = None
    return list(names)
