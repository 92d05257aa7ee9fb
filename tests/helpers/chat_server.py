"""A local server of OpenAI's chat completions that can simulate the faults of real servers.

with ChatServer(lambda prompt, seed: "VERDICT: right") as server:
    server.faults = ["429", "cut"]       # for the next requests
    ... server.spec ...                  # openai:http://127.0.0.1:40123/v1#tiny
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Replies with `answer(prompt, seed)`: a text, or an object as the complete body; `requests` has all bodies.

    faults      faults of the next requests: "429", "500", "400", "401", "404", "context", "cut", "cut stream", "slow",
                "page"
    dies_after  number of requests after which all are cut
    slow        seconds that a slow reply takes; `pause` is the delay of every reply
    """

    def __init__(self, answer: Callable[[str, int], Any]) -> None:
        self.answer, self.requests, self.faults = answer, [], []
        self.dies_after: int | None = None
        self.about: dict[str, Any] = {}  # more fields in the list of models
        self.refusal: Any = None  # the body of an error
        self.slow, self.pause, self.keys, self.open, self.most_open = 2.0, 0.0, set(), 0, 0
        self._counting = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self.spec = f"openai:{self.url}#tiny"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self, body: dict[str, Any]) -> str | None:
        with self._counting:
            self.requests.append(body)
            if self.dies_after is not None and len(self.requests) > self.dies_after:
                return "cut"
            return self.faults.pop(0) if self.faults else None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the body of the answer to a POST."""
        said = self.answer(body["messages"][-1]["content"], body["seed"])
        if not isinstance(said, str):
            return 200, said
        choices = [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        return 200, {"id": "1", "object": "chat.completion", "choices": choices, "usage": usage}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                chat.keys.add(self.headers["Authorization"])
                if "401" in chat.faults:
                    self.send(401, {"error": {"message": "no such key"}})
                else:
                    self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model", **chat.about}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
                fault = chat._next_fault(body)
                with chat._counting:
                    chat.open += 1
                    chat.most_open = max(chat.most_open, chat.open)
                try:
                    time.sleep(chat.slow if fault == "slow" else chat.pause)
                    self.reply(body, fault)
                finally:
                    with chat._counting:
                        chat.open -= 1

            def reply(self, body: dict[str, Any], fault: str | None) -> None:
                if fault == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif fault == "page":
                    self.send(200, b"<html>Bad gateway</html>", "text/html")
                elif fault == "context":
                    self.send(400, {"error": {"message": "This model's maximum context length is 128 tokens."}})
                elif fault not in (None, "slow", "cut stream"):
                    said = chat.refusal or {"error": {"message": f"something of {fault}"}}
                    self.send(int(fault), said, again=fault in ("429", "500"))
                else:
                    status, made = chat.respond(self.path, body)
                    if status == 200 and isinstance(body, dict) and body.get("stream"):
                        self.stream(made, fault)
                    else:
                        self.send(status, made, *(["text/plain"] if isinstance(made, bytes) else []))

            def stream(self, made: Any, fault: str | None) -> None:
                """Stream the text of a completion, a character per event."""
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                (choice,) = made["choices"]
                message = choice.get("message", {})
                text = message.get("content") or "" if message else choice["text"]
                for name in ("reasoning_content", "reasoning"):
                    delta = {name: message[name]} if message.get(name) else {}
                    one = {**made, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                    self.wfile.write(b"data: " + json.dumps(one).encode() + b"\n\n")
                for number, call in enumerate(message.get("tool_calls") or ()):
                    named, half = {"index": number, "id": call["id"]}, len(call["function"]["arguments"]) // 2
                    for name, piece in ((call["function"]["name"], slice(half)), (None, slice(half, None))):
                        function = {"name": name, "arguments": call["function"]["arguments"][piece]}
                        delta = {"tool_calls": [{**named, "function": function}]}
                        one = {**made, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                        self.wfile.write(b"data: " + json.dumps(one).encode() + b"\n\n")
                        named.pop("id", None)
                for number, piece in enumerate([*text, ""]):
                    if fault == "cut stream" and number == 3:
                        break
                    said = {"delta": {"content": piece}} if "message" in choice else {"text": piece}
                    done = number == len(text)
                    said |= {"index": 0, "finish_reason": choice["finish_reason"] if done else None}
                    self.wfile.write(b"data: " + json.dumps({**made, "choices": [said]}).encode() + b"\n\n")
                self.close_connection = True

            def send(self, status: int, content: Any, kind: str = "application/json", again: bool = False) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                if again:
                    self.send_header("Retry-After", "0.01")
                with suppress(ConnectionError):  # the client may have given up on a slow answer
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
