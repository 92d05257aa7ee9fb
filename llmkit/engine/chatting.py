"""A conversation with a model, turn by turn: what `llmkit sample --chat` is made of.

    chat = Chat(generator, opened.chat, context=2048, system="Be brief.")
    chat.ask("Who are you?", write=print)

A conversation that outgrows the context loses its oldest turns, never the system message, and says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from llmkit.conversations import Message, as_record, message
from llmkit.display import check_stdout, printable
from llmkit.engine.generation import Generator, Request
from llmkit.engine.served_sampling import ServedSampler
from llmkit.errors import UserError
from llmkit.files import atomic_file
from llmkit.progress import say
from llmkit.stream import open_input
from llmkit.tokenizer.chat import ChatFormat

LEAST_ANSWER = 32  # tokens of the context that stay free for an answer
HELP = """\
/system TEXT   set the system message, and begin again; without TEXT, take it away
/reset         begin again
/save FILE     append the conversation to a JSONL file, for sft
/quit          end (Ctrl-D does as well)
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


class Chat:
    """One conversation.

    chat        how turns become tokens; None where a server has them become tokens
    context     tokens that the model can take; None where only the server knows, which then refuses
    max_tokens  of an answer; None goes on until the model stops or the context is full
    seed        of the random numbers; each turn draws its own
    """

    def __init__(
        self,
        generator: Generator | ServedSampler,
        chat: ChatFormat | None,
        *,
        context: int | None,
        system: str | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self._generator, self._chat, self._context = generator, chat, context
        self.max_tokens, self.seed = max_tokens, seed
        self.turns: list[Message] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin again, with a system message or without one."""
        self.turns = [] if system is None else [message("system", system)]

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else None

    def ask(self, text: str, write: Callable[[str], object], say: Callable[[str], object] = lambda line: None) -> str:
        """Say something, pass the answer to `write` as it comes, and return it.

        An interrupted answer stays in the conversation as far as it came, and so does the interrupt. Raises UserError
        for a message that alone is longer than the context.
        """
        self.turns.append(message("user", text))
        pieces: list[str] = []

        def take(request: int, sample: int, piece: str) -> None:
            pieces.append(piece)
            write(piece)

        self._generator.on_text = take
        number = sum(turn.role == "user" for turn in self.turns)
        try:
            request = Request(self._prompt(say), max_tokens=self.max_tokens, seed=self.seed, number=number)
            next(iter(self._generator.complete([request])))
        finally:
            if pieces:
                self.turns.append(message("assistant", "".join(pieces)))
            else:
                self.turns.pop()
        return "".join(pieces)

    def _prompt(self, say: Callable[[str], object]) -> Sequence[Any]:
        """The ids of the conversation so far, less its oldest turns where they do not fit."""
        if self._chat is None:
            return as_record(self.turns)
        first = 1 if self.system is not None else 0
        dropped = 0
        while True:
            ids = self._chat.encode(self.turns, prompt=True).token_ids.tolist()
            if self._context is None or len(ids) + LEAST_ANSWER <= self._context:
                break
            if len(self.turns) <= first + 1:
                if len(ids) < self._context:
                    break
                raise UserError(f"the message is {len(ids)} tokens long and the model's context is {self._context}")
            following = (i for i in range(first + 1, len(self.turns)) if self.turns[i].role == "user")
            cut = next(following, len(self.turns) - 1)
            dropped += cut - first
            del self.turns[first:cut]
        if dropped:
            longer = f"the conversation is longer than the context of {self._context} tokens"
            say(f"{longer}: left out its oldest {dropped} turns")
        return ids

    def save(self, path: str) -> None:
        """Append the conversation to a JSONL file, as a record for sft."""
        line = json.dumps({"messages": as_record(self.turns)}, ensure_ascii=False) + "\n"
        former = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
        with atomic_file(path, "w") as handle:
            handle.write(former + line)


def converse(chat: Chat, first: str | None, quiet: bool) -> None:
    """Talk on the terminal, beginning with `first`; without a terminal each line of stdin is a turn, or `first` is."""

    def write(text: str) -> None:
        sys.stdout.write(shown(text))
        sys.stdout.flush()

    check_stdout()
    shown = printable if sys.stdout.isatty() else str
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    if on_terminal:
        say("/help tells the commands; Ctrl-D ends", quiet)
    typed = typed_lines() if first is None or on_terminal else iter(())
    talk(chat, chain([] if first is None else [first], typed), write, say)


def talk(chat: Chat, lines: Iterator[str], write: Callable[[str], object], say: Callable[[str], object]) -> None:
    """Hold a conversation: messages and commands in `lines`, answers to `write`, all else to `say`."""
    for line in lines:
        text = line
        while text.endswith("\\"):
            text = text[:-1] + "\n" + next(lines, "")
        if not text.strip():
            continue
        if text.startswith("/"):
            if not _obey(chat, text, say):
                return
            continue
        try:
            chat.ask(text, write, say)
        except KeyboardInterrupt:
            say("stopped")
        except UserError as error:
            say(f"error: {error}")
        write("\n")


def typed_lines() -> Iterator[str]:
    """The lines of stdin: typed after a prompt and editable on a terminal, where Ctrl-C takes one back."""
    if sys.stdin is None or not sys.stdin.isatty():
        with open_input("-") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    yield line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    raise UserError(f"stdin:{number}: expected UTF-8; convert the text first") from None
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its history and editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def _obey(chat: Chat, text: str, say: Callable[[str], object]) -> bool:
    """Carry out a command; False when it ends the conversation."""
    command, _, rest = text.partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        chat.reset(chat.system)
        say("a new conversation")
    elif command == "/system":
        chat.reset(rest or None)
        say("a new conversation, " + ("with that system message" if rest else "without a system message"))
    elif command == "/save":
        try:
            chat.save(rest)
            say(f"saved in {rest}")
        except (OSError, UserError) as error:
            say(f"error: {rest or '/save'}: {getattr(error, 'strerror', None) or error}")
    else:
        say(HELP)
    return True
