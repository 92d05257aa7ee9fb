"""One completion in progress: how each sampled token changes its text, its tool calls and its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.generation.next_token import uniforms
from llmkit.generation.requests import Completion, OnText, Request, StopMatcher
from llmkit.generation.tool_calls import BROKEN, ToolUse
from llmkit.tokenizer.encoding import DecodeStream, JsonConstraint, Tokenizer

DRAWS = 128  # random numbers drawn at once
CALL = "call"  # in place of a finish reason: the sequence waits for a tool


@dataclass
class RunningSequence:
    """One sample in progress."""

    index: int  # of the request
    sample: int
    request: Request
    max_tokens: int  # of sampled tokens
    room: int  # for all tokens after the prompt
    decoding: DecodeStream
    stops: StopMatcher
    tools: ToolUse | None
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    on_text: OnText | None
    constraint: JsonConstraint | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated_logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    own: int = 0  # number of tokens sampled
    texts: list[str] = field(default_factory=list)
    call: tuple[str, list[int]] | None = None  # tool of the open call, and the tokens of its input so far
    calls: list[tuple[str, str]] = field(default_factory=list)  # (tool, input) of the calls that it waits for
    opening: StopMatcher | None = None  # finds the beginning of a call written as text
    turn_start: int = 0  # index of the first token after the last result
    turn_text: str = ""  # text of the tokens since then
    emitted: int = 0  # characters of it already emitted
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    _draws: tuple[int, np.ndarray] | None = None

    @property
    def position(self) -> int:
        """Position of the last token; its slot contains all tokens before it."""
        return len(self.request.prompt) + len(self.token_ids) - 1

    @property
    def full(self) -> bool:
        """True if no token may follow."""
        return self.own >= self.max_tokens or len(self.token_ids) >= self.room

    def append(self, token: int, logprob: float, truncated_logprob: float, sampled: bool = True) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.truncated_logprobs.append(truncated_logprob)
        self.sampled.append(sampled)
        self.own += sampled

    def next_uniform(self) -> float:
        """Return the random number of the next token."""
        block, at = divmod(len(self.token_ids), DRAWS)
        if self._draws is None or self._draws[0] != block:
            request = self.request
            self._draws = block, uniforms(request.seed, request.number, self.sample, block * DRAWS, DRAWS)
        return self._draws[1][at]

    def take(self, token: int, logprob: float, truncated: float) -> str | None:
        """Append a token; return why the sequence ends with it, or `CALL`, or None if it continues."""
        self.append(token, logprob, truncated)
        if self.constraint is not None and not self.constraint.take(token):
            return self.finish("error")
        ended, tools, open_call = token in self.end_ids, self.tools, self.call
        if tools is not None and open_call is None and token in tools.others:
            tools.unavailable_calls[tools.others[token]] += 1
        if tools is not None and self.opening is not None and open_call is None and token not in tools.starts:
            if (reason := self._take_text(tools, token, ended)) is not None:
                return reason
            text = ""
        elif ended:
            text = ""
        elif tools is not None and token in tools.starts:
            self.call = tools.starts[token], []
            text = self.decoding.finish()
            if self.opening is not None:  # which may hold back text
                self.turn_text += text
                text, self.emitted = self.turn_text[self.emitted :], len(self.turn_text)
            text = self.stops.push(text)
        elif tools is not None and open_call is not None:
            tool, input_ids = open_call
            if token == tools.ends[tool]:
                if tool not in tools.toolbox.names and tool not in tools.own:
                    return self.finish("no_tool")
                text = self.tokenizer.decode(input_ids, skip_specials=True)
                self.call = None
                return self._call(tools, [(tool, text)])
            input_ids.append(token)
            text = ""
        else:
            text = self.stops.push(self.decoding.push([token]))
        self._emit(text)
        if self.stops.stopped:
            return "stop"
        if ended or self.full:
            return self.finish("stop" if ended else "length")
        return None

    def _take_text(self, tools: ToolUse, token: int, ended: bool) -> str | None:
        """Process a token of a turn with calls as text: emit the text before a call, and parse complete calls."""
        assert self.opening is not None
        over = ended or self.full
        piece = self.decoding.finish() if ended else self.decoding.push([token])
        piece += self.decoding.finish() if over and not ended else ""
        self.opening.stopped |= token in tools.opener_ids
        text, self.turn_text = self.opening.push(piece), self.turn_text + piece
        calls: list[tuple[str, str]] = []
        if tools.may_be_over(self.turn_text, token, ended):
            before, calls = tools.read(self.token_ids[self.turn_start :], self.turn_text)
            text = before[self.emitted :] if calls else text
        if over and not calls:
            text = self.turn_text[self.emitted :]
            tools.unavailable_calls[BROKEN] += tools.is_broken(self.token_ids[self.turn_start :])
        self.emitted += len(text)
        self._emit(self.stops.push(text))
        return self._call(tools, calls) if calls and not self.stops.stopped else None

    def _call(self, tools: ToolUse, calls: list[tuple[str, str]]) -> str:
        """Let the sequence wait for calls, or return why it ends with them."""
        if len(self.tool_calls) + len(calls) > tools.max_calls:
            return self.finish("tool_limit")
        self.calls = calls
        if tools.are_left(calls):
            self.tool_calls += [{"tool": tool, "input": text} for tool, text in calls]
            return self.finish("tool_calls")
        return self.finish("length") if self.full else CALL

    def finish(self, reason: str) -> str:
        """Emit the text held back at the end; return "stop" if it contains a stop string, else `reason`."""
        text = self.stops.push(self.decoding.finish())
        self._emit(text + self.stops.finish())
        return "stop" if self.stops.stopped else reason

    def _emit(self, text: str) -> None:
        if text:
            self.texts.append(text)
            if self.on_text is not None:
                self.on_text(self.index, self.sample, text)

    def append_results(self, ids: list[int]) -> None:
        """Append the results of calls, which were not sampled; a new turn begins after them."""
        for token in ids:
            self.append(token, 0.0, 0.0, sampled=False)
            if self.request.top_logprobs:
                self.top_logprobs.append([])
        if self.opening is not None and self.tools is not None:
            self.turn_start, self.turn_text, self.emitted = len(self.token_ids), "", 0
            self.opening = StopMatcher(self.tools.openers)

    def completion(self, reason: str) -> Completion:
        """Return the completion, with the reason why it ended."""
        return Completion(
            "".join(self.texts),
            self.token_ids,
            reason,
            self.logprobs,
            self.truncated_logprobs,
            self.sampled,
            self.tool_calls,
            self.top_logprobs,
        )
