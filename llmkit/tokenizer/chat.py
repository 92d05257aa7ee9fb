"""Conversations to token ids and back: `<|im_start|>role<|im_sep|>text<|im_end|>` for each turn, nothing between.

What the assistant writes to a tool stands in the tool's tokens, a call of any other function as JSON between
`<tool_call>` and `</tool_call>`, what comes back in `<|result_start|>...<|result_end|>`, in the same turn. The
functions that it may call stand behind the system message. Text never becomes a special token, whatever it spells;
transformers' `apply_chat_template` on the folder's template gives the same ids for text that spells none.
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
# about the functions that may be called, as chat_template.jinja has it
TOOLS_BEFORE = "# Tools\n\nFunctions that you may call, as JSON schemas:\n<tools>"
TOOLS_AFTER = """
</tools>
A call is written as:
<tool_call>
{"name": FUNCTION, "arguments": {ARGUMENT: VALUE}}
</tool_call>"""
Turn = list[tuple[np.ndarray | EnclosedText, bool]]  # ids or a text between special tokens, and whether it is learnt


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    token_ids   (T,) int32
    trained     (T,) bool: which tokens are targets of the loss
    turn_ends   positions at which a turn has just ended, T the last of them
    questions   positions at which a turn of the user begins
    preamble    length of the system message that it begins with, 0 where there is none
    """

    token_ids: np.ndarray
    trained: np.ndarray
    turn_ends: tuple[int, ...]
    questions: tuple[int, ...] = ()
    preamble: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


class ChatFormat:
    """The chat format of a tokenizer that has its special tokens.

    end_id       the token that ends a turn
    shows_tools  whether functions that may be called are described to the model
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
        # SentencePiece's tokenizers cut a text behind a special token otherwise than alone
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
        """Token of characters outside the vocabulary, if there is one."""
        return self._tokenizer.unk_id

    def encode(
        self, messages: Sequence[Message], *, loss: str = "assistant", prompt: bool = False, tools: Definitions = ()
    ) -> Encoded:
        """Encode messages; with `prompt`, also what comes before the assistant's answer to them.

        `tools` are functions that may be called, as JSON schemas.

        A last turn of the assistant that ends in a call or in its result is left open: the answer goes on with it.

        `loss` says what is trained on: all that the assistant says and does ("assistant"), the same without its
        thoughts ("answer"), its last turn only ("last"), or every token ("all"). An assistant's tool results and turns
        of weight 0 never are, but by "all".
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
        """Encode many conversations, their texts together by the fastest backend.

        A record of plain text becomes a document: its beginning token, its text and its end, all of it trained on.
        """
        shown = map(with_definitions, conversations)
        listed = [(conversation, self._turns(conversation, loss)) for conversation in shown]
        texts = [piece for _, turns in listed for turn in turns for piece, _ in turn if isinstance(piece, tuple)]
        encoded = iter(self._encode_texts(texts))
        joined = [_joined(conversation.messages, turns, encoded) for conversation, turns in listed]
        return [self._without_thoughts(whole) for whole in joined] if loss == "answer" else joined

    def _without_thoughts(self, encoded: Encoded) -> Encoded:
        """Take thoughts, with the tags about them, out of what is trained on."""
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
        """Encode prompts, each with the answers that may follow it, as ids and what is `trained`; no turns, no ids."""
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
        """Encode what a tool answered, as it stands between the tokens of a result."""
        return self._encode_texts([(f"<|{RESULT}_start|>", text, f"<|{RESULT}_end|>")])[0].tolist()

    def _encode_texts(self, texts: list[EnclosedText]) -> list[np.ndarray]:
        if self._whole is None and len(texts) < 32:  # a batch proves its backend first
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
        """Lay out a conversation as turns of ids and texts, each with whether it is learnt."""
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
            stretches: list[tuple[str, str]] = []  # neighbouring texts as one
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
        """Return the start and end ids of each tool's call, and of `result`."""
        ids = self._tokenizer.specials
        return {kind: (ids[f"<|{kind}_start|>"], ids[f"<|{kind}_end|>"]) for kind in (*TOOLS, RESULT)}


def _goes_on(message: Message) -> bool:
    """True for a turn of the assistant that ends in a call of a tool or in its result."""
    return message.role == "assistant" and message.parts[-1:] != () and message.parts[-1].kind != "text"


def _joined(messages: Sequence[Message], turns: Sequence[Turn], encoded: Iterator[np.ndarray]) -> Encoded:
    """Join the pieces of a conversation; `encoded` gives the ids of its texts."""
    pieces: list[np.ndarray] = []
    flags: list[bool] = []
    ends: list[int] = []
    for turn in turns:
        of_turn = [next(encoded) if isinstance(piece, tuple) else piece for piece, _ in turn]
        pieces += of_turn
        flags += [trained for _, trained in turn]
        ends.append((ends[-1] if ends else 0) + sum(map(len, of_turn)))
    starts = [0, *ends]
    questions = tuple(starts[i] for i, message in enumerate(messages) if message.role == "user")
    preamble = ends[0] if messages and messages[0].role == "system" else 0
    trained = np.repeat(flags, [len(piece) for piece in pieces])
    return Encoded(np.concatenate(pieces), trained, tuple(ends), questions, preamble)


def with_definitions(conversation: Conversation) -> Conversation:
    """Put the functions that a conversation offers behind its system message."""
    if not conversation.tools:
        return conversation
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
    messages, text = conversation.messages, f"{TOOLS_BEFORE}{listed}{TOOLS_AFTER}"
    if messages[:1] and messages[0].role == "system":
        messages, text = messages[1:], f"{messages[0].text}\n\n{text}"
    return replace(conversation, messages=(Message("system", (Part("text", text),)), *messages), tools=())


def has_own_template(tokenizer: Tokenizer) -> bool:
    """True if a folder from elsewhere brings a chat template, and not our format."""
    if tokenizer.chat_template is None:
        return False
    ours = "<|im_sep|>" in tokenizer.chat_template  # Phi-4's has it, too, without the tokens of our tools
    return not ours or not has_chat_tokens(tokenizer)


def has_chat_tokens(tokenizer: Tokenizer) -> bool:
    """True if a tokenizer has all special tokens of our conversations."""
    return tokenizer.specials.keys() >= set(CHAT_SPECIALS)


def write_chat_tokenizer(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Write a tokenizer into `folder` with the special tokens and the template of conversations, and load it.

    Tokens that it lacks come after all that it has. An older form of the template becomes that of today.
    """
    tokenizer.copy_to(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = spec.setdefault("added_tokens", [])
    missing = [name for name in CHAT_SPECIALS if name not in tokenizer.specials]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [
        {"id": tokenizer.vocab_size + i, "content": name, **flags, "special": True} for i, name in enumerate(missing)
    ]
    # other classes of transformers put steps of their own in place of those in tokenizer.json
    config = {**tokenizer.config, "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("added_tokens_decoder", None)  # what transformers 4 wrote of the tokens in tokenizer.json
    write_template(folder, config)
    with atomic_file(folder / "tokenizer.json", "w") as handle:
        json.dump(spec, handle, indent=2, ensure_ascii=False)
    return load_tokenizer(folder)
