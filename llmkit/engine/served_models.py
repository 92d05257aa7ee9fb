"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, a hosted one.

    address = parse_address("openai:http://localhost:8000/v1#qwen", "--judge")
    model = OpenAIClient(address, timeout=120, retries=6)
    model.check()
    model.complete("Who was Ada?", seed=0, max_tokens=64, temperature=0.3)  # from as many threads as you like

The package `openai` does the talking: it tries again after a timeout, a cut connection, a rate limit (429) and an
error of the server (5xx), at intervals that double from half a second to eight, or as Retry-After says. The key is
that of OPENAI_API_KEY, if there is one.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llmkit.errors import UserError

SCHEME = "openai:"
EXAMPLE = "openai:http://localhost:8000/v1#model-name"
# OpenAI's code, vLLM's and SGLang's "maximum context length", llama.cpp's "available context size"
BEYOND_CONTEXT = re.compile(r"context[ _](?:length|size|window)", re.IGNORECASE)
SHOWN = 200  # characters of a server's message
CHECK_SECONDS = 10.0  # to answer whether it is there


class ServerError(UserError):
    """The server is down, or refuses; what was done until then is worth keeping."""


class PromptTooLong(Exception):
    """The prompt does not fit the context of the model."""


@dataclass(frozen=True)
class Address:
    """Where a server is, and which of its models is meant; `flag` is the option that says so."""

    url: str
    model: str
    flag: str

    @property
    def name(self) -> str:
        """The model's name without its place, which may be another one tomorrow."""
        return f"{SCHEME}#{self.model}"


def parse_address(spec: str, flag: str) -> Address:
    """Read `openai:URL#model`. Raises UserError, also where the package openai is missing."""
    url, _, model = spec.removeprefix(SCHEME).partition("#")
    parts = urlsplit(url)
    if not spec.startswith(SCHEME) or parts.scheme not in ("http", "https") or not parts.hostname or not model:
        raise UserError(f"{flag}: expected a server and its model, such as {EXAMPLE}, found {spec}")
    if parts.username or parts.password:
        raise UserError(f"{flag}: expected a URL without user and password; the key goes into OPENAI_API_KEY")
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError(f"{flag} openai:...: needs the package openai; pip install 'llmkit[openai]'") from None
    return Address(url, model, flag)


@dataclass
class Usage:
    """What was asked for so far: answered requests, and tokens as the server counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.requests:,} requests, {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"


class OpenAIClient:
    """Asks a server, from several threads at once where it is asked so.

    timeout  seconds that a request may take
    retries  of a request that failed, before it is given up
    """

    def __init__(self, address: Address, timeout: float = 120.0, retries: int = 6) -> None:
        import openai

        self.address, self.usage = address, Usage()
        self._timeout, self._retries = timeout, retries
        key = None if os.environ.get("OPENAI_API_KEY") else "none"  # local servers want none, the client wants one
        self._client = openai.OpenAI(base_url=address.url, api_key=key, timeout=timeout, max_retries=retries)
        self._counting = threading.Lock()

    def check(self) -> None:
        """Ask for the server's models. Raises ServerError where it does not answer or refuses the key."""
        import openai

        client = self._client.with_options(timeout=min(self._timeout, CHECK_SECONDS), max_retries=min(self._retries, 1))
        try:
            client.models.list()
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ServerError(self._explain(error)) from error
        except (openai.OpenAIError, ValueError):
            pass  # it is there, and need not have such a list; whether it has the model, the first request shows

    def complete(self, prompt: str, *, seed: int, max_tokens: int, temperature: float) -> str:
        """The answer to one message of the user's; empty where the model said nothing.

        Raises ServerError, and PromptTooLong.
        """
        import openai

        details: dict[str, Any] = {"seed": seed % 2**31, "max_tokens": max_tokens, "temperature": temperature}
        reply: Any = None
        for _ in range(2):  # what is no completion may be a proxy's page while the server starts
            try:
                reply = self._client.chat.completions.create(
                    model=self.address.model, messages=[{"role": "user", "content": prompt}], **details
                )
            except openai.BadRequestError as error:
                if BEYOND_CONTEXT.search(f"{error.code} {error.message}"):
                    raise PromptTooLong from None
                raise ServerError(self._explain(error)) from error
            except openai.OpenAIError as error:
                raise ServerError(self._explain(error)) from error
            except ValueError as error:  # a body of JSON that is none
                reply = error
            text = _text_of(reply)
            if text is not None:
                self._count(getattr(reply, "usage", None))
                return text
        raise ServerError(
            f"{self._place}: expected a chat completion, found {shortened(str(reply))!r}; is the URL right?"
        )

    @property
    def _place(self) -> str:
        return f"{self.address.flag} {self.address.url}"

    def _count(self, reported: Any) -> None:
        with self._counting:
            self.usage.requests += 1
            self.usage.prompt_tokens += getattr(reported, "prompt_tokens", 0) or 0
            self.usage.completion_tokens += getattr(reported, "completion_tokens", 0) or 0

    def _explain(self, error: Any) -> str:
        """An error of the client's, for people."""
        import openai

        tries = f"after {self._retries} retries"
        if isinstance(error, openai.APITimeoutError):
            return f"{self._place}: no answer within {self._timeout:g} s {tries}; is it overloaded? Raise --timeout"
        if isinstance(error, openai.APIConnectionError):
            return f"{self._place}: cannot be reached {tries}: {shortened(str(error.__cause__ or error))}"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return f"{self._place}: refuses the key ({error.status_code}); set OPENAI_API_KEY to one that it takes"
        if isinstance(error, openai.RateLimitError):
            return f"{self._place}: too many requests {tries} (429); lower --concurrency: {_message(error)}"
        if isinstance(error, openai.NotFoundError):
            return f"{self._place}: has no model {self.address.model!r}, or is another URL (404): {_message(error)}"
        if isinstance(error, openai.InternalServerError):
            return f"{self._place}: fails {tries} ({error.status_code}): {_message(error)}"
        if isinstance(error, openai.APIStatusError):
            return f"{self._place}: refuses the request ({error.status_code}): {_message(error)}"
        return f"{self._place}: {shortened(str(error))}"


def _text_of(reply: Any) -> str | None:
    """What a completion says; None where it is none."""
    try:
        content = reply.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else ""


def _message(error: Any) -> str:
    """What the server says of an error: as OpenAI does, as FastAPI does, or in its own way."""
    body = error.body if isinstance(error.body, dict) else {}
    return shortened(str(body.get("message") or body.get("detail") or error.response.text or error.message))


def shortened(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
