"""`llmkit serve` in a new process, as a user starts it, or in this process, which takes 0.1 s instead of 5.

with served("chat/", "--queue", "4") as server:
    server.client.chat.completions.create(model="chat", ...)
    server.post("/tokenize", {"prompt": "abc"})   ->  (200, {...})
with serving("chat/") as server:
    ... server.spec ...                           #  openai:http://127.0.0.1:40123/v1#chat
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A running server: its `url`, the name of its `model`, and its `process` if it has a separate one."""

    url: str
    model: str = ""
    process: Any = None

    @property
    def spec(self) -> str:
        """The value for --engine."""
        return f"openai:{self.url}/v1#{self.model}"

    @property
    def client(self) -> Any:
        """An `openai` client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return status and content of the answer to `body`, as JSON or raw bytes; None sends a GET."""
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
        said, address = "", None
        while address is None and (
            line := process.stderr.readline()
        ):  # models that run through transformers print a notice first
            said, address = said + line, re.fullmatch(r"llmkit: serving .* on (http://\S+)\n", line)
        try:
            assert address, said
            yield Server(address[1], process=process)
        finally:
            if process.poll() is None:
                process.terminate()
            rest = process.communicate(timeout=30)[1]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest, rest


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a model in a thread on a free port, like `llmkit serve FOLDER`."""
    import uvicorn

    from llmkit.generation.generator import Generator
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.sampler import open_sampler
    from llmkit.serving.app import Service, build
    from llmkit.serving.engine import Engine
    from llmkit.serving.models import ServedModel
    from llmkit.serving.server import HttpProtocol, listen

    running: list[uvicorn.Server] = []
    ready = threading.Event()

    async def serve(generator: Generator) -> None:
        model = ServedModel(folder.name, str(folder), generator)
        engine = Engine({model.name: generator}, asyncio.get_running_loop())
        service = Service([model], engine, slots=16, queue=256, timeout=600, judgements=None, guide=None)
        app = build(service, keys=(), hosts=(), origins=())
        config = uvicorn.Config(app, http=HttpProtocol, ws="none", lifespan="off", log_config=None, access_log=False)
        running.append(uvicorn.Server(config))
        ready.set()
        await running[0].serve([sock])
        engine.close()

    with listen("127.0.0.1", 0) as sock, open_sampler(str(folder), Sampling()) as generator:
        assert isinstance(generator, Generator)
        thread = threading.Thread(target=lambda: asyncio.run(serve(generator)), daemon=True)
        thread.start()
        assert ready.wait(60)
        try:
            yield Server(f"http://127.0.0.1:{sock.getsockname()[1]}", folder.name)
        finally:
            running[0].should_exit = True
            thread.join()
