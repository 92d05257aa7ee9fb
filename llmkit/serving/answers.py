"""What jobs become, as OpenAI's API tells it: whole, or in the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmkit.formats.conversations import ARGUMENT, RESULT, TOOLS, Message, as_record
from llmkit.generation.requests import Completion
from llmkit.generation.tool_calls import ToolUse, call_part
from llmkit.serving.engine import Called, Event, Finished, Job, Piece, Scored
from llmkit.serving.models import ServedModel

FINISHES = {"tool_limit": "length", "no_tool": "stop"}  # ours in OpenAI's words


class Thoughts:
    """Divides a text that comes in pieces into thoughts, between <think> and </think>, and the answer.

    >>> thoughts = Thoughts()
    >>> thoughts.push("<thi"), thoughts.push("nk>\\nTwo and two.\\n</think>\\n\\nFo"), thoughts.finish()
    (('', ''), ('Two and two.', 'Fo'), ('', ''))
    """

    def __init__(self, thinking: bool = False) -> None:
        self._thinking, self._held, self._begins = thinking, "", thinking

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return what of it are thoughts, and what the answer."""
        told = {True: "", False: ""}
        self._held += text
        while (at := self._held.find(self._tag)) >= 0:
            before, self._held = self._held[:at], self._held[at + len(self._tag) :]
            told[self._thinking] += self._told(before.rstrip("\n") if self._thinking else before)
            self._thinking, self._begins = not self._thinking, True
        ends = (n for n in range(min(len(self._tag) - 1, len(self._held)), 0, -1) if self._tag[:n] == self._held[-n:])
        cut = len(self._held) - next(ends, 0)
        if self._thinking:  # the line's end before </think> is none of the thought
            cut = len(self._held[:cut].rstrip("\n"))
        told[self._thinking] += self._told(self._held[:cut])
        self._held = self._held[cut:]
        return told[True], told[False]

    def finish(self) -> tuple[str, str]:
        """The rest that was held back."""
        rest, self._held = self._told(self._held.rstrip("\n") if self._thinking else self._held), ""
        return (rest, "") if self._thinking else ("", rest)

    @property
    def _tag(self) -> str:
        return "</think>" if self._thinking else "<think>"

    def _told(self, text: str) -> str:
        """The text without the line's ends behind a tag."""
        if self._begins:
            text = text.lstrip("\n")
            self._begins = not text
        return text


class Answers:
    """The answers to one request of HTTP: `whole`, or `chunks` of each event and at the end `last_chunks`.

    chat         whether they are chat completions; else they are completions of texts
    logprobs     how many alternatives are told beside each token; None tells no log-probabilities
    echo         the texts of the prompts, which begin the completions
    thinking     whether the prompt has begun a thought
    form         whether ids are told (`token_ids`), tokens are written as token_id:7 (`names_ids`), and a stream ends
                 with the `usage`
    """

    def __init__(
        self,
        model: ServedModel,
        jobs: Sequence[Job],
        *,
        chat: bool,
        logprobs: int | None = None,
        echo: Sequence[str] | None = None,
        thinking: bool = False,
        form: Mapping[str, bool],
    ) -> None:
        self._model, self._jobs, self._chat, self._logprobs, self._echo = model, jobs, chat, logprobs, echo
        self._thinking, self._usage = thinking, form["usage"]
        self._token_ids, self._names_ids = form["token_ids"], form["names_ids"]
        kind = "chat.completion" if chat else "text_completion"
        self._whole = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model.name,
            "seed": jobs[0].request.seed,
        }
        self._scores: dict[int, Scored] = {}
        self.completions: dict[int, list[Completion]] = {}  # by prompt
        self._thoughts: dict[int, Thoughts] = {}  # by choice
        self._offsets: dict[int, int] = {}  # of the text, by choice
        self._called: dict[int, int] = {}

    def take(self, index: int, event: Event) -> None:
        """Keep what an event of the job at `index` tells."""
        if isinstance(event, Scored):
            self._scores[index] = event
        elif isinstance(event, Finished):
            self.completions[index] = event.completions

    @property
    def usage(self) -> dict[str, int]:
        """How many tokens came and went."""
        prompt = sum(len(job.request.prompt) for job in self._jobs)
        made = sum(sum(one.sampled) for samples in self.completions.values() for one in samples)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def whole(self) -> dict[str, Any]:
        """The answer, after all events."""
        choices = []
        for index, job in enumerate(self._jobs):
            samples = self.completions[index] or [Completion("", [], "length", [], [], [], [])]
            for sample, completion in enumerate(samples if job.generates else samples * job.request.samples):
                number = index * job.request.samples + sample
                choice: dict[str, Any] = {"index": number}
                if self._chat:
                    choice["message"] = self._message(job, completion)
                else:
                    choice["text"] = (self._echo[index] if self._echo is not None else "") + completion.text
                echoed = self._echoed(index) if self._echo is not None else None
                choice["logprobs"] = self._told_tokens(number, _piece(sample, completion), echoed)
                choice["finish_reason"] = FINISHES.get(completion.finish_reason, completion.finish_reason)
                if self._token_ids:
                    choice |= {"token_ids": completion.token_ids, "prompt_token_ids": list(job.request.prompt)}
                choices.append(choice)
        return {**self._whole, "choices": choices, "usage": self.usage}

    def _message(self, job: Job, completion: Completion) -> dict[str, Any]:
        thoughts = Thoughts(self._thinking)
        reasoning, text = (a + b for a, b in zip(thoughts.push(completion.text), thoughts.finish(), strict=True))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if completion.finish_reason == "tool_calls":
            message |= {"content": text or None, "tool_calls": calls_of(completion.tool_calls)}
        elif completion.tool_calls and isinstance(tools := job.request.tools or self._model.generator.tools, ToolUse):
            parts = tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)
            message["content_parts"] = as_record([Message("assistant", parts)])[0]["content"]
        return message

    # ---- streams

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Chunks before all events."""
        if self._chat:
            for number in range(self._jobs[0].request.samples):
                yield self._chunk(number, delta={"role": "assistant", "content": ""})
        elif self._echo is not None and self._logprobs is None:
            for index in range(len(self._jobs)):
                yield from self._echo_chunks(index, None)

    def chunks(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that tell an event of the job at `index`."""
        self.take(index, event)
        samples = self._jobs[index].request.samples
        if isinstance(event, Scored):
            yield from self._echo_chunks(index, self._echoed(index))
        elif isinstance(event, (Piece, Called)):
            number = index * samples + event.sample
            if isinstance(event, Called):
                part = {"type": RESULT, "text": event.seen}
                if event.seen is None:
                    call = call_part(event.call["tool"], event.call["input"])
                    part = {"type": call.kind, "text": call.text}
                if self._chat:
                    yield self._chunk(number, delta={"content_parts": [part]})
                return
            details: dict[str, Any] = {"logprobs": self._told_tokens(number, event, None)}
            if self._token_ids:
                details["token_ids"] = list(event.token_ids)
            if self._chat:
                thoughts = self._thoughts.setdefault(number, Thoughts(self._thinking))
                yield self._chunk(number, delta=_delta(*thoughts.push(event.text)), **details)
            else:
                yield self._chunk(number, text=event.text, **details)
        elif isinstance(event, Finished):
            for sample, completion in enumerate(event.completions):
                yield from self._end(index * samples + sample, completion)

    def _echo_chunks(self, index: int, echoed: Piece | None) -> Iterator[dict[str, Any]]:
        samples, text = self._jobs[index].request.samples, self._echo[index] if self._echo is not None else ""
        for number in range(index * samples, (index + 1) * samples):
            yield self._chunk(number, text=text, logprobs=self._told_tokens(number, Piece(0, ""), echoed))

    def _end(self, number: int, completion: Completion) -> Iterator[dict[str, Any]]:
        reason = FINISHES.get(completion.finish_reason, completion.finish_reason)
        if not self._chat:
            yield self._chunk(number, text="", finish_reason=reason)
            return
        thoughts = self._thoughts.pop(number, None)
        if thoughts is not None and (delta := _delta(*thoughts.finish())):
            yield self._chunk(number, delta=delta)
        if reason == "tool_calls":
            calls = [{"index": place, **call} for place, call in enumerate(calls_of(completion.tool_calls))]
            yield self._chunk(number, delta={"tool_calls": calls})
        yield self._chunk(number, delta={}, finish_reason=reason)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Chunks after all events."""
        if self._usage:
            yield {**self._chunk(0), "choices": [], "usage": self.usage}

    def _chunk(self, number: int, **choice: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        whole = {"index": number, "logprobs": None, "finish_reason": None, **choice}
        return {**self._whole, "object": kind, "choices": [whole], **({"usage": None} if self._usage else {})}

    # ---- tokens

    def _echoed(self, index: int) -> Piece:
        """The tokens of a prompt, with their log-probabilities where they were scored."""
        ids = self._jobs[index].request.prompt
        if (scores := self._scores.get(index)) is None:
            return Piece(0, "", ids)
        return Piece(0, "", ids, scores.logprobs, [True] * len(ids), scores.top_logprobs)

    def _told_tokens(self, number: int, piece: Piece, echoed: Piece | None) -> dict[str, Any] | None:
        """Tokens and their log-probabilities, in the form of chats or of completions."""
        if self._logprobs is None:
            return None
        if self._chat:
            return {"content": [self._token(piece, place) for place in range(len(piece.token_ids))], "refusal": None}
        ids, logprobs = list(piece.token_ids), [*map(_finite, piece.logprobs)]
        tops = [self._named(top) for top in piece.top_logprobs]
        if echoed is not None:
            ids = [*echoed.token_ids, *ids]
            logprobs = [None, *map(_finite, echoed.logprobs), *logprobs]
            tops = [None, *map(self._named, echoed.top_logprobs), *tops]
        texts = [self._model.token_text(token) for token in ids]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(number, 0))
            self._offsets[number] = offsets[-1] + len(text)
        names = [f"token_id:{token}" for token in ids] if self._names_ids else texts
        told = {"tokens": names, "token_logprobs": logprobs, "text_offset": offsets}
        return {**told, "top_logprobs": tops if self._logprobs else None}

    def _named(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        name = (lambda token: f"token_id:{token}") if self._names_ids else self._model.token_text
        named: dict[str, float] = {}
        for token, logprob in top:
            named.setdefault(name(token), logprob)  # of two tokens of one text the likelier
        return named

    def _token(self, piece: Piece, place: int) -> dict[str, Any]:
        entry = self._entry(piece.token_ids[place], piece.logprobs[place])
        if not piece.sampled[place]:
            entry["sampled"] = False
        tops = piece.top_logprobs[place] if piece.top_logprobs else ()
        return {**entry, "top_logprobs": [self._entry(token, logprob) for token, logprob in tops]}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = f"token_id:{token}" if self._names_ids else self._model.token_text(token)
        data = list(self._model.token_bytes(token))
        return {"token": text, "logprob": _finite(logprob), "bytes": data, "id": token}


def calls_of(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write calls that the client has to run, as OpenAI has them."""
    written = []
    for call in calls:
        arguments = call["input"]
        if call["tool"] in TOOLS:
            arguments = json.dumps({ARGUMENT[call["tool"]]: arguments}, ensure_ascii=False)
        function = {"name": call["tool"], "arguments": arguments}
        written.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return written


def _piece(sample: int, completion: Completion) -> Piece:
    one = completion
    return Piece(sample, one.text, one.token_ids, one.logprobs, one.sampled, one.top_logprobs)


def _finite(logprob: float) -> float:
    """A log-probability as JSON has it, which knows no infinity: -9999, as OpenAI writes the unlikely."""
    return max(logprob, -9999.0)


def _delta(reasoning: str, text: str) -> dict[str, str]:
    delta = {"reasoning_content": reasoning, "content": text}
    return {name: value for name, value in delta.items() if value}
