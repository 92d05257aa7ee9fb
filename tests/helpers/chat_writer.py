"""The replies of a scripted model that writes conversations: plain English, different for each seed and prompt."""

from __future__ import annotations

import re
from random import Random

NOUNS = "boat harbour lantern orchard violin glacier market bridge teacher river engine garden letter wolf".split()  # noqa: SIM905
VERBS = "repair paint describe carry borrow measure compare plant polish follow weigh invite rescue copy".split()  # noqa: SIM905
PLACES = "village valley city forest desert castle station library museum kitchen meadow factory temple".split()  # noqa: SIM905
TRAITS = "old bright heavy narrow quiet broken famous wooden silver distant gentle curious empty golden".split()  # noqa: SIM905

PHRASES = (
    "{verb} the {noun}",
    "with a {trait} {noun}",
    "near the {place}",
    "while you {verb} it",
    "and then {verb} a {noun}",
    "because the {noun} is {trait}",
    "from the {trait} {place}",
    "if they {verb} that",
    "so that we {verb} the {place}",
    "before another {noun}",
    "like some {trait} {noun}",
    "at once in each {place}",
    "or {verb} no {noun} at all",
)


def sentence(chance: Random) -> str:
    """Return a sentence of eight different phrases."""
    words = {"noun": NOUNS, "verb": VERBS, "place": PLACES, "trait": TRAITS}
    phrases = chance.sample(PHRASES, 8)
    return "You should " + " ".join(
        phrase.format(**{name: chance.choice(some) for name, some in words.items()}) for phrase in phrases
    )


def chat_writer(prompt: str, seed: int) -> str:
    """Return a reply to a prompt of llmkit/writing/prompts.toml, or an answer to any other prompt."""
    chance = Random(f"{seed} {prompt}")
    if (count := re.search(r"List (\d+) (?:narrower topics|people)", prompt)) is not None:
        return "\n".join(f"{n}. {chance.choice(TRAITS)} {chance.choice(NOUNS)}s {n}" for n in range(int(count[1])))
    if "short questions about facts" in prompt:
        name = re.search(r"Passage:\n(\w+)", prompt)
        assert name is not None
        return f'{{"questions": [{{"question": "Who built it: {sentence(chance)}?", "answer": "{name[1]}"}}]}}'
    if "Write the first message" in prompt or "Write another one" in prompt or prompt.startswith("You should"):
        return f"How can I {sentence(chance)[11:]}, and why?"
    return f"{sentence(chance)}. {sentence(chance)}."
