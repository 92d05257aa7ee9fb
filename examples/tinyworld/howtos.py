"""How-tos: pages that explain how something is made, without facts of the world."""

from __future__ import annotations

import random

MAKES = ("a kite", "a lantern", "a raft", "a bench", "a soup", "a loaf of bread", "a broom", "a birdhouse", "a drum",
         "a basket", "a candle", "a scarf", "a sledge", "a pie", "a swing", "a scarecrow", "a puppet")  # fmt: skip
THINGS = ("the wood", "the paper", "the string", "the flour", "the onions", "the wax", "the wool", "the reeds",
          "the nails", "the cloth", "the paint", "the carrots", "the clay", "the straw", "the butter", "the glue",
          "the boards", "the ribbon", "the feathers", "the stones", "the honey", "the leather")  # fmt: skip
DOINGS = ("Cut {a} into pieces as long as your hand", "Put {a} and {b} on a clean table", "Wash {a} in cold water",
          "Tie {a} to {b} with a good knot", "Leave {a} in the sun for {n} hours", "Mix {a} with {b}",
          "Fold {a} {n} times", "Hold {a} over the fire for {n} minutes", "Press {a} down with both hands",
          "Cover {a} with {b}", "Let {a} rest until {b} is dry", "Turn {a} every {n} minutes", "Weigh {a} with care",
          "Ask a friend to hold {a} while you fetch {b}", "Lay {a} under a heavy book", "Rub {a} with a soft cloth",
          "Divide {a} into {n} equal parts", "Fasten {a} at both ends", "Stir {a} slowly", "Paint {a} red")  # fmt: skip
REASONS = ("so that it does not break", "until you are pleased with it", "or it will not last", "and do not hurry",
           "as my grandmother did", "which takes some time", "but keep {b} away from it", "before you go on",
           "because nobody likes to lose {b}", "and wait for a while", "if you have enough of it")  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "eight", "ten", "twelve")
OPENINGS = ("To make {make} is not hard.", "Anybody can make {make}.", "Here is how I make {make}.",
            "You do not have to buy {make}, for it is easily made.")  # fmt: skip
ENDINGS = ("That is all, and {make} of your own is better than one from the shop.",
           "Show it to your friends, and be proud of it.", "If it fails, try again with more patience.",
           "Now {make} is ready, and you have earned a cup of tea.")  # fmt: skip


def howto(rng: random.Random) -> tuple[str, list[str]]:
    """Return a title and paragraphs with seven to ten steps, different on every page."""
    make = rng.choice(MAKES)
    steps = []
    for doing in rng.sample(DOINGS, rng.randint(7, 10)):
        first, second, third = rng.sample(THINGS, 3)
        said = doing.format(a=first, b=second, n=rng.choice(NUMBERS))
        if rng.random() < 0.6:
            said += f", {rng.choice(REASONS).format(b=third)}"
        steps.append(f"{said}.")
    half = len(steps) // 2
    opening, ending = rng.choice(OPENINGS).format(make=make), rng.choice(ENDINGS).format(make=make)
    paragraphs = [opening, " ".join(steps[:half]), " ".join(steps[half:]), ending]
    return f"How to make {make}", paragraphs
