"""A web server with the faults of real ones: no ranges, overload, cut connections, wrong lengths.

python tests/helpers/file_server.py --ways cut FILE...    # prints its address, then serves
"""

from __future__ import annotations

import argparse
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Serves `files` (path to bytes) at `address`; `requests` and `paths` have the Range and the path of each GET.

    `ways` are its faults:

    norange  ignores ranges and sends everything
    cut      every other answer ends after two thirds
    short    every answer ends after 700 kB
    busy     two of three requests get a 503
    down     every request gets a 503
    changes  every answer has a different ETag
    lie      the stated length is 1,000 bytes too large
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.version = "1"
        self.ways: set[str] = set()
        self.requests: list[str] = []
        self.paths: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore connections that are cut on purpose."""


class _Answer(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.requests.append(asked)
        server.paths.append(self.path)
        data = server.files.get(self.path.lstrip("/"))
        busy = "down" in server.ways or ("busy" in server.ways and len(server.requests) % 3)
        if data is None or busy:
            self.send_response(404 if data is None else 503)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        size, start = len(data), re.match(r"bytes=(\d+)-(\d*)", asked)
        ranged = start is not None and "norange" not in server.ways
        if ranged:
            data = data[int(start[1]) : int(start[2]) + 1 if start[2] else None]
        self.send_response(416 if ranged and not data else 206 if ranged else 200)
        self.send_header("ETag", f'"{len(server.requests) if "changes" in server.ways else server.version}"')
        self.send_header("Content-Length", str(len(data) + 1000 * ("lie" in server.ways)))
        if ranged:
            self.send_header("Content-Range", f"bytes {start[1]}-{size - 1}/{size}")
        self.end_headers()
        if "short" in server.ways:
            data = data[:700_000]
        elif "cut" in server.ways and len(server.requests) % 2:
            data = data[: len(data) * 2 // 3]
        self.wfile.write(data)


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Run a server in a thread."""
    with FileServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ways", default="")
    parser.add_argument("files", nargs="*", type=Path)
    asked = parser.parse_args()
    with file_server() as server:
        server.ways = set(asked.ways.split())
        server.files = {path.name: path.read_bytes() for path in asked.files}
        print(server.address, flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
