"""Conversations in the words of another model's chat template, as transformers' `apply_chat_template` has them.

The template is rendered whole, by jinja2 in a sandbox in a process of its own, and the text is encoded whole. Special
tokens are those that the template writes, never text that spells one: what would is broken by a mark before rendering,
and the mark taken out again. Other marks tell where each message begins and ends in what was rendered, and so which
tokens are learnt.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, Message, message
from llmkit.tokenizer.chat import LOSSES, ChatFormat, Encoded, has_own_template
from llmkit.tokenizer.encoding import RESERVED, THOUGHTS, Tokenizer
from llmkit.tokenizer.template_worker import TemplateFault, renderer

# Noncharacters of Unicode, which no text has to say. BREAK stands in text that spells a special token, BEGIN and END
# about each message, CUT where an answer is asked for.
BREAK, BEGIN, END, CUT = "\ufde0", "\ufde1", "\ufde2", "\ufde3"
_MARKS, _EDGES = re.compile(f"[{BREAK}{BEGIN}{END}{CUT}]"), re.compile(f"[{BEGIN}{END}]")
_RESERVED = re.compile(f"[{BREAK}{BEGIN}{END}{CUT}{RESERVED}]")
_THOUGHT = "</think>"
EACH, BETWEEN, NONE = "each answer", "an answer before another turn", "none"  # what a template ends by a special token
_TAKEN_OUT = re.compile(r"""\breplace\(\s*(['"])([^'"]+)\1\s*,\s*(['"])\3\s*\)""")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Return the chat format of a tokenizer's folder. Raises UserError for one that has none."""
    return TemplateFormat(tokenizer) if has_own_template(tokenizer) else ChatFormat(tokenizer)


class TemplateFormat(ChatFormat):
    """The chat format of a tokenizer with a template of its own.

    end_id   the token that ends the assistant's turn
    """

    def __init__(self, tokenizer: Tokenizer) -> None:  # not that of our format, which asks for its special tokens
        self._tokenizer = tokenizer
        self._special = _any_of(tokenizer.specials)
        self._escaped = {role: self._special for role in ("system", "user")}  # what a text may not make a token of
        self._escaped["assistant"] = _any_of(name for name in tokenizer.specials if name not in THOUGHTS)
        self._template = self._renderer()
        # words by which people switch the model, as Nemotron's /no_think, and which are no part of what they say
        self._switches = [match[2] for match in _TAKEN_OUT.finditer(tokenizer.chat_template or "")]
        self._whole = tokenizer.with_stand_ins(tokenizer.specials)
        named = {key: tokenizer.config.get(key) for key in _NAMED}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        self._names = {key: value for key, value in texts.items() if value is not None}  # null is undefined
        self.end_id, self._ended = self._end()

    def _renderer(self) -> Callable[..., str]:
        try:
            return renderer(portable_template(self._tokenizer.chat_template or ""))
        except TemplateFault as error:
            raise UserError(f"{self._tokenizer.path.parent}: its chat template is no valid Jinja: {error}") from None

    def _end(self) -> tuple[int, str]:
        """The token that ends an answer, and after which answers the template writes one: EACH, BETWEEN, NONE."""
        turns, ends = [message("user", "Hello"), message("assistant", "Hello")], EACH
        special = self._after_answer(turns)
        if special is None:
            with suppress(UserError):
                special = self._after_answer([*turns, message("user", "Hello")])
            ends = NONE if special is None else BETWEEN
            if self._tokenizer.eos_id is not None and (special is None or special == self._header()):
                return self._tokenizer.eos_id, ends
        if special is None:
            raise UserError(self._endless)
        return self._tokenizer.specials[special], ends

    def _after_answer(self, turns: Sequence[Message]) -> str | None:
        """The special token between the second turn, an answer, and the third."""
        pieces = self._render(turns, prompt=False).split(END)
        match = self._special.search(pieces[2].partition(BEGIN)[0]) if len(pieces) > 2 else None
        return match and match[0]

    def _header(self) -> str | None:
        """The special token that begins a turn of the user."""
        specials = self._special.findall(self._render([message("user", "Hello")], prompt=False).partition(BEGIN)[0])
        return specials[-1] if specials else None

    @property
    def _endless(self) -> str:
        return f"{self._tokenizer.path.parent}: its chat template ends an answer with no special token"

    def encode(self, messages: Sequence[Message], *, loss: str = "assistant", prompt: bool = False) -> Encoded:
        """As `ChatFormat.encode`. Raises UserError for what the template refuses."""
        encoded = self._encode(Conversation(tuple(messages)), loss, prompt=prompt)
        return replace(encoded, trained=np.zeros(len(encoded), bool)) if prompt and loss != "all" else encoded

    def encode_many(self, conversations: Iterable[Conversation], *, loss: str = "assistant") -> list[Encoded]:
        """As `ChatFormat.encode_many`."""
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, found {loss!r}")
        return [self._encode_record(conversation, loss) for conversation in conversations]

    def _encode_record(self, conversation: Conversation, loss: str) -> Encoded:
        try:
            return self._encode(conversation, loss, prompt=False)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}" if conversation.where else str(error)) from None

    def encode_branches(
        self, branches: Sequence[tuple[Sequence[Message], Sequence[Sequence[Message]]]]
    ) -> list[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
        """As `ChatFormat.encode_branches`; each answer is encoded with its prompt: a template may know none alone."""
        encoded_branches = []
        for prompt, answers in branches:
            wholes = self.encode_many(Conversation((*prompt, *answer)) for answer in answers)
            prompts = [
                whole.token_ids[: whole.turn_ends[len(prompt) - 1]] if prompt else whole.token_ids[:0]
                for whole in wholes
            ]
            shared = prompts[0][: _alike(prompts)]
            encoded_branches.append((shared, tuple(whole.token_ids[len(shared) :] for whole in wholes)))
        return encoded_branches

    def tool_tokens(self) -> dict[str, tuple[int, int]]:
        """Raises UserError: the tokens of calls are those of our own format."""
        raise UserError(
            f"{self._tokenizer.path.parent}: --tools needs the special tokens of llmkit's own chat format, "
            "and this model has a chat template of its own"
        )

    # ---- text

    def _render(
        self, messages: Sequence[Message], prompt: bool, late: Collection[int] = (), bare: Collection[int] = ()
    ) -> str:
        """Render some messages; `late` are marked after their thoughts, `bare` not at all."""
        turns = []
        for index, turn in enumerate(messages):
            before, core, after = self._core(turn, index in late)
            content = core if index in bare else f"{BEGIN}{core}{END}"
            turns.append({"role": turn.role, "content": before + content + after})
        # transformers gives both, and a template may ask whether they are defined
        given = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._template(given | self._names)
        except TemplateFault as error:
            turn = f"turn {len(messages)} ({messages[-1].role})" if messages else "no turn"
            verb = "refuses this" if error.refused else "fails"
            if len(messages) > 1 and not error.ended:
                self._render(messages[:-1], prompt=False)  # where an earlier turn is at fault, that is named
            raise UserError(f"{self._tokenizer.path.parent}: its chat template {verb}: {error} (at {turn})") from None

    def _core(self, turn: Message, late: bool) -> tuple[str, str, str]:
        """Split a text into the part before the marked one, the marked one, and the rest: white space, and thoughts."""
        if any(part.kind != "text" for part in turn.parts):
            raise UserError(
                f"{self._tokenizer.path.parent}: calls of tools need llmkit's own chat format, "
                "and this model has a chat template of its own"
            )
        text = _RESERVED.sub("", "".join(part.text for part in turn.parts))
        text = self._escaped[turn.role].sub(lambda match: match[0][:1] + BREAK + match[0][1:], text)
        at = text.rindex(_THOUGHT) + len(_THOUGHT) if late else 0
        core = text[at:].strip()  # within white space, which some templates strip
        start = text.index(core, at) if core else len(text)
        return text[:start], core, text[start + len(core) :]

    def _said(self, turn: Message, late: bool) -> tuple[str, str]:
        """The text that is marked, and what is left of it where the template takes its switches out."""
        core = left = self._core(turn, late)[1]
        if turn.role != "assistant":
            for switch in self._switches:
                left = left.replace(switch, "")
        return core, left.strip()

    def _rendered(self, messages: Sequence[Message], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where in it stands what each message says.

        Raises UserError for a template that changes what they say.
        """
        everyone = range(len(messages))
        late: set[int] = set()  # whose thoughts the template takes or moves
        bare = {index for index in everyone if not self._core(messages[index], False)[1]}  # marks would fill them
        marked = self._render(messages, prompt, late, bare)
        while (wrong := self._changed(messages, marked, late, bare)) is not None:
            turn = messages[wrong]
            if turn.role == "assistant" and _THOUGHT in turn.text and wrong not in late:
                late.add(wrong)
                bare |= {wrong} if not self._core(turn, True)[1] else set()
            elif turn.role == "system" and wrong not in bare:  # some put it into a turn of the user, as Mistral's
                bare.add(wrong)
            else:
                raise self._leaves_out(messages, wrong)
            marked = self._render(messages, prompt, late, bare)
        text = self._render(messages, prompt, late, everyone)
        if _EDGES.sub("", marked) != text:  # it looks at what is said
            bare = set(everyone)
        edges = [match.start() - count for count, match in enumerate(_EDGES.finditer(marked))]
        about = zip(edges[::2], edges[1::2], strict=True)
        places = dict(zip((i for i in everyone if i not in bare), about, strict=False))
        places |= {index: self._place(messages, prompt, late, index, text) for index in bare}
        for index in everyone[1:]:
            if places[index][0] < places[index - 1][1]:
                if index > 1 or messages[0].role != "system":
                    raise self._leaves_out(messages, index)
                places[0] = (0, 0)
        return text, [places[index] for index in everyone]

    def _leaves_out(self, messages: Sequence[Message], index: int) -> UserError:
        return UserError(
            f"{self._tokenizer.path.parent}: its chat template leaves messages out or changes them: "
            f"turn {index + 1} ({messages[index].role}); use conversations that it shows whole"
        )

    def _changed(
        self, messages: Sequence[Message], rendered: str, late: Collection[int], bare: Collection[int]
    ) -> int | None:
        """The first marked message that does not stand in the text as it was said, between its marks."""
        *pieces, rest = rendered.split(END)
        marked = [index for index in range(len(messages)) if index not in bare]
        for position, index in enumerate(marked):
            piece = pieces[position] if position < len(pieces) else ""
            core, left = self._said(messages[index], index in late)
            shown = piece.partition(BEGIN)[2]
            if piece.count(BEGIN) != 1 or (shown != core and shown.strip() != left):
                return index
        return None if len(pieces) == len(marked) and BEGIN not in rest else marked[-1] if marked else len(messages) - 1

    def _place(
        self, messages: Sequence[Message], prompt: bool, late: Collection[int], index: int, text: str
    ) -> tuple[int, int]:
        """Where in the text an unmarked message stands: from where the text differs if it alone is marked."""
        core, left = self._said(messages[index], index in late)
        alone = self._render(messages, prompt, late, [i for i in range(len(messages)) if i != index])
        differs = (offset for offset, (char, other) in enumerate(zip(text, alone, strict=False)) if char != other)
        start = next(differs, min(len(text), len(alone)))
        begin = text.find(core, start)
        if begin < 0:
            begin, core = text.find(left, start), left
        if begin < 0 or BEGIN not in alone:
            raise self._leaves_out(messages, index)
        token = next((match for match in self._special.finditer(text) if match.start() < begin < match.end()), None)
        begin = begin if token is None else token.start()
        return begin, begin + len(core)

    # ---- tokens

    def _encode(self, conversation: Conversation, loss: str, prompt: bool) -> Encoded:
        if conversation.document is not None:
            return self._document(conversation.document)
        if not prompt and self._ended == NONE:
            raise UserError(self._endless)
        messages = conversation.messages
        text, places = self._rendered(messages, prompt)
        answers = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
        learnt = {i for i in answers if messages[i].weight > 0 and (loss != "last" or i == answers[-1])}
        ids: list[int] = []
        trained: list[bool] = []
        ends: list[int] = []  # of turns: after the special token that follows a text, or where the next text begins
        current, learning, done = -1, False, False  # the message, whether it is learnt, whether its text is over
        for kind, token in self._events(self._marked(text, places, messages, answers)):
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
                says_nothing = done and places[current][0] == places[current][1]  # then another turn may begin here
                trained.append(learning and not (kind == "special" and says_nothing and token != self.end_id))
                if kind == "special" and done:
                    ends.append(len(ids))
                    learning = done = False
        if not prompt:
            if self._ended == BETWEEN and done and messages[-1].role == "assistant":
                ids.append(self.end_id)
                trained.append(learning)
            ends[len(messages) - 1 :] = [len(ids)]  # what follows the last end token belongs to it
        starts = [0, *ends]
        questions = tuple(starts[i] for i, turn in enumerate(messages) if turn.role == "user" and i < len(starts))
        preamble = ends[0] if messages[0].role == "system" and ends else 0
        flags = np.ones(len(ids), bool) if loss == "all" else np.array(trained, bool)
        return Encoded(np.array(ids, np.int32), flags, tuple(ends), questions, preamble)

    def _marked(
        self,
        text: str,
        places: Sequence[tuple[int, int]],
        messages: Sequence[Message],
        answers: Sequence[int],
    ) -> str:
        """The text with marks about each message, and CUT before each answer that it asks for with the same words."""
        marks: list[tuple[int, str]] = []
        for index, (begin, end) in enumerate(places):
            if index and index in answers:
                opening = self._render(messages[:index], prompt=True, bare=range(index))
                if opening and text.startswith(opening) and len(opening) <= begin:
                    marks.append((len(opening), CUT))
            marks += [(begin, BEGIN), (end, END)]
        for position, mark in reversed(sorted(marks, key=lambda mark: mark[0])):
            text = f"{text[:position]}{mark}{text[position:]}"
        return text

    def _document(self, text: str) -> Encoded:
        start, end = self._tokenizer.document_bounds()
        ids = np.array([start, *self._tokenizer.encode(text), end], np.int32)
        return Encoded(ids, np.arange(len(ids)) > 0, (len(ids),))

    def _events(self, rendered: str) -> Iterator[tuple[str, int]]:
        """A mark, or "special" or "text" with a token's id, in the order of the text, which is encoded whole."""
        text = self._special.sub(lambda match: self._whole.stand_ins[match[0]], rendered)
        marks = [(match.start() - count, match[0]) for count, match in enumerate(_MARKS.finditer(text))]
        waiting = deque((position, mark) for position, mark in marks if mark != BREAK)
        for start, stop, token in self._whole.placed_tokens(_MARKS.sub("", text)):
            special = self._whole.special_ids.get(token)
            # a token of a header's last space and an answer's first word is the answer's: the model has to say it;
            # a special token is none of theirs, also where it takes their white space
            last = start if special is None else stop - 1
            while waiting and waiting[0][0] <= (last if waiting[0][1] == END else stop - 1):
                yield waiting.popleft()[1], 0
            yield ("text", token) if special is None else ("special", special)
        for _, mark in waiting:
            yield mark, 0


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the names in a text; of two at one place the longer."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _alike(rows: Sequence[np.ndarray]) -> int:
    """With how many elements all rows begin alike."""
    length = min(map(len, rows))
    differs = np.any([row[:length] != rows[0][:length] for row in rows], axis=0)
    return int(differs.argmax()) if differs.any() else length


def portable_template(template: str) -> str:
    """A chat template without transformers' `generation` tags, which other readers of Jinja do not know.

    An `if` that is always true leaves white space as it is.
    """
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)
