"""Every function that parses text from models, servers or the web takes linear time.

Each gets texts of three lengths made of repeated seeds, and its CPU time is measured in a child process with limits on
time and memory. Slow: `pytest -m slow tests/test_growth.py` runs all 392 seeds in 80 minutes or more, and prints the
slowest.
"""

from __future__ import annotations

import ast
import gc
import json
import math
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from readers import EXEMPT, REFUSALS, readers

from tests.test_house import modules

EXPONENT = 1.2  # largest allowed exponent of time over length, between the shortest and the longest text
# A word of a quarter of a million characters: the library's heap of merges takes n log n and outgrows the caches (.45
# us per byte at 48 kB, .6 at 768 kB, 1.2 at 3 MB). Cut into pieces, it would have other tokens.
EXPONENTS = {"tokenizer of a chat": 1.4}
FLOOR = 0.020  # seconds; shorter times are noise and count as this
SECONDS = 20  # CPU seconds for a text of 256,000 characters, before the child is killed
MEMORY = 2 << 30  # additional bytes that a reader may allocate
TRIES = 6  # for a measurement beyond the limit: other processes disturb even CPU time
PAUSE = 0.5  # seconds before the next try, in which they may end
SHORT, LONG = (4_000, 16_000, 64_000), (16_000, 64_000, 256_000)
FEW = 5  # seeds per function in the quick tests, different for each function

PIECES = json.loads(Path(__file__).parent.joinpath("helpers", "fragments.json").read_text())
PAIRS = [
    *("()", "[]", "{}", "<>", "((", ("\\boxed{", "}"), ("{%", "%}"), ('["', '"]'), ("[", "]")),
    *(("<div>", "</div>"), ("<!--", "-->"), ("<think>", "</think>"), ("<b>", "</a>")),
]
Seed = tuple[str, str, str]  # before, repeated, after


def seeds() -> list[Seed]:
    """Return single pieces, pieces with a tail that does not match, pairs, and opened and closed pieces."""
    rng = random.Random(0)
    chosen = [("", piece, "") for piece in PIECES]
    chosen += [("", piece, "\0!") for piece in rng.sample(PIECES, 20)]
    chosen += [("a ", piece, " x") for piece in rng.sample(PIECES, 20)]
    chosen += [("", rng.choice(PIECES) + rng.choice(PIECES), rng.choice(PIECES)) for _ in range(40)]
    return chosen + [("OPEN", *pair) for pair in PAIRS]


SEEDS = seeds()


def text_of(seed: Seed, size: int) -> str:
    """Return a text of `size` characters; openings and closings are balanced."""
    before, piece, after = seed
    if before == "OPEN":
        count = size // (len(piece) + len(after))
        return piece * count + after * count
    room = max(0, size - len(before) - len(after))
    return before + (piece * (room // len(piece) + 1))[:room] + after


def seconds(name: str, text: str) -> float:
    """Return the CPU time that a reader takes for a text."""
    began = time.process_time()
    with suppress(*REFUSALS):
        readers()[name](text)
    return time.process_time() - began


def exponent(times: dict[int, float]) -> float:
    """Fit the exponent of time over length: the slope in log-log space between the first and the last point."""
    shortest, longest = min(times), max(times)
    return math.log(max(times[longest], FLOOR) / max(times[shortest], FLOOR)) / math.log(longest / shortest)


def measured(name: str, seed: Seed, sizes: tuple[int, ...]) -> dict[int, float]:
    """Return the times by length; the minimum of several tries if they are beyond the limit."""
    times: dict[int, float] = {}
    limit = EXPONENTS.get(name, EXPONENT)
    for attempt in range(TRIES):
        time.sleep(PAUSE if attempt else 0)
        for size in sizes:
            times[size] = min(times.get(size, math.inf), seconds(name, text_of(seed, size)))
            tried = {length: found for length, found in times.items() if length <= size}
            if size > sizes[0] and exponent(tried) > 1.6:
                break  # the next would exceed the limit
        if exponent(times) <= limit:
            break
    return times


def in_child(name: str, chosen: list[Seed], sizes: tuple[int, ...]) -> Iterator[tuple[Seed, dict[int, float] | str]]:
    """Yield each seed with its times, or the reason why there are none, measured in a child with a time limit."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(ours)
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            gc.disable()  # it would scan all imported modules
            with suppress(Exception):
                seconds(name, "a")  # warm up lazy loading
            for seed in chosen:
                used = math.ceil(time.process_time())
                resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, resource.RLIM_INFINITY))
                try:
                    result: object = measured(name, seed, sizes)
                except Exception as error:
                    result = f"{type(error).__name__}: {error}"[:200]
                os.write(theirs, json.dumps(result).encode() + b"\n")
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    with open(ours) as lines:
        results = [json.loads(line) for line in lines]
    os.waitpid(child, 0)
    for seed, result in zip(chosen, results, strict=False):
        yield seed, {int(size): value for size, value in result.items()} if isinstance(result, dict) else result
    if len(results) < len(chosen):
        yield chosen[len(results)], f"no end within {SECONDS} s of the processor"
        yield from in_child(name, chosen[len(results) + 1 :], sizes) if len(results) + 1 < len(chosen) else ()


def faults(name: str, chosen: list[Seed], sizes: tuple[int, ...]) -> list[str]:
    """Return the measurements beyond the limit, and print the slowest."""
    wrong, slowest, steepest = [], (0.0, ""), (0.0, "")
    for seed, result in in_child(name, chosen, sizes):
        if isinstance(result, str):
            wrong.append(f"{name}: {seed!r}: {result}")
            continue
        slowest = max(slowest, (result[max(result)], repr(seed)))
        steepest = max(steepest, (exponent(result), repr(seed)))
        if exponent(result) > EXPONENTS.get(name, EXPONENT):
            wrong.append(f"{name}: {seed!r}: exponent {exponent(result):.2f}, seconds by length {result}")
    print(f"{name}: slowest {slowest[0]:.3f} s {slowest[1]}, exponent at most {steepest[0]:.2f} {steepest[1]}")
    return wrong


def test_the_measurement_finds_quadratic_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers(), "square", lambda text: sum(range(len(text) ** 2 // 20)))
    monkeypatch.setitem(readers(), "n^1.5", lambda text: sum(range(int(len(text) ** 1.5))))
    monkeypatch.setattr("tests.test_growth.EXPONENTS", {"n^1.5": 1.4})
    monkeypatch.setitem(readers(), "hangs", lambda text: [None for _ in iter(int, 1)] if len(text) > 99 else None)
    monkeypatch.setitem(readers(), "raises", lambda text: text + 1)
    for constant, value in (("SECONDS", 2), ("TRIES", 2), ("PAUSE", 0)):
        monkeypatch.setattr(f"tests.test_growth.{constant}", value)
    assert len(SEEDS) >= 300
    assert len(set(SEEDS)) > 290
    assert "exponent" in faults("square", SEEDS[:1], (4_000, 16_000))[0]
    assert "exponent" in faults("n^1.5", SEEDS[:1], (16_000, 64_000))[0]
    assert len(faults("hangs", SEEDS[:2], SHORT)) == 2
    assert "TypeError" in faults("raises", SEEDS[:1], SHORT)[0]


def test_every_module_with_patterns_is_measured_or_exempt() -> None:
    source = ast.parse(Path(__file__).parent.joinpath("helpers", "readers.py").read_text())
    measured = {
        name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom)
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    unmeasured = set()
    for name, text in modules().items():
        used = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        if any(one.startswith("re.") for one in used) and name not in measured:
            unmeasured.add(name)
    assert not unmeasured - EXEMPT  # give them readers in tests/helpers/readers.py


def test_time_grows_with_the_length() -> None:
    chosen = {name: random.Random(number).sample(SEEDS, FEW) for number, name in enumerate(readers())}
    assert not [fault for name, few in chosen.items() for fault in faults(name, few, SHORT)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(readers()))
def test_time_grows_with_the_length_of_all_seeds(name: str) -> None:
    assert not faults(name, SEEDS, LONG)
