"""Conversations as token ids: `<|im_start|>role<|im_sep|>text<|im_end|>` for each turn, with nothing in between.

A call of a built-in tool is enclosed by the tool's tokens, a call of another function is JSON between `<tool_call>` and
`</tool_call>`; the result follows in the same turn, between `<|result_start|>` and `<|result_end|>`. The system
message ends with the functions that may be called. Text never becomes a special token, even if it spells one;
otherwise transformers' `apply_chat_template` gives the same ids with the folder's template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from pathlib import Path

import numpy as np

from llmkit.errors import UserError
from llmkit.formats.conversations import CALL, RESULT, TOOLS, Conversation, Definitions, Message, Part
from llmkit.io.jsonl import atomic_file
from llmkit.tokenizer.encoding import EnclosedText, Tokenizer, load_tokenizer
from llmkit.tokenizer.folder import END_OF_TEXT, SPECIALS, write_template

CHAT_SPECIALS = tuple(name for name in SPECIALS if name != END_OF_TEXT)
_THOUGHTS = re.compile(r"<think>.*?(?:</think>\s*|\Z)", re.DOTALL)
ENCODED_AT_ONCE = 4096  # texts
# around the schemas of functions, as in chat_template.jinja
TOOLS_BEFORE = "# Tools\n\nFunctions that you may call, as JSON schemas:\n<tools>"
TOOLS_AFTER = """
</tools>
A call is written as:
<tool_call>
{"name": FUNCTION, "arguments": {ARGUMENT: VALUE}}
</tool_call>"""
Turn = list[tuple[np.ndarray | EnclosedText, bool]]  # ids or a text between special tokens, and whether it is trained


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    token_ids   (T,) int32
    trained     (T,) bool: True for targets of the loss
    turn_ends   position after each turn; the last is T
    questions   position at which each turn of the user begins
    preamble    length of the leading system message, or 0
    """

    token_ids: np.ndarray
    trained: np.ndarray
    turn_ends: tuple[int, ...]
    questions: tuple[int, ...] = ()
    preamble: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


class ChatFormat:
    """The chat format of a tokenizer with llmkit's special tokens.

    end_id       the token that ends a turn
    shows_tools  True if the prompt describes the functions that may be called
    """

    shows_tools = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [name for name in CHAT_SPECIALS if name not in tokenizer.specials]
        if missing:
            raise UserError(
                f"{tokenizer.path}: expected the special tokens of conversations, found no {missing[0]}; "
                "fine-tune the model with llmkit sft, which adds them"
            )
        self._tokenizer = tokenizer
        self._tokens = {name: np.array([tokenizer.specials[name]], np.int32) for name in CHAT_SPECIALS}
        self.end_id = tokenizer.specials["<|im_end|>"]
        # SentencePiece tokenizers encode a text differently after a special token
        self._whole = None if tokenizer.encodes_alone(CHAT_SPECIALS) else tokenizer.with_stand_ins(CHAT_SPECIALS)
        begin, end = "<|im_start|>", "<|im_sep|>"
        roles = ("system", "user", "assistant")
        named = self._encode_texts([(begin, role, end) for role in roles])
        self._headers = {
            role: np.concatenate([self._tokens[begin], ids, self._tokens[end]])
            for role, ids in zip(roles, named, strict=True)
        }

    @property
    def unk_id(self) -> int | None:
        """The token for characters outside the vocabulary, if there is one."""
        return self._tokenizer.unk_id

    def encode(
        self, messages: Sequence[Message], *, loss: str = "assistant", prompt: bool = False, tools: Definitions = ()
    ) -> Encoded:
        """Encode messages; with `prompt`, append the header of the assistant's answer.

        tools: JSON schemas of functions that may be called
        loss: the tokens that are trained: the assistant's turns ("assistant"), these without thoughts ("answer"), only
              its last turn ("last"), or every token ("all"). Tool results and turns of weight 0 are trained only by
              "all".

        A last turn of the assistant that ends in a call or a result stays open, and the answer continues it.
        """
        (encoded,) = self.encode_many([Conversation(tuple(messages), tools=tuple(tools))], loss=loss)
        if not prompt:
            return encoded
        header = self._headers["assistant"]
        if messages and _goes_on(messages[-1]):
            return replace(encoded, turn_ends=encoded.turn_ends[:-1])
        ids = np.concatenate([encoded.token_ids, header])
        trained = np.concatenate([encoded.trained, np.zeros(len(header), bool)])
        return replace(encoded, token_ids=ids, trained=trained)

    def encode_many(self, conversations: Iterable[Conversation], *, loss: str = "assistant") -> list[Encoded]:
        """Encode conversations in batches by the fastest backend.

        A plain-text record becomes a document: start token, text and end token. Its text and end token are trained.
        """
        shown = map(with_definitions, conversations)
        listed = [(conversation, self._turns(conversation, loss)) for conversation in shown]
        texts = [piece for _, turns in listed for turn in turns for piece, _ in turn if isinstance(piece, tuple)]
        encoded = iter(self._encode_texts(texts))
        joined = [_joined(conversation.messages, turns, encoded) for conversation, turns in listed]
        return [self._without_thoughts(whole) for whole in joined] if loss == "answer" else joined

    def _without_thoughts(self, encoded: Encoded) -> Encoded:
        """Exclude thoughts and their tags from training."""
        stream, trained = self._tokenizer.stream(), encoded.trained.copy()
        pieces = [stream.push([token]) for token in encoded.token_ids.tolist()]
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = np.concatenate([[0], ends[:-1]])
        for thought in _THOUGHTS.finditer("".join(pieces)):
            trained &= (ends <= thought.start()) | (starts >= thought.end())
        return replace(encoded, trained=trained)

    def encode_branches(
        self, branches: Sequence[tuple[Sequence[Message], Sequence[Sequence[Message]]]]
    ) -> list[tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]]:
        """Encode prompts, each with its possible answers: the ids of the prompt, ids and `trained` of each answer.

        Without messages a prompt or an answer has no ids.
        """
        turns = [tuple(messages) for prompt, answers in branches for messages in (prompt, *answers)]
        encoded = iter(self.encode_many(Conversation(turn) for turn in turns if turn))
        nothing = np.zeros(0, np.int32), np.zeros(0, bool)
        pairs = iter([(new.token_ids, new.trained) if turn and (new := next(encoded)) else nothing for turn in turns])
        skipped = [len(self._headers["assistant"]) if prompt and _goes_on(prompt[-1]) else 0 for prompt, _ in branches]
        return [
            (next(pairs)[0], [(ids[skip:], trained[skip:]) for ids, trained in islice(pairs, len(answers))])
            for skip, (_, answers) in zip(skipped, branches, strict=True)
        ]

    def encode_result(self, text: str) -> list[int]:
        """Encode the text of a tool's result, without the tokens around it."""
        return self._encode_texts([(f"<|{RESULT}_start|>", text, f"<|{RESULT}_end|>")])[0].tolist()

    def _encode_texts(self, texts: list[EnclosedText]) -> list[np.ndarray]:
        if self._whole is None and len(texts) < 32:  # too few to be worth choosing a faster backend
            return [np.array(self._tokenizer.encode(text), np.int32) for _, text, _ in texts]
        pieces: list[np.ndarray] = []
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            some = texts[start : start + ENCODED_AT_ONCE]
            if self._whole is None:
                ids, lengths = self._tokenizer.encode_batch([text for _, text, _ in some])
            else:
                ids, lengths = self._whole.encode_enclosed(some)
            pieces += np.split(ids.astype(np.int32), np.cumsum(lengths)[:-1])
        return pieces

    def _turns(self, conversation: Conversation, loss: str) -> list[Turn]:
        """Lay out a conversation as turns of ids and texts, each marked as trained or not."""
        if conversation.document is not None:
            start, end = self._tokenizer.document_bounds()
            first, last = np.array([start], np.int32), np.array([end], np.int32)
            return [[(first, loss == "all"), (("", conversation.document, ""), True), (last, True)]]
        last = max((i for i, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1)
        turns: list[Turn] = []
        for index, message in enumerate(conversation.messages):
            taught = message.role == "assistant" and message.weight > 0 and (loss != "last" or index == last)
            trained = taught or loss == "all"
            turn: Turn = [(self._headers[message.role], loss == "all")]
            stretches: list[tuple[str, str]] = []  # (kind, text), consecutive texts joined
            for kind, run in groupby(message.parts, key=lambda part: "text" if part.kind == CALL else part.kind):
                texts = [f"<tool_call>\n{part.text}\n</tool_call>" if part.kind == CALL else part.text for part in run]
                stretches += [(kind, "".join(texts))] if kind == "text" else [(kind, text) for text in texts]
            before = "<|im_sep|>"
            for (kind, text), (following, _) in pairwise([*stretches, ("im", "")]):
                start, end = f"<|{kind}_start|>", f"<|{kind}_end|>"
                if kind == "text":
                    after = "<|im_end|>" if following == "im" else f"<|{following}_start|>"
                    turn.append(((before, text, after), trained))
                else:
                    flag = trained and (kind != RESULT or loss == "all")
                    turn += [(self._tokens[start], flag), ((start, text, end), flag), (self._tokens[end], flag)]
                before = end
            if message is not conversation.messages[-1] or not _goes_on(message):
                turn.append((self._tokens["<|im_end|>"], trained))
            turns.append(turn)
        return turns

    def tool_tokens(self) -> dict[str, tuple[int, int]]:
        """Return the start and end ids of each tool's calls, and of `result`."""
        ids = self._tokenizer.specials
        return {kind: (ids[f"<|{kind}_start|>"], ids[f"<|{kind}_end|>"]) for kind in (*TOOLS, RESULT)}


def _goes_on(message: Message) -> bool:
    """Return True for a turn of the assistant that ends in a tool call or its result."""
    return message.role == "assistant" and message.parts[-1:] != () and message.parts[-1].kind != "text"


def _joined(messages: Sequence[Message], turns: Sequence[Turn], encoded: Iterator[np.ndarray]) -> Encoded:
    """Join the pieces of a conversation; `encoded` yields the ids of its texts."""
    pieces: list[np.ndarray] = []
    flags: list[bool] = []
    ends: list[int] = []
    for turn in turns:
        turn_pieces = [next(encoded) if isinstance(piece, tuple) else piece for piece, _ in turn]
        pieces += turn_pieces
        flags += [trained for _, trained in turn]
        ends.append((ends[-1] if ends else 0) + sum(map(len, turn_pieces)))
    starts = [0, *ends]
    questions = tuple(starts[i] for i, message in enumerate(messages) if message.role == "user")
    preamble = ends[0] if messages and messages[0].role == "system" else 0
    trained = np.repeat(flags, [len(piece) for piece in pieces])
    return Encoded(np.concatenate(pieces), trained, tuple(ends), questions, preamble)


def with_definitions(conversation: Conversation) -> Conversation:
    """Append the schemas of a conversation's functions to its system message."""
    if not conversation.tools:
        return conversation
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
    messages, text = conversation.messages, f"{TOOLS_BEFORE}{listed}{TOOLS_AFTER}"
    if messages[:1] and messages[0].role == "system":
        messages, text = messages[1:], f"{messages[0].text}\n\n{text}"
    return replace(conversation, messages=(Message("system", (Part("text", text),)), *messages), tools=())


def has_own_template(tokenizer: Tokenizer) -> bool:
    """Return True if the tokenizer has a chat template other than ours."""
    if tokenizer.chat_template is None:
        return False
    ours = "<|im_sep|>" in tokenizer.chat_template  # also in Phi-4's, without our tool tokens
    return not ours or not has_chat_tokens(tokenizer)


def has_chat_tokens(tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer has all special tokens of our conversations."""
    return tokenizer.specials.keys() >= set(CHAT_SPECIALS)


def write_chat_tokenizer(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Write a tokenizer to `folder` with our special tokens and chat template, and load it.

    Missing tokens are appended to the vocabulary. An older version of the template is replaced.
    """
    tokenizer.copy_to(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = spec.setdefault("added_tokens", [])
    missing = [name for name in CHAT_SPECIALS if name not in tokenizer.specials]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [
        {"id": tokenizer.vocab_size + i, "content": name, **flags, "special": True} for i, name in enumerate(missing)
    ]
    # other tokenizer classes of transformers override steps of tokenizer.json
    config = {**tokenizer.config, "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("added_tokens_decoder", None)  # transformers 4's copy of the tokens in tokenizer.json
    write_template(folder, config)
    with atomic_file(folder / "tokenizer.json", "w") as handle:
        json.dump(spec, handle, indent=2, ensure_ascii=False)
    return load_tokenizer(folder)
