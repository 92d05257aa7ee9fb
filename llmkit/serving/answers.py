"""Completions in the format of OpenAI's API: as one response, or as the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.formats.conversations import ARGUMENT, RESULT, TOOLS, Message, as_record
from llmkit.generation.requests import Completion
from llmkit.generation.tool_calls import ToolUse, call_part
from llmkit.serving.engine import Delta, Job
from llmkit.serving.models import Prompt, ServedModel
from llmkit.serving.protocol import ChatBody, CompletionBody

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's value for very unlikely tokens


class ThinkSplitter:
    """Splits streamed text into reasoning, between <think> and </think>, and the answer.

    >>> splitter = ThinkSplitter()
    >>> splitter.push("<thi"), splitter.push("nk>\\nTwo and two.\\n</think>\\n\\nFo"), splitter.push("", last=True)
    (('', ''), ('Two and two.', 'Fo'), ('', ''))
    """

    def __init__(self, thinking: bool = False) -> None:
        self._thinking, self._rest, self._after_tag = thinking, "", thinking

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """Return the new (reasoning, answer). A possible start of a tag is held back until more text or `last`."""
        split = {True: "", False: ""}
        self._rest += text
        while True:
            tag = "</think>" if self._thinking else "<think>"
            before, separator, after = self._rest.partition(tag)
            if not separator and not last:  # hold back a possible start of the tag
                cut = len(before) - max(size for size in range(len(tag)) if before.endswith(tag[:size]))
                cut = len(before[:cut].rstrip("\n")) if self._thinking else cut
                before, after = before[:cut], before[cut:]
            if self._thinking:
                before = before.rstrip("\n")
            if self._after_tag:
                before = before.lstrip("\n")
                self._after_tag = not before
            split[self._thinking] += before
            self._rest = after
            if not separator:
                return split[True], split[False]
            self._thinking, self._after_tag = not self._thinking, True


class Answer:
    """The answer to a request: `whole` after all events; or `first_chunks`, `chunks` per event, `last_chunks`."""

    def __init__(
        self, model: ServedModel, body: ChatBody | CompletionBody, prompts: Sequence[Prompt], jobs: Sequence[Job]
    ) -> None:
        self._model, self._body, self._jobs, self._chat = model, body, jobs, isinstance(body, ChatBody)
        self._first = {job: body.n * number for number, job in enumerate(jobs)}  # index of each job's first choice
        self._splitters = [ThinkSplitter(prompt.thinking) for prompt in prompts for _ in range(body.n)]
        self._offsets: Counter[int] = Counter()  # into the text, by choice
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._fields = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind if self._chat else "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "seed": jobs[0].request.seed,
        }
        if body.stream_options and body.stream_options.include_usage:
            self._fields["usage"] = None

    @property
    def usage(self) -> dict[str, int]:
        """Token counts of prompts and completions."""
        prompt = sum(len(job.request.prompt) for job in self._jobs)
        completion = sum(sum(sample.sampled) for job in self._jobs for sample in job.completions)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self) -> dict[str, Any]:
        """Return the response, after all jobs have ended."""
        choices = []
        for job in self._jobs:
            for index, completion in enumerate(job.completions, self._first[job]):
                parts = [completion] if job.echo is None else [job.echo, completion]
                choice = {"index": index, "logprobs": self._logprobs(index, parts)}
                if self._chat:
                    choice["message"] = self._message(index, job, completion)
                else:
                    choice["text"] = "".join(part.text for part in parts)
                choice["finish_reason"] = _finish_reason(completion)
                if self._body.return_token_ids:
                    choice |= {"token_ids": completion.token_ids, "prompt_token_ids": list(job.request.prompt)}
                choices.append(choice)
        return {**self._fields, "choices": choices, "usage": self.usage}

    def _message(self, index: int, job: Job, completion: Completion) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "", **self._split(index, completion.text, last=True)}
        if completion.finish_reason == "tool_calls":
            message |= {"content": message["content"] or None, "tool_calls": tool_calls_of(completion.tool_calls)}
        elif completion.tool_calls and isinstance(tools := job.request.tools or self._model.generator.tools, ToolUse):
            parts = tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)
            if self._body.stop and completion.finish_reason == "stop" and parts[-1].kind == "text":
                before = sum(len(part.text) for part in parts[:-1] if part.kind == "text")
                last = parts[-1].text[: max(len(completion.text) - before, 0)]  # cut at the stop string
                parts = (*parts[:-1], replace(parts[-1], text=last))
            message["content_parts"] = as_record([Message("assistant", parts)])[0]["content"]
        return message

    def _split(self, index: int, text: str, last: bool = False) -> dict[str, str]:
        """Return the message fields that new text adds: reasoning, content."""
        reasoning, content = self._splitters[index].push(text, last)
        fields = {"reasoning_content": reasoning, "content": content}
        return {name: value for name, value in fields.items() if value}

    # ---- streams

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks that precede all events: the roles in a chat."""
        for index in range(len(self._splitters) if self._chat else 0):
            yield self._chunk(index, delta={"role": "assistant", "content": ""})

    def chunks(self, job: Job, delta: Delta | None) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an engine event; None is the end of a job."""
        first = self._first[job]
        if delta is None:
            for index, completion in enumerate(job.completions, first):
                yield from self._end(index, completion)
        elif delta.sample is None:
            for index in range(first, first + self._body.n):
                yield self._chunk(index, text=delta.text, logprobs=self._logprobs(index, [delta]))
        elif delta.call is not None:
            part = {"type": RESULT, "text": delta.result}
            if delta.result is None:
                call = call_part(delta.call["tool"], delta.call["input"])
                part = {"type": call.kind, "text": call.text}
            if self._chat:
                yield self._chunk(first + delta.sample, delta={"content_parts": [part]})
        else:
            index = first + delta.sample
            text = {"delta": self._split(index, delta.text)} if self._chat else {"text": delta.text}
            tokens = {"token_ids": list(delta.token_ids)} if self._body.return_token_ids else {}
            yield self._chunk(index, logprobs=self._logprobs(index, [delta]), **text, **tokens)

    def _end(self, index: int, completion: Completion) -> Iterator[dict[str, Any]]:
        reason = _finish_reason(completion)
        if not self._chat:
            yield self._chunk(index, text="", finish_reason=reason)
            return
        if rest := self._split(index, "", last=True):
            yield self._chunk(index, delta=rest)
        if reason == "tool_calls":
            calls = [{"index": number, **call} for number, call in enumerate(tool_calls_of(completion.tool_calls))]
            yield self._chunk(index, delta={"tool_calls": calls})
        yield self._chunk(index, delta={}, finish_reason=reason)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the chunk that follows all events: the usage, if requested."""
        if "usage" in self._fields:
            yield {**self._fields, "choices": [], "usage": self.usage}

    def _chunk(self, index: int, **choice: Any) -> dict[str, Any]:
        return {**self._fields, "choices": [{"index": index, "logprobs": None, "finish_reason": None, **choice}]}

    # ---- log-probabilities

    def _logprobs(self, index: int, parts: Sequence[Delta | Completion]) -> dict[str, Any] | None:
        """Return tokens with log-probabilities and alternatives; None if they are not requested."""
        if self._body.alternatives is None:
            return None
        ids = [token for part in parts for token in part.token_ids]
        logprobs = [logprob for part in parts for logprob in part.logprobs]
        tops = [top for part in parts for top in part.top_logprobs]
        if self._chat:
            sampled = [flag for part in parts for flag in part.sampled]
            content = []
            for token, logprob, is_sampled, top in zip(ids, logprobs, sampled, tops or [()] * len(ids), strict=True):
                alternatives = [self._entry(other, odds) for other, odds in top or ()]
                entry = {**self._entry(token, logprob), "top_logprobs": alternatives}
                content.append(entry if is_sampled else {**entry, "sampled": False})
            return {"content": content, "refusal": None}
        offsets = []
        for token in ids:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._model.token_text(token))
        return {
            "tokens": list(map(self._token_name, ids)),
            "token_logprobs": list(map(_finite, logprobs)),
            "text_offset": offsets,
            "top_logprobs": list(map(self._alternatives, tops)) if self._body.alternatives else None,
        }

    def _alternatives(self, top: Sequence[tuple[int, float]] | None) -> dict[str, float] | None:
        if top is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in top:
            named.setdefault(self._token_name(token), logprob)  # of two tokens with the same text, the likelier
        return named

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, data = self._token_name(token), list(self._model.token_bytes(token))
        return {"token": name, "logprob": _finite(logprob), "bytes": data, "id": token}

    def _token_name(self, token: int) -> str:
        return f"token_id:{token}" if self._body.return_tokens_as_token_ids else self._model.token_text(token)


def tool_calls_of(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the calls that the client has to run, as OpenAI's `tool_calls`."""
    entries = []
    for call in calls:
        arguments = call["input"]
        if call["tool"] in TOOLS:
            arguments = json.dumps({ARGUMENT[call["tool"]]: arguments}, ensure_ascii=False)
        function = {"name": call["tool"], "arguments": arguments}
        entries.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return entries


def _finish_reason(completion: Completion) -> str:
    """Return OpenAI's finish reason."""
    return {"tool_limit": "length", "no_tool": "stop"}.get(completion.finish_reason, completion.finish_reason)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)
