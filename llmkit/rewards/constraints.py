"""The form of a completion: regular expressions with a limit of time, and JSON that fits a schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llmkit.errors import UserError
from llmkit.formats.problems import Problem
from llmkit.generation.requests import split_thoughts
from llmkit.io.foreign import shown
from llmkit.io.pool import Worker, WorkerDied
from llmkit.rewards.reward import Attempt, Reward

if TYPE_CHECKING:
    from llmkit.tokenizer.encoding import Tokenizer

SECONDS = 1.0  # for one completion: (a+)+$ on forty letters takes a day
LONGEST_CHECK = 10.0  # of the processor: JSON of a megabyte takes a second
BACKTRACKS = 1_000_000  # of a pattern in a schema
FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)


def compiled(pattern: str, where: str) -> Any:
    """A pattern of the `regex` package, which keeps the last 500. Raises UserError for one that it does not know."""
    import regex

    try:
        return regex.compile(pattern)
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

    def __init__(self, pattern: str, flag: str = "--reward") -> None:
        super().__init__(f"format:{pattern}", flag)
        self._pattern = compiled(pattern, self.where)

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """1.0 or 0.0 for each attempt."""
        texts = [attempt.completion.strip() for attempt in attempts]
        return [float(bool(text) and matches_whole(self._pattern, text)) for text in texts]


class LengthReward(Reward):
    """`length`: the share of --max-tokens that was sampled, 0 to 1; a negative weight makes for brevity.

    `length=answer` counts the tokens of what follows the thoughts.
    """

    _tokenizer: Tokenizer | None = None

    def check_policy(self, tokenizer: Tokenizer) -> None:
        """Count by the policy's tokenizer."""
        self._tokenizer = tokenizer if self.name == "length=answer" else None

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """Sampled tokens over those that could have been."""
        counts = [attempt.token_count for attempt in attempts]
        if self._tokenizer is not None:
            answers = [split_thoughts(attempt.completion)[1] for attempt in attempts]
            counts = [len(self._tokenizer.encode(answer)) for answer in answers]
        return [count / attempt.max_tokens for count, attempt in zip(counts, attempts, strict=True)]


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


class SchemaVerifier:
    """JSON that fits `schema`, by jsonschema-rs in a process of its own: `allOf` may double the work at each level."""

    def __init__(self, seconds: float = LONGEST_CHECK) -> None:
        self.worker = Worker(start_checking, seconds)

    def check(self, problem: Problem) -> None:
        """Raise UserError for a problem without a valid schema, or without jsonschema-rs."""
        schema = problem.record.get("schema")
        if not isinstance(schema, dict):
            raise UserError(f"{problem.where}: expected field 'schema', an object, found {sorted(problem.record)}")
        if not schema:
            raise UserError(f"{problem.where}: expected 'schema' to ask for something, found {{}}, which all JSON fits")
        try:
            from jsonschema_rs import ValidationErrorKind
        except ImportError:
            needed = "needs jsonschema-rs; pip install 'llmkit[json-schema]'"
            raise UserError(f"{problem.where}: the verifier 'json-schema' {needed}") from None
        try:
            _validator(json.dumps(schema))
        except (ValueError, RecursionError) as error:
            refers = isinstance(getattr(error, "kind", None), ValidationErrorKind.Referencing)
            expected = f"expected 'schema' to {'refer to its own parts' if refers else 'be a JSON schema'}"
            reason = getattr(error, "message", str(error)).splitlines()[0][:200]
            raise UserError(f"{problem.where}: {expected}: {reason}") from None

    def judge(self, problem: Problem, completion: str) -> bool:
        """The completion is JSON that fits `schema`; alone, or as the one fenced block that it consists of.

        Deliberately strict: text around it, a key twice, NaN and Infinity are no JSON. Nothing is fetched for a `$ref`.
        """
        try:
            return self.worker.call((json.dumps(problem.record["schema"]), completion))
        except WorkerDied:  # also at the limit of time
            return False


def start_checking() -> Callable[[tuple[str, str]], Iterator[bool]]:
    """Return a function that tells if a completion is JSON that fits a schema, which is JSON, too."""

    def check(pair: tuple[str, str]) -> Iterator[bool]:
        schema, completion = pair
        fenced = FENCED.fullmatch(completion)
        try:
            yield _validator(schema).is_valid(strict_json(fenced[1] if fenced else completion))
        except (ValueError, RecursionError):
            yield False

    return check


@lru_cache(64)
def _validator(schema: str) -> Any:
    import jsonschema_rs

    # (a+)+$ on forty letters takes a day otherwise
    patterns = jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKS)
    return jsonschema_rs.validator_for(json.loads(schema), offline=True, pattern_options=patterns)


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
