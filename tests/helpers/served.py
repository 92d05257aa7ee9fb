"""`llmkit serve` in a process of its own, as a user starts it.

with served("chat/", "--queue", "4") as server:
    server.client.chat.completions.create(model="chat", ...)
    server.post("/tokenize", {"prompt": "abc"})   ->  (200, {...})
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Server:
    """A server that runs: `url`, its `process`, and what it wrote to stderr until then."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    @property
    def client(self) -> Any:
        """A client of `openai`."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """The status and the content of an answer; `body` is JSON, or bytes as they are; None is a GET."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()


@contextmanager
def served(*arguments: Any) -> Iterator[Server]:
    """Start a server on a free port; SIGTERM ends it, with exit code 0."""
    command = [sys.executable, "-m", "llmkit", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.fullmatch(r"llmkit: serving .* on (http://\S+)\n", line)
        try:
            assert address, line + process.stderr.read()
            yield Server(process, address[1])
        finally:
            if process.poll() is None:
                process.terminate()
            rest = process.communicate(timeout=30)[1]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest, rest
