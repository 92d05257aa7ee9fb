"""Run uvicorn on a listening socket until a signal; then finish running requests and refuse new ones."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from anyio.to_thread import current_default_thread_limiter
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmkit.display import write_message
from llmkit.errors import UserError

HEADER_SECONDS = 30.0  # limit for the headers of a request, and for the next request on a connection
THREADS = 4  # that tokenize prompts and write judgements; each of anyio's default 40 would allocate its own memory
SWITCH_SECONDS = 0.0005  # until the engine's thread must release the GIL to the event loop; Python's default is 5 ms


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 picks a free one. Raises UserError if that fails."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise UserError(f"--host {host} --port {port}: {reason}; choose another port, or 0 for a free one") from None


def run(sock: socket.socket, build: Callable[[asyncio.AbstractEventLoop], tuple[ASGIApp, Callable[[], None]]]) -> None:
    """Serve the application from `build` until SIGTERM or SIGINT; finish running requests, then call its `close`."""
    logger = logging.getLogger("uvicorn.error")
    logger.handlers, logger.propagate = [_Messages(logging.ERROR)], False
    sys.setswitchinterval(SWITCH_SECONDS)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again when it ends

    async def main() -> None:
        current_default_thread_limiter().total_tokens = THREADS
        app, close = build(asyncio.get_running_loop())
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(HEADER_SECONDS),
        )
        try:
            await uvicorn.Server(config).serve([sock])
        finally:
            close()

    asyncio.run(main())


class HttpProtocol(H11Protocol):
    """Closes a connection if a request's headers do not arrive in time, even if bytes trickle in.

    uvicorn's `timeout_keep_alive` stops at the first byte after a response, and does not cover the first request.
    """

    head_seconds = HEADER_SECONDS

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._timer.cancel()
        elif self._timer.cancelled():  # a byte after the response: of the next header, or of an unread body
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self.transport.close)


class _Messages(logging.Handler):
    """Write uvicorn's errors without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError):  # second Ctrl-C
            write_message(self.format(record))
