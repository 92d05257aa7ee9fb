"""Conversations in a model's own chat template, with the ids of transformers' `apply_chat_template`.

The template is rendered by jinja2 in a sandbox, in a separate process, and the complete text is encoded. Special tokens
are those that the template writes, never text that spells one: a mark breaks up such text before rendering and is
removed afterwards. Other marks show where each message begins and ends in the rendering, and so which tokens are
trained.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from llmkit.errors import UserError, naming
from llmkit.formats.conversations import ARGUMENT, CALL, RESULT, Conversation, Definitions, Message, Part, message
from llmkit.tokenizer.calls import FORMS, Call, CallForm, form_of, response_form
from llmkit.tokenizer.chat import ChatFormat, Encoded, has_own_template
from llmkit.tokenizer.encoding import RESERVED, THOUGHTS, Tokenizer
from llmkit.tokenizer.template_worker import TemplateFault, renderer

# Unicode noncharacters, which texts do not contain. BREAK splits text that spells a special token, BEGIN and END
# enclose each message, CUT marks where an answer starts.
BREAK, BEGIN, END, CUT = "\ufde0", "\ufde1", "\ufde2", "\ufde3"
_MARKS, _EDGES = re.compile(f"[{BREAK}{BEGIN}{END}{CUT}]"), re.compile(f"[{BEGIN}{END}]")
_RESERVED = re.compile(f"[{BREAK}{BEGIN}{END}{CUT}{RESERVED}]")
_THOUGHT = "</think>"
EACH, BETWEEN, NONE = "each answer", "an answer before another turn", "none"  # which answers have an end token
_TAKEN_OUT = re.compile(r"""\breplace\(\s*(['"])([^'"]+)\1\s*,\s*(['"])\3\s*\)""")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = Call("probe", {"argument": "value"})
OBJECT, JSON = "an object", "JSON"  # how a template expects arguments
_SWITCHES = ("enable_thinking", "thinking")  # template variables for thoughts before an answer
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class _Turn:
    """A message as text: `core` is the part to mark, without outer white space and perhaps thoughts.

    before, after  the text around `core`
    left     `core` without words that the template removes
    late     True if `core` begins after the thoughts
    calls    tool calls after the text, in the form that templates expect
    results  the answering messages of role "tool"
    """

    role: str
    before: str
    core: str
    after: str
    left: str
    late: bool
    calls: Sequence[dict[str, Any]] = ()
    results: Sequence[dict[str, Any]] = ()


class _Calling(NamedTuple):
    """How a template shows calls: the form in which it is given them, a rendered one, the special token after it, and
    the form that parses it."""

    way: str | CallForm
    written: str
    end: int
    form: CallForm | None


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Return the chat format of a tokenizer. Raise UserError if it has none."""
    return TemplateFormat(tokenizer) if has_own_template(tokenizer) else ChatFormat(tokenizer)


def choose_thinking(tokenizer: Tokenizer, wanted: str) -> None:
    """Switch thoughts before answers "on" or "off", or leave that to the chat template ("auto").

    The switch is the template's `enable_thinking` (Qwen 3, SmolLM 3, GLM, Gemma 4) or `thinking` (DeepSeek 3.1,
    Granite). Raise UserError for a template without one.
    """
    if wanted == "auto":
        return
    before = tokenizer.template_values
    for switch in _SWITCHES if has_own_template(tokenizer) else ():
        prompts = []
        for value in (wanted != "on", wanted == "on"):
            tokenizer.template_values = {switch: value}
            with suppress(UserError):
                encoded = TemplateFormat(tokenizer).encode([message("user", "Hello")], prompt=True)
                prompts.append(encoded.token_ids.tolist())
        if prompts[1:] != prompts[:1]:  # a template may use the name for something else, as gpt-oss's does
            return
    tokenizer.template_values = before
    raise UserError(
        f"--thinking {wanted}: expected a chat template with enable_thinking or thinking in {tokenizer.path.parent}, "
        "found none; leave the option out"
    )


class TemplateFormat(ChatFormat):
    """The chat format of a tokenizer with its own template.

    end_id   the token that ends the assistant's turn
    """

    def __init__(self, tokenizer: Tokenizer) -> None:  # without super().__init__, which requires our special tokens
        self._tokenizer, self._folder, template = tokenizer, tokenizer.path.parent, tokenizer.chat_template or ""
        self.shows_tools = "tools" in template
        self._tools_in_system = bool(re.search(r"""message(\.tools\b|\[['"]tools['"]\])""", template))  # Phi-4-mini's
        self._special = _any_of(tokenizer.specials)
        self._escaped = {role: self._special for role in ("system", "user")}  # special tokens that texts may not spell
        self._escaped["assistant"] = _any_of(name for name in tokenizer.specials if name not in THOUGHTS)
        try:
            self._template = renderer(portable_template(template))
        except TemplateFault as error:
            raise UserError(f"{self._folder}: its chat template is not valid Jinja: {error}") from None
        # commands within messages, such as Nemotron's /no_think, which the template removes
        self._switches = [match[2] for match in _TAKEN_OUT.finditer(template)]
        self._whole = tokenizer.with_stand_ins(tokenizer.specials)
        named = {key: tokenizer.config.get(key) for key in _NAMED}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        self._names = {key: value for key, value in texts.items() if value is not None}  # null means undefined
        self._names |= tokenizer.template_values
        self._endless = f"{self._folder}: its chat template does not end an answer with a special token"
        self.end_id, self._ended = self._end()

    def _end(self) -> tuple[int, str]:
        """Find the token that ends an answer, and which answers the template ends with it: EACH, BETWEEN or NONE."""
        question, answered = self._message("user", "Hello"), self._message("assistant", "Hello")

        def after_answer(*more: _Turn) -> str | None:
            pieces = self._render([question, answered, *more], prompt=False).split(END)
            match = self._special.search(pieces[2].partition(BEGIN)[0]) if len(pieces) > 2 else None
            return match and match[0]

        special, ends = after_answer(), EACH
        if special is None:
            with suppress(UserError):
                special = after_answer(question)
            ends = NONE if special is None else BETWEEN
            header = self._special.findall(self._render([question], prompt=False).partition(BEGIN)[0])
            if self._tokenizer.eos_id is not None and (special is None or [special] == header[-1:]):
                return self._tokenizer.eos_id, ends
        if special is None:
            raise UserError(self._endless)
        return self._tokenizer.specials[special], ends

    def encode(
        self, messages: Sequence[Message], *, loss: str = "assistant", prompt: bool = False, tools: Definitions = ()
    ) -> Encoded:
        """Encode messages like `ChatFormat.encode`. Raise UserError if the template refuses them."""
        encoded = self._encode(Conversation(tuple(messages), tools=tuple(tools)), loss, prompt=prompt)
        return replace(encoded, trained=np.zeros(len(encoded), bool)) if prompt and loss != "all" else encoded

    def encode_many(self, conversations: Iterable[Conversation], *, loss: str = "assistant") -> list[Encoded]:
        """Encode conversations like `ChatFormat.encode_many`."""
        encoded = []
        for conversation in conversations:
            with naming(conversation.where):
                encoded.append(self._encode(conversation, loss, prompt=False))
        return encoded

    def encode_branches(
        self, branches: Sequence[tuple[Sequence[Message], Sequence[Sequence[Message]]]]
    ) -> list[tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]]:
        """Encode like `ChatFormat.encode_branches`, each answer with its prompt, which templates may require."""
        encoded_branches = []
        for prompt, answers in branches:
            wholes = self.encode_many(Conversation((*prompt, *answer)) for answer in answers)
            end = len(prompt) - 1
            prompts = [whole.token_ids[: whole.turn_ends[end] if prompt else 0].tolist() for whole in wholes]
            shared = len(commonprefix(prompts))  # noqa: RUF071  (of ids)
            branch = [(whole.token_ids[shared:], whole.trained[shared:]) for whole in wholes]
            encoded_branches.append((wholes[0].token_ids[:shared], branch))
        return encoded_branches

    # ---- calls

    @property
    def call_form(self) -> CallForm:
        """The form of the model's calls, from its response template or from a call that its chat template renders.

        Raise UserError for a template without calls, and for an unknown form.
        """
        calling = self._calling
        if calling.form is None:
            raise UserError(
                f"{self._folder}: its chat template writes calls in a form unknown to llmkit, "
                f"{calling.written[:80]!r}; use it without --tools"
            )
        return calling.form

    @property
    def call_end(self) -> int:
        """The token that ends a turn with calls. Raise UserError for a template without calls."""
        return self._calling.end

    @cached_property
    def _calling(self) -> _Calling:
        """The first way of passing calls that the template renders in a known form, else in any form."""
        source = self._tokenizer.chat_template or ""
        written = [
            form
            for form in FORMS
            if form.writing and (form.openers[0] in {*self._tokenizer.specials} or form.openers[0] in source)
        ]
        callings = [calling for way in (OBJECT, JSON, *written) if (calling := self._try_calls(way)) is not None]
        if not callings:
            raise UserError(f"{self._folder}: its chat template does not support tool calls with results")
        return next((calling for calling in callings if calling.form is not None), callings[0])

    def _try_calls(self, way: str | CallForm) -> _Calling | None:
        """Render a call and its result; return None if the template does not show them."""
        question, parts = self._message("user", "Hello"), (Part(CALL, json.dumps(_PROBE._asdict())),)
        with suppress(UserError):
            (calling,) = self._turns(Message("assistant", parts), way)
            (answered,) = self._turns(Message("assistant", (*parts, Part(RESULT, "answer"))), way)
            asking, text = self._render([question], True, [0]), self._render([question, calling], False, [0, 1])
            going_on = self._render([question, answered], True, [0, 1])
            begin = len(asking) if text.startswith(asking) else text.find(question.core) + len(question.core)
            words = (_PROBE.name, *_PROBE.arguments, *_PROBE.arguments.values())
            after = max(text.rfind(word) for word in words)  # the end token may come only with the next turn
            if min(text.find(word, begin) for word in words) < 0 or "answer" not in going_on[after:]:
                return None
            specials = list(self._special.finditer(text, after))
            if not specials and going_on.startswith(text):
                specials = list(self._special.finditer(going_on, len(text)))[:1]
            if specials:
                end, response = specials[-1], self._tokenizer.config.get("response_template")
                written = (going_on if end.start() >= len(text) else text)[begin : end.start()]
                form = response_form(response) if isinstance(response, dict) else None
                if form is None or form.read(written) != [_PROBE]:
                    form = form_of(written, _PROBE) or form_of(written + end[0], _PROBE)  # `end` may be part of a call
                return _Calling(way, written, self._tokenizer.specials[end[0]], form)
        return None

    def encode_results(self, calls: Sequence[Part], results: Sequence[str]) -> list[int]:
        """Encode the results of calls, from after the token that ends the calls to where the assistant continues."""
        parts = (*calls, *(Part(RESULT, text) for text in results))
        (turn,) = self._turns(Message("assistant", parts))
        first, *others = turn.results
        turn = replace(turn, results=[{**first, "content": f"{BEGIN}{first['content']}"}, *others])
        before, mark, after = self._render([self._message("user", "Hello"), turn], True, [0, 1]).partition(BEGIN)
        end = next(name for name, number in self._tokenizer.specials.items() if number == self.call_end)
        _, ended, between = before.rpartition(end)
        if not (mark and ended):
            raise UserError(f"{self._folder}: its chat template does not show the results of tools")
        return [token for kind, token in self._events(between + after) if kind in ("special", "text")]

    # ---- text

    def _turns(self, turn: Message, way: str | CallForm | None = None) -> list[_Turn]:
        """Split a message after tool results, which are separate messages for templates."""
        groups: list[tuple[list[str], list[Part], list[str]]] = [([], [], [])]
        for part in turn.parts:
            if part.kind != RESULT and groups[-1][2]:
                groups.append(([], [], []))
            texts, calls, results = groups[-1]
            if part.kind == RESULT:
                results.append(self._escape(part.text, "user"))
            elif part.kind == "text":
                texts.append(part.text)
            else:
                calls.append(part)
        turns = []
        for texts, parts, results in groups:
            if parts or results:
                way = self._calling.way if way is None else way
            functions = [self._escape_all(function_of(part)) for part in parts]
            # ids of nine characters, which Mistral's templates require
            calls = [
                {"id": f"call{number:05d}", "type": "function", "function": function}
                for number, function in enumerate(functions)
            ]
            text, answers = self._escape("".join(texts), turn.role), []
            for number, result in enumerate(results):
                call = {"id": "call00000", "function": {"name": "tool"}}
                call = calls[min(number, len(calls) - 1)] if calls else call
                answers.append(
                    {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": result}
                )
            if way == JSON:
                for function in functions:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            elif isinstance(way, CallForm) and way.writing and calls:
                before, between, after = way.writing
                written = between.join(json.dumps(function, ensure_ascii=False) for function in functions)
                closer = way.closer if way.closer in self._tokenizer.specials else ""
                text += ("" if not text or text.endswith("\n") else "\n") + before + written + after + closer
                calls = []
            turns.append(replace(self._turn(turn.role, text), calls=calls, results=answers))
        return turns

    def _escape_all(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._escape_all(key): self._escape_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._escape_all(item) for item in value]
        return self._escape(value, "assistant") if isinstance(value, str) else value

    def _escape(self, text: str, role: str) -> str:
        """Insert BREAK into text that spells special tokens which this role may not write."""
        return self._escaped[role].sub(lambda match: match[0][:1] + BREAK + match[0][1:], _RESERVED.sub("", text))

    def _message(self, role: str, text: str) -> _Turn:
        return self._turn(role, self._escape(text, role))

    def _turn(self, role: str, text: str, late: bool = False) -> _Turn:
        at = text.rindex(_THOUGHT) + len(_THOUGHT) if late else 0
        core = left = text[at:].strip()  # some templates strip white space
        start = text.index(core, at) if core else len(text)
        if role != "assistant":
            for switch in self._switches:
                left = left.replace(switch, "")
        return _Turn(role, text[:start], core, text[start + len(core) :], left.strip(), late)

    def _render(self, turns: Sequence[_Turn], prompt: bool, bare: Collection[int] = (), tools: Any = None) -> str:
        """Render turns, with marks except for those in `bare`; `tools` are the functions that may be called."""
        messages = []
        for index, turn in enumerate(turns):
            content = turn.core if index in bare else f"{BEGIN}{turn.core}{END}"
            entry: dict[str, Any] = {"role": turn.role, "content": turn.before + content + turn.after}
            if tools and turn.role == "system" and self._tools_in_system:
                entry["tools"] = json.dumps(tools, ensure_ascii=False)
            messages += [entry | ({"tool_calls": list(turn.calls)} if turn.calls else {}), *turn.results]
        # transformers passes tools and documents, and a template may test whether they are defined
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._template(given | self._names)
        except TemplateFault as error:
            last = f"turn {len(turns)} ({turns[-1].role})" if turns else "no turn"
            verb = "refuses this" if error.refused else "fails"
            if len(turns) > 1 and not error.ended:
                self._render(turns[:-1], False, tools=tools)  # raises and names an earlier turn if that is at fault
            raise UserError(f"{self._folder}: its chat template {verb}: {error} (at {last})") from None

    def _rendered(self, turns: list[_Turn], prompt: bool, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and the (start, end) of each turn's core; update turns whose thoughts it moves.

        Raise UserError for a template that changes the text of messages.
        """
        everyone = range(len(turns))
        bare = {index for index in everyone if not turns[index].core}  # with marks they would not be empty
        marked = self._render(turns, prompt, bare, tools)
        while (wrong := _changed(turns, marked, bare)) is not None:
            turn = turns[wrong]
            whole = turn.before + turn.core + turn.after
            if turn.role == "assistant" and _THOUGHT in whole and not turn.late:  # the template moves thoughts
                late = self._turn(turn.role, whole, late=True)
                turns[wrong] = replace(late, calls=turn.calls, results=turn.results)
                bare |= {wrong} if not turns[wrong].core else set()
            elif turn.role == "system" and wrong not in bare:  # Mistral's template puts it into a turn of the user
                bare.add(wrong)
            else:
                raise self._leaves_out(turns, wrong)
            marked = self._render(turns, prompt, bare, tools)
        text = self._render(turns, prompt, everyone, tools)
        if _EDGES.sub("", marked) != text:  # the template depends on the text, and the marks changed it
            bare = set(everyone)
        edges = [match.start() - count for count, match in enumerate(_EDGES.finditer(marked))]
        about = zip(edges[::2], edges[1::2], strict=True)
        places = dict(zip((i for i in everyone if i not in bare), about, strict=False))
        places |= {index: self._place(turns, prompt, index, text, tools) for index in bare}
        for index in everyone[1:]:
            if places[index][0] < places[index - 1][1]:
                if index > 1 or turns[0].role != "system":
                    raise self._leaves_out(turns, index)
                places[0] = (0, 0)
        return text, [places[index] for index in everyone]

    def _leaves_out(self, turns: Sequence[_Turn], index: int) -> UserError:
        return UserError(
            f"{self._folder}: its chat template drops or changes messages: "
            f"turn {index + 1} ({turns[index].role}); use conversations that it renders completely"
        )

    def _place(self, turns: Sequence[_Turn], prompt: bool, index: int, text: str, tools: Any) -> tuple[int, int]:
        """Find the (start, end) of an unmarked message in the text: where marking only it changes the rendering."""
        if turns[index].calls and not turns[index].core:  # some templates drop text of turns with calls
            opening = self._render(turns[:index], True, range(index), tools)
            if not text.startswith(opening):  # compare with a rendering without the calls
                silent = replace(turns[index], calls=(), results=())
                other = self._render([*turns[:index], silent], False, range(index + 1), tools)
                opening = other[: self._before_token(other, len(commonprefix([text, other])))]  # noqa: RUF071
            begin = self._before_token(text, len(opening))
            return begin, begin
        alone = self._render(turns, prompt, [i for i in range(len(turns)) if i != index], tools)
        start = len(commonprefix([text, alone]))  # noqa: RUF071  (of characters)
        core = turns[index].core
        begin = text.find(core, start)
        if begin < 0:
            core = turns[index].left
            begin = text.find(core, start)
        if begin < 0 or BEGIN not in alone:
            raise self._leaves_out(turns, index)
        begin = self._before_token(text, begin)
        return begin, begin + len(core)

    def _before_token(self, text: str, position: int) -> int:
        """Move a position inside a special token to the start of the token."""
        return next(
            (match.start() for match in self._special.finditer(text) if match.start() < position < match.end()),
            position,
        )

    # ---- tokens

    def _encode(self, conversation: Conversation, loss: str, prompt: bool) -> Encoded:
        if conversation.document is not None:
            start, end = self._tokenizer.document_bounds()
            whole = np.array([start, *self._tokenizer.encode(conversation.document), end], np.int32)
            return Encoded(whole, np.arange(len(whole)) > 0, (len(whole),))
        if not prompt and self._ended == NONE:
            raise UserError(self._endless)
        messages, tools = conversation.messages, list(conversation.tools) or None
        if tools and self._tools_in_system and messages[0].role != "system":
            messages = (Message("system", ()), *messages)
        divided = [self._turns(each) for each in messages]
        message_of = [index for index, some in enumerate(divided) for _ in some]  # index of each turn's message
        turns = [turn for some in divided for turn in some]
        text, places = self._rendered(turns, prompt, tools)
        answers = [index for index, each in enumerate(messages) if each.role == "assistant"]
        taught = {i for i in answers if messages[i].weight > 0 and (loss != "last" or i == answers[-1])}
        learnt = {turn for turn, index in enumerate(message_of) if index in taught}
        ids: list[int] = []
        trained: list[bool] = []
        ends: list[int] = []  # end of each turn: after the special token that follows its text, or at the next text
        current, learning, done = -1, False, False  # the turn, whether it is trained, whether its text has ended
        for kind, token in self._events(self._marked(text, places, turns, tools)):
            if kind == CUT:
                learning = current + 1 in learnt
            elif kind == BEGIN:
                if done:
                    ends.append(len(ids))
                current, done = current + 1, False
                learning = current in learnt
            elif kind == END:
                done = True
            else:
                ids.append(token)
                calls = bool(done and turns[current].calls)
                says_nothing = done and places[current][0] == places[current][1]  # empty: another turn may begin here
                other = kind == "special" and says_nothing and not calls and token != self.end_id
                trained.append(learning and not other)
                if kind == "special" and done and (not calls or token == self.call_end):
                    ends.append(len(ids))
                    learning = done = False
        if not prompt:
            if self._ended == BETWEEN and done and messages[-1].role == "assistant":
                ids.append(self.end_id)
                trained.append(learning)
            ends[len(turns) - 1 :] = [len(ids)]  # text after the last end token belongs to the last turn
        last_turns = [turn for turn, index in enumerate(message_of) if message_of[turn + 1 : turn + 2] != [index]]
        ends = [ends[turn] for turn in last_turns if turn < len(ends)]
        starts = [0, *ends]
        questions = tuple(starts[i] for i, turn in enumerate(messages) if turn.role == "user" and i < len(starts))
        preamble = ends[0] if messages[0].role == "system" and ends else 0
        flags = np.ones(len(ids), bool) if loss == "all" else np.array(trained, bool)
        encoded = Encoded(np.array(ids, np.int32), flags, tuple(ends), questions, preamble)
        return self._without_thoughts(encoded) if loss == "answer" else encoded

    def _marked(self, text: str, places: Sequence[tuple[int, int]], turns: Sequence[_Turn], tools: Any) -> str:
        """Insert BEGIN and END around each message, and CUT where the prompt for each answer ends."""
        marks: list[tuple[int, str]] = []
        for index, (begin, end) in enumerate(places):
            if index and turns[index].role == "assistant":
                opening = self._render(turns[:index], True, range(index), tools)
                if opening and text.startswith(opening) and len(opening) <= begin:
                    marks.append((len(opening), CUT))
            marks += [(begin, BEGIN), (end, END)]
            names = [call["function"]["name"] for call in turns[index].calls]
            following = places[index + 1][0] if index + 1 < len(places) else len(text)
            if names and text.find(names[0], end, following) < 0:  # calls are rendered before the text
                raise self._leaves_out(turns, index)
        for position, mark in reversed(sorted(marks, key=lambda mark: mark[0])):
            text = f"{text[:position]}{mark}{text[position:]}"
        return text

    def _events(self, rendered: str) -> Iterator[tuple[str, int]]:
        """Encode the rendered text; yield its marks, and ("special" | "text", id) for each token, in order."""
        text = self._special.sub(lambda match: self._whole.stand_ins[match[0]], rendered)
        marks = [(match.start() - count, match[0]) for count, match in enumerate(_MARKS.finditer(text))]
        waiting = deque((position, mark) for position, mark in marks if mark != BREAK)
        for start, stop, token in self._whole.placed_tokens(_MARKS.sub("", text)):
            special = self._whole.special_ids.get(token)
            # a token that joins a header's last space and an answer's first word belongs to the answer, because the
            # model has to write it; a special token belongs to neither, even if it includes their white space
            last = start if special is None else stop - 1
            while waiting and waiting[0][0] <= (last if waiting[0][1] == END else stop - 1):
                yield waiting.popleft()[1], 0
            yield ("text", token) if special is None else ("special", special)
        for _, mark in waiting:
            yield mark, 0


def function_of(part: Part) -> dict[str, Any]:
    """Return the name and arguments of a call."""
    if part.kind == CALL:
        return json.loads(part.text)
    return {"name": part.kind, "arguments": {ARGUMENT[part.kind]: part.text}}


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _changed(turns: Sequence[_Turn], rendered: str, bare: Collection[int]) -> int | None:
    """Find the first marked turn whose text is not unchanged between its marks; None if there is none."""
    *pieces, rest = rendered.split(END)
    marked = [index for index in range(len(turns)) if index not in bare]
    for position, index in enumerate(marked):
        piece = pieces[position] if position < len(pieces) else ""
        shown = piece.partition(BEGIN)[2]
        if piece.count(BEGIN) != 1 or (shown != turns[index].core and shown.strip() != turns[index].left):
            return index
    return None if len(pieces) == len(marked) and BEGIN not in rest else marked[-1] if marked else len(turns) - 1


def portable_template(template: str) -> str:
    """Replace transformers' `generation` tags in a chat template, which other Jinja implementations do not know.

    They become `if true`, which keeps the white space.
    """
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)
