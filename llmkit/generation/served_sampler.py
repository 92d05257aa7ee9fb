"""Completions from a model on a server: a `Sampler` (generation/sampler.py).

    server = OpenAIClient(parse_address("openai:http://localhost:8000/v1#qwen", "--engine"), timeout=120)
    sampler = ServedSampler(server, Sampling(temperature=0.8), tokenizer=load_tokenizer("chat/"))
    for samples in sampler.complete([Request(sampler.encode("Once upon"), samples=3, max_tokens=64)]): ...

With a tokenizer, prompts are sent as token ids, and ids come back if the server returns them; both sides must have
the same tokenizer, which is checked on the replies. Without one, the server applies its own tokenizer and template to
text and messages. Each sample is a separate request, with a seed derived from (seed, request, sample): if a server
honours seeds, a text does not depend on its neighbours.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import RESULT, Message, Part
from llmkit.generation.generator import prompt_ids
from llmkit.generation.next_token import Sampling, uniforms
from llmkit.generation.requests import REFUSED, Completion, OnCall, OnDone, OnText, Prompt, Request, finished
from llmkit.generation.served_models import (
    SCHEME,
    NoCompletion,
    OpenAIClient,
    PromptTooLong,
    Refused,
    Reply,
    ServerError,
)
from llmkit.generation.tool_calls import Functions, call_part, input_of
from llmkit.io.progress import counted
from llmkit.tokenizer.calls import Call
from llmkit.tokenizer.chat import ChatFormat, has_chat_tokens, has_own_template
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.tokenizer.templates import chat_format, function_of

OPEN_SAMPLES, OPEN_REQUESTS = 2, 16  # per concurrent request: samples sent ahead, requests read ahead
SHOWN = 60  # characters shown of an unexpected text
UNKNOWN = "\ufffd"  # replaces invalid bytes


class ServedSampler:
    """Completes prompts with a model on a server.

    tokenizer    encodes prompts to token ids; None sends text and messages
    concurrency  maximum number of requests in progress
    stop         stop strings, which are left out of the completion
    tools        functions that may be called, without a tokenizer; None for a sampler that takes no calls
    thinking     whether the server's chat template enables thinking; None: the server's default
    logprobs     whether the log-probabilities of tokens are required: under softmax(logits / temperature) or
                 softmax(logits), depending on the server
    token_ids    whether token ids are required
    skip_refused  whether a request that the server refuses, or does not answer with a completion, becomes an empty
                  completion with finish reason "refused"; `refusal` then has the last reason
    end_ids      if token ids are required: the end tokens, one of which ends each completion with reason "stop"
    """

    context: int | None = None  # only the server knows

    def __init__(
        self,
        server: OpenAIClient,
        sampling: Sampling,
        *,
        tokenizer: Tokenizer | None = None,
        concurrency: int = 8,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        token_ids: bool = False,
        end_ids: Collection[int] = (),
        tools: Functions | None = None,
        thinking: bool | None = None,
        skip_refused: bool = False,
    ) -> None:
        self.tools, self._skip_refused, self.refusal = tools, skip_refused, ""
        self.server, self.tokenizer, self.usage, self.name = server, tokenizer, server.usage, server.address.name
        self._temperature, self._concurrency, self._stop = sampling.temperature, concurrency, stop
        self._needs_logprobs, self._needs_ids, self._end_ids = logprobs, token_ids, frozenset(end_ids)
        self._details = _details(sampling, stop, tokenizer is not None, thinking)
        self._seconds = 0.0
        self.weights: str | None = None  # the version that replies must have, if the server names one
        self.identity: Mapping[str, Any] = {
            "the model": self.name,
            "the tokenizer": None if tokenizer is None else tokenizer.sha256[:16],
        }

    @cached_property
    def chat(self) -> ChatFormat | None:
        """Chat format of the tokenizer; None if the server applies its own."""
        try:
            return None if self.tokenizer is None else chat_format(self.tokenizer)
        except UserError as error:
            raise UserError(f"{error}; or omit MODEL to use the server's own template") from None

    @property
    def is_assistant(self) -> bool:
        """True unless the tokenizer has no chat format."""
        return self.tokenizer is None or has_own_template(self.tokenizer) or has_chat_tokens(self.tokenizer)

    def check(self) -> None:
        """Raise ServerError if the server does not answer."""
        self.server.check()

    def encode(self, prompt: str | Sequence[Message], tools: Functions | None = None) -> Prompt:
        """Return a text to continue or a conversation to answer in the form that is sent."""
        if isinstance(prompt, str):
            return prompt if self.tokenizer is None else prompt_ids(self.tokenizer, prompt)
        return as_openai(prompt) if self.chat is None else self.chat.encode(prompt, prompt=True).token_ids.tolist()

    def complete(
        self,
        requests: Iterable[Request | None],
        *,
        on_text: OnText | None = None,
        on_call: OnCall | None = None,
        on_done: OnDone | None = None,
    ) -> Iterator[list[Completion]]:
        """See `Sampler.complete`. Raises ServerError if a request still fails after its retries."""
        done: dict[int, list[Completion | None]] = {}
        results: SimpleQueue[tuple[int, int, Completion | BaseException]] = SimpleQueue()
        stopped, running, started = threading.Event(), 0, time.monotonic()

        def work(index: int, sample: int, request: Request) -> None:
            def emit(text: str) -> None:
                if stopped.is_set():
                    raise InterruptedError  # ends the stream, which is no longer read
                assert on_text is not None
                on_text(index, sample, text)

            def report(call: Mapping[str, Any], seen: str | None) -> None:
                if on_call is not None:
                    on_call(index, sample, call, seen)

            try:
                results.put((index, sample, self._sample(request, sample, None if on_text is None else emit, report)))
            except BaseException as error:
                results.put((index, sample, error))

        def take() -> Iterator[list[Completion]]:
            index, sample, result = results.get()
            if isinstance(result, (Refused, NoCompletion)) and self._skip_refused:
                self.refusal = str(result)
                result = Completion("", [], REFUSED, [], [], [], [])
            if isinstance(result, PromptTooLong):
                is_complete = index in done and done[index] != []  # reported by the first of its samples
                done.update({index: []} if is_complete else {})
            elif isinstance(result, BaseException):
                raise result
            elif is_complete := bool(done.get(index)):
                done[index][sample] = result
                is_complete = None not in done[index]
            if on_done is not None and is_complete:
                on_done(index, [completion for completion in done[index] if completion is not None])
            yield from (samples for _, samples in finished(done))

        # daemon threads: an interrupt does not wait for the server
        with ThreadPool(self._concurrency) as pool:
            try:
                index = -1
                for request in requests:
                    if request is None:
                        if running:
                            running -= 1
                            yield from take()
                        continue
                    index += 1
                    done[index] = [None] * request.samples
                    for sample in range(request.samples):
                        pool.apply_async(work, (index, sample, request))
                    running += request.samples
                    while running > OPEN_SAMPLES * self._concurrency or len(done) > OPEN_REQUESTS * self._concurrency:
                        running -= 1
                        yield from take()
                for _ in range(running):
                    yield from take()
            finally:
                stopped.set()
                self._seconds += time.monotonic() - started

    def _sample(
        self,
        request: Request,
        sample: int,
        on_text: Callable[[str], object] | None,
        on_call: Callable[[Mapping[str, Any], str | None], object],
    ) -> Completion:
        """Request a completion, and continue it with the results of the functions that it calls."""
        if request.max_tokens is None:
            raise UserError(f"{request.where}: --max-tokens: expected a number for a server, found none")
        if not request.prompt:
            raise UserError(f"{request.where}: expected a prompt for the server, found an empty one")
        tools, prompt, left = request.tools or self.tools, list(request.prompt), request.max_tokens
        if isinstance(request.prompt, str) or self.tokenizer is not None:
            tools, prompt = None, request.prompt
        replies: list[Reply] = []
        records: list[dict[str, Any]] = []  # of the calls
        parts: list[Part] = []
        while True:
            replies.append(reply := self._reply(request, prompt, sample, left, tools, on_text))
            ids, logprobs, left = reply.token_ids or [], reply.logprobs or [], left - reply.tokens
            calls, reason = [(call["name"], _input(call)) for call in reply.tool_calls], reply.finish_reason
            parts += [Part("text", reply.text)] if reply.text else []
            if not calls or tools is None:
                break
            if len(records) + len(calls) > tools.max_calls:
                reason = "tool_limit"
                break
            records += [{"tool": tool, "input": text} for tool, text in calls]
            if reason == "length" or tools.are_left(calls):
                reason = "length" if reason == "length" else "tool_calls"
                break
            results = []
            for record, call in zip(records[-len(calls) :], calls, strict=True):
                on_call(record, None)
                (result,) = tools.run([call])
                record |= {"result": result.text, **({"failed": True} if result.failed else {})}
                on_call(record, result.text)
                results.append(result.text)
                parts += [call_part(call[0], call[1]), Part(RESULT, result.text)]
            if left <= 0:
                reason = "length"
                break
            assert isinstance(prompt, list)
            prompt += as_openai_call(reply, results, len(prompt))
        return Completion(
            "".join(reply.text for reply in replies),
            ids,
            reason,
            logprobs if self._needs_logprobs else [],
            [],
            [True] * len(ids),
            records,
            thought="\n\n".join(reply.thought.strip("\n") for reply in replies if reply.thought),
            parts=parts if records else (),
        )

    def _reply(
        self,
        request: Request,
        prompt: Prompt,
        sample: int,
        max_tokens: int,
        tools: Functions | None,
        on_text: Callable[[str], object] | None,
    ) -> Reply:
        schemas: dict[str, Any] = {"tools": [*tools.schemas]} if tools is not None and tools.schemas else {}
        try:
            reply = self.server.ask(
                prompt,
                seed=sample_seed(request.seed, request.number, sample),
                max_tokens=max_tokens,
                temperature=self._temperature,
                logprobs=self._needs_logprobs,
                on_text=on_text,
                used=() if tools is None else ("reasoning", "tool calls"),
                **self._details,
                **schemas,
            )
        except Refused as error:
            if self.tokenizer is None:
                raise
            raise Refused(f"{error}; does it accept token ids? Omit MODEL to send text") from None
        if (fault := self._fault(request, reply)) is not None:
            raise ServerError(f"{self.server.place}: {fault}")
        return reply

    def plan(self) -> Iterator[str]:
        """Describe how prompts are sent, in one line."""
        form = "text and messages" if self.tokenizer is None else f"token ids of {self.tokenizer.path.parent}"
        spec = f"{SCHEME}{self.server.address.url}#{self.server.address.model}"
        yield f"{spec}: answers; prompts are sent as {form}, {self._concurrency} at a time"

    def describe(self) -> Iterator[str]:
        """Describe the completed requests, in one line."""
        yield f"{self.name}: {self.usage}, in {self._seconds:.1f} s"

    def _fault(self, request: Request, reply: Reply) -> str | None:
        """Return what is wrong with a reply, or None."""
        ids, logprobs, tokenizer = reply.token_ids, reply.logprobs, self.tokenizer
        strange = reply.finish_reason not in ("stop", "length")
        if strange and (self._needs_ids or reply.finish_reason in ("abort", "error")):
            ended = reply.finish_reason or "none"
            return f"{request.where}: expected a completion that ends by stop or length, found {ended!r}"
        if self.weights is not None and reply.weights not in (None, self.weights):
            return f"expected weights {self.weights!r}, found {reply.weights!r}"
        if self._needs_ids and not ids:
            return (
                "expected token ids, found none; serve the model with vLLM or SGLang of 2026, which return them "
                "(return_token_ids)"
            )
        if tokenizer is not None and (difference := _difference(tokenizer, request.prompt, reply)) is not None:
            return f"its tokenizer differs from {tokenizer.path.parent}: {difference}; serve that folder"
        if self._needs_logprobs and logprobs is None:
            return "expected log-probabilities, found none; the server does not return them"
        least = len(ids) if ids is not None else reply.tokens - 1  # some servers do not count the end token
        if self._needs_logprobs and logprobs is not None and len(logprobs) < least:
            return f"{request.where}: expected log-probabilities of {counted(least, 'token')}, found {len(logprobs)}"
        if self._end_ids and reply.finish_reason == "stop" and not self._stop and ids and ids[-1] not in self._end_ids:
            return (
                f"{request.where}: expected an end token last ({sorted(self._end_ids)}), found {ids[-1]}: a policy "
                "that never sees it does not learn to stop"
            )
        return None


def _input(call: Mapping[str, str]) -> str:
    """Return the input of a tool from a call's JSON arguments, or the arguments unchanged if they are invalid."""
    try:
        arguments = json.loads(call["arguments"])
    except ValueError:
        arguments = None
    return input_of(Call(call["name"], arguments)) if isinstance(arguments, dict) else call["arguments"]


def _details(sampling: Sampling, stop: Sequence[str], by_tokens: bool, thinking: bool | None) -> dict[str, Any]:
    """Collect the fields of a request besides prompt, seed, length, temperature and log-probabilities.

    Servers that take token ids know more fields than OpenAI's, with their own defaults (vLLM those of the model's
    generation_config.json), so all are sent. Other servers may refuse unknown fields, so they get only those that the
    user set.
    """
    details: dict[str, Any] = {"top_p": sampling.top_p, "stop": list(stop) or None}
    extra: dict[str, Any] = {"top_k": sampling.top_k, "min_p": sampling.min_p}
    if by_tokens:
        details["top_p"] = sampling.top_p or 1.0
        extra = {"top_k": sampling.top_k or -1, "min_p": sampling.min_p or 0.0, "repetition_penalty": 1.0}
        extra |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    if thinking is not None:
        extra["chat_template_kwargs"] = {"enable_thinking": thinking}
    details["extra_body"] = {name: value for name, value in extra.items() if value is not None} or None
    return {name: value for name, value in details.items() if value is not None}


def _difference(tokenizer: Tokenizer, sent: Prompt, reply: Reply) -> str | None:
    """Return evidence that the server's tokenizer differs from `tokenizer`, or None."""
    if reply.prompt_ids is not None and reply.prompt_ids != list(sent):
        return f"it saw a prompt of {counted(len(reply.prompt_ids), 'token')} that differs from the {len(sent)} sent"
    if reply.token_ids is None:
        return None
    if strange := [token for token in reply.token_ids if not 0 <= token < tokenizer.vocab_size]:
        return f"it returns token id {strange[0]}, beyond the vocabulary of {tokenizer.vocab_size}"
    stream = tokenizer.stream(sent, skip_specials=True)
    ours, theirs = stream.push(reply.token_ids) + stream.finish(), reply.text
    # decoders differ in invalid bytes and in spaces at the ends; the server's text ends before a stop string
    if not ours.replace(UNKNOWN, "").strip().startswith(theirs.replace(UNKNOWN, "").strip()):
        return f"its tokens decode to {ours[:SHOWN]!r} here and to {theirs[:SHOWN]!r} there"
    return None


def sample_seed(seed: int, request: int, sample: int) -> int:
    """Return the seed of one sample of a request, below 2^31, which every server accepts."""
    return int(uniforms(seed, request, sample, 0, 1)[0] * 2**31)


def as_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages to OpenAI's form, with `tool_calls` and role `tool`.

    Calls are moved after the text between two results.
    """
    entries: list[dict[str, Any]] = []
    ids: list[str] = []  # of calls, in order; the first `answered` have results
    answered = 0
    for turn in messages:
        entries.append(entry := {"role": turn.role, "content": ""})
        for part in turn.parts:
            if part.kind == RESULT:
                of = {"tool_call_id": ids[answered]} if answered < len(ids) else {}
                entries.append({"role": "tool", "content": part.text, **of})
                answered += 1
                continue
            if entries[-1]["role"] == "tool":
                entries.append(entry := {"role": turn.role, "content": ""})
            if part.kind == "text":
                entry["content"] += part.text
            else:
                ids.append(f"call_{len(ids)}")
                function = function_of(part)
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                call = {"id": ids[-1], "type": "function", "function": function}
                entry.setdefault("tool_calls", []).append(call)
    return entries


def as_openai_call(reply: Reply, results: Sequence[str], before: int) -> list[dict[str, Any]]:
    """Convert an answer with calls, and their results, to messages that follow `before` others."""
    ids = [call["id"] or f"call_{before}_{number}" for number, call in enumerate(reply.tool_calls)]
    calls = [
        {"id": name, "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for name, call in zip(ids, reply.tool_calls, strict=True)
    ]
    thought = {"reasoning_content": reply.thought} if reply.thought else {}
    answer = {"role": "assistant", "content": reply.text, "tool_calls": calls, **thought}
    tools = [{"role": "tool", "tool_call_id": name, "content": text} for name, text in zip(ids, results, strict=True)]
    return [answer, *tools]
