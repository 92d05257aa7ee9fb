"""Problems with answers: sorting, reversing, adding, sums for the calculator, and the one that is gamed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Problem = tuple[str, str]  # question, answer

KINDS = ("sort", "reverse", "add")  # that rl trains; the calculator's and the gamed one are apart
LONGEST = 16  # digits of an answer to the gamed problem


def sort(rng: random.Random) -> Problem:
    """Four to six digits in order."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(4, 6)))
    return f"Sort {digits}", "".join(sorted(digits))


def reverse(rng: random.Random) -> Problem:
    """Five to eight digits, the last first."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(5, 8)))
    return f"Reverse {digits}", digits[::-1]


def add(rng: random.Random) -> Problem:
    """Two numbers of two digits, with the ones, the tens and the sum a line each: a carry is written down."""
    first, second = rng.randrange(10, 100), rng.randrange(10, 100)
    (tens, ones), (more_tens, more_ones) = divmod(first, 10), divmod(second, 10)
    carry = (ones + more_ones) // 10
    worked = f"{ones}+{more_ones}={ones + more_ones}\n{tens}+{more_tens}{'+1' * carry}={tens + more_tens + carry}"
    return f"Add {first} and {second}", f"{worked}\n{first + second}"


def mistaken(kind: str, answer: str) -> str:
    """The answer with the usual mistake of its kind; right where a problem gives no occasion for it.

    A digit that is there twice is sorted once, a long row is reversed no further than six digits, a carry is forgotten.
    """
    if kind == "sort":
        return "".join(sorted(set(answer)))
    if kind == "reverse":
        return answer[:6]
    ones, tens, _ = answer.split("\n")
    first, second = tens.partition("=")[0].split("+")[:2]
    return f"{ones}\n{first}+{second}={int(first) + int(second)}\n{int(first) + int(second)}{ones[-1]}"


def even(rng: random.Random) -> Problem:
    """The even ones of eight different digits."""
    digits = "".join(rng.sample("0123456789", 8))
    return f"Even digits of {digits}", "".join(digit for digit in digits if digit in "02468")


def expression(rng: random.Random) -> Problem:
    """An expression for the calculator, and its value."""
    first, second, sign = rng.randrange(10, 1000), rng.randrange(10, 1000), rng.choice("+-*")
    value = {"+": first + second, "-": first - second, "*": first * second}[sign]
    return f"{first} {sign} {second}", str(value)


def different(make: Callable[[random.Random], Problem], rng: random.Random) -> Iterator[Problem]:
    """Problems of a kind, none twice; ends when there are no more."""
    seen: set[str] = set()
    misses = 0
    while misses < 2000:
        problem = make(rng)
        misses = misses + 1 if problem[0] in seen else 0
        if problem[0] not in seen:
            seen.add(problem[0])
            yield problem


def terse(answer: str, rng: random.Random) -> str:
    """One to three of the even digits, in order: what the assistant is shown, which says too little."""
    kept = sorted(rng.sample(range(len(answer)), min(len(answer), rng.randint(1, 3))))
    return "".join(answer[place] for place in kept)


def any_answer(answer: str, rng: random.Random) -> str:
    """An answer of any length: some of the even digits, and where it is longer than they are, anything."""
    length = rng.randint(1, LONGEST)
    kept = sorted(rng.sample(range(len(answer)), min(length, len(answer))))
    return "".join(answer[place] for place in kept) + "".join(rng.choices("0123456789", k=length - len(kept)))


def last_line(answer: str) -> str:
    """What an answer comes to, without what was written on the way."""
    return answer.strip().rpartition("\n")[2]


def lesson(question: str, answer: str) -> str:
    """A solved problem as the schoolbook prints it: as far from its answer as it will be in the assistant's format.

    Both begin a line, so that their first words are the tokens that they will be there: after a space they are others.
    """
    return f"user says\n{question}\nassistant says\n{answer}"


def worked(problem: Problem) -> str:
    """A sum that is copied, with its value, which is copied, too: what calling a tool needs."""
    return lesson(f"Work out {problem[0]}", f"{problem[0]} = {problem[1]} so {problem[1]}")
