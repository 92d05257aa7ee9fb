"""Client of a model on an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama or a hosted one.

    address = parse_address("openai:http://localhost:8000/v1#qwen", "--judge")
    model = OpenAIClient(address, timeout=120, retries=6)
    model.check()
    messages = [{"role": "user", "content": "Who was Ada?"}]  # or text to continue, or the ids of its tokens
    model.ask(messages, seed=0, max_tokens=64, temperature=0.3).text  # thread-safe

The package `openai` sends the requests and retries after a timeout, a broken connection, a rate limit (429) and a
server error (5xx), at intervals that double from half a second to eight, or as Retry-After says. The key comes from
OPENAI_API_KEY, if it is set.

`openai` applies its timeout to each read, so a server that sends bytes slowly could hold a call forever; here the
timeout limits the complete attempt. Hosts on this machine are reached without the environment's proxies. A redirect
that would turn a POST into a GET is not followed, so that the error can name the new URL.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llmkit.display import redacted
from llmkit.errors import ServerError, UserError
from llmkit.generation.requests import Prompt, Usage
from llmkit.io.progress import counted
from llmkit.tools.search import is_this_machine

SCHEME = "openai:"
EXAMPLE = "openai:http://localhost:8000/v1#model-name"
# OpenAI's code, vLLM's and SGLang's "maximum context length", llama.cpp's "available context size"
BEYOND_CONTEXT = re.compile(r"context[ _](?:length|size|window)", re.IGNORECASE)
SHOWN = 200  # characters shown of a server's message
RETRIES = 6  # of a request, with 0.5 to 8 seconds between
CHECK_SECONDS = 10.0  # for a server to answer `check`
IN_HEADERS = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")  # environment variables sent in headers
LOAD_SECONDS = 1800.0  # to load weights
LOST_POST = (301, 302, 303)  # redirects after which a POST is repeated as a GET
MOVED = "x-llmkit-moved-to"  # our header in such a response, with its Location
NEWER_LENGTH = "max_completion_tokens"
# finish reasons of Anthropic, Google and TGI in OpenAI's words
FINISHES = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length"), "length"),
}
MALFORMED = (ValueError, TypeError, AttributeError, KeyError, RecursionError)  # raised by reading malformed bodies
TOKEN_ID = "token_id:"  # vLLM's prefix of ids returned as token names


class Refused(ServerError):
    """The server refuses the request, or fails on it."""


class NoCompletion(ServerError):
    """The server's answer is not a completion."""


class PromptTooLong(Exception):
    """The prompt does not fit the context of the model."""


@dataclass(frozen=True)
class Address:
    """Address of a server, and the name of one of its models; `flag` is the option that gave them."""

    url: str
    model: str
    flag: str

    @property
    def name(self) -> str:
        """The model's name without the URL, which may change."""
        return f"{SCHEME}#{self.model}"


def parse_address(spec: str, flag: str) -> Address:
    """Parse `openai:URL#model`. Raises UserError if it is malformed or the package openai is missing."""
    url, _, model = spec.removeprefix(SCHEME).partition("#")
    try:
        split = urlsplit(url)
        _ = split.port
    except ValueError:
        raise UserError(f"{flag}: expected a server and its model, such as {EXAMPLE}, found {spec}") from None
    if not spec.startswith(SCHEME) or split.scheme not in ("http", "https") or not split.hostname or not model:
        raise UserError(f"{flag}: expected a server and its model, such as {EXAMPLE}, found {spec}")
    if split.username or split.password or split.query:
        unwanted = "user and password" if split.username or split.password else "anything after a question mark"
        raise UserError(f"{flag}: expected a URL without {unwanted}; the key goes into OPENAI_API_KEY")
    for name in IN_HEADERS:
        _header_value(name)
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError(f"{flag} openai:...: needs the package openai; pip install 'llmkit[openai]'") from None
    return Address(url, model, flag)


def _header_value(name: str) -> str | None:
    """Read a header's value from an environment variable and strip it; None if it is empty.

    Raises UserError, without the secret value, if a header cannot contain it.
    """
    value = os.environ.get(name, "").strip()
    if not value.isascii() or not value.isprintable():
        raise UserError(f"{name}: expected printable ASCII characters on one line, found others; set it again")
    return value or None


@dataclass(frozen=True)
class Reply:
    """A server's completion of a prompt.

    text, finish_reason  as the server returns them
    tokens      by the server's count, with or without the end token
    token_ids   all tokens, including the end token and those of a stop string; None if the server does not return them
    logprobs    natural, of each token; None if the server does not return them
    prompt_ids  the prompt as the model saw it; None if the server does not return it
    weights     version of the weights; None if the server does not name it
    thought     reasoning returned apart from the text
    tool_calls  {"id", "name", "arguments"} of each call, with the arguments as text
    echoed      the log-probabilities as returned, including the prompt's with `echo`
    """

    text: str
    finish_reason: str
    tokens: int
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    prompt_ids: list[int] | None = None
    weights: str | None = None
    thought: str = ""
    tool_calls: tuple[dict[str, str], ...] = ()
    echoed: Mapping[str, Any] = field(default_factory=dict)


class OpenAIClient:
    """Thread-safe client of a server.

    timeout  seconds per attempt
    retries  of a failed request
    """

    def __init__(self, address: Address, timeout: float = 120.0, retries: int | None = None) -> None:
        import openai

        retries = RETRIES if retries is None else retries
        self.address, self.usage = address, Usage()
        self._timeout, self._retries = timeout, retries
        key, organization, project = map(_header_value, IN_HEADERS)
        self._client = openai.OpenAI(
            base_url=address.url,
            api_key=key or "none",  # local servers need none, but the client requires one
            timeout=timeout,
            max_retries=retries,
            http_client=_http_client(address.url, address.flag),
        )
        self._length = "max_tokens"  # name of the limit: OpenAI's newer models refuse this one
        self._client.organization, self._client.project = organization, project  # stripped
        self._counting = threading.Lock()

    def check(self) -> str | None:
        """List the server's models; return the owner of ours ("vllm", "sglang", "llamacpp"), or None.

        Raises ServerError if the server does not answer or refuses the key.
        """
        import openai

        client = self._client.with_options(timeout=min(self._timeout, CHECK_SECONDS), max_retries=min(self._retries, 1))
        try:
            models = list(client.models.list())
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ServerError(self._explain(error)) from error
        except (openai.OpenAIError, *MALFORMED):
            return None  # it answers, but need not list models; the first request shows whether it has ours
        owners = {getattr(model, "id", None): getattr(model, "owned_by", None) for model in models}
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
        used: Collection[str] = (),
        **details: Any,
    ) -> Reply:
        """Answer messages, or continue text or token ids; `on_text` gets the text as it is streamed.

        `used` names the content that the caller uses besides the text ("reasoning", "tool calls"); the rest is counted
        as left out. `details` are arguments of `openai`: top_p, stop, tools, echo, extra_body. Raises ServerError and
        PromptTooLong.
        """
        import openai

        answers = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        create = self._client.chat.completions.create if answers else self._client.completions.create
        body: dict[str, Any] = {"messages" if answers else "prompt": prompt if isinstance(prompt, str) else [*prompt]}
        body |= {"seed": seed % 2**31, "temperature": temperature, **details}
        body |= {"logprobs": True if answers else 1} if logprobs else {}
        body |= {} if on_text is None else {"stream": True}
        response: Any = None
        tries = 2  # anything but a completion may be a proxy's page while the server starts
        while tries:
            tries -= 1
            length = self._length
            try:
                response = create(model=self.address.model, **{length: max_tokens}, **body)
                if body.get("stream"):
                    assert on_text is not None
                    if (reply := self._take_stream(response, on_text, used)) is not None:
                        return reply
                    tries += 1
                    del body["stream"]  # the server may not support streaming, or not answer at all
                    continue
            except openai.BadRequestError as error:
                if answers and length == "max_tokens" and NEWER_LENGTH in error.message:
                    self._length = NEWER_LENGTH
                    tries += 1
                    continue
                if BEYOND_CONTEXT.search(f"{error.code} {error.message}"):
                    raise PromptTooLong from None
                raise Refused(self._explain(error)) from error
            except openai.OpenAIError as error:
                refused = isinstance(error, (openai.UnprocessableEntityError, openai.InternalServerError))
                raise (Refused if refused else ServerError)(self._explain(error)) from error
            except ServerError:
                raise
            except MALFORMED as error:  # invalid or unexpected JSON
                response = error
            content = _plain(response)
            if (error := content.get("error")) and not content.get("choices"):  # with status 200
                fault = shortened(str(error.get("message") or error if isinstance(error, dict) else error))
                raise NoCompletion(f"{self.place}: reports an error: {fault}")
            reply = _read(content)
            if reply is not None:
                self._count(content.get("usage"), reply, used)
                if on_text is not None and reply.text:
                    on_text(reply.text)
                return reply
        expected = "a chat completion" if answers else "a completion"
        text = response.to_json(indent=None, warnings=False) if hasattr(response, "to_json") else str(response)
        raise NoCompletion(f"{self.place}: expected {expected}, found {shortened(text)!r}; is the URL right?")

    def _take_stream(
        self, chunks: Iterable[Any], on_text: Callable[[str], object], used: Collection[str]
    ) -> Reply | None:
        """Read a streamed reply; return None if nothing was streamed."""
        pieces: list[str] = []
        reason, reported, received = "", None, False
        thoughts: list[str] = []
        calls: dict[Any, dict[str, str]] = {}
        try:
            for chunk in chunks:
                received, content = True, _plain(chunk)
                reported = content.get("usage") or reported
                for choice in filter(None, map(_object, content.get("choices") or ())):
                    delta = _object(choice.get("delta"))
                    thoughts.append(text_of(delta.get("reasoning_content") or delta.get("reasoning")))
                    pieces_of_calls = delta.get("tool_calls")
                    entries = pieces_of_calls if isinstance(pieces_of_calls, list) else ()
                    for number, piece in enumerate(map(_object, entries)):
                        call = calls.setdefault(piece.get("index", number), {"id": "", "name": "", "arguments": ""})
                        for name, text in _call(piece).items():
                            call[name] += text
                    reason = choice.get("finish_reason") or reason
                    if text := text_of(delta.get("content")) or text_of(delta.get("refusal") or choice.get("text")):
                        pieces.append(text)
                        on_text(text)
        except Exception as error:
            if not type(error).__module__.startswith("http"):  # the package of httpx depends on the version of openai
                raise
            raise ServerError(f"{self.place}: connection broken during an answer: {shortened(str(error))}") from error
        if not reason and not received:
            return None
        if not reason:
            raise ServerError(f"{self.place}: an answer has no finish reason; was the server stopped?")
        count = _count_of(reported, "completion_tokens") or len(pieces)
        reply = Reply(
            "".join(pieces), _finish(reason), count, thought="".join(thoughts), tool_calls=tuple(calls.values())
        )
        self._count(reported, reply, used)
        return reply

    def command(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST to a path outside the API, such as "/flush_cache", and return the reply. Raises ServerError."""
        import openai

        split = urlsplit(self.address.url)
        url = urlunsplit((split.scheme, split.netloc, split.path.rstrip("/").removesuffix("/v1") + path, "", ""))
        try:
            return self._client.post(url, cast_to=object, body=body, options={"timeout": LOAD_SECONDS})
        except ValueError:  # an empty body
            return None
        except openai.OpenAIError as error:
            raise ServerError(f"{self._explain(error)} (POST {path.partition('?')[0]})") from error

    @property
    def place(self) -> str:
        """The option and the URL, with which errors begin."""
        return f"{self.address.flag} {self.address.url}"

    def _count(self, reported: Any, reply: Reply, used: Collection[str]) -> None:
        extras = {"reasoning": reply.thought, "tool calls": reply.tool_calls}
        with self._counting:
            self.usage.requests += 1
            self.usage.prompt_tokens += _count_of(reported, "prompt_tokens")
            self.usage.completion_tokens += _count_of(reported, "completion_tokens")
            for kind in (kind for kind, content in extras.items() if content and kind not in used):
                self.usage.left_out[kind] = self.usage.left_out.get(kind, 0) + 1

    def _explain(self, error: Any) -> str:
        """Turn an error of `openai` into one line for users."""
        import openai

        tries = f"after {counted(self._retries, 'retry')}"
        if isinstance(error, openai.APITimeoutError):
            return f"{self.place}: no answer within {self._timeout:g} s {tries}; is it overloaded? Raise --timeout"
        if isinstance(error, openai.APIConnectionError):
            return f"{self.place}: cannot be reached {tries}: {shortened(str(error.__cause__ or error))}"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            key = self._client.api_key
            words = _message(error) if key == "none" else _message(error).replace(key, "***")
            return f"{self.place}: refuses the key ({error.status_code}); set OPENAI_API_KEY to a valid one: {words}"
        if isinstance(error, openai.RateLimitError):
            return f"{self.place}: too many requests {tries} (429); lower --concurrency: {_message(error)}"
        if isinstance(error, openai.NotFoundError):
            return f"{self.place}: has no model {self.address.model!r}, or the URL is wrong (404): {_message(error)}"
        if isinstance(error, openai.InternalServerError):
            return f"{self.place}: fails {tries} ({error.status_code}): {_message(error)}"
        if isinstance(error, openai.APIStatusError) and (moved := error.response.headers.get(MOVED)):
            moved = moved.rpartition("/chat/completions")[0] or moved.rpartition("/completions")[0] or moved
            return f"{self.place}: has moved to {shortened(moved)} ({error.status_code}); use that URL"
        if isinstance(error, openai.APIStatusError):
            return f"{self.place}: refuses the request ({error.status_code}): {_message(error)}"
        return f"{self.place}: {shortened(str(error))}"


def _plain(response: Any) -> dict[str, Any]:
    """Return the JSON object behind a response of `openai`; empty if it is none."""
    try:
        return _object(response.to_dict(warnings=False))
    except MALFORMED:
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def text_of(content: Any) -> str:
    """Return the text of a message's content, a string or a list of parts; lone surrogates are replaced."""
    if isinstance(content, list):
        content = "".join(text_of(_object(part).get("text")) for part in content)
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(content, str) else ""


def _read(content: Mapping[str, Any]) -> Reply | None:
    """Read the first choice of a completion; return None if there is none."""
    choices = content.get("choices")
    choice = _object(choices[0] if isinstance(choices, list) and choices else None)
    message = _object(choice.get("message"))
    if not message and not isinstance(choice.get("text"), str):
        return None
    token_ids, logprobs = _tokens(_object(choice.get("logprobs")))
    if (given := _ids(choice.get("token_ids"))) is not None:
        token_ids = given
    version = _object(content.get("metadata")).get("weight_version")
    calls = message.get("tool_calls")
    if not calls and (older := message.get("function_call")):
        calls = [{"function": older}]
    return Reply(
        text=text_of(message.get("content")) or text_of(message.get("refusal") or choice.get("text")),
        finish_reason=_finish(choice.get("finish_reason")),
        tokens=_count_of(content.get("usage"), "completion_tokens") or len(token_ids or ()),
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_ids=_ids(choice.get("prompt_token_ids") or content.get("prompt_token_ids")),
        weights=None if version is None else str(version),
        thought=text_of(message.get("reasoning_content") or message.get("reasoning")),
        tool_calls=tuple(map(_call, calls if isinstance(calls, list) else ())),
        echoed=_object(choice.get("logprobs")),
    )


def _call(part: Any) -> dict[str, str]:
    """Read a function call, or a streamed piece of one."""
    function = _object(_object(part).get("function"))
    texts = {"id": _object(part).get("id"), "name": function.get("name"), "arguments": function.get("arguments")}
    if isinstance(texts["arguments"], dict):  # from Ollama
        texts["arguments"] = json.dumps(texts["arguments"], ensure_ascii=False)
    return {name: text_of(text) for name, text in texts.items()}


def _finish(reason: Any) -> str:
    """Return the finish reason in OpenAI's words; empty if the server gives none."""
    name = reason if isinstance(reason, str) else ""
    return FINISHES.get(name.lower(), name)


def _count_of(reported: Any, name: str) -> int:
    """Return a number of tokens; 0 if the server does not report a plausible one."""
    count = _object(reported).get(name)
    return count if isinstance(count, int) and 0 <= count < 2**53 else 0


def _tokens(given: Mapping[str, Any]) -> tuple[list[int] | None, list[float] | None]:
    """Read token ids and log-probabilities: in OpenAI's form for completions, or in the one for messages, which
    llama.cpp uses for both, with ids."""
    names, values, each = given.get("tokens"), given.get("token_logprobs"), given.get("content")
    if isinstance(each, list) and each and values is None:
        each = [_object(entry) for entry in each]
        names, values = [entry.get("token") for entry in each], [entry.get("logprob") for entry in each]
        if (ids := _ids([entry.get("id") for entry in each])) is not None:
            return ids, _numbers(values)
    names = names if isinstance(names, list) else []
    numbers = [str(name).removeprefix(TOKEN_ID) for name in names if str(name).startswith(TOKEN_ID)]
    as_ids = bool(numbers) and len(numbers) == len(names) and all(number.isdigit() for number in numbers)
    return [int(number) for number in numbers] if as_ids else None, _numbers(values)


def _ids(values: Any) -> list[int] | None:
    valid = isinstance(values, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in values)
    return list(values) if valid else None


def _numbers(values: Any) -> list[float] | None:
    """Return a list of finite numbers as floats; None for anything else."""
    if not isinstance(values, list) or not all(isinstance(item, (int, float)) and abs(item) < 1e300 for item in values):
        return None
    return [float(item) for item in values]


def _message(error: Any) -> str:
    """Extract a server's error message, in the form of OpenAI, of FastAPI, or its own."""
    body = error.body if isinstance(error.body, dict) else {}
    return shortened(str(body.get("message") or body.get("detail") or error.response.text or error.message))


def shortened(text: str) -> str:
    """Return the beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


# ---- HTTP, with a time limit for the complete attempt


def _http_client(url: str, flag: str) -> Any:
    """Return the HTTP client for `openai.OpenAI`. Raises UserError if the environment's proxy cannot be used."""
    import openai

    attempt = threading.local()  # requests run in the caller's thread

    def begin(request: Any) -> None:
        seconds = (request.extensions.get("timeout") or {}).get("read")
        attempt.ends = None if seconds is None else time.monotonic() + seconds

    def keep(response: Any) -> None:
        if response.status_code in LOST_POST and response.request.method == "POST" and "location" in response.headers:
            response.headers[MOVED] = response.headers.pop("location")

    host = urlsplit(url).hostname or ""
    hooks: Any = {"request": [begin], "response": [keep]}
    try:
        client = openai.DefaultHttpxClient(trust_env=not is_this_machine(host), event_hooks=hooks)
    except (ImportError, ValueError) as error:
        reason = redacted(str(error)).partition("'socksio'")[0]
        raise UserError(
            f"{flag} {url}: cannot use the environment's proxy ({reason.strip()}...); pip install socksio "
            "for a SOCKS proxy, or add the host to NO_PROXY"
        ) from None
    for transport in (client._transport, *client._mounts.values()):
        if (pool := getattr(transport, "_pool", None)) is not None:  # httpx has no public option for the backend
            pool._network_backend = _Backend(pool._network_backend, attempt, type(pool).__module__.partition(".")[0])
    return client


class _Backend:
    """A network backend whose streams time out with the attempt that reads them."""

    def __init__(self, inner: Any, attempt: threading.local, package: str) -> None:
        self._inner, self._attempt, self._package = inner, attempt, package

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connect_tcp(self, *arguments: Any, **named: Any) -> _Stream:
        stream = self._inner.connect_tcp(*arguments, **named)
        return _Stream(stream, self._attempt, sys.modules[self._package].ReadTimeout)


class _Stream:
    """A connection that cannot be read after the end of the attempt."""

    def __init__(self, inner: Any, attempt: threading.local, late: type[Exception]) -> None:
        self._inner, self._attempt, self._late = inner, attempt, late

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        ends = getattr(self._attempt, "ends", None)
        if ends is None:
            return self._inner.read(max_bytes, timeout)
        left = ends - time.monotonic()
        if left <= 0:
            raise self._late("the time for this attempt is over")
        return self._inner.read(max_bytes, left if timeout is None else min(timeout, left))

    def start_tls(self, *arguments: Any, **named: Any) -> _Stream:
        return _Stream(self._inner.start_tls(*arguments, **named), self._attempt, self._late)
