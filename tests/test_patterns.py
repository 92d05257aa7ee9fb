"""No regular expression of the package backtracks catastrophically, on malicious or accidental text."""

from __future__ import annotations

import ast
import importlib
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from llmkit.crawl.read.pages import looks_like_html
from tests.test_house import modules

try:
    from re import _constants as codes
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as codes  # type: ignore[no-redef]
    import sre_parse as parser  # type: ignore[no-redef]

SECONDS = 1.0  # CPU seconds; a pattern that can split a text in 2^n ways takes hours
LENGTHS = (60, 2000)
FUNCTIONS = {f"re.{name}" for name in "compile match search fullmatch sub split findall finditer".split()}  # noqa: SIM905
PLAIN = (codes.LITERAL, codes.RANGE)
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
SAMPLES = {"NOT_SPACE": "a", "SPACE": " ", "NOT_DIGIT": "a", "DIGIT": "1", "NOT_WORD": " "}


def patterns() -> dict[str, re.Pattern]:
    """Return every pattern of the package by its location, in modules and in functions."""
    taken: dict[str, re.Pattern] = {}

    def take(where: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, re.Pattern):
            taken[f"{where}: {value.pattern!r:.40}"] = value
        elif depth < 4 and isinstance(value, (list, tuple, set, frozenset, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                take(where, item, depth + 1)

    for name, source in modules().items():
        if not re.search(r"^\s*import re$", source, re.MULTILINE):
            continue
        with suppress(ImportError):
            for key, value in vars(importlib.import_module(name)).items():
                take(f"{name}.{key}", value)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in FUNCTIONS:
                continue
            if node.args and isinstance(node.args[0], ast.Constant):
                flags = re.I if any("I" in ast.unparse(rest) for rest in node.args[1:]) else 0
                take(f"{name}:{node.lineno}", re.compile(node.args[0].value, flags))
    return taken


def inner(code: Any, value: Any) -> list[Any]:
    """Return the parsed patterns within one node of a parsed pattern."""
    if str(code) in REPEATS:
        return [value[2]]
    if code is codes.BRANCH:
        return value[1]
    if code is codes.SUBPATTERN:
        return [value[-1]]
    return [value] if str(code) == "ATOMIC_GROUP" else []


def match_of(tree: Any, more: int = 0) -> str:
    """Return a text that a parsed pattern may match, with `more` iterations in each loop."""
    text = ""
    for code, value in tree:
        if code in (codes.LITERAL, codes.NOT_LITERAL):
            text += chr(value) if code is codes.LITERAL else "\u00a1" if value < 161 else "a"
        elif code is codes.ANY:
            text += "a"
        elif code is codes.IN:
            text += member(value)
        elif str(code) in REPEATS:
            text += match_of(value[2], more) * min(max(value[0], more), value[1])
        else:
            text += "".join(match_of(tree, more) for tree in inner(code, value)[:1])
    return text


def member(choices: list) -> str:
    """Return a character of a class such as [a-z]."""
    if choices[0][0] is codes.NEGATE:
        excluded = [value if code is codes.RANGE else (value, value) for code, value in choices[1:] if code in PLAIN]
        spared = [text for text in "a1 <-.\u00a1" if not any(low <= ord(text) <= high for low, high in excluded)]
        return spared[0] if spared else "a"
    code, value = choices[0]
    if code in PLAIN:
        return chr(value if code is codes.LITERAL else value[0])
    return next((character for name, character in SAMPLES.items() if name in str(value)), "a")


def loops(tree: Any) -> Iterator[Any]:
    """Yield the bodies of a parsed pattern's loops, outer ones first."""
    for code, value in tree:
        if str(code) in REPEATS and value[1] > 1:
            yield value[2]
        for within in inner(code, value):
            yield from loops(within)


def branches(tree: Any) -> Iterator[str]:
    """Yield a text for each alternative in a loop."""
    yield from (match_of(tree), match_of(tree, 1))
    for code, value in tree:
        for within in inner(code, value) if code in (codes.BRANCH, codes.SUBPATTERN) else ():
            yield from branches(within)


def seeds(pattern: re.Pattern) -> Iterator[str]:
    """Yield texts that a loop of the pattern can match in many ways, with a tail that does not match."""
    is_bytes = isinstance(pattern.pattern, bytes)
    text = pattern.pattern.decode("latin-1") if is_bytes else pattern.pattern
    tree = parser.parse(text, pattern.flags & ~re.UNICODE if is_bytes else pattern.flags)
    whole = match_of(tree, 1)
    for inside in loops(tree):
        for piece in filter(None, set(branches(inside))):
            for before in {"", whole.partition(piece)[0]}:
                for length in LENGTHS:
                    for end in ("", "\0!"):
                        yield before + piece * (length // len(piece) + 1) + end
    yield whole * 20


@pytest.fixture
def clock() -> Iterator[None]:
    """Raise TimeoutError if a match takes long; the engine of `re` checks for signals."""

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, late)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def slowest(pattern: re.Pattern) -> tuple[float, str]:
    """Return the time of the worst seed, and the seed."""
    worst = (0.0, "")
    for seed in dict.fromkeys(seeds(pattern)):
        text: Any = seed.encode("latin-1", "replace") if isinstance(pattern.pattern, bytes) else seed
        began = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            pattern.match(text)
            pattern.search(text)
        except TimeoutError:
            return SECONDS, seed
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        worst = max(worst, (time.process_time() - began, seed))
    return worst


def test_the_seeds_find_the_patterns_that_run_for_ever(clock) -> None:
    ambiguous = [
        rb"(?is)(?:<!--.*?-->|<\?xml[^>]*>|\s)*<(?:html|body)[\s/>]",
        r"(a+)+b",
        r"(?:\w+\s?)+[.]",
        r"^(?:ab|[a-c][a-z])*$",
    ]
    for text in ambiguous:
        assert slowest(re.compile(text))[0] >= SECONDS, text


def test_no_pattern_of_the_package_runs_for_ever(clock) -> None:
    assert len(patterns()) > 100
    slow = {where: slowest(pattern) for where, pattern in patterns().items()}
    assert not {where: worst for where, worst in slow.items() if worst[0] >= SECONDS / 2}


@pytest.mark.parametrize("piece", [b"<!---->", b"<!-- -->", b"<!-- widget -->\n", b"<?xml >", b"<!-- <!-- -->"])
def test_a_page_of_comments_is_html_or_not_at_once(piece: bytes, clock) -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    assert not looks_like_html(piece * 400 + b"<center>")
    assert looks_like_html(piece * 40 + b"<p>")
