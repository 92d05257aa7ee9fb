"""Tool calls in what a model writes: their tokens or text, the tools, and what is shown of the results.

Our own tools have tokens that begin and end a call, in the models that llmkit taught them. Calls of other functions,
and all calls of models with a chat template from elsewhere, are text, which is read when it may be over: behind
`</tool_call>`, or at the end of the turn. The text of a result is encoded as text: whatever it spells, it holds no
special token.
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
BROKEN = "broken"  # beside the names of tools


class Functions:
    """Functions that a model may call, whoever makes its tokens.

    schemas    of those that a prompt has to describe
    own        names of those that a prompt offers, and nobody here runs; a call of one ends the completion, as any does
               where there are no tools
    max_calls  of one completion; the next call ends it
    """

    def __init__(self, toolbox: Toolbox, max_calls: int = 8) -> None:
        self.toolbox, self.max_calls, self.own = toolbox, max_calls, frozenset[str]()
        self.schemas: Definitions = tuple(toolbox.schemas.values())

    def offering(self: AnyFunctions, definitions: Definitions) -> AnyFunctions:
        """Return these functions with those of a prompt. Raises UserError for one without a name or twice there."""
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
        """True if these calls are for whoever made the request to run."""
        return not self.toolbox.names or not self.own.isdisjoint(name for name, _ in calls)

    def run(self, calls: Sequence[tuple[str, str]]) -> list[ToolResult]:
        """Run calls, one after the other."""
        names = ", ".join(self.toolbox.names)
        return [
            self.toolbox.run(tool, text)
            if tool in self.toolbox.names
            else ToolResult(f"error: there is no function {tool!r}; there are {names}", failed=True)
            for tool, text in calls
        ]


class ToolUse(Functions):
    """The tools of a generator, and their tokens.

    openers            texts with which calls in text begin, and `opener_ids`, tokens
    starts             start token -> tool, of calls that are no text
    ends               tool -> end token
    others             start token -> tool, of calls that are text, for the tool is not there
    unavailable_calls  how many of them there were, by tool, and under BROKEN, turns with calls that cannot be read
    result_tokens      a result is cut to this many
    end_at_others      whether a call of a tool that is not there ends the completion, not stays text
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
        """How calls are written as text; None where there are none such."""
        return self._form if self.schemas else None

    def _with_own(self, definitions: Definitions, names: Sequence[str]) -> ToolUse:
        other = super()._with_own(definitions, names)
        ours = [name for name in names if name in self._tokens]  # with tokens
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
        """Return the tool of a call that a prompt begins and does not end, and its input so far; None without one."""
        ends = set(self.ends.values())
        for index in range(len(prompt) - 1, -1, -1):
            if prompt[index] in ends:
                break
            if prompt[index] in self.starts:
                return self.starts[prompt[index]], list(prompt[index + 1 :])
        return None

    def last_call(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """The tool and the input of the last call in some tokens, which its end token ends."""
        start = max(index for index, token in enumerate(token_ids) if token in self.starts)
        return self.starts[token_ids[start]], self._tokenizer.decode(token_ids[start + 1 : -1], skip_specials=True)

    def may_be_over(self, text: str, token: int, ended: bool) -> bool:
        """True if calls in the text of a turn so far may be complete, with this token as the last."""
        return ended or token == self.call_end or (self._closer is not None and text.endswith(self._closer))

    def read(self, token_ids: Sequence[int], text: str) -> tuple[str, list[tuple[str, str]]]:
        """Read the calls in a stretch of a turn: the text around them, and the tool and the input of each.

        text  the stretch without special tokens
        """
        form, written = self.form, self._answer(token_ids)
        if form is None or not (calls := form.read(written, self.schemas)):
            return text, []
        first = form.stretch.search(written)
        assert first is not None, "it has calls"
        answer_start = text.rfind("</think>") + 1  # a call in thoughts is none
        starts = [start for opener in self.openers if (start := text.find(opener, answer_start)) >= 0]
        before = text[: min(starts)] if starts else text if self.opener_ids else text[:answer_start]
        rest = form.stretch.sub("", written[first.start() :]).strip()
        for name in self._tokenizer.specials if rest else ():
            rest = rest.replace(name, "")
        return before + rest, [(call.name, input_of(call)) for call in calls]

    def is_broken(self, token_ids: Sequence[int]) -> bool:
        """True if a turn in which no call could be read begins one."""
        written, openers = self._answer(token_ids), () if self.form is None else self.form.openers
        return any(text in written if len(text) > 1 else written.lstrip().startswith(text) for text in openers)

    def _answer(self, token_ids: Sequence[int]) -> str:
        """Decode a turn without its thoughts, special tokens included but for one at its end."""
        text, last = self._tokenizer.decode(token_ids).rpartition("</think>")[2], self._tokenizer.decode(token_ids[-1:])
        text = text.removesuffix(last) if last in self._tokenizer.specials else text
        return "" if "<think>" in text else text

    def result_ids(
        self, calls: Sequence[tuple[str, str]], results: Sequence[ToolResult], room: int
    ) -> tuple[list[int], list[str]]:
        """Encode results in at most `room` ids, or in none if they do not fit; and what the model sees of each.

        A result in our own format is cut to fit.
        """
        # a lone surrogate, which JSON may spell, becomes ?
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
        """Split a completion with calls into texts, calls and results, in their order.

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
    """The input of a tool: for our own its text, for functions the arguments in JSON."""
    if call.name not in TOOLS:
        return json.dumps(call.arguments, ensure_ascii=False)
    value = call.arguments.get(ARGUMENT[call.name], next(iter(call.arguments.values()), ""))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def call_part(tool: str, text: str) -> Part:
    """Make the part of a message that a call is, of the tool and its input."""
    return Part(tool, text) if tool in TOOLS else Part(CALL, f'{{"name": {json.dumps(tool)}, "arguments": {text}}}')


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
    """Open the tools of `options`, closed with `stack`; without any, still recognise calls, to count them.

    None without tools for a model that knows no calls, or does not end a turn: a base writes such tokens now and then.
    Raises UserError as `Toolbox.parse` does.
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
    """Yield a note for each tool that was called without being given, and for calls that could not be read, from the
    counts of each process."""
    for tool in TOOLS:
        if count := sum(used.get(tool, 0) for used in counts):
            yield (
                f"{counted(count, 'call')} of {tool} {'is' if count == 1 else 'are'} text in the completions, "
                f"for it was not given; {tools_flag(tool)} runs them"
            )
    if count := sum(used.get(BROKEN, 0) for used in counts):
        yield f"{counted(count, 'answer')} with a call that is cut off or not well formed, which stays text"
