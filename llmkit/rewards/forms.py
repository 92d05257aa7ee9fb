"""The form of a completion: regular expressions with a limit of time, and JSON that fits a schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llmkit.errors import UserError
from llmkit.problems import Problem
from llmkit.rewards.reward import Attempt, Reward

SECONDS = 1.0  # for one completion: (a+)+$ on forty letters takes a day
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
    except regex.error as error:
        raise UserError(f"{where}: expected a regular expression, found {pattern!r}: {error}") from None


def matches_whole(pattern: Any, text: str) -> bool:
    """Whether all of a text matches; False where that takes longer than `SECONDS`."""
    try:
        return pattern.fullmatch(text, timeout=SECONDS, concurrent=True) is not None
    except TimeoutError:
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
        said = [one.completion.strip() for one in attempts]
        return [float(bool(text) and matches_whole(self._pattern, text)) for text in said]


class LengthReward(Reward):
    """`length`: the share of --max-tokens that was sampled, 0 to 1; a negative weight makes for brevity."""

    name = "length"

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """Sampled tokens over those that could have been."""
        return [one.token_count / one.max_tokens for one in attempts]


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
    except ImportError:
        raise UserError(
            f"{problem.where}: the verifier 'json-schema' needs jsonschema; pip install 'llmkit[json-schema]'"
        ) from None
    try:
        validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"{problem.where}: expected 'schema' to be a JSON schema: {error.message[:200]}") from None


def is_schema_met(problem: Problem, completion: str) -> bool:
    """The completion is JSON that fits `schema`; alone, or as the one fenced block that it consists of.

    Deliberately strict: text around it, a key twice, NaN and Infinity are no JSON. Nothing is fetched for a `$ref`.
    """
    from referencing.exceptions import Unresolvable

    fenced = FENCED.fullmatch(completion)
    try:
        said = fenced[1] if fenced else completion
        value = json.loads(said, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        return _validator(problem.record["schema"]).is_valid(value)
    except (ValueError, ArithmeticError, RecursionError, TimeoutError):  # a quotient beyond floats of multipleOf
        return False
    except Unresolvable as error:
        raise UserError(f"{problem.where}: expected 'schema' to refer to its own parts: {error}") from None


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry

    known = validators.validator_for(schema, Draft202012Validator)
    patient = validators.extend(known, PATIENT)
    return patient(schema, registry=Registry())


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Any:
    import jsonschema

    if isinstance(instance, str) and not _compiled(pattern).search(instance, timeout=SECONDS):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, properties: dict[str, Any], instance: Any, schema: Any) -> Any:
    for pattern, inner in properties.items() if isinstance(instance, dict) else ():
        for key, value in instance.items():
            if _compiled(pattern).search(key, timeout=SECONDS):
                yield from validator.descend(value, inner, path=key, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, instance: Any, schema: Any) -> Any:
    import jsonschema

    patterns = [_compiled(pattern) for pattern in schema.get("patternProperties", {})]
    for key, value in instance.items() if isinstance(instance, dict) else ():
        if key in schema.get("properties", {}) or any(one.search(key, timeout=SECONDS) for one in patterns):
            continue
        if inner is False:
            yield jsonschema.ValidationError(f"{key!r} is not among the properties")
        else:
            yield from validator.descend(value, inner, path=key)


PATIENT = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond a float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
