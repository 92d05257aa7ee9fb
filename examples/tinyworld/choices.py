"""Multiple choice and minimal pairs about Tiny World, for `llmkit evaluate` (facts.toml, word_order.toml).

Both are about held-out entities and plain sentences, so that base models and assistants get the same items.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from telling import SENTENCES, WHOLE
from world import KINDS, Entity

OPTIONS = 4  # choices per question
# Before each sentence: at the start of a text a name has other tokens, which are rare on the pages
KNOWN = "It is well known that"


def facts(entities: Sequence[Entity], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield sentences without their last word, with four choices for it."""
    for entity in entities:
        for fact, right in entity.facts.items() if entity.use == "held out" else ():
            others = [value for value in KINDS[entity.kind][fact].split() if value != right]
            values = [right, *rng.sample(others, OPTIONS - 1)]
            rng.shuffle(values)
            said = WHOLE[fact].partition(f" {{{fact}}}")[0]
            said = said if said.startswith("{name}") else said[0].lower() + said[1:]
            query = f"{KNOWN} {said.format(name=entity.name)}"
            row = {"query": query, "choices": [f"{value}." for value in values], "gold": values.index(right)}
            yield {**row, "fact": fact, "tier": entity.tier}


def word_order(entities: Sequence[Entity], rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield pairs of a sentence and the same sentence with two adjacent words swapped."""
    for entity in entities:
        for fact, value in entity.facts.items() if entity.use == "held out" else ():
            wordings = [wording for wording in SENTENCES[fact] if "{deed}" not in wording]
            words = rng.choice(wordings).format(name=entity.name, **{fact: value}).rstrip(".").split()
            place = rng.randrange(1, len(words) - 1)
            exchanged = [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            yield {"good": " ".join(words) + ".", "bad": " ".join(exchanged) + ".", "fact": fact}
