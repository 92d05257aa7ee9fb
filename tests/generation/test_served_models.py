"""Odd answers of servers are parsed, reported or counted, within time limits and without a traceback."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec

import pytest
from chat_server import ChatServer

from llmkit.errors import ServerError, UserError
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.generation.served_models import OpenAIClient, parse_address
from llmkit.generation.served_sampler import ServedSampler

ASKED = [{"role": "user", "content": "Hi"}]
WANTED = {"seed": 1, "max_tokens": 8, "temperature": 0.8}


def test_a_pause_without_requests_does_not_end_the_run():
    with ChatServer(lambda prompt, seed: "Hello.") as server:
        sampler = ServedSampler(OpenAIClient(parse_address(server.spec, "--engine"), 20.0, 0), Sampling())
        requests = [None, Request(ASKED, max_tokens=8), None, None]
        assert [samples[0].text for samples in sampler.complete(requests)] == ["Hello."]


def client(spec: str, timeout: float = 20.0, retries: int = 0) -> OpenAIClient:
    return OpenAIClient(parse_address(spec, "--engine"), timeout, retries)


def chat(content: object = "Hello.", finish: object = "stop", **message: object) -> dict:
    return {
        "id": "x",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    } | ({} if finish is None else {"choices": [{**_choice(content, message), "finish_reason": finish}]})


def _choice(content: object, message: dict) -> dict:
    return {"index": 0, "message": {"role": "assistant", "content": content, **message}}


@pytest.mark.parametrize(
    ("body", "text", "finish", "left_out"),
    [
        (chat([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]), "Hello.", "stop", {}),
        (chat("Four.", reasoning_content="I think."), "Four.", "stop", {"reasoning": 1}),
        (chat(None, "length", reasoning="I think."), "", "length", {"reasoning": 1}),
        (chat(None, refusal="I cannot."), "I cannot.", "stop", {}),
        (chat(None, "tool_calls", tool_calls=[{"id": "1"}]), "", "tool_calls", {"tool calls": 1}),
        (chat(finish=None), "Hello.", "", {}),
        (chat(finish="STOP"), "Hello.", "stop", {}),
        (chat(finish="end_turn"), "Hello.", "stop", {}),
        (chat(finish={"a": 1}), "Hello.", "", {}),
        (chat(["a", None, {"text": 5}]), "", "stop", {}),
        ({**chat(), "usage": {"completion_tokens": "many", "prompt_tokens": -5}}, "Hello.", "stop", {}),
        ({**chat(), "usage": {"completion_tokens": 10**30}}, "Hello.", "stop", {}),
        (chat("a\ud83d b"), "a\ufffd b", "stop", {}),
    ],
)
def test_answers_of_a_server_are_parsed_or_counted(body, text, finish, left_out):
    with ChatServer(lambda prompt, seed: body) as server:
        model = client(server.spec)
        reply = model.ask(ASKED, **WANTED)
    assert (reply.text, reply.finish_reason, model.usage.left_out) == (text, finish, left_out)
    assert all(f"left out the {kind} of 1" in str(model.usage) for kind in left_out)


def test_the_newer_name_of_the_length_is_used_where_the_older_is_refused():
    class Newer(ChatServer):
        def respond(self, path, body):
            if "max_tokens" in body:
                return 400, {"error": {"message": "Unsupported 'max_tokens'. Use 'max_completion_tokens' instead."}}
            return super().respond(path, body)

    with Newer(lambda prompt, seed: "yes") as server:
        model = client(server.spec)
        assert [model.ask(ASKED, **WANTED).text for _ in range(2)] == ["yes", "yes"]
    assert [one.get("max_completion_tokens") for one in server.requests] == [None, 8, 8]


@contextmanager
def raw_server(answer):
    """Run a server that answers every request with raw bytes or with a function of the connection; yield its URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def handle(connection):
            with connection, suppress(OSError):
                while connection.recv(65536).find(b"POST") < 0:
                    pass
                answer(connection) if callable(answer) else connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        def serve():
            with suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=server.accept()[:1], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"openai:http://127.0.0.1:{server.getsockname()[1]}/v1#m"


def body(content: object, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nConnection: close\r\n" + more
    return head + b"Content-Length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("delta", [{"reasoning_content": "Hm."}, {"tool_calls": [{"index": 0, "id": "1"}]}])
def test_dropped_parts_are_reported_with_the_answer(delta):
    from llmkit.generation.chat import Chat
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.sampler import open_sampler

    chunks = [
        {"choices": [{"index": 0, "delta": one, "finish_reason": end}]} for one, end in ((delta, None), ({}, "stop"))
    ]
    events = b"".join(b"data: " + json.dumps({"id": "x", **chunk}).encode() + b"\n\n" for chunk in chunks)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    with raw_server(head + events + b"data: [DONE]\n\n") as address:
        said: list[str] = []
        with open_sampler(address, Sampling()) as sampler:
            Chat(sampler, max_tokens=9).ask("Hi", lambda text: None, said.append)
    first = "thinks: Hm." if "reasoning_content" in delta else "left out: the server's tool calls"
    assert said[0] == first and said[1].startswith("no answer")


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (body({"error": {"message": "No endpoints found"}}), "reports an error: No endpoints found"),
        (body(b"", b"302 Found", b"Location: /v2/chat/completions\r\n"), r"has moved to /v2 \(302\); use that URL"),
        (body(b"", b"301 Moved", b"Location: /v2/chat/completions\r\n"), r"has moved to /v2 \(301\); use that URL"),
        (body(b'{"choices":' + b"[" * 100000 + b"]" * 100000 + b"}"), "expected a chat completion, found"),
        (body(b'{"choices":5}'), "expected a chat completion, found"),
        (body(b'{"choices":[null]}'), "expected a chat completion, found"),
        (body([1]), "expected a chat completion, found"),
        (body(b""), "expected a chat completion, found"),
        (b"garbage\r\n\r\n", "cannot be reached"),
        (b"", "cannot be reached"),
    ],
)
def test_a_broken_answer_is_one_line(answer, said, streams):
    with raw_server(answer) as spec, pytest.raises(ServerError, match=said) as raised:
        client(spec).ask(ASKED, **WANTED, on_text=(lambda text: None) if streams else None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("first", [body(b" " * 10**6)[:99], b"HTTP/1.1 200 OK\r\nX: "])
def test_a_server_that_drips_is_not_waited_for_longer_than_the_timeout(first, streams):
    def drip(connection):
        connection.sendall(first)
        while True:
            connection.sendall(b" ")
            time.sleep(0.2)

    started = time.monotonic()
    with raw_server(drip) as spec, pytest.raises(ServerError, match=r"no answer within 1 s|connection broken"):
        client(spec, timeout=1.0).ask(ASKED, **WANTED, on_text=(lambda text: None) if streams else None)
    assert time.monotonic() - started < 20


def test_a_server_that_cannot_stream_answers_whole():
    shown: list[str] = []
    with raw_server(body(chat())) as spec:
        reply = client(spec).ask(ASKED, **WANTED, on_text=shown.append)
    assert (reply.text, "".join(shown)) == ("Hello.", "Hello.")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "humbug://127.0.0.1:9"])
def test_a_proxy_is_not_for_this_machine_and_named_where_it_cannot_be_used(monkeypatch, proxy):
    for name in ("ALL_PROXY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy)
    with ChatServer(lambda prompt, seed: "yes") as server:
        assert client(server.spec).ask(ASKED, **WANTED).text == "yes"
    if proxy.startswith("socks") and find_spec("socksio"):
        pytest.skip("SOCKS can be used here")
    with pytest.raises(UserError, match=r"--engine http://example\.invalid/v1: cannot use the environment's proxy"):
        client("openai:http://example.invalid/v1#m")
