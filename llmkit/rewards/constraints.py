"""The form of a completion: regular expressions with a limit of time, and JSON that fits a schema."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.problems import Problem
from llmkit.io.foreign import shown
from llmkit.rewards.reward import Attempt, Reward

SECONDS = 1.0  # for one completion: (a+)+$ on forty letters takes a day
LONGEST_CHECK = 10.0  # of the processor: JSON of a megabyte takes a second
_deadline = threading.local()  # of the check by a schema under way
FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)


@lru_cache(1024)
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern)


def compiled(pattern: str, where: str) -> Any:
    """A pattern of the `regex` package. Raises UserError for one that it does not know."""
    import regex

    try:
        return _compiled(pattern)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"{where}: expected a regular expression, found {shown(pattern)}: {error}") from None


def matches_whole(pattern: Any, text: str) -> bool:
    """True if all of a text matches; False where that takes longer than `SECONDS`, or too much memory ((?R))."""
    try:
        return pattern.fullmatch(text, timeout=SECONDS, concurrent=True) is not None
    except (TimeoutError, MemoryError):
        return False


class FormatReward(Reward):
    """`format:REGEX`: 1 for a completion that matches as a whole, 0 for any other; an empty one has 0.

    White space around the completion does not count. A dot takes line breaks only with (?s).
    """

    def __init__(self, pattern: str) -> None:
        self.name = f"format:{pattern}"
        self._pattern = compiled(pattern, f"--reward {self.name}")

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """1.0 or 0.0 for each attempt."""
        texts = [attempt.completion.strip() for attempt in attempts]
        return [float(bool(text) and matches_whole(self._pattern, text)) for text in texts]


class LengthReward(Reward):
    """`length`: the share of --max-tokens that was sampled, 0 to 1; a negative weight makes for brevity."""

    name = "length"

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """Sampled tokens over those that could have been."""
        return [attempt.token_count / attempt.max_tokens for attempt in attempts]


# ---- the verifier regex


def check_pattern(problem: Problem) -> None:
    """Raise UserError for a problem without a pattern."""
    compiled(_pattern_of(problem), problem.where)


def is_pattern_met(problem: Problem, completion: str) -> bool:
    """The completion as a whole matches `pattern`, else the answer: .* must be written where it is meant."""
    return matches_whole(compiled(_pattern_of(problem), problem.where), completion)


def _pattern_of(problem: Problem) -> str:
    pattern = problem.record.get("pattern", problem.answer)
    if not isinstance(pattern, str) or not pattern:
        expected = "expected field 'pattern' for the verifier 'regex'"
        raise UserError(f"{problem.where}: {expected}, found {sorted(problem.record)}")
    return pattern


# ---- the verifier json-schema


def check_schema(problem: Problem) -> None:
    """Raise UserError for a problem without a valid schema, or without jsonschema."""
    schema = problem.record.get("schema")
    if not isinstance(schema, dict):
        raise UserError(f"{problem.where}: expected field 'schema', an object, found {sorted(problem.record)}")
    if not schema:
        raise UserError(f"{problem.where}: expected 'schema' to ask for something, found {{}}, which all JSON fits")
    try:
        import jsonschema
        from jsonschema import validators
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise UserError(
            f"{problem.where}: the verifier 'json-schema' needs jsonschema; pip install 'llmkit[json-schema]'"
        ) from None
    try:
        if not isinstance(schema.get("$schema", ""), str):
            raise jsonschema.SchemaError(f"its '$schema' is {shown(schema['$schema'])}")
        validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
        _check_references(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"{problem.where}: expected 'schema' to be a JSON schema: {error.message[:200]}") from None
    except RecursionError:
        raise UserError(
            f"{problem.where}: expected 'schema' to be less deep; Python ends at a thousand levels"
        ) from None
    except Unresolvable as error:
        raise UserError(f"{problem.where}: expected 'schema' to refer to its own parts: {error}") from None


def _check_references(schema: dict[str, Any]) -> None:
    """Raise Unresolvable for a reference to what is not there, which a completion may come upon much later."""
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import DRAFT202012, specification_with

    kind = specification_with(schema.get("$schema", ""), default=DRAFT202012)
    root = kind.create_resource(schema)
    waiting = [(root, REGISTRY.resolver_with_root(root))]
    while waiting:
        part, resolver = waiting.pop()
        if isinstance(part.contents, dict):
            for name in ("$ref", "$dynamicRef"):
                if isinstance(part.contents.get(name), str):
                    resolver.lookup(part.contents[name])
        waiting += ((inner, resolver.in_subresource(inner)) for inner in part.subresources())


def is_schema_met(problem: Problem, completion: str) -> bool:
    """The completion is JSON that fits `schema`; alone, or as the one fenced block that it consists of.

    Deliberately strict: text around it, a key twice, NaN and Infinity are no JSON. Nothing is fetched for a `$ref`.
    """
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    fenced, schema = FENCED.fullmatch(completion), problem.record["schema"]
    try:
        value = strict_json(fenced[1] if fenced else completion)
        _deadline.at = time.thread_time() + LONGEST_CHECK
        validator = _bounded_validator(validators.validator_for(schema, Draft202012Validator))
        return validator(schema, registry=Registry()).is_valid(value)
    # ArithmeticError: a quotient beyond floats of multipleOf
    except (ValueError, ArithmeticError, RecursionError, TimeoutError, MemoryError):
        return False
    except Unresolvable as error:
        raise UserError(f"{problem.where}: expected 'schema' to refer to its own parts: {error}") from None


def strict_json(text: str) -> Any:
    """Parse JSON in which no key stands twice and every number is finite. Raises ValueError for other."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("a key twice")
        return value

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):  # NaN and Infinity, too
            raise ValueError(f"{number} is no finite number")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)


@cache
def _bounded_validator(known: Any) -> Any:
    """A validator of jsonschema's with a limit of time on all that it does, and on every pattern."""
    from jsonschema import validators

    bounded = ModuleType("re")
    vars(bounded).update(vars(re))
    bounded.search = lambda pattern, text: _compiled(pattern).search(text, timeout=SECONDS, concurrent=True)  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("jsonschema.") and getattr(module, "re", None) is re:
            module.re = bounded  # type: ignore[attr-defined]
    keywords = {name: _with_deadline(keyword) for name, keyword in known.VALIDATORS.items()}
    return validators.extend(known, {**keywords, "uniqueItems": _unique_items})


def _with_deadline(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """A keyword of a schema that ends the check where it has taken too long: `allOf` may double at each level."""

    def checked(*arguments: Any) -> Any:
        if time.thread_time() > _deadline.at:
            raise TimeoutError
        yield from keyword(*arguments) or ()

    return checked


def _unique_items(validator: Any, wanted: bool, instance: Any, schema: Any) -> Any:
    import jsonschema

    if wanted and isinstance(instance, list) and len(set(map(_hashable, instance))) < len(instance):
        yield jsonschema.ValidationError("two items are equal")


def _hashable(value: Any) -> Any:
    """A JSON value as one that has a hash, equal where JSON Schema's are: 1 and 1.0, but not 1 and true."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return ("boolean", value) if isinstance(value, bool) else value
