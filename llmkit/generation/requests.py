"""What a sampler takes and gives: requests, completions, their count, and the strings that end them."""

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
Prompt = Sequence[Any]  # token ids; where a server makes them text to continue, or messages to answer
OnText = Callable[[int, int, str], object]  # (request, sample, text), as text is decided
# (request, sample, call, what the model sees of its result): as a tool is called, None, and as it has answered
OnCall = Callable[[int, int, Mapping[str, Any], str | None], object]
OnDone = Callable[[int, "list[Completion]"], object]  # (request, its samples)
REFUSED = "refused"  # how a completion ends that a server has failed to make


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    prompt       as the sampler's `encode` made it
    samples      how many completions
    max_tokens   of each; None goes on to the end of the context
    seed         of the random numbers
    number       tells requests with the same seed apart; 64 bits
    where        names the prompt in errors: "prompts.jsonl:3"

    Of a model here, for this request alone:

    sampling      in the place of the generator's
    stop          strings that end a completion, beside the generator's
    tools         in the place of the generator's, or of a server's
    top_logprobs  how many of the likeliest tokens are told at each position
    constraint    what may follow; no tool is called
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

    text                what the tokens say, up to a stop string; special tokens, calls of tools and their results
                        say nothing
    token_ids           all tokens, the end token, those of a stop string, calls and results among them
    finish_reason       "stop" after an end token or stop string, "length" after `max_tokens` or the context's end,
                        "tool_limit" after a call too many, "no_tool" after one of a tool that is not there (in chats),
                        "tool_calls" after calls that whoever asked has to run, "error" where the parser of a
                        constraint met its limits
    logprobs            of each token, natural: under softmax(logits / temperature), at temperature 0
                        softmax(logits), over the model's whole vocabulary; 0 where not sampled
    truncated_logprobs  under the distribution drawn from, after top-k, top-p and min-p; 0 where not sampled
    sampled             whether the model chose the token; False for results of tools
    tool_calls          {"tool", "input", "result"} of each call, with "failed": true where the result is an error, and
                        without "result" where it is left to whoever asked
    top_logprobs        the likeliest tokens at each position and their `logprobs`, where the request asks for them;
                        none where not sampled
    thought             what a server tells apart from the text; thoughts of a model here stand in the text
    parts               text, calls and results in their order, where a server's model has called tools

    What a server does not tell is empty: `token_ids`, `logprobs`, `sampled`, and always `truncated_logprobs`.
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
    """Divide an answer from the thoughts before it, between <think> and </think>; a prompt may have begun them.

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
    """Answered requests and their tokens so far, a server's by its own count."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self.left_out: dict[str, int] = {}  # answers of which something is not in the text, by what

    def __str__(self) -> str:
        left = "".join(f"; left out the {kind} of {count:,}" for kind, count in self.left_out.items())
        tokens = f"{counted(self.prompt_tokens, 'token')} in, {self.completion_tokens:,} out"
        return f"{counted(self.requests, 'request')}, {tokens}{left}"


def finished(done: dict[int, list[Completion | None]]) -> Iterator[tuple[int, list[Completion]]]:
    """Take out the first requests that are whole, with their samples; `done` has these by number, None for what is not
    there."""
    while done and None not in (samples := done[index := next(iter(done))]):
        del done[index]
        yield index, [completion for completion in samples if completion is not None]


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back an end that may be the beginning of one.

    The stop string that is complete first wins, so the result does not depend on where the pieces end.

    >>> matcher = StopMatcher(["\\n\\n", "END"])
    >>> matcher.push("one\\n"), matcher.push("two E"), matcher.push("N"), matcher.push("D three"), matcher.stopped
    ('one', '\\ntwo ', '', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._tail = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text; return what is certain to be in front of any stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._tail + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._tail = True, ""
            return text[: min(matches)[1]]
        # the longest end of the text that is a beginning of a stop string, short of all of it
        longest = min(len(text), max(map(len, self._stops)) - 1)
        hold = next((n for n in range(longest, 0, -1) if any(stop[:n] == text[-n:] != stop for stop in self._stops)), 0)
        self._tail = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """Return the text that was held back, after the last piece."""
        rest, self._tail = self._tail, ""
        return rest
