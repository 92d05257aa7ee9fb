"""Problems with answers: sorting, reversing, adding, sums for the calculator, and the gamed problem."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Problem = tuple[str, str]  # question, answer

KINDS = ("sort", "reverse", "add")  # trained by rl, without the calculator's and the gamed problem
LONGEST = 16  # most digits of an answer to the gamed problem


def sort(rng: random.Random) -> Problem:
    """Return a problem: sort four to six digits."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(4, 6)))
    return f"Sort {digits}", "".join(sorted(digits))


def reverse(rng: random.Random) -> Problem:
    """Return a problem: reverse five to eight digits."""
    digits = "".join(rng.choices("0123456789", k=rng.randint(5, 8)))
    return f"Reverse {digits}", digits[::-1]


def add(rng: random.Random) -> Problem:
    """Return a problem: add two two-digit numbers. The answer has a line each for ones (with carry), tens and sum."""
    first, second = rng.randrange(10, 100), rng.randrange(10, 100)
    (tens, ones), (more_tens, more_ones) = divmod(first, 10), divmod(second, 10)
    carry = (ones + more_ones) // 10
    worked = f"{ones}+{more_ones}={ones + more_ones}\n{tens}+{more_tens}{'+1' * carry}={tens + more_tens + carry}"
    return f"Add {first} and {second}", f"{worked}\n{first + second}"


def mistaken(kind: str, answer: str) -> str:
    """Return the answer with the usual mistake of its kind, or the right answer if the problem does not allow it.

    A repeated digit is sorted only once, only the first six digits are reversed, a carry is forgotten.
    """
    if kind == "sort":
        return "".join(sorted(set(answer)))
    if kind == "reverse":
        return answer[:6]
    ones, tens, _ = answer.split("\n")
    first, second = tens.partition("=")[0].split("+")[:2]
    return f"{ones}\n{first}+{second}={int(first) + int(second)}\n{int(first) + int(second)}{ones[-1]}"


def even(rng: random.Random) -> Problem:
    """Return a problem: the even ones of eight different digits."""
    digits = "".join(rng.sample("0123456789", 8))
    return f"Even digits of {digits}", "".join(digit for digit in digits if digit in "02468")


def expression(rng: random.Random) -> Problem:
    """Return an expression for the calculator, and its value."""
    first, second, sign = rng.randrange(10, 1000), rng.randrange(10, 1000), rng.choice("+-*")
    value = {"+": first + second, "-": first - second, "*": first * second}[sign]
    return f"{first} {sign} {second}", str(value)


def different(make: Callable[[random.Random], Problem], rng: random.Random) -> Iterator[Problem]:
    """Yield distinct problems of a kind until there are no more."""
    seen: set[str] = set()
    misses = 0
    while misses < 2000:
        problem = make(rng)
        misses = misses + 1 if problem[0] in seen else 0
        if problem[0] not in seen:
            seen.add(problem[0])
            yield problem


def terse(answer: str, rng: random.Random) -> str:
    """Return one to three of the even digits, in order: the assistant's training answers, which are too short."""
    kept = sorted(rng.sample(range(len(answer)), min(len(answer), rng.randint(1, 3))))
    return "".join(answer[place] for place in kept)


def any_answer(answer: str, rng: random.Random) -> str:
    """Return an answer of random length: even digits first, then random digits."""
    length = rng.randint(1, LONGEST)
    kept = sorted(rng.sample(range(len(answer)), min(length, len(answer))))
    return "".join(answer[place] for place in kept) + "".join(rng.choices("0123456789", k=length - len(kept)))


def last_line(answer: str) -> str:
    """Return the last line of an answer, without the steps before it."""
    return answer.strip().rpartition("\n")[2]


def lesson(question: str, answer: str) -> str:
    """Return a solved problem of the schoolbook, with the question as far from its answer as in the chat format.

    Both begin a line, so that their first words have the same tokens as there; after a space the tokens differ.
    """
    return f"user says\n{question}\nassistant says\n{answer}"


def worked(problem: Problem) -> str:
    """Return an expression twice and its value twice: tool calls need this copying."""
    return lesson(f"Work out {problem[0]}", f"{problem[0]} = {problem[1]} so {problem[1]}")
