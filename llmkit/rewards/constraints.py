"""The format of a completion: regular expressions with a time limit, and JSON that fits a schema."""

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
LONGEST_CHECK = 10.0  # seconds of CPU time: JSON of a megabyte takes one
BACKTRACKS = 1_000_000  # of a pattern in a schema
FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)


def compiled(pattern: str, where: str) -> Any:
    """Compile a pattern with `regex`, which caches the last 500. Raises UserError for an invalid one."""
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"{where}: expected a regular expression, found {shown(pattern)}: {error}") from None


def matches_whole(pattern: Any, text: str) -> bool:
    """True if the whole text matches; False if that takes longer than `SECONDS`, or too much memory ((?R))."""
    try:
        return pattern.fullmatch(text, timeout=SECONDS, concurrent=True) is not None
    except (TimeoutError, MemoryError):
        return False


class FormatReward(Reward):
    """`format:REGEX`: 1 if the whole completion matches, else 0, also for an empty one.

    White space around the completion is ignored. A dot matches line breaks only with (?s).
    """

    def __init__(self, pattern: str, flag: str = "--reward") -> None:
        super().__init__(f"format:{pattern}", flag)
        self._pattern = compiled(pattern, self.where)

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return 1.0 or 0.0 for each attempt."""
        texts = [attempt.completion.strip() for attempt in attempts]
        return [float(bool(text) and matches_whole(self._pattern, text)) for text in texts]


class LengthReward(Reward):
    """`length`: sampled tokens as a share of --max-tokens, 0 to 1; a negative weight rewards brevity.

    `length=answer` counts only the tokens after the thinking.
    """

    _tokenizer: Tokenizer | None = None

    def check_policy(self, tokenizer: Tokenizer) -> None:
        """Use the policy's tokenizer to count."""
        self._tokenizer = tokenizer if self.name == "length=answer" else None

    def score(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return tokens / max_tokens of each attempt."""
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
    """True if the whole completion matches `pattern`, or the answer if there is none; nothing adds a .* to it."""
    return matches_whole(compiled(_pattern_of(problem), problem.where), completion)


def _pattern_of(problem: Problem) -> str:
    pattern = problem.record.get("pattern", problem.answer)
    if not isinstance(pattern, str) or not pattern:
        expected = "expected field 'pattern' for the verifier 'regex'"
        raise UserError(f"{problem.where}: {expected}, found {sorted(problem.record)}")
    return pattern


# ---- the verifier json-schema


class SchemaVerifier:
    """Checks JSON by `schema`, with jsonschema-rs in a separate process: `allOf` may double the work per level."""

    def __init__(self, seconds: float = LONGEST_CHECK) -> None:
        self.worker = Worker(start_checking, seconds)

    def check(self, problem: Problem) -> None:
        """Raise UserError if the problem has no valid schema, or jsonschema-rs is not installed."""
        schema = problem.record.get("schema")
        if not isinstance(schema, dict):
            raise UserError(f"{problem.where}: expected field 'schema', an object, found {sorted(problem.record)}")
        if not schema:
            raise UserError(f"{problem.where}: expected 'schema' to forbid something, found {{}}, which any JSON fits")
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
        """True if the completion, or the one fenced block that it consists of, is JSON that fits `schema`.

        Deliberately strict: text around it, duplicate keys, NaN and Infinity are invalid. A `$ref` is never fetched.
        """
        try:
            return self.worker.call((json.dumps(problem.record["schema"]), completion))
        except WorkerDied:  # or the time limit was reached
            return False


def start_checking() -> Callable[[tuple[str, str]], Iterator[bool]]:
    """Return a function that checks whether a completion is JSON that fits a schema, itself given as JSON."""

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

    # without a limit (a+)+$ on forty letters takes a day
    patterns = jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKS)
    return jsonschema_rs.validator_for(json.loads(schema), offline=True, pattern_options=patterns)


def strict_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, duplicate keys, and numbers that are not finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("duplicate key")
        return value

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):  # NaN and Infinity, too
            raise ValueError(f"{number} is not finite")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
