"""Conversations in the words of another model's chat template, as transformers' `apply_chat_template` has them.

The template is rendered whole, by jinja2 in a sandbox in a process of its own, and the text is encoded whole. Special
tokens are those that the template writes, never text that spells one: what would is broken by a mark before rendering,
and the mark taken out again. Other marks tell where each message begins and ends in what was rendered, and so which
tokens are learnt.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from llmkit.conversations import Conversation, Message, message
from llmkit.errors import UserError
from llmkit.tokenizer.chat import LOSSES, ChatFormat, Encoded, has_own_template
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.tokenizer.rendering import Renderer, TemplateFault, renderer

# Characters for private use, which stand for nothing. BREAK stands in text that spells a special token, BEGIN and END
# about each message, CUT where an answer is asked for. From STAND_IN on each stands for a special token.
BREAK, BEGIN, END, CUT = "\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3"
STAND_IN, MOST_SPECIALS = 0xF0000, 65_000
_MARKS = re.compile(f"[{BREAK}{BEGIN}{END}{CUT}]")
_RESERVED = re.compile(f"[{BREAK}{BEGIN}{END}{CUT}{chr(STAND_IN)}-{chr(STAND_IN + MOST_SPECIALS)}]")
_THOUGHT = "</think>"
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """How a folder's conversations become tokens. Raises UserError for one that knows none."""
    return TemplateFormat(tokenizer) if has_own_template(tokenizer) else ChatFormat(tokenizer)


class TemplateFormat(ChatFormat):
    """The chat format of a tokenizer with a template of its own.

    end_id   the token that ends the assistant's turn
    """

    def __init__(self, tokenizer: Tokenizer) -> None:  # not that of our format, which asks for its special tokens
        self._tokenizer = tokenizer
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")  # of two at one place the longer
        self._template = self._renderer()
        self._whole = tokenizer.with_stand_ins(
            {name: chr(STAND_IN + i) for i, name in enumerate(names[:MOST_SPECIALS])}
        )
        named = {key: tokenizer.config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        self._names = {key: value for key, value in texts.items() if value is not None}  # null is undefined
        self.end_id = self._end()

    def _renderer(self) -> Renderer:
        try:
            return renderer(portable_template(self._tokenizer.chat_template or ""))
        except TemplateFault as error:
            raise UserError(f"{self._tokenizer.path.parent}: its chat template is no valid Jinja: {error}") from None

    def _end(self) -> int:
        rendered = self._render([message("user", "Hello"), message("assistant", "Hello")], asked=False)
        after = self._special.search(rendered, rendered.rfind(END)) if END in rendered else None
        if after is None:
            raise UserError(f"{self._tokenizer.path.parent}: its chat template ends an answer with no special token")
        return self._tokenizer.specials[after[0]]

    def encode(self, messages: Sequence[Message], *, loss: str = "assistant", prompt: bool = False) -> Encoded:
        """As `ChatFormat.encode`. Raises UserError for what the template refuses."""
        encoded = self._encode(Conversation(tuple(messages)), loss, asked=prompt)
        return replace(encoded, trained=np.zeros(len(encoded), bool)) if prompt and loss != "all" else encoded

    def encode_many(self, conversations: Iterable[Conversation], *, loss: str = "assistant") -> list[Encoded]:
        """As `ChatFormat.encode_many`."""
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, found {loss!r}")
        return [self._encode_record(conversation, loss) for conversation in conversations]

    def _encode_record(self, conversation: Conversation, loss: str) -> Encoded:
        try:
            return self._encode(conversation, loss, asked=False)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}" if conversation.where else str(error)) from None

    def encode_branches(
        self, branches: Sequence[tuple[Sequence[Message], Sequence[Sequence[Message]]]]
    ) -> list[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
        """As `ChatFormat.encode_branches`; each answer is encoded with its prompt: a template may know none alone."""
        found = []
        for prompt, answers in branches:
            wholes = self.encode_many(Conversation((*prompt, *answer)) for answer in answers)
            parts = [one.token_ids[: one.turn_ends[len(prompt) - 1]] if prompt else one.token_ids[:0] for one in wholes]
            shared = parts[0][: _alike(parts)]
            found.append((shared, tuple(one.token_ids[len(shared) :] for one in wholes)))
        return found

    def tool_tokens(self) -> dict[str, tuple[int, int]]:
        """Raises UserError: the tokens of calls are those of our own format."""
        raise UserError(
            f"{self._tokenizer.path.parent}: --tools needs the special tokens of llmkit's own chat format, "
            "and this model has a chat template of its own"
        )

    # ---- text

    def _render(self, messages: Sequence[Message], asked: bool, late: frozenset[int] = frozenset()) -> str:
        """What the template makes of some messages; `late` are those marked after their thoughts."""
        turns = [
            {"role": turn.role, "content": self._marked(turn, index in late)} for index, turn in enumerate(messages)
        ]
        try:
            return self._template.ask({"messages": turns, "add_generation_prompt": asked, **self._names})
        except TemplateFault as error:
            turn = f"turn {len(messages)} ({messages[-1].role})" if messages else "no turn"
            verb = "refuses this" if error.refused else "fails"
            if len(messages) > 1 and not error.ended:
                self._render(messages[:-1], asked=False)  # where an earlier turn is at fault, that is named
            raise UserError(f"{self._tokenizer.path.parent}: its chat template {verb}: {error} (at {turn})") from None

    def _core(self, turn: Message, late: bool) -> tuple[str, str, str]:
        """What stands before the text that is marked, that text, and what follows: white space, and thoughts."""
        if any(part.kind != "text" for part in turn.parts):
            raise UserError(
                f"{self._tokenizer.path.parent}: calls of tools need llmkit's own chat format, "
                "and this model has a chat template of its own"
            )
        text = _RESERVED.sub("", "".join(part.text for part in turn.parts))
        text = self._special.sub(lambda found: found[0][:1] + BREAK + found[0][1:], text)
        at = text.rindex(_THOUGHT) + len(_THOUGHT) if late else 0
        core = text[at:].strip()  # within white space, which some templates strip
        start = text.index(core, at)
        return text[:start], core, text[start + len(core) :]

    def _marked(self, turn: Message, late: bool) -> str:
        before, core, after = self._core(turn, late)
        return f"{before}{BEGIN}{core}{END}{after}"

    def _rendered(self, messages: Sequence[Message], asked: bool) -> tuple[str, frozenset[int]]:
        """The text with each message whole and in its place, and those whose thoughts the template takes or moves.

        Raises UserError for a template that changes what they say.
        """
        late: frozenset[int] = frozenset()
        thoughtful = [i for i, one in enumerate(messages) if one.role == "assistant" and _THOUGHT in one.text]
        while True:
            rendered = self._render(messages, asked, late)
            wrong = self._changed(messages, rendered, late)
            if wrong is None:
                return rendered, late
            if wrong not in thoughtful or wrong in late:
                raise UserError(
                    f"{self._tokenizer.path.parent}: its chat template leaves messages out or changes them: "
                    f"turn {wrong + 1} ({messages[wrong].role}); use conversations that it shows whole"
                )
            late |= {wrong}

    def _changed(self, messages: Sequence[Message], rendered: str, late: frozenset[int]) -> int | None:
        """The first message that does not stand in the text as it was said, between its marks."""
        pieces = rendered.split(END)
        for index, turn in enumerate(messages):
            core = self._core(turn, index in late)[1]
            piece = pieces[index] if index < len(pieces) - 1 else ""
            if piece.count(BEGIN) != 1 or piece.partition(BEGIN)[2] != core:
                return index
        return None if len(pieces) == len(messages) + 1 and BEGIN not in pieces[-1] else len(messages) - 1

    # ---- tokens

    def _encode(self, conversation: Conversation, loss: str, asked: bool) -> Encoded:
        if conversation.document is not None:
            return self._document(conversation.document)
        messages = conversation.messages
        rendered, late = self._rendered(messages, asked)
        answers = [index for index, one in enumerate(messages) if one.role == "assistant"]
        learnt = {i for i in answers if messages[i].weight > 0 and (loss != "last" or i == answers[-1])}
        ids: list[int] = []
        trained: list[bool] = []
        ends: list[int] = []  # of turns: after the special token that follows a text, or where the next text begins
        current, learning, done = -1, False, False  # the message, whether it is learnt, whether its text is over
        for kind, token in self._events(self._cut(rendered, messages, answers, late)):
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
                trained.append(learning)
                if kind == "special" and done:
                    ends.append(len(ids))
                    learning = done = False
        if not asked:
            ends[len(messages) - 1 :] = [len(ids)]  # what follows the last end token belongs to it
        starts = [0, *ends]
        questions = tuple(starts[i] for i, one in enumerate(messages) if one.role == "user" and i < len(starts))
        preamble = ends[0] if messages[0].role == "system" and ends else 0
        flags = np.ones(len(ids), bool) if loss == "all" else np.array(trained, bool)
        return Encoded(np.array(ids, np.int32), flags, tuple(ends), questions, preamble)

    def _cut(self, rendered: str, messages: Sequence[Message], answers: Sequence[int], late: frozenset[int]) -> str:
        """The text with CUT before each answer, where the template asks for it with the same words."""
        places = []
        for index in answers:
            asked = self._render(messages[:index], asked=True, late=late) if index else ""
            if asked and rendered.startswith(asked):
                places.append(len(asked))
        for place in reversed(places):
            rendered = f"{rendered[:place]}{CUT}{rendered[place:]}"
        return rendered

    def _document(self, text: str) -> Encoded:
        start, end = self._tokenizer.document_bounds()
        ids = np.array([start, *self._tokenizer.encode(text), end], np.int32)
        return Encoded(ids, np.arange(len(ids)) > 0, (len(ids),))

    def _events(self, rendered: str) -> Iterator[tuple[str, int]]:
        """A mark, or "special" or "text" with a token's id, in the order of the text, which is encoded whole."""
        text = self._special.sub(lambda found: self._whole.stand_ins[found[0]], rendered)
        marks = [(found.start() - count, found[0]) for count, found in enumerate(_MARKS.finditer(text))]
        waiting = deque((place, mark) for place, mark in marks if mark != BREAK)
        for start, stop, token in self._whole.placed_tokens(_MARKS.sub("", text)):
            # a token of a header's last space and an answer's first word is the answer's: the model has to say it
            while waiting and (waiting[0][0] <= start if waiting[0][1] == END else waiting[0][0] < stop):
                yield waiting.popleft()[1], 0
            special = self._whole.special_ids.get(token)
            yield ("text", token) if special is None else ("special", special)
        for _, mark in waiting:
            yield mark, 0


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
