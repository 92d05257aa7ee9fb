"""HTTP to a server of models: bounded as a whole, without surprises of the environment.

The client of `openai` bounds each read by its timeout, so that a server that drips may hold a call for ever; here each
attempt ends when its time is over. A host of this machine is asked past the proxies of the environment. A redirect that
would turn a POST into a GET is not followed, so that the server's answer to it is told.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from llmkit.display import redacted
from llmkit.errors import UserError
from llmkit.tools.search import is_this_machine

LOST_POST = (301, 302, 303)  # after which a POST comes again as a GET
MOVED = "x-llmkit-moved-to"  # a header of ours in such a response


def open_http_client(url: str, flag: str) -> Any:
    """The HTTP client for a server, for `openai.OpenAI`. Raises UserError for a proxy that cannot be used."""
    import openai

    attempt = threading.local()  # requests are made in the thread that asks

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
            f"{flag} {url}: cannot be asked by the proxy of the environment ({reason.strip()}...); pip install socksio "
            "for one of SOCKS, or name the host in NO_PROXY"
        ) from None
    for transport in (client._transport, *client._mounts.values()):
        if (pool := getattr(transport, "_pool", None)) is not None:  # httpx hands on no backend by its public names
            pool._network_backend = _Backend(pool._network_backend, attempt, type(pool).__module__.partition(".")[0])
    return client


class _Backend:
    """A network backend whose streams end with the attempt that reads them."""

    def __init__(self, inner: Any, attempt: threading.local, package: str) -> None:
        self._inner, self._attempt, self._package = inner, attempt, package

    def connect_tcp(self, *arguments: Any, **named: Any) -> _Stream:
        return self._wrapped(self._inner.connect_tcp(*arguments, **named))

    def connect_unix_socket(self, *arguments: Any, **named: Any) -> _Stream:
        return self._wrapped(self._inner.connect_unix_socket(*arguments, **named))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)

    def _wrapped(self, stream: Any) -> _Stream:
        return _Stream(stream, self._attempt, sys.modules[self._package].ReadTimeout)


class _Stream:
    """A connection that is not read from after the end of the attempt."""

    def __init__(self, inner: Any, attempt: threading.local, late: type[Exception]) -> None:
        self._inner, self._attempt, self._late = inner, attempt, late

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        ends = getattr(self._attempt, "ends", None)
        if ends is None:
            return self._inner.read(max_bytes, timeout)
        left = ends - time.monotonic()
        if left <= 0:
            raise self._late("the time of the whole call is over")
        return self._inner.read(max_bytes, left if timeout is None else min(timeout, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, *arguments: Any, **named: Any) -> _Stream:
        return _Stream(self._inner.start_tls(*arguments, **named), self._attempt, self._late)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def text_of(content: Any) -> str:
    """The text of a message's content: text, or a list of parts of it; halves of characters are replaced."""
    if isinstance(content, list):
        content = "".join(text_of(part.get("text")) for part in _mappings(content))
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(content, str) else ""


def _mappings(parts: Iterable[Any]) -> Iterable[dict[str, Any]]:
    """Yield the fields of parts that have any: JSON objects, or what `openai` makes of them."""
    for part in parts:
        fields = part if isinstance(part, dict) else getattr(part, "__dict__", None)
        if isinstance(fields, dict):
            yield fields
