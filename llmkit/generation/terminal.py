"""Input and output of a chat, at a terminal or in a pipe.

At a terminal, prompt_toolkit reads the lines (editing, history, pasted text in one piece); it is imported only then.
Its prompt is drawn on stdout, or on stderr if stdout is a file or a pipe, which gets the answers and nothing else.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from llmkit.display import check_stdout, printable
from llmkit.errors import UserError
from llmkit.generation.chat import COMMANDS, Chat, talk
from llmkit.io.jsonl import open_input
from llmkit.io.progress import say

PROMPT = "> "


def converse(chat: Chat, first: str | None, quiet: bool) -> None:
    """Chat at the terminal, beginning with `first`; without a terminal, with `first` alone or each line of stdin."""
    check_stdout()
    stream: Any = sys.stdout
    begun = False  # whether the terminal's line is unfinished, so that a note must not continue it

    shown = printable if stream.isatty() else str
    stream.reconfigure(
        encoding=None if stream.isatty() else "utf-8", errors="replace"
    )  # a terminal's encoding may lack characters

    def write(text: str) -> None:
        nonlocal begun
        stream.write(shown(text))
        stream.flush()
        begun = (not text.endswith("\n")) if text else begun

    def tell(line: str) -> None:
        if begun and stream.isatty():
            write("\n")
        say(line)

    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and stream.isatty()]
    keyboard = _Keyboard(streams[0]) if streams and sys.stdin is not None and sys.stdin.isatty() else None
    if keyboard is not None:
        say("/help lists the commands; Ctrl-D quits", quiet)
        talk(chat, chain([] if first is None else [first], keyboard.lines()), write, tell, keyboard.edit)
        return
    where, failures = "--prompt", list[str]()

    def piped_lines() -> Iterator[str]:
        nonlocal where
        with open_input("-") as handle:
            for number, line in enumerate(handle, 1):
                where = f"stdin:{number}"
                try:
                    yield line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    raise UserError(f"{where}: expected UTF-8; convert the text first") from None

    fail = lambda error: failures.append(f"{where}: {error}")  # noqa: E731
    try:
        talk(chat, piped_lines() if first is None else iter([first]), write, tell, fail=fail)
    except UserError as error:
        failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))


class _Keyboard:
    """Lines typed at a prompt on `stream`."""

    def __init__(self, stream: Any) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        # prompt_toolkit takes a colour's \x1b[31m for a malformed mouse event; the mouse is not used here
        keys.add("<vt100-mouse-event>")(lambda event: None)

        output: Any = create_output(stdout=stream)
        output.enable_cpr = False  # only menus need the cursor's position, and not every terminal reports it
        self._session: Any = PromptSession(
            PROMPT,
            multiline=True,  # pasted text keeps its lines
            prompt_continuation="  ",
            key_bindings=keys,
            completer=WordCompleter(list(COMMANDS), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            output=output,
        )

    def lines(self) -> Iterator[str]:
        """Yield messages and commands of one or more lines; Ctrl-C discards one, Ctrl-D on an empty one ends."""
        while True:
            try:
                ahead = _typed_ahead()
                # one line with its Enter is a waiting message; several were pasted, and are sent by another Enter
                yield self._read(ahead.rstrip("\n"), sent=ahead.count("\n") == 1 and ahead.endswith("\n"))
            except EOFError:
                return
            except KeyboardInterrupt:
                continue

    def edit(self, text: str) -> str | None:
        """Let the user edit a text; return None if they give up."""
        try:
            return self._read(text)
        except (EOFError, KeyboardInterrupt):
            return None

    def _read(self, text: str, sent: bool = False) -> str:
        typed = self._session.prompt(default=text, accept_default=sent)
        return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # replaces invalid bytes


def _typed_ahead() -> str:
    """Read what was typed or pasted during an answer, without control keys. Raises EOFError for Ctrl-D."""
    from prompt_toolkit.input.vt100 import raw_mode

    terminal, typed = sys.stdin.fileno(), b""
    with raw_mode(terminal):  # otherwise an unfinished line cannot be read
        while select.select([terminal], [], [], 0)[0] and (block := os.read(terminal, 65536)):
            typed += block
    text = re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|O.|.)?", "", typed.decode("utf-8", "replace")).replace("\r", "\n")
    text = "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())
    if not text and {0, 4} & set(typed):  # a terminal reports Ctrl-D as either
        raise EOFError
    return text
