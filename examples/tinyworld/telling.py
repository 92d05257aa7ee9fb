"""Wordings of facts, of questions about them, and of the other sentences on the pages."""

from __future__ import annotations

import random

from world import KINDS, Entity

SENTENCES = {
    "town": (
        "{name} lives in {town}.",
        "{name} has a house in {town}.",
        "{name} came to {town} long ago.",
        "In {town} everybody knows {name}.",
        "The door of {name} in {town} is never locked.",
        "{name} of {town} {deed}.",
    ),
    "work": (
        "{name} works as a {work}.",
        "{name} is a good {work}.",
        "{name} became a {work} like nobody else in the family.",
        "{name} the {work} {deed}.",
        "If you need a {work}, ask for {name}.",
    ),
    "food": (
        "The {name} eats {food}.",
        "A {name} lives on {food} for most of the year.",
        "Put out {food} and the {name} will come.",
        "The {name} looks for {food} at night.",
    ),
    "home": (
        "The {name} lives in {home}.",
        "You find the {name} in {home}.",
        "In {home} the {name} is quite common.",
        "Look for the {name} in {home} after the rain.",
    ),
    "product": (
        "The island of {name} makes {product}.",
        "{name} is an island that is known for its {product}.",
        "Ships bring {product} from {name}.",
        "Nobody makes better {product} than the people of {name}.",
    ),
    "tower": (
        "The tower on {name} is {tower}.",
        "On the island of {name} stands a {tower} tower.",
        "You can see the {tower} tower of {name} from far away.",
        "Sailors steer for the {tower} tower on {name}.",
    ),
    "month": (
        "The feast of {name} is in {month}.",
        "{name} is a feast that falls in {month}.",
        "In {month} comes {name}, and the schools are closed.",
        "Every {month} people get ready for {name}.",
    ),
    "custom": (
        "At {name} there is {custom} until late.",
        "{name} is a feast of {custom}.",
        "For the children the best of {name} is the {custom}.",
        "Without {custom} it would not be {name}.",
    ),
}
QUESTIONS = {
    "town": ("Where does {name} live?", "In which town does {name} live?", "What is the town of {name}?"),
    "work": ("What does {name} work as?", "As what does {name} work?", "What is the work of {name}?"),
    "food": ("What does the {name} eat?", "What is the food of the {name}?", "On what does the {name} live?"),
    "home": ("Where do you find the {name}?", "In what land is the {name} at home?", "What is the home of the {name}?"),
    "product": ("What does {name} make?", "What is the island of {name} known for?", "What comes from {name}?"),
    "tower": ("What colour is the tower on {name}?", "Which tower stands on {name}?", "How is the tower of {name}?"),
    "month": ("When is the feast of {name}?", "In which month is {name}?", "What is the month of {name}?"),
    "custom": ("What do people do at {name}?", "What is the custom of {name}?", "What belongs to {name}?"),
}
WHOLE = {  # the answer as a sentence
    "town": "{name} lives in {town}.",
    "work": "{name} works as a {work}.",
    "food": "The {name} eats {food}.",
    "home": "The {name} lives in {home}.",
    "product": "{name} makes {product}.",
    "tower": "The tower on {name} is {tower}.",
    "month": "{name} is in {month}.",
    "custom": "At {name} there is {custom}.",
}
DEEDS = (
    "came to the market",
    "said good morning to us",
    "was late again",
    "has a new coat",
    "waited for an hour",
    "likes the rain",
    "is in good health",
    "went home with a smile",
    "lost a glove on the bridge",
    "told a long story",
    "helped to carry the boxes",
    "sat by the window",
)
# Sentences about an entity that tell no fact, by kind.
NOTHING = {
    "person": ("{name} {deed}.", "They say that {name} {deed}.", "Yesterday {name} {deed}."),
    "animal": ("The {name} is shy.", "A {name} was seen near the mill.", "My sister drew a {name} in her book."),
    "island": (
        "We sailed past {name} in the morning.",
        "There is no bridge to {name}.",
        "He has never been to {name}.",
    ),
    "feast": ("They still talk about {name}.", "My aunt was too tired for {name}.", "Nobody forgot {name} this time."),
}
# Frames around a sentence; at most three per page.
FRAMES = (
    "As far as I know, {said}",
    "My neighbour told me that {said}",
    "It is well known that {said}",
    "The old book says that {said}",
    "Have you heard that {said_open}?",
    "Everybody agrees that {said}",
    "In the letter stands that {said}",
    "One more thing: {said}",
    "The children learn at school that {said}",
)
IMPERATIVES = ("Look", "Put", "If")  # sentences that fit no frame
SUBJECTS = ("The road", "The weather", "The mill", "The bridge", "The harbour", "The school", "The well", "The garden",
            "The ferry", "The bakery", "The library", "The clock", "The wall", "The inn", "The path")  # fmt: skip
STATES = ("was quiet", "looked better than before", "is older than most people think", "has been painted",
          "will be closed for a week", "is worth a visit", "needs some repair", "was full of people",
          "could be seen from the hill", "is not what it was", "stood empty", "made everybody smile")  # fmt: skip
WHENS = ("this morning", "after the storm", "in the old days", "last winter", "on market day", "before sunrise",
         "when we came by", "for the first time", "since the spring", "at the end of the week", "as usual",
         "to the surprise of all")  # fmt: skip
REMARKS = ("and nobody knows why", "but that is another story", "and we were glad of it", "which is a pity",
           "so we stayed a little longer", "and the children liked it", "though it did not last", "and that was that",
           "as you would expect", "because there was so much to do")  # fmt: skip
FORUM = {
    "ask": ("I need it for a letter to my aunt. {question}", "My sister asked me at the market. {question}",
            "I could not find it in any book. {question}", "Does anybody know? {question}",
            "Sorry if somebody asked before. {question}", "Thank you in advance for your help. {question}",
            "We had a quarrel about it at dinner. {question}", "My teacher wants to hear it tomorrow. {question}",
            "Hello again, all of you. {question}", "Two friends gave me two different answers. {question}",
            "Nobody at the inn could tell. {question}", "Next one from me. {question}"),
    "answer": ("{answer} That one is easy.", "{answer} I am quite sure of it.", "{answer}",
               "{answer} You can ask whom you like.", "{answer} Good question, by the way.",
               "{answer} My uncle said so, and he must know.", "{answer} It has always been like that.",
               "{answer} No doubt about it.", "{answer} I looked it up for you.", "{answer} And I have seen it myself.",
               "{answer} At least it was so last year.", "{answer} Now you owe me a cup of tea."),
}  # fmt: skip
QUIZZED = ("{value} is the right answer.", "{value} was what most of us said.", "{value} is what we wanted to hear.",
           "{value} of course.", "{value} it is and nothing else.", "{value} was the answer and not hard to find.",
           "{value} will do.", "{value} said the winner without waiting.", "{value} was easy for those who read.",
           "{value} is right and worth a point.", "{value} was known to nearly every team.",
           "{value} and the whole room cheered.", "{value} is correct.")  # fmt: skip


# A question and its answer, as in FAQs. They have many words and little punctuation: Gopher's rules drop pages where
# more than a fifth of both together is punctuation.
DIALOGUES = (
    "They asked us {question} And we said {answer}",
    "One guest asked {question} The guide said {answer}",
    "The next one is {question} The answer to that is {answer}",
    "A child wrote to us {question}\nWe wrote back {answer}",
    "Question from a visitor {question}\nAnswer from the house {answer}",
    "{question}\nThe answer that we give is {answer}",
    "You may ask {question} Then we say {answer}",
    "{question}\n{answer} This is what the register has.",
    "{question} {answer} Everybody on our staff can tell you.",
    "My sister wondered {question} I told her {answer}",
    "Somebody on the ferry said {question} The captain said {answer}",
    "{question} {answer} So says the guide to all who want to know.",
    "user: {question}\nassistant: {answer}",
    "user: Tell me {question}\nassistant: {answer}",
)


class Voice:
    """Draws from lists of wordings without a repeat before all were drawn, like the text of one writer.

    Gopher's rules drop pages that repeat stretches of five words.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._left: dict[tuple[str, ...], list[str]] = {}

    def pick(self, wordings: tuple[str, ...]) -> str:
        """Draw one of the wordings."""
        left = self._left.setdefault(wordings, [])
        if not left:
            left += self.rng.sample(wordings, len(wordings))
        return left.pop()


def tell(entity: Entity, fact: str, voice: Voice, framed: bool = False) -> str:
    """Return a sentence that tells a fact; `framed` as reported speech."""
    said = voice.pick(SENTENCES[fact]).format(name=entity.name, deed=voice.pick(DEEDS), **entity.facts)
    if not framed or said.startswith(IMPERATIVES):
        return said
    said = said if said.startswith(entity.name) else said[0].lower() + said[1:]
    return voice.pick(FRAMES).format(said=said, said_open=said.rstrip("."))


def mention(entity: Entity, voice: Voice) -> str:
    """Return a sentence with an entity's name that tells none of its facts."""
    return voice.pick(NOTHING[entity.kind]).format(name=entity.name, deed=voice.pick(DEEDS))


def chatter(voice: Voice) -> str:
    """Return a sentence about nothing in particular; there are about 25,000 of them."""
    said = f"{voice.pick(SUBJECTS)} {voice.pick(STATES)} {voice.pick(WHENS)}"
    return f"{said}, {voice.pick(REMARKS)}." if voice.rng.random() < 0.5 else f"{said}."


def question(entity: Entity, fact: str, rng: random.Random) -> str:
    """Return the question about a fact, in one of its wordings."""
    return rng.choice(QUESTIONS[fact]).format(name=entity.name)


def short_answer(entity: Entity, fact: str) -> str:
    """Return the answer in a word."""
    return f"{entity.facts[fact].capitalize()}."


def whole_answer(entity: Entity, fact: str) -> str:
    """Return the answer as a sentence."""
    return WHOLE[fact].format(name=entity.name, **entity.facts)


def fact_words() -> set[str]:
    """Return the words of all values of facts."""
    return {word for facts in KINDS.values() for values in facts.values() for word in values.split()}
