"""No regular expression of the package takes for ever over a text that was made for it, or by accident."""

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

SECONDS = 1.0  # of the processor: a pattern that parts a text in 2^n ways takes hours
LENGTHS = (60, 2000)
FUNCTIONS = ("compile", "match", "search", "fullmatch", "sub", "split", "findall", "finditer")
PLAIN = (codes.LITERAL, codes.RANGE)


def patterns() -> dict[str, re.Pattern]:
    """Every pattern of the package, by the place where it stands: those of modules, and those inside functions."""
    found: dict[str, re.Pattern] = {}

    def take(where: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, re.Pattern):
            found[f"{where}: {value.pattern!r:.40}"] = value
        elif depth < 4 and isinstance(value, (list, tuple, set, frozenset)):
            for part in value:
                take(where, part, depth + 1)
        elif depth < 4 and isinstance(value, dict):
            for part in value.values():
                take(where, part, depth + 1)

    for name, source in modules().items():
        tree = ast.parse(source)
        if not any(isinstance(node, (ast.Import, ast.ImportFrom)) and "re" in _names(node) for node in ast.walk(tree)):
            continue
        with suppress(ImportError):
            module = importlib.import_module(name)
            for key, value in vars(module).items():
                take(f"{name}.{key}", value)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            if ast.unparse(node.func).removeprefix("re.") in FUNCTIONS and ast.unparse(node.func).startswith("re."):
                flags = re.I if any("I" in ast.unparse(rest) for rest in node.args[1:]) else 0
                take(f"{name}:{node.lineno}", re.compile(node.args[0].value, flags))
    return found


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names]


def one(tree: Any, more: int = 0) -> str:
    """A text that a parsed pattern may match, with `more` rounds in each of its loops."""
    told = ""
    for code, value in tree:
        if code in (codes.LITERAL, codes.NOT_LITERAL):
            told += chr(value) if code is codes.LITERAL else "\u00a1" if value < 161 else "a"
        elif code is codes.ANY:
            told += "a"
        elif code is codes.IN:
            told += member(value)
        elif code is codes.BRANCH:
            told += one(value[1][0], more)
        elif code is codes.SUBPATTERN:
            told += one(value[-1], more)
        elif code in (codes.MAX_REPEAT, codes.MIN_REPEAT) or str(code) == "POSSESSIVE_REPEAT":
            low, high, inside = value
            told += one(inside, more) * min(max(low, more), high)
        elif str(code) == "ATOMIC_GROUP":
            told += one(value, more)
    return told


def member(choices: list) -> str:
    """A character of a class such as [a-z]."""
    if choices[0][0] is codes.NEGATE:
        excluded = [value if code is codes.RANGE else (value, value) for code, value in choices[1:] if code in PLAIN]
        spared = [text for text in "a1 <-.\u00a1" if not any(low <= ord(text) <= high for low, high in excluded)]
        return spared[0] if spared else "a"
    code, value = choices[0]
    if code is codes.LITERAL:
        return chr(value)
    if code is codes.RANGE:
        return chr(value[0])
    category = str(value)
    for name, character in (("NOT_SPACE", "a"), ("SPACE", " "), ("NOT_DIGIT", "a"), ("DIGIT", "1"), ("NOT_WORD", " ")):
        if name in category:
            return character
    return "a"


def loops(tree: Any) -> Iterator[Any]:
    """The insides of a parsed pattern's loops, outer ones first."""
    for code, value in tree:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) or str(code) == "POSSESSIVE_REPEAT":
            if value[1] > 1:
                yield value[2]
            yield from loops(value[2])
        elif code is codes.BRANCH:
            for branch in value[1]:
                yield from loops(branch)
        elif code is codes.SUBPATTERN:
            yield from loops(value[-1])
        elif str(code) == "ATOMIC_GROUP":
            yield from loops(value)


def branches(tree: Any) -> Iterator[str]:
    """A text of each alternative in a loop, alone."""
    yield one(tree)
    yield one(tree, 1)
    for code, value in tree:
        inner = value[-1] if code is codes.SUBPATTERN else None
        for branch in value[1] if code is codes.BRANCH else ():
            yield from branches(branch)
        if inner is not None:
            yield from branches(inner)


def seeds(pattern: re.Pattern) -> Iterator[str]:
    """Texts over which a loop of the pattern can run in many ways, with an end that it does not take."""
    text = pattern.pattern.decode("latin-1") if isinstance(pattern.pattern, bytes) else pattern.pattern
    tree = parser.parse(text, pattern.flags & ~re.UNICODE if isinstance(pattern.pattern, bytes) else pattern.flags)
    whole = one(tree, 1)
    for inside in loops(tree):
        pieces = {piece for piece in branches(inside) if piece}
        for piece in pieces:
            for before in {"", whole.partition(piece)[0]}:
                for length in LENGTHS:
                    for end in ("", "\0!"):
                        yield before + piece * (length // len(piece) + 1) + end
    yield whole * 20


@pytest.fixture
def clock() -> Iterator[None]:
    """Raise TimeoutError when a match takes long; the engine of `re` asks for signals."""

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, late)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def slowest(pattern: re.Pattern) -> tuple[float, str]:
    """The seconds that the worst seed takes, and the seed."""
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
    found = patterns()
    assert len(found) > 100
    slow = {where: slowest(pattern) for where, pattern in found.items()}
    assert not {where: worst for where, worst in slow.items() if worst[0] >= SECONDS / 2}


@pytest.mark.parametrize("piece", [b"<!---->", b"<!-- -->", b"<!-- widget -->\n", b"<?xml >", b"<!-- <!-- -->"])
def test_a_page_of_comments_is_html_or_not_at_once(piece: bytes, clock) -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    assert not looks_like_html(piece * 400 + b"<center>")
    assert looks_like_html(piece * 40 + b"<p>")
