"""Tool calls in what a model writes: their tokens, the tools, and what is shown of the results.

The text of a result is encoded as text: whatever it spells, it holds no special token but the two around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Any

from llmkit.config import ToolConfig
from llmkit.formats.conversations import RESULT, TOOLS, Part
from llmkit.io.progress import counted
from llmkit.tokenizer.chat import has_chat_tokens, has_own_template
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.tokenizer.templates import chat_format
from llmkit.tools.toolbox import Toolbox, ToolResult


class ToolUse:
    """The tools of a generator, and their tokens.

    starts             start token -> tool, of calls that are no text
    ends               tool -> end token
    others             start token -> tool, of calls that are text, for the tool is not there
    unavailable_calls  how many of them there were, by tool
    max_calls          of one completion; the next call ends it
    result_tokens      a result is cut to this many
    end_at_others      whether a call of a tool that is not there ends the completion; else it is text
    """

    def __init__(
        self,
        toolbox: Toolbox,
        tokenizer: Tokenizer,
        max_calls: int = 8,
        result_tokens: int = 512,
        *,
        end_at_others: bool = False,
    ) -> None:
        self._chat = chat_format(tokenizer)
        tokens = self._chat.tool_tokens()
        noticed = TOOLS if end_at_others else toolbox.names
        self.starts = {tokens[tool][0]: tool for tool in noticed}
        self.ends = {tool: tokens[tool][1] for tool in noticed}
        self.others = {tokens[tool][0]: tool for tool in TOOLS if tool not in noticed}
        self.unavailable_calls: Counter[str] = Counter()
        self.max_calls, self._result_tokens = max_calls, result_tokens
        self.toolbox, self._tokenizer, self._bounds = toolbox, tokenizer, tokens[RESULT]

    def last_call(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """The tool and the input of the last call in some tokens, which its end token ends."""
        start = max(index for index, token in enumerate(token_ids) if token in self.starts)
        return self.starts[token_ids[start]], self._tokenizer.decode(token_ids[start + 1 : -1], skip_specials=True)

    def result_ids(self, result: ToolResult, room: int) -> list[int]:
        """A result between its tokens, at most `room` ids in all; none where not even the two tokens fit."""
        if room < 2:
            return []
        text = result.text.encode("utf-8", "replace").decode()  # a lone surrogate, which JSON may spell, becomes ?
        ids = self._chat.encode_result(text)[: min(self._result_tokens, room - 2)]
        return [self._bounds[0], *ids, self._bounds[1]]

    def parts(
        self, token_ids: Sequence[int], sampled: Sequence[bool], calls: Sequence[Mapping[str, Any]]
    ) -> tuple[Part, ...]:
        """Split a completion with calls into texts, calls and results, in their order.

        A result is what was not sampled, whatever tokens the model writes around words of its own. A call that has no
        result is left out: it was cut, or one too many.
        """
        answered, parts = iter(calls), []
        for own, run in groupby(zip(token_ids, sampled, strict=True), key=itemgetter(1)):
            ids = [token for token, _ in run]
            if own:
                written = list(takewhile(lambda token: token not in self.starts, ids))
                parts.append(Part("text", self._tokenizer.decode(written, skip_specials=True)))
            else:
                call = next(answered)
                parts.append(Part(call["tool"], call["input"]))
                parts.append(Part(RESULT, self._tokenizer.decode(ids, skip_specials=True)))
        return tuple(part for part in parts if part.text or part.kind != "text")


def tools_flag(tool: str) -> str:
    """The option that gives a model a tool."""
    return f"--tools {tool}:DOCS.jsonl" if tool == "search" else f"--tools {tool}"


def open_tools(
    options: ToolConfig,
    tokenizer: Tokenizer,
    stack: ExitStack,
    end_ids: Collection[int | None],
    end_at_others: bool = False,
) -> ToolUse | None:
    """The tools that are wanted, closed with `stack`, and what tells the calls of others.

    None where no tool is wanted of a model that knows none, or that does not end a turn: a base writes such tokens
    now and then. Raises UserError as `Toolbox.parse` does.
    """
    ours = has_chat_tokens(tokenizer) and not has_own_template(tokenizer)
    if not options.tools and not (ours and tokenizer.specials["<|im_end|>"] in end_ids):
        return None
    toolbox = Toolbox.parse(options.tools, sandbox=options.sandbox, timeout=options.tool_timeout)
    toolbox = stack.enter_context(toolbox)
    return ToolUse(toolbox, tokenizer, options.max_tool_calls, end_at_others=end_at_others)


def told_unavailable(counts: Sequence[Mapping[str, int]]) -> Iterator[str]:
    """Yield a note for each tool that was called without being given, from the counts of each process."""
    for tool in TOOLS:
        if count := sum(used.get(tool, 0) for used in counts):
            yield (
                f"{counted(count, 'call')} of {tool} {'is' if count == 1 else 'are'} text in the completions, "
                f"for it was not given; {tools_flag(tool)} runs them"
            )
