"""The listening socket, uvicorn on it, and the way down: what runs is finished, and nothing new begins."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmkit.display import write_message
from llmkit.errors import UserError

HEADER_SECONDS = 30.0  # for the head of a request to arrive, and for another request on a connection
SWITCH_SECONDS = 0.0005  # in which the event loop gets its turn beside the engine's thread; Python's own are 5 ms


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 takes a free one. Raises UserError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that wait for their end
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise UserError(f"--host {host} --port {port}: {reason}; choose another port, or 0 for a free one") from None
    return sock


def run(sock: socket.socket, build: Callable[[asyncio.AbstractEventLoop], tuple[ASGIApp, Callable[[], None]]]) -> None:
    """Serve the application that `build` makes, until SIGTERM or SIGINT; then finish what runs and call its end."""
    logger = logging.getLogger("uvicorn.error")
    logger.handlers, logger.propagate = [_Messages(logging.ERROR)], False
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)

    async def main() -> None:
        app, end = build(asyncio.get_running_loop())
        try:
            config = uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=int(HEADER_SECONDS),
            )
            await _Server(config).serve([sock])
        finally:
            end()

    try:
        asyncio.run(main())
    finally:
        sys.setswitchinterval(before)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Begin the end at the first signal, and do not raise it again behind it, as uvicorn does."""
        if threading.current_thread() is not threading.main_thread():  # which alone is sent signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """Closes a connection whose next head is not there in time, which uvicorn does only behind a first answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(HEADER_SECONDS, self._close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:
            self._head.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.cancel()
        super().connection_lost(exc)

    def _close(self) -> None:
        self.transport.close()


class _Messages(logging.Handler):
    """Errors of uvicorn's, without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError):  # by a second Ctrl-C
            write_message(self.format(record))
