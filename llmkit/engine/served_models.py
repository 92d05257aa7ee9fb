"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, a hosted one.

    address = parse_address("openai:http://localhost:8000/v1#qwen", "--judge")
    model = OpenAIClient(address, timeout=120, retries=6)
    model.check()
    asked = [{"role": "user", "content": "Who was Ada?"}]  # or text to continue, or the ids of its tokens
    model.ask(asked, seed=0, max_tokens=64, temperature=0.3).text  # from as many threads as you like

The package `openai` does the talking: it tries again after a timeout, a cut connection, a rate limit (429) and an
error of the server (5xx), at intervals that double from half a second to eight, or as Retry-After says. The key is
that of OPENAI_API_KEY, if there is one.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llmkit.errors import UserError

SCHEME = "openai:"
EXAMPLE = "openai:http://localhost:8000/v1#model-name"
# OpenAI's code, vLLM's and SGLang's "maximum context length", llama.cpp's "available context size"
BEYOND_CONTEXT = re.compile(r"context[ _](?:length|size|window)", re.IGNORECASE)
SHOWN = 200  # characters of a server's message
CHECK_SECONDS = 10.0  # to answer whether it is there
IN_HEADERS = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")  # of the environment: what headers hold
LOAD_SECONDS = 1800.0  # to load weights
TOKEN_ID = "token_id:"  # what stands before the number where vLLM gives ids as the tokens' names

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text or token ids to continue, or messages to answer


class ServerError(UserError):
    """The server is down, or refuses; what was done until then is worth keeping."""


class Refused(ServerError):
    """The server will not have the request, or fails on it."""


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
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UserError(f"{flag}: expected a server and its model, such as {EXAMPLE}, found {spec}") from None
    if not spec.startswith(SCHEME) or parts.scheme not in ("http", "https") or not parts.hostname or not model:
        raise UserError(f"{flag}: expected a server and its model, such as {EXAMPLE}, found {spec}")
    if parts.username or parts.password or parts.query:
        unwanted = "user and password" if parts.username or parts.password else "anything after a question mark"
        raise UserError(f"{flag}: expected a URL without {unwanted}; the key goes into OPENAI_API_KEY")
    for name in IN_HEADERS:
        _header_value(name)
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError(f"{flag} openai:...: needs the package openai; pip install 'llmkit[openai]'") from None
    return Address(url, model, flag)


def _header_value(name: str) -> str | None:
    """What an environment variable gives a header, without the white space of the file it came from; None for nothing.

    Raises UserError where no header can hold it, without its value, which is secret.
    """
    value = os.environ.get(name, "").strip()
    if not value.isascii() or not value.isprintable():
        raise UserError(f"{name}: expected printable ASCII characters on one line, found others; set it again")
    return value or None


@dataclass
class Usage:
    """What was asked for so far: answered requests, and tokens as the server counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.requests:,} requests, {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"


@dataclass(frozen=True)
class Reply:
    """What a server has made of a prompt.

    text, finish_reason  as it says them
    tokens      in its count, the end token among them or not
    token_ids   all tokens, the end token and those of a stop string among them; None where the server does not tell
    logprobs    natural, of each token; None where the server gives none
    prompt_ids  the prompt as the model saw it; None where the server does not tell
    weights     the version of the weights; None where the server has no name for it
    """

    text: str
    finish_reason: str
    tokens: int
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    prompt_ids: list[int] | None = None
    weights: str | None = None


class OpenAIClient:
    """Asks a server, from several threads at once where it is asked so.

    timeout  seconds that a request may take
    retries  of a request that failed, before it is given up
    """

    def __init__(self, address: Address, timeout: float = 120.0, retries: int = 6) -> None:
        import openai

        self.address, self.usage = address, Usage()
        self._timeout, self._retries = timeout, retries
        key, organization, project = map(_header_value, IN_HEADERS)
        self._client = openai.OpenAI(
            base_url=address.url,
            api_key=key or "none",  # local servers want none, the client wants one
            timeout=timeout,
            max_retries=retries,
        )
        self._client.organization, self._client.project = organization, project  # stripped
        self._counting = threading.Lock()

    def check(self) -> str | None:
        """Ask for the server's models; who owns ours, in the server's words ("vllm", "sglang", "llamacpp"), or None.

        Raises ServerError where it does not answer or refuses the key.
        """
        import openai

        client = self._client.with_options(timeout=min(self._timeout, CHECK_SECONDS), max_retries=min(self._retries, 1))
        try:
            models = list(client.models.list())
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ServerError(self._explain(error)) from error
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return None  # it is there, and need not have such a list; whether it has the model, the first request shows
        owners = {getattr(one, "id", None): getattr(one, "owned_by", None) for one in models}
        return owners.get(self.address.model, next(iter(owners.values()), None))

    def ask(
        self,
        prompt: Prompt,
        *,
        seed: int,
        max_tokens: int,
        temperature: float,
        logprobs: bool = False,
        on_text: Callable[[str], object] | None = None,
        **details: Any,
    ) -> Reply:
        """Messages answered, or text or token ids continued; `on_text` is given the text as it comes.

        `details` are those of `openai`: top_p, stop, extra_body. Raises ServerError, and PromptTooLong.
        """
        import openai

        answers = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        create = self._client.chat.completions.create if answers else self._client.completions.create
        asked: dict[str, Any] = {"messages" if answers else "prompt": prompt if isinstance(prompt, str) else [*prompt]}
        asked |= {"seed": seed % 2**31, "max_tokens": max_tokens, "temperature": temperature, **details}
        asked |= {"logprobs": True if answers else 1} if logprobs else {}
        asked |= {} if on_text is None else {"stream": True}
        found: Any = None
        for _ in range(2):  # what is no completion may be a proxy's page while the server starts
            try:
                found = create(model=self.address.model, **asked)
                if on_text is not None:
                    return self._take_stream(found, on_text)
            except openai.BadRequestError as error:
                if BEYOND_CONTEXT.search(f"{error.code} {error.message}"):
                    raise PromptTooLong from None
                raise Refused(self._explain(error)) from error
            except openai.OpenAIError as error:
                refused = isinstance(error, (openai.UnprocessableEntityError, openai.InternalServerError))
                raise (Refused if refused else ServerError)(self._explain(error)) from error
            except ServerError:
                raise
            except ValueError as error:  # a body of JSON that is none
                found = error
            reply = _read(found)
            if reply is not None:
                self._count(getattr(found, "usage", None))
                return reply
        expected = "a chat completion" if answers else "a completion"
        raise ServerError(f"{self.place}: expected {expected}, found {shortened(str(found))!r}; is the URL right?")

    def _take_stream(self, chunks: Iterable[Any], on_text: Callable[[str], object]) -> Reply:
        pieces: list[str] = []
        reason, reported = "", None
        try:
            for chunk in chunks:
                reported = getattr(chunk, "usage", None) or reported
                for choice in getattr(chunk, "choices", None) or ():
                    delta = getattr(choice, "delta", None)
                    text = getattr(choice, "text", None) if delta is None else delta.content
                    reason = getattr(choice, "finish_reason", None) or reason
                    if text:
                        pieces.append(text)
                        on_text(text)
        except Exception as error:
            if not type(error).__module__.startswith("http"):  # httpx is another package in each version of openai
                raise
            raise ServerError(f"{self.place}: was cut in the middle of an answer: {shortened(str(error))}") from error
        if not reason:
            raise ServerError(f"{self.place}: an answer has no end; was the server stopped?")
        self._count(reported)
        return Reply("".join(pieces), reason, getattr(reported, "completion_tokens", None) or len(pieces))

    def command(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST to a path beside the API, such as "/flush_cache": what it answers. Raises ServerError."""
        import openai

        parts = urlsplit(self.address.url)
        url = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1") + path, "", ""))
        try:
            return self._client.post(url, cast_to=object, body=body, options={"timeout": LOAD_SECONDS})
        except ValueError:  # an empty body
            return None
        except openai.OpenAIError as error:
            raise ServerError(f"{self._explain(error)} (POST {path.partition('?')[0]})") from error

    @property
    def place(self) -> str:
        """The option and the URL, as errors begin."""
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
            return f"{self.place}: no answer within {self._timeout:g} s {tries}; is it overloaded? Raise --timeout"
        if isinstance(error, openai.APIConnectionError):
            return f"{self.place}: cannot be reached {tries}: {shortened(str(error.__cause__ or error))}"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return f"{self.place}: refuses the key ({error.status_code}); set OPENAI_API_KEY to one that it takes"
        if isinstance(error, openai.RateLimitError):
            return f"{self.place}: too many requests {tries} (429); lower --concurrency: {_message(error)}"
        if isinstance(error, openai.NotFoundError):
            return f"{self.place}: has no model {self.address.model!r}, or is another URL (404): {_message(error)}"
        if isinstance(error, openai.InternalServerError):
            return f"{self.place}: fails {tries} ({error.status_code}): {_message(error)}"
        if isinstance(error, openai.APIStatusError):
            return f"{self.place}: refuses the request ({error.status_code}): {_message(error)}"
        return f"{self.place}: {shortened(str(error))}"


def _read(found: Any) -> Reply | None:
    """The first choice of a completion; None where it is none."""
    try:
        choice = found.choices[0]
        message = getattr(choice, "message", None)
        content = choice.text if message is None else message.content
    except (AttributeError, IndexError, TypeError):
        return None
    token_ids, logprobs = _tokens(getattr(choice, "logprobs", None))
    if (given := _ids(getattr(choice, "token_ids", None))) is not None:
        token_ids = given
    count = getattr(getattr(found, "usage", None), "completion_tokens", None)
    seen = getattr(choice, "prompt_token_ids", None) or getattr(found, "prompt_token_ids", None)
    metadata = getattr(found, "metadata", None)
    version = metadata.get("weight_version") if isinstance(metadata, Mapping) else None
    return Reply(
        text=content if isinstance(content, str) else "",
        finish_reason=str(getattr(choice, "finish_reason", None) or ""),
        tokens=count if isinstance(count, int) else len(token_ids or ()),
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_ids=_ids(seen),
        weights=None if version is None else str(version),
    )


def _tokens(given: Any) -> tuple[list[int] | None, list[float] | None]:
    """Ids and log-probabilities of tokens: in OpenAI's form for completions, or in that for messages, which llama.cpp
    has for both, with ids."""
    if isinstance(given, Mapping):
        names, values = given.get("tokens"), given.get("token_logprobs")
        each = given.get("content")
    else:
        names, values = getattr(given, "tokens", None), getattr(given, "token_logprobs", None)
        each = getattr(given, "content", None)
    if isinstance(each, list) and each and values is None:
        each = [
            one if isinstance(one, Mapping) else vars(one) | (getattr(one, "model_extra", None) or {}) for one in each
        ]
        names, values = [one.get("token") for one in each], [one.get("logprob") for one in each]
        if (ids := _ids([one.get("id") for one in each])) is not None:
            return ids, _numbers(values)
    names = names if isinstance(names, list) else []
    numbers = [str(one).removeprefix(TOKEN_ID) for one in names if str(one).startswith(TOKEN_ID)]
    as_ids = bool(numbers) and len(numbers) == len(names) and all(number.isdigit() for number in numbers)
    return [int(number) for number in numbers] if as_ids else None, _numbers(values)


def _ids(values: Any) -> list[int] | None:
    whole = isinstance(values, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in values)
    return list(values) if whole else None


def _numbers(values: Any) -> list[float] | None:
    """A list of finite numbers; None for any other."""
    if not isinstance(values, list) or not all(isinstance(one, (int, float)) and isfinite(one) for one in values):
        return None
    return [float(one) for one in values]


def _message(error: Any) -> str:
    """What the server says of an error: as OpenAI does, as FastAPI does, or in its own way."""
    body = error.body if isinstance(error.body, dict) else {}
    return shortened(str(body.get("message") or body.get("detail") or error.response.text or error.message))


def shortened(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
