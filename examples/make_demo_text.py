"""Write the little stories that `make demo` trains on: JSONL documents, the same for the same seed.

    python examples/make_demo_text.py --stories 1500 --seed 1 > docs.jsonl

A story keeps its hero, its place and the thing that is looked for from the first sentence to the last, so a
model that has learnt only the spelling of words is easily told from one that has learnt the stories.
"""

import argparse
import json
import random

HEROES = [
    ("Anna", "girl", "she", "her"),
    ("Mira", "girl", "she", "her"),
    ("Tove", "woman", "she", "her"),
    ("Old Ruth", "woman", "she", "her"),
    ("Jonas", "boy", "he", "his"),
    ("Pip", "boy", "he", "his"),
    ("Emil", "man", "he", "his"),
    ("Captain Brandt", "man", "he", "his"),
]
PLACES = [
    ("village by the sea", "the harbour", "the fishing boats"),
    ("town under the mountain", "the market", "the stone bridge"),
    ("house at the edge of the forest", "the garden", "the old well"),
    ("lighthouse on the cape", "the stairs", "the lamp"),
    ("mill beside the river", "the loft", "the water wheel"),
    ("farm on the hill", "the barn", "the apple trees"),
]
THINGS = [
    "key",
    "lantern",
    "silver ring",
    "red kite",
    "map",
    "music box",
    "letter",
    "blue button",
    "compass",
    "coat",
]
ADJECTIVES = ["little", "quiet", "curious", "stubborn", "cheerful", "clever", "sleepy", "brave"]
ANIMALS = ["fox", "crow", "hedgehog", "grey cat", "goat", "owl", "heron", "hare"]
PEOPLE = ["baker", "ferryman", "schoolteacher", "blacksmith", "gardener", "postman"]
TIMES = [
    "One morning",
    "One evening",
    "On the first day of spring",
    "In the middle of winter",
    "After the harvest",
]
WEATHER = [
    "It was raining",
    "The wind blew hard",
    "Snow lay on the ground",
    "The sun was warm",
    "Fog hung over the land",
]
HIDDEN = [
    "under {spot}",
    "behind {spot}",
    "in a hole beside {spot}",
    "in a nest near {spot}",
    "in a box below {spot}",
]
FEELINGS = ["sad", "angry", "worried", "puzzled"]
THANKS = ["a loaf of bread", "a song", "a bowl of soup", "three ripe pears", "a warm place by the fire"]
MORALS = [
    "From that day on they were friends.",
    "And that night everyone slept well.",
    "Since then {name} never goes out without a friend.",
    "Nobody in the {place} ever forgot it.",
]


def story(rng: random.Random) -> str:
    """One story of eight to twelve sentences."""
    name, kind, they, their = rng.choice(HEROES)
    place, near, spot = rng.choice(PLACES)
    thing, animal, person = rng.choice(THINGS), rng.choice(ANIMALS), rng.choice(PEOPLE)
    adjective, feeling = rng.choice(ADJECTIVES), rng.choice(FEELINGS)
    hidden = rng.choice(HIDDEN).format(spot=spot)
    they_big = they.capitalize()
    opening = rng.choice(
        [
            f"Once upon a time there was a {adjective} {kind} named {name}, who lived in a {place}.",
            f"In a {place} lived a {adjective} {kind}. {they_big} was called {name}.",
            f"{name} was a {adjective} {kind}. {they_big} lived in a {place}.",
        ]
    )
    loss = rng.choice(
        [
            f"{rng.choice(TIMES)} {name} could not find {their} {thing}.",
            f"{rng.choice(TIMES)} {name} lost {their} {thing} near {near}.",
            f"{rng.choice(TIMES)} the {thing} of {name} was gone.",
        ]
    )
    search = [
        f"{rng.choice(WEATHER)}, and {name} was {feeling}.",
        f"{they_big} looked in {near}, but the {thing} was not there.",
    ]
    asked = rng.choice(
        [
            f'{they_big} asked the {person}: "Have you seen my {thing}?" "No, but ask the {animal}."',
            f'"Where is my {thing}?" {they} asked the {person}. The {person} did not know.',
            f"The {person} helped {name} to look for the {thing} until it was dark.",
        ]
    )
    help_ = rng.choice(
        [
            f'Then a {animal} came along. "I know where it is," said the {animal}. "It lies {hidden}."',
            f'A {animal} had seen everything. "Look {hidden}," it said.',
            f"At last a {animal} led {name} to {spot}.",
        ]
    )
    found = rng.choice(
        [
            f"And there, {hidden}, was the {thing}!",
            f"{name} looked {hidden} and found the {thing}.",
            f"So {name} went there, and the {thing} lay {hidden}.",
        ]
    )
    thanks = f'"Thank you," said {name}, and gave the {animal} {rng.choice(THANKS)}.'
    moral = rng.choice(MORALS).format(name=name, place=place)
    return " ".join([opening, loss, *search, asked, help_, found, thanks, moral])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the stories of `make demo` to stdout.")
    parser.add_argument("--stories", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for number in range(arguments.stories):
        print(json.dumps({"text": story(rng), "id": f"story-{arguments.seed}-{number}", "source": "stories"}))


if __name__ == "__main__":
    main()
