"""Tool calls in a model's output: as tokens or text, the tools themselves, and the results that the model sees.

Our own tools have tokens that begin and end a call, in models trained by llmkit. Calls of other functions, and all
calls of models with a foreign chat template, are text, which is parsed when it may be complete: after `</tool_call>`,
or at the end of the turn. Results are encoded as plain text, so they never contain a special token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Any, TypeVar

from llmkit.config import ToolConfig
from llmkit.errors import UserError
from llmkit.formats.conversations import ARGUMENT, CALL, RESULT, TOOLS, Definitions, Part
from llmkit.io.progress import counted
from llmkit.tokenizer.calls import TAGGED, Call, CallForm
from llmkit.tokenizer.chat import ChatFormat, has_chat_tokens, has_own_template
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.tokenizer.templates import TemplateFormat, chat_format
from llmkit.tools.toolbox import Toolbox, ToolResult

AnyFunctions = TypeVar("AnyFunctions", bound="Functions")
BROKEN = "broken"  # in place of a tool's name


class Functions:
    """Functions that a model may call, local or on a server.

    schemas    of the functions that a prompt has to describe
    own        names of functions that a request offers and its sender runs; a call of one ends the completion, as any
               call does without tools
    max_calls  per completion; the next call ends it
    """

    def __init__(self, toolbox: Toolbox, max_calls: int = 8) -> None:
        self.toolbox, self.max_calls, self.own = toolbox, max_calls, frozenset[str]()
        self.schemas: Definitions = tuple(toolbox.schemas.values())

    def offering(self: AnyFunctions, definitions: Definitions) -> AnyFunctions:
        """Return these functions and those of a prompt. Raises UserError if one has no name or occurs twice."""
        names = [definition.get("function", definition) for definition in definitions]
        names = [function.get("name") if isinstance(function, dict) else None for function in names]
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"expected each of 'tools' to be a function with a name, found {names}")
        return self._with_own(definitions, [str(name) for name in names])

    def _with_own(self: AnyFunctions, definitions: Definitions, names: Sequence[str]) -> AnyFunctions:
        if twice := next((name for name in names if names.count(name) > 1 or name in self.toolbox.names), None):
            raise UserError(f"expected each function once in 'tools' and --tools, found {twice} twice")
        other = copy(self)
        other.schemas, other.own = (*self.schemas, *definitions), frozenset(names)
        return other

    def none(self) -> Functions:
        """Return no functions, for a request that offers none; calls in its completion stay text."""
        return Functions(Toolbox.parse(()), self.max_calls) if self.toolbox.names else self

    def are_left(self, calls: Sequence[tuple[str, str]]) -> bool:
        """Return True if the sender of the request has to run these calls."""
        return not self.toolbox.names or not self.own.isdisjoint(name for name, _ in calls)

    def run(self, calls: Sequence[tuple[str, str]]) -> list[ToolResult]:
        """Run calls one after the other, and return their results."""
        names = ", ".join(self.toolbox.names)
        return [
            self.toolbox.run(tool, text)
            if tool in self.toolbox.names
            else ToolResult(f"error: there is no function {tool!r}; there are {names}", failed=True)
            for tool, text in calls
        ]


class ToolUse(Functions):
    """The tools of a generator, and their tokens.

    openers            strings that begin calls written as text; `opener_ids`: tokens that do
    starts             start token -> tool, of calls delimited by tokens
    ends               tool -> end token
    others             start token -> tool, of tools that are not enabled; their calls stay text
    unavailable_calls  number of such calls by tool; under BROKEN, turns with calls that cannot be parsed
    result_tokens      maximum length of a result
    end_at_others      whether a call of a tool that is not enabled ends the completion instead of staying text
    """

    def __init__(
        self,
        toolbox: Toolbox,
        tokenizer: Tokenizer,
        max_calls: int = 8,
        result_tokens: int = 512,
        *,
        end_at_others: bool = False,
        chat: ChatFormat | None = None,
    ) -> None:
        super().__init__(toolbox, max_calls)
        self._end_at_others = end_at_others
        self._chat = chat = chat_format(tokenizer) if chat is None else chat
        if isinstance(chat, TemplateFormat):
            self._closer, self._form, noticed, tokens = None, chat.call_form, (), {}
            self.call_end: int | None = chat.call_end
        else:
            self._closer, self._form, tokens = "</tool_call>", TAGGED, chat.tool_tokens()
            self.call_end = None
            self.schemas = tuple(schema for name, schema in toolbox.schemas.items() if name not in TOOLS)
            noticed = TOOLS if end_at_others else tuple(name for name in toolbox.names if name in TOOLS)
        openers = self._form.openers
        self.opener_ids = {tokenizer.specials[text] for text in openers if text in tokenizer.specials}
        self.openers = tuple(text for text in openers if text not in tokenizer.specials)
        self.starts = {tokens[tool][0]: tool for tool in noticed}
        self.ends = {tool: tokens[tool][1] for tool in noticed}
        self.others = {tokens[tool][0]: tool for tool in TOOLS if tokens and tool not in noticed}
        self.unavailable_calls: Counter[str] = Counter()
        self._tokenizer, self._tokens, self._result_tokens = tokenizer, tokens, result_tokens

    @property
    def form(self) -> CallForm | None:
        """Format of calls written as text; None if there are none."""
        return self._form if self.schemas else None

    def _with_own(self, definitions: Definitions, names: Sequence[str]) -> ToolUse:
        other = super()._with_own(definitions, names)
        ours = [name for name in names if name in self._tokens]  # that have tokens
        other.starts = self.starts | {self._tokens[name][0]: name for name in ours}
        other.ends = self.ends | {name: self._tokens[name][1] for name in ours}
        other.others = {token: name for token, name in self.others.items() if name not in ours}
        return other

    def none(self) -> ToolUse:
        """See `Functions`."""
        if not self.toolbox.names:
            return self
        return ToolUse(Toolbox.parse(()), self._tokenizer, end_at_others=self._end_at_others, chat=self._chat)

    def open_call(self, prompt: Sequence[int]) -> tuple[str, list[int]] | None:
        """Return the tool and the input so far of a call that a prompt begins and does not end; None if there is
        none."""
        ends = set(self.ends.values())
        for index in range(len(prompt) - 1, -1, -1):
            if prompt[index] in ends:
                break
            if prompt[index] in self.starts:
                return self.starts[prompt[index]], list(prompt[index + 1 :])
        return None

    def last_call(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """Return the tool and the input of the last call, whose end token is the last of `token_ids`."""
        start = max(index for index, token in enumerate(token_ids) if token in self.starts)
        return self.starts[token_ids[start]], self._tokenizer.decode(token_ids[start + 1 : -1], skip_specials=True)

    def may_be_over(self, text: str, token: int, ended: bool) -> bool:
        """Return True if calls in the text of a turn so far may be complete after this token."""
        return ended or token == self.call_end or (self._closer is not None and text.endswith(self._closer))

    def read(self, token_ids: Sequence[int], text: str) -> tuple[str, list[tuple[str, str]]]:
        """Parse the calls in a stretch of a turn; return the text around them, and the tool and the input of each.

        text  the stretch without special tokens
        """
        form, written = self.form, self._answer(token_ids)
        if form is None or not (calls := form.read(written, self.schemas)):
            return text, []
        first = form.stretch.search(written)
        assert first is not None, "it has calls"
        answer_start = text.rfind("</think>") + 1  # a call in thoughts does not count
        starts = [start for opener in self.openers if (start := text.find(opener, answer_start)) >= 0]
        before = text[: min(starts)] if starts else text if self.opener_ids else text[:answer_start]
        rest = form.stretch.sub("", written[first.start() :]).strip()
        for name in self._tokenizer.specials if rest else ():
            rest = rest.replace(name, "")
        return before + rest, [(call.name, input_of(call)) for call in calls]

    def is_broken(self, token_ids: Sequence[int]) -> bool:
        """Return True if a turn in which no call could be parsed begins one."""
        written, openers = self._answer(token_ids), () if self.form is None else self.form.openers
        return any(text in written if len(text) > 1 else written.lstrip().startswith(text) for text in openers)

    def _answer(self, token_ids: Sequence[int]) -> str:
        """Decode a turn without its thoughts, with special tokens except one at its end."""
        text, last = self._tokenizer.decode(token_ids).rpartition("</think>")[2], self._tokenizer.decode(token_ids[-1:])
        text = text.removesuffix(last) if last in self._tokenizer.specials else text
        return "" if "<think>" in text else text

    def result_ids(
        self, calls: Sequence[tuple[str, str]], results: Sequence[ToolResult], room: int
    ) -> tuple[list[int], list[str]]:
        """Encode results in at most `room` ids, or in none if they do not fit; also return the text of each that the
        model sees.

        A result in our own format is cut to fit.
        """
        # a lone surrogate, which JSON can contain, becomes ?
        texts = [result.text.encode("utf-8", "replace").decode() for result in results]
        if isinstance(self._chat, TemplateFormat):
            seen = list(map(self._cut, texts))
            ids = self._chat.encode_results([call_part(tool, text) for tool, text in calls], seen)
            return (ids, seen) if len(ids) <= room else ([], [""] * len(calls))
        if room < 2:
            return [], [""]
        ids = self._chat.encode_result(texts[0])[: min(self._result_tokens, room - 2)]
        start, end = self._tokens[RESULT]
        return [start, *ids, end], [self._tokenizer.decode(ids, skip_specials=True)]

    def _cut(self, text: str) -> str:
        ids = self._tokenizer.encode(text)
        return text if len(ids) <= self._result_tokens else self._tokenizer.decode(ids[: self._result_tokens])

    def parts(
        self, token_ids: Sequence[int], sampled: Sequence[bool], calls: Sequence[Mapping[str, Any]]
    ) -> tuple[Part, ...]:
        """Split a completion with calls into texts, calls and results, in order.

        Only tokens that were not sampled are a result, whatever the model writes. A call that was cut, or one too many,
        is left out; calls without results come last.
        """
        records, content, answered = iter(calls), [], 1
        for is_sampled, run in groupby(zip(token_ids, sampled, strict=True), key=itemgetter(1)):
            ids = [token for token, _ in run]
            if is_sampled:
                text_ids = list(takewhile(lambda token: token not in self.starts, ids))
                text, read = self.read(text_ids, self._tokenizer.decode(text_ids, skip_specials=True))
                content.append(Part("text", text))
                answered = len(read) or 1
            else:
                of_turn = [next(records) for _ in range(answered)]
                content += [call_part(call["tool"], call["input"]) for call in of_turn]
                if self.call_end is None:
                    content.append(Part(RESULT, self._tokenizer.decode(ids, skip_specials=True)))
                else:
                    content += [Part(RESULT, self._cut(call["result"])) for call in of_turn]
        content += [call_part(call["tool"], call["input"]) for call in records]
        return tuple(part for part in content if part.text or part.kind != "text")


def input_of(call: Call) -> str:
    """Return the input of a tool: the text for our own tools, the JSON arguments for functions."""
    if call.name not in TOOLS:
        return json.dumps(call.arguments, ensure_ascii=False)
    value = call.arguments.get(ARGUMENT[call.name], next(iter(call.arguments.values()), ""))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def call_part(tool: str, text: str) -> Part:
    """Return a call of a tool as a part of a message."""
    return Part(tool, text) if tool in TOOLS else Part(CALL, f'{{"name": {json.dumps(tool)}, "arguments": {text}}}')


def tools_flag(tool: str) -> str:
    """Return the option that gives a model a tool."""
    return f"--tools {tool}:DOCS.jsonl" if tool == "search" else f"--tools {tool}"


def open_tools(
    options: ToolConfig,
    tokenizer: Tokenizer,
    stack: ExitStack,
    end_ids: Collection[int | None],
    end_at_others: bool = False,
) -> ToolUse | None:
    """Open the tools of `options`, which `stack` closes; without any, recognise calls only to count them.

    Return None without tools if the model knows no calls or does not end turns: a base model writes such tokens now and
    then. Raises UserError as `Toolbox.parse` does.
    """
    if not options.tools and has_own_template(tokenizer):
        with suppress(UserError):  # a template without calls
            return ToolUse(Toolbox.parse(()), tokenizer, options.max_tool_calls)
    if not options.tools and not (has_chat_tokens(tokenizer) and tokenizer.specials["<|im_end|>"] in end_ids):
        return None
    toolbox = Toolbox.parse(options.tools, sandbox=options.sandbox, timeout=options.tool_timeout)
    toolbox = stack.enter_context(toolbox)
    return ToolUse(toolbox, tokenizer, options.max_tool_calls, end_at_others=end_at_others)


def unavailable_notes(counts: Sequence[Mapping[str, int]]) -> Iterator[str]:
    """Yield notes on calls of tools that are not enabled and on malformed calls, from the counts of each process."""
    for tool in TOOLS:
        if count := sum(used.get(tool, 0) for used in counts):
            yield (
                f"{counted(count, 'call')} of {tool} stayed text in the completions, because it is not enabled; "
                f"enable it with {tools_flag(tool)}"
            )
    if count := sum(used.get(BROKEN, 0) for used in counts):
        yield f"{counted(count, 'answer')} with a cut-off or malformed call, which stayed text"
