"""The fields of a request's body, each taken once; a field that nobody takes is refused by its name.

fields = Fields({"model": "chat", "temperature": 0.5, "logit_bias": {"7": 5}})
fields.number("temperature", 1.0, 0, 2)    ->  0.5
fields.check_all_taken()                   ->  ApiError: 'logit_bias' is not supported
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmkit.io.records import kind_of

# Fields of OpenAI's and of vLLM's that are taken at the values which leave a completion as it is
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
}
NAMES_ONLY = ("user", "safety_identifier", "prompt_cache_key")  # say who asks, and change nothing anywhere


class ApiError(Exception):
    """An error as OpenAI's API tells it: HTTP status, message, the field at fault, and a code."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Fields:
    """The fields of a JSON object; null stands for a field that is not there. Each method raises ApiError."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise ApiError(f"expected a JSON object, found {kind_of(body)}")
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it came."""
        return self._left.pop(name, default)

    def number(self, name: str, default: Any, least: float, most: float) -> Any:
        """A number in a range."""
        value = self._left.pop(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ApiError(f"{name!r}: expected a number, found {kind_of(value)}", name)
        if not least <= value <= most:
            raise ApiError(f"{name!r}: expected a number from {least:g} to {most:g}, found {value:g}", name)
        return value

    def integer(self, name: str, default: Any, least: int, most: int) -> Any:
        """A whole number in a range."""
        value = self._left.pop(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ApiError(f"{name!r}: expected a whole number, found {kind_of(value)}", name)
        if not least <= value <= most:
            raise ApiError(f"{name!r}: expected a number from {least} to {most}, found {value}", name)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise ApiError(f"{name!r}: expected true or false, found {kind_of(value)}", name)
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        """A string."""
        value = self._left.pop(name, default)
        if value is not None and not isinstance(value, str):
            raise ApiError(f"{name!r}: expected a string, found {kind_of(value)}", name)
        return value

    def texts(self, name: str, most: int) -> Sequence[str]:
        """A string or a list of strings, which may not be empty ones."""
        value = self._left.pop(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
            raise ApiError(f"{name!r}: expected a string or a list of strings, none of them empty", name)
        if len(values) > most:
            raise ApiError(f"{name!r}: expected {most} strings at most, found {len(values)}", name)
        return values

    def check_all_taken(self) -> None:
        """Refuse what is left, but for what changes nothing."""
        for name, value in self._left.items():
            if name in NAMES_ONLY:
                continue
            if name not in NEUTRAL:
                raise ApiError(f"{name!r} is not supported; leave it out", name, code="unsupported_parameter")
            if value not in NEUTRAL[name] or (isinstance(value, bool) != isinstance(NEUTRAL[name][0], bool)):
                only = " or ".join(map(repr, NEUTRAL[name]))
                raise ApiError(f"{name!r} is supported at {only} alone", name, code="unsupported_parameter")
