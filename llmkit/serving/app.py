"""The paths of the server: OpenAI's, those that vLLM has beside them, the page, and the people's judgements."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.serving.answers import Answers
from llmkit.serving.collect import Judgements
from llmkit.serving.engine import Engine, Failed, Job
from llmkit.serving.fields import ApiError, Fields
from llmkit.serving.models import MOST_PROMPTS, MOST_TOP, ServedModel

MOST_BODY = 8 << 20  # bytes
BODY_SECONDS = 30.0  # for a body to arrive
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OPEN_PATHS = {*PAGE_FILES, "/health"}  # without a key
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx would hold a stream back


class Service:
    """What the paths work with.

    models     by name
    engine     computes for them
    queue      requests of a model that may wait while all slots are taken
    slots      sequences of a model that run at a time
    timeout    seconds that a request may take
    judgements the files of --collect, and `guide` the text of --guide
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        engine: Engine,
        *,
        slots: int,
        queue: int,
        timeout: float,
        judgements: Judgements | None,
        guide: str | None,
    ) -> None:
        self.models, self.engine, self.timeout = models, engine, timeout
        self.judgements, self.guide = judgements, guide
        self._most_open = slots + queue
        self._slots = slots
        self.open_jobs: Counter[str] = Counter()  # by model: those that run or wait
        self.counts = Counter[tuple[str, str]]()
        self.first_token_seconds = defaultdict[str, float](float)

    # ---- models

    async def list_models(self, request: Request) -> Response:
        collecting = {"collect": self.judgements is not None, "guide": self.guide is not None}
        return _json({"object": "list", "data": [model.about() | collecting for model in self.models]})

    async def show_model(self, request: Request) -> Response:
        return _json(self._model(request.path_params["name"]).about())

    def _model(self, name: Any) -> ServedModel:
        """The model that a request names; the only one where it names none."""
        if name is None and len(self.models) == 1:
            return self.models[0]
        model = next((one for one in self.models if name in (one.name, one.path)), None)
        if model is None:
            known = ", ".join(one.name for one in self.models)
            raise ApiError(
                f"there is no model {name!r}; there are {known}", "model", status=404, code="model_not_found"
            )
        return model

    # ---- completions

    async def chat_completions(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        model = self._model(fields.take("model"))
        wants = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", 0, 0, MOST_TOP)
        if top and not wants:
            raise ApiError("'top_logprobs': expected 'logprobs' to be true beside it", "top_logprobs")
        limits = [fields.integer(name, None, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
        max_tokens = next((limit for limit in limits if limit is not None), None)
        form = self._form(fields)
        details = model.read_sampling(fields)
        prompt = await run_in_threadpool(model.encode_chat, fields)
        fields.check_all_taken()
        job = {"stream": form["stream"], "tokens": wants or form["token_ids"]}
        jobs = [
            model.job(
                "messages",
                prompt.ids,
                max_tokens=max_tokens,
                scored=None,
                job=job,
                top_logprobs=top,
                tools=prompt.tools,
                **details,
            )
        ]
        answers = Answers(model, jobs, chat=True, logprobs=top if wants else None, thinking=prompt.thinking, form=form)
        return await self._answer(request, model, jobs, answers, form["stream"])

    async def completions(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        model = self._model(fields.take("model"))
        logprobs = fields.integer("logprobs", None, 0, MOST_TOP)
        max_tokens = fields.integer("max_tokens", 16, 0, 2**31)
        echo = fields.boolean("echo")
        if max_tokens == 0 and not echo:
            raise ApiError("'max_tokens': expected 'echo' to be true beside 0", "max_tokens")
        adds, form, details = (
            fields.boolean("add_special_tokens", True),
            self._form(fields),
            model.read_sampling(fields),
        )
        prompts = await run_in_threadpool(_prompts, model, fields.take("prompt"), adds)
        fields.check_all_taken()
        scored = logprobs if echo else None
        job = {"stream": form["stream"], "tokens": logprobs is not None or form["token_ids"]}
        top = logprobs or 0
        jobs = [
            model.job("prompt", ids, max_tokens=max_tokens, scored=scored, job=job, top_logprobs=top, **details)
            for ids, _ in prompts
        ]
        texts = [text for _, text in prompts] if echo else None
        answers = Answers(model, jobs, chat=False, logprobs=logprobs, echo=texts, form=form)
        return await self._answer(request, model, jobs, answers, form["stream"])

    @staticmethod
    def _form(fields: Fields) -> dict[str, bool]:
        """How the answer is wanted."""
        stream, options = fields.boolean("stream"), fields.take("stream_options")
        usage = False
        if options is not None:
            if not stream:
                raise ApiError("'stream_options': expected 'stream' to be true beside it", "stream_options")
            inner = Fields(options)
            usage = inner.boolean("include_usage")
            inner.take("include_obfuscation")
            inner.check_all_taken()
        return {
            "stream": stream,
            "usage": usage,
            "token_ids": fields.boolean("return_token_ids"),
            "names_ids": fields.boolean("return_tokens_as_token_ids"),
        }

    async def _answer(
        self, request: Request, model: ServedModel, jobs: Sequence[Job], answers: Answers, stream: bool
    ) -> Response:
        if self.open_jobs[model.name] >= self._most_open:
            raise ApiError(
                f"{self._most_open} requests wait or run already; try again", status=429, code="too_many_requests"
            )
        self.open_jobs[model.name] += len(jobs)  # before anything else has its turn
        end = partial(self.open_jobs.subtract, {model.name: len(jobs)})
        if stream:
            return _Stream(self._chunks(model, jobs, answers), end)
        try:
            await _unless_gone(request, self._finish(model, jobs, answers))
        finally:
            end()
        return _json(answers.whole())

    async def _finish(self, model: ServedModel, jobs: Sequence[Job], answers: Answers) -> None:
        async with aclosing(self.engine.answers(model.name, jobs, self.timeout)) as events:
            async for index, event in events:
                if isinstance(event, Failed):
                    raise ApiError(event.reason, status=event.status)
                answers.take(index, event)
        self._count(model, jobs, answers)

    async def _chunks(self, model: ServedModel, jobs: Sequence[Job], answers: Answers) -> AsyncIterator[bytes]:
        yield b"".join(map(_chunk, answers.first_chunks()))
        async with aclosing(self.engine.answers(model.name, jobs, self.timeout)) as events:
            async for index, event in events:
                if isinstance(event, Failed):
                    yield _chunk(ApiError(event.reason, status=event.status).body)
                    return
                if chunk := b"".join(map(_chunk, answers.chunks(index, event))):
                    yield chunk
        self._count(model, jobs, answers)
        yield b"".join(map(_chunk, answers.last_chunks())) + b"data: [DONE]\n\n"

    def _count(self, model: ServedModel, jobs: Sequence[Job], answers: Answers) -> None:
        usage = answers.usage
        self.counts[model.name, "prompt_tokens"] += usage["prompt_tokens"]
        self.counts[model.name, "generation_tokens"] += usage["completion_tokens"]
        for job in jobs:
            self.counts[model.name, "requests"] += 1
            if job.first_token is not None:
                self.counts[model.name, "first_tokens"] += 1
                self.first_token_seconds[model.name] += job.first_token - job.started

    # ---- tokens

    async def tokenize(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        model = self._model(fields.take("model"))
        strings = fields.boolean("return_token_strs")
        adds, prompt = fields.boolean("add_special_tokens", True), fields.text("prompt")
        of_turns: dict[str, Any] = {}
        if prompt is None:
            encoded = (await run_in_threadpool(model.encode_chat, fields)).encoded
            ids = encoded.token_ids.tolist()
            of_turns = {"trained": encoded.trained.tolist(), "turn_ends": encoded.turn_ends}
        else:
            ids = await run_in_threadpool(model.encode_text, prompt, adds)
        fields.check_all_taken()
        told = {"count": len(ids), "max_model_len": model.context, "tokens": ids, **of_turns}
        return _json(told | _names(model, ids, strings))

    async def detokenize(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        model = self._model(fields.take("model"))
        ids, strings = model.check_ids(fields.take("tokens"), "tokens"), fields.boolean("return_token_strs")
        fields.check_all_taken()
        return _json({"prompt": model.tokenizer.decode(ids)} | _names(model, ids, strings))

    # ---- people as labellers

    async def collect(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        model = self._model(fields.take("model"))
        if self.judgements is None:
            raise ApiError("this server collects no judgements; start it with --collect FILE.jsonl", status=404)
        try:
            await run_in_threadpool(self.judgements.add, fields, model)
        except OSError as error:
            raise ApiError(f"the judgement is not kept: {str(error.strerror or error).lower()}", status=507) from None
        return _json({"ok": True})

    async def show_guide(self, request: Request) -> Response:
        if self.guide is None:
            raise ApiError("this server has no guide; start it with --guide FILE.md", status=404)
        return Response(self.guide, media_type="text/markdown; charset=utf-8")

    # ---- the server itself

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Counters in the text format of Prometheus."""
        lines = []
        for name, kind, help_text in (
            ("requests", "counter", "Requests answered."),
            ("prompt_tokens", "counter", "Tokens of prompts."),
            ("generation_tokens", "counter", "Tokens generated."),
            ("requests_open", "gauge", "Requests that run or wait."),
            ("slots", "gauge", "Sequences that can run at a time."),
            ("time_to_first_token_seconds", "summary", "From a request to its first text."),
        ):
            full = f"llmkit_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
            for model in self.models:
                label = '{model="' + model.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"}'
                if kind == "summary":
                    lines.append(f"{full}_sum{label} {self.first_token_seconds[model.name]:.6f}")
                    lines.append(f"{full}_count{label} {self.counts[model.name, 'first_tokens']}")
                    continue
                value = {"requests_open": self.open_jobs[model.name], "slots": self._slots}
                lines.append(f"{full}{label} {value.get(name, self.counts[model.name, name])}")
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        name, kind = PAGE_FILES[request.url.path]
        headers = {"content-security-policy": CONTENT_POLICY, "cache-control": "no-cache"}
        try:
            data = (PAGE / name).read_bytes()
        except OSError:
            raise ApiError("this server has no page", status=404) from None
        return Response(data, headers=headers, media_type=f"{kind}; charset=utf-8")


class _Stream(StreamingResponse):
    """Server-sent events; `end` is called when they are over, or their client has gone."""

    def __init__(self, chunks: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(chunks, headers=STREAM_HEADERS, media_type="text/event-stream; charset=utf-8")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def build(service: Service, *, keys: Collection[bytes], hosts: Collection[str], origins: Collection[str]) -> ASGIApp:
    """The application: `hosts` are those that a request may name, all where there are none."""
    post, paths = ["POST"], [Route(path, service.page) for path in PAGE_FILES]
    paths += [
        Route("/v1/chat/completions", service.chat_completions, methods=post),
        Route("/v1/completions", service.completions, methods=post),
        Route("/v1/models", service.list_models),
        Route("/v1/models/{name:path}", service.show_model),
        Route("/tokenize", service.tokenize, methods=post),
        Route("/detokenize", service.detokenize, methods=post),
        Route("/collect", service.collect, methods=post),
        Route("/guide", service.show_guide),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    handlers: Any = {ApiError: _refuse, HTTPException: _refuse_path, ClientDisconnect: _gone}
    app: ASGIApp = Guard(Starlette(routes=paths, exception_handlers=handlers), keys, hosts, origins)
    if origins:
        app = CORSMiddleware(app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


class Guard:
    """Lets requests through that name one of our hosts, come from a page of ours or of --allow-origin, and have a key.

    A page of another site may send requests to 127.0.0.1, also by a name of its own that it points there (DNS
    rebinding): browsers tell the name as Host and the page as Origin.
    """

    def __init__(self, app: ASGIApp, keys: Collection[bytes], hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._keys, self._hosts, self._origins = app, keys, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await _json(error.body, error.status)(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = {name: value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts and host.rpartition(":")[0 if ":" in host.rpartition("]")[2] else 2] not in self._hosts:
            return ApiError("this server is not known by the name in the header Host; see --host", status=421)
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & set(self._origins):
            return ApiError("requests of pages of other sites are refused; see --allow-origin", status=403)
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        given = headers.get(b"authorization", b"")
        key = given[7:].strip() if given[:7].lower() == b"bearer " else b""
        if not sum(hmac.compare_digest(key, known) for known in self._keys):  # all of them, whichever it is
            return ApiError("Incorrect API key provided", status=401, code="invalid_api_key")
        return None


# ---- requests and responses


def _prompts(model: ServedModel, given: Any, adds: bool) -> list[tuple[list[int], str]]:
    """The prompts of a request, as ids and as text: one or several, each of them text or ids."""
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not 0 < len(given) <= MOST_PROMPTS:
        raise ApiError(f"'prompt': expected text, token ids, or a list of 1 to {MOST_PROMPTS} of these", "prompt")
    if isinstance(given[0], str):
        if not all(isinstance(text, str) for text in given):
            raise ApiError("'prompt': expected texts or lists of token ids, found both", "prompt")
        return [(model.encode_text(text, adds), text) for text in given]
    listed = [model.check_ids(ids, "prompt") for ids in given]
    return [(ids, model.tokenizer.decode(ids)) for ids in listed]


async def _body(request: Request) -> Any:
    """The JSON of a request. Raises ApiError for what is too large, comes too slowly, or is no JSON."""
    too_large = ApiError(f"expected a body of {MOST_BODY:,} bytes at most", status=413)
    with suppress(ValueError):
        if int(request.headers.get("content-length", 0)) > MOST_BODY:
            raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BODY:
                raise too_large
        return bytes(body)

    try:
        data = await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(f"the body was not there after {BODY_SECONDS:g} s", status=408) from None
    try:
        return orjson.loads(data)
    except ValueError as error:
        raise ApiError(f"expected JSON: {error}") from None


async def _unless_gone(request: Request, work: Awaitable[None]) -> None:
    """Do work, and stop it when the client has gone."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        task.cancel()
        watch.cancel()


def _names(model: ServedModel, ids: Sequence[int], strings: bool) -> dict[str, Any]:
    """What tokens say, where that is asked for, and which of them are special."""
    texts = list(map(model.token_text, ids)) if strings else None
    return {"token_strs": texts, "special": list(map(model.is_special, ids))}


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    headers = {"x-content-type-options": "nosniff", **(headers or {})}
    return Response(orjson.dumps(content), status, headers, "application/json")


def _chunk(content: Any) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _refuse(request: Request, error: Any) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else {}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return _json(error.body, error.status, headers)


async def _refuse_path(request: Request, error: Any) -> Response:
    message = {404: "there is no such path here", 405: "expected another method on this path"}
    told = ApiError(message.get(error.status_code, str(error.detail)), status=error.status_code)
    return _json(told.body, error.status_code)


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it
