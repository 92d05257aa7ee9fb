"""Input and output of a sampler: requests, completions, usage and stop strings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.io.progress import counted

if TYPE_CHECKING:
    from llmkit.formats.conversations import Part
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.tool_calls import Functions
    from llmkit.tokenizer.encoding import JsonConstraint

_THOUGHTS = re.compile(r"<think>(.*?)(?:</think>\n*|\Z)", re.DOTALL)
Prompt = Sequence[Any]  # token ids, or text to continue or messages to answer if a server tokenizes
OnText = Callable[[int, int, str], object]  # (request, sample, text), as soon as text is final
# (request, sample, call, the result as the model sees it): None when a tool is called, then again with its result
OnCall = Callable[[int, int, Mapping[str, Any], str | None], object]
OnDone = Callable[[int, "list[Completion]"], object]  # (request, its samples)
REFUSED = "refused"  # finish reason of a completion that a server failed to make


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    prompt       as the sampler's `encode` made it
    samples      number of completions
    max_tokens   per completion; None: up to the end of the context
    seed         of the random numbers
    number       tells requests with the same seed apart; 64 bits
    where        names the prompt in errors: "prompts.jsonl:3"

    For a local model, and this request alone:

    sampling      replaces the generator's
    stop          stop strings in addition to the generator's
    tools         replace the generator's, or the server's
    top_logprobs  number of likeliest tokens to report at each position
    constraint    on what may follow; no tool is called
    """

    prompt: Prompt
    samples: int = 1
    max_tokens: int | None = None
    seed: int = 0
    number: int = 0
    where: str = "prompt"
    sampling: Sampling | None = None
    stop: Sequence[str] = ()
    tools: Functions | None = None
    top_logprobs: int = 0
    constraint: JsonConstraint | None = None


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    text                decoded tokens, up to a stop string, without special tokens, tool calls and their results
    token_ids           all tokens, including the end token, those of a stop string, calls and results
    finish_reason       "stop" after an end token or stop string, "length" after `max_tokens` or the context's end,
                        "tool_limit" after too many calls, "no_tool" after a call of an unavailable tool (in chats),
                        "tool_calls" after calls that the requester has to run, "error" if the parser of a constraint
                        met its limits
    logprobs            of each token, natural: under softmax(logits / temperature), at temperature 0 softmax(logits),
                        over the model's complete vocabulary; 0 if not sampled
    truncated_logprobs  under the distribution sampled from, after top-k, top-p and min-p; 0 if not sampled
    sampled             whether the model chose the token; False for results of tools
    tool_calls          {"tool", "input", "result"} of each call, with "failed": true if the result is an error, and
                        without "result" if the requester has to run it
    top_logprobs        the likeliest tokens at each position and their `logprobs`, if requested; empty if not sampled
    thought             reasoning that a server returns apart from the text; a local model's stays in the text
    parts               text, calls and results in order, if a server's model called tools

    Empty if a server does not return them: `token_ids`, `logprobs`, `sampled`, and always `truncated_logprobs`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]
    truncated_logprobs: list[float]
    sampled: list[bool]
    tool_calls: list[dict[str, Any]]
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    thought: str = ""
    parts: Sequence[Part] = ()


def split_thoughts(text: str) -> tuple[str, str]:
    """Split thoughts, between <think> and </think>, from the answer; the <think> may be in the prompt.

    >>> split_thoughts("<think>\\nTwo and two.\\n</think>\\n\\nFour.")
    ('Two and two.', 'Four.')
    """
    begin, end = text.find("<think>"), text.find("</think>")
    if begin < 0 and end < 0:
        return "", text
    text = f"<think>{text}" if end >= 0 and not 0 <= begin < end else text
    thoughts = [thought.strip("\n") for thought in _THOUGHTS.findall(text)]
    return "\n\n".join(filter(None, thoughts)), _THOUGHTS.sub("", text)


@dataclass
class Usage:
    """Answered requests and their tokens so far; a server's as it reports them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self.left_out: dict[str, int] = {}  # number of answers with content outside the text, by kind

    def __str__(self) -> str:
        left = "".join(f"; left out the {kind} of {count:,}" for kind, count in self.left_out.items())
        tokens = f"{counted(self.prompt_tokens, 'token')} in, {self.completion_tokens:,} out"
        return f"{counted(self.requests, 'request')}, {tokens}{left}"


def finished(done: dict[int, list[Completion | None]]) -> Iterator[tuple[int, list[Completion]]]:
    """Remove and yield the complete requests at the front of `done`: samples by request, None if unfinished."""
    while done and None not in (samples := done[index := next(iter(done))]):
        del done[index]
        yield index, [completion for completion in samples if completion is not None]


class StopMatcher:
    """Finds stop strings in streamed text, and holds back an end that may begin one.

    The stop string that is complete first wins, so the result does not depend on how the text is split.

    >>> matcher = StopMatcher(["\\n\\n", "END"])
    >>> matcher.push("one\\n"), matcher.push("two E"), matcher.push("N"), matcher.push("D three"), matcher.stopped
    ('one', '\\ntwo ', '', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._tail = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return the part that certainly precedes any stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._tail + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._tail = True, ""
            return text[: min(matches)[1]]
        # the longest suffix of the text that is a proper prefix of a stop string
        longest = min(len(text), max(map(len, self._stops)) - 1)
        hold = next((n for n in range(longest, 0, -1) if any(stop[:n] == text[-n:] != stop for stop in self._stops)), 0)
        self._tail = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """Return the text that was held back, after the last piece."""
        rest, self._tail = self._tail, ""
        return rest
