"""The routes of the server: OpenAI's API, vLLM's token routes, the page, and judgements; and their access control."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.serving.answers import Answer
from llmkit.serving.collect import JudgementBody, Judgements
from llmkit.serving.engine import Engine, Job
from llmkit.serving.models import ServedModel
from llmkit.serving.protocol import (
    AnyBody,
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)

MAX_BODY = 8 << 20  # bytes
BODY_SECONDS = 30.0  # limit for a request body
PAGE = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # otherwise nginx buffers the stream
METRICS = (  # name, type, help
    ("requests_total", "counter", "Completed requests."),
    ("prompt_tokens_total", "counter", "Prompt tokens."),
    ("generation_tokens_total", "counter", "Generated tokens."),
    ("requests_open", "gauge", "Running and waiting requests."),
    ("slots", "gauge", "Maximum number of concurrent sequences."),
    ("time_to_first_token_seconds", "summary", "Time from request to first text."),
)


@dataclass(eq=False)
class Service:
    """The handlers of the routes.

    slots    concurrent sequences per model
    queue    requests per model that may wait for a slot
    timeout  seconds per request
    """

    models: Sequence[ServedModel]
    engine: Engine
    _: KW_ONLY
    slots: int
    queue: int
    timeout: float
    judgements: Judgements | None
    guide: str | None

    def __post_init__(self) -> None:
        self._values: dict[str, Any] = defaultdict(Counter)  # by metric and model
        self._values["slots"].update({model.name: self.slots for model in self.models})
        self._open = self._values["requests_open"]

    def _model(self, name: str | None) -> ServedModel:
        """Return the requested model; without a name, the only one."""
        if name is None and len(self.models) == 1:
            return self.models[0]
        for model in self.models:
            if name in (model.name, model.path):
                return model
        names = ", ".join(model.name for model in self.models)
        if name is None:
            raise ApiError(f"'model': expected one of {names}", "model")
        raise ApiError(f"unknown model {name!r}; expected one of {names}", "model", status=404, code="model_not_found")

    # ---- completions

    async def complete(self, request: Request, schema: type[ChatBody] | type[CompletionBody]) -> Response:
        body = await _read(request, schema)
        model = self._model(body.model)
        prompts = await run_in_threadpool(model.prompts, body)
        jobs = model.jobs(body, prompts)
        answer = Answer(model, body, prompts, jobs)
        if self._open[model.name] >= self.slots + self.queue:
            message = f"too many open requests, at most {self.slots + self.queue}; try again"
            raise ApiError(message, status=429, code="too_many_requests")
        self._open[model.name] += len(jobs)  # atomic with the check: no await in between
        release = partial(self._release, model, jobs, answer)
        if body.stream:
            return _Stream(self._chunks(model, jobs, answer), release)
        whole = asyncio.ensure_future(self._whole(model, jobs, answer))
        disconnected = asyncio.ensure_future(request.receive())  # the only message after the body
        try:
            await asyncio.wait((whole, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return _json(whole.result())
        finally:
            whole.cancel()
            disconnected.cancel()
            release()

    def _release(self, model: ServedModel, jobs: Sequence[Job], answer: Answer) -> None:
        """Count a finished request, and free its place in the queue."""
        self._open[model.name] -= len(jobs)
        if not all(job.completions for job in jobs):
            return
        values, name, usage = self._values, model.name, answer.usage
        values["requests_total"][name] += len(jobs)
        values["prompt_tokens_total"][name] += usage["prompt_tokens"]
        values["generation_tokens_total"][name] += usage["completion_tokens"]
        seconds = [job.first_token - job.created for job in jobs if job.first_token is not None]
        values["time_to_first_token_seconds_sum"][name] += sum(seconds)
        values["time_to_first_token_seconds_count"][name] += len(seconds)

    async def _whole(self, model: ServedModel, jobs: Sequence[Job], answer: Answer) -> dict[str, Any]:
        async with aclosing(self.engine.run(model.name, jobs, self.timeout)) as events:
            async for _ in events:
                pass
        return answer.whole()

    async def _chunks(self, model: ServedModel, jobs: Sequence[Job], answer: Answer) -> AsyncIterator[bytes]:
        yield _events(answer.first_chunks())
        try:
            async with aclosing(self.engine.run(model.name, jobs, self.timeout)) as events:
                async for job, delta in events:
                    if chunk := _events(answer.chunks(job, delta)):
                        yield chunk
        except ApiError as error:
            yield _events([error.body])
            return
        yield _events(answer.last_chunks()) + b"data: [DONE]\n\n"

    # ---- tokens

    async def tokenize(self, request: Request) -> Response:
        body = await _read(request, TokenizeBody)
        model = self._model(body.model)
        conversation: dict[str, Any] = {}
        if body.prompt is not None:
            prompt = await run_in_threadpool(model.encode_text, body.prompt, body.add_special_tokens)
        else:
            prompt = await run_in_threadpool(model.encode_chat, body)
            if prompt.encoded is not None:
                conversation = {"trained": prompt.encoded.trained.tolist(), "turn_ends": prompt.encoded.turn_ends}
        ids = prompt.token_ids
        fields = {"count": len(ids), "max_model_len": model.context, "tokens": ids, **conversation}
        return _json(fields | model.token_strings(ids, body.return_token_strs))

    async def detokenize(self, request: Request) -> Response:
        body = await _read(request, DetokenizeBody)
        model = self._model(body.model)
        model.check_ids(body.tokens, "tokens")
        strings = model.token_strings(body.tokens, body.return_token_strs)
        return _json({"prompt": model.tokenizer.decode(body.tokens), **strings})

    # ---- judgements, models, the server itself

    async def collect(self, request: Request) -> Response:
        body = await _read(request, JudgementBody)
        if self.judgements is None:
            raise ApiError("this server does not collect judgements; start it with --collect FILE.jsonl", status=404)
        try:
            await run_in_threadpool(self.judgements.add, body, self._model(body.model))
        except OSError as error:
            reason = str(error.strerror or error).lower()
            raise ApiError(f"the judgement was not saved: {reason}", status=507) from None
        return _json({"ok": True})

    async def show_guide(self, request: Request) -> Response:
        if self.guide is None:
            raise ApiError("this server has no guide; start it with --guide FILE.md", status=404)
        return Response(self.guide, media_type="text/markdown; charset=utf-8")

    async def list_models(self, request: Request) -> Response:
        collecting = {"collect": self.judgements is not None, "guide": self.guide is not None}
        return _json({"object": "list", "data": [model.info() | collecting for model in self.models]})

    async def show_model(self, request: Request) -> Response:
        return _json(self._model(request.path_params["name"]).info())

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Return metrics in Prometheus's text format."""
        lines = []
        for name, kind, description in METRICS:
            lines += [f"# HELP llmkit_{name} {description}", f"# TYPE llmkit_{name} {kind}"]
            for sample in (f"{name}_sum", f"{name}_count") if kind == "summary" else (name,):
                for model in self.models:
                    label = json.dumps(model.name, ensure_ascii=False)
                    lines.append(f"llmkit_{sample}{{model={label}}} {self._values[sample][model.name]}")
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        return FileResponse(Path(__file__).parent / "page" / PAGE[request.scope["path"]], headers=PAGE_HEADERS)


class _Stream(StreamingResponse):
    """Server-sent events; calls `release` when they end or the client disconnects, even before the first event."""

    def __init__(self, chunks: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        super().__init__(chunks, headers=STREAM_HEADERS, media_type="text/event-stream; charset=utf-8")
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


def build(service: Service, *, keys: Collection[bytes], hosts: Collection[str], origins: Collection[str]) -> ASGIApp:
    """Return the application. `hosts`: allowed values of the Host header; empty allows all."""
    routes = [Route(path, service.page) for path in PAGE]
    routes += [
        Route("/v1/chat/completions", partial(service.complete, schema=ChatBody), methods=["POST"]),
        Route("/v1/completions", partial(service.complete, schema=CompletionBody), methods=["POST"]),
        Route("/v1/models", service.list_models),
        Route("/v1/models/{name:path}", service.show_model),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/collect", service.collect, methods=["POST"]),
        Route("/guide", service.show_guide),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    handlers: Any = dict.fromkeys((ApiError, HTTPException, ClientDisconnect), _error_response)
    app: ASGIApp = Guard(Starlette(routes=routes, exception_handlers=handlers), keys, hosts, origins)
    if origins:
        app = CORSMiddleware(app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


class Guard:
    """Middleware that refuses requests with a wrong Host, from pages of other sites, or without a key.

    A page of another site can send requests to 127.0.0.1, directly or under a domain that resolves to it (DNS
    rebinding). The Origin and Host headers reveal both.
    """

    def __init__(self, app: ASGIApp, keys: Collection[bytes], hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._keys, self._hosts, self._origins = app, keys, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (error := self._error(Request(scope))) is not None:
            app = _json(error.body, error.status)
        await app(scope, receive, send)

    def _error(self, request: Request) -> ApiError | None:
        host, origin = (request.headers.get(name, "").lower() for name in ("host", "origin"))
        if self._hosts and re.sub(r":\d*$", "", host) not in self._hosts:
            return ApiError("the Host header does not name this server; see --host", status=421)
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & set(self._origins):
            return ApiError("requests from pages of other sites are refused; see --allow-origin", status=403)
        if not self._keys or request.scope["path"] in {*PAGE, "/health"} or request.method == "OPTIONS":
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        token = key.strip().encode() if scheme.lower() == "bearer" else b""
        if not sum(hmac.compare_digest(token, known) for known in self._keys):  # all keys, in constant time
            message = "Incorrect API key provided" if token else "expected a key: Authorization: Bearer KEY"
            return ApiError(message, status=401, code="invalid_api_key")
        return None


async def _read(request: Request, schema: type[AnyBody]) -> AnyBody:
    """Read a JSON body. Raises ApiError if it is too large, too slow, or does not match the schema."""
    too_large = ApiError(f"expected a body of at most {MAX_BODY:,} bytes", status=413)
    if int(request.headers.get("content-length", 0)) > MAX_BODY:
        raise too_large
    data = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {BODY_SECONDS:g} s", status=408) from None
    try:
        return read_body(schema, orjson.loads(data))
    except orjson.JSONDecodeError as error:
        raise ApiError(f"expected JSON: {error}") from None


async def _error_response(request: Request, error: Any) -> Response:
    if not isinstance(error, ApiError):  # 499: nginx's status for a client that has disconnected
        message = getattr(error, "detail", "the client has disconnected")
        error = ApiError(message, status=getattr(error, "status_code", 499))
    headers = {"retry-after": "1"} if error.status == 429 else {}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return _json(error.body, error.status, headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(content), status, {"x-content-type-options": "nosniff", **(headers or {})}, "application/json"
    )


def _events(contents: Iterable[Any]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(content) + b"\n\n" for content in contents)
