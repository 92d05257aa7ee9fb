"""A conversation with a model, turn by turn, for `llmkit sample --chat`.

    chat = Chat(sampler, system="Be brief.")
    chat.ask("Who are you?", write=print)

It is independent of the terminal: messages and commands arrive as lines (generation/terminal.py reads them from the
keyboard), answers and notes go to two callbacks. When a conversation outgrows the context, the oldest turns are hidden
from the model, but never the system message, and a note says so; `/save` still writes all turns.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import RESULT, Message, Part, as_record, message
from llmkit.generation.requests import Completion, Prompt, Request
from llmkit.generation.sampler import Sampler
from llmkit.generation.tool_calls import ToolUse, call_part, tools_flag
from llmkit.io.files import atomic_file
from llmkit.io.jsonl import PACKED
from llmkit.io.progress import counted

LEAST_ANSWER = 32  # tokens of the context reserved for an answer
SHOWN = 400  # characters shown of a call or a result
Say = Callable[[str], object]
HELP = """\
commands:
  /retry          replace the last answer with another one
  /edit [TEXT]    replace the last message with TEXT and answer it again;
                  without TEXT, on a terminal, edit the message first
  /system [TEXT]  start over with the system message TEXT, or without one
  /reset          start over with the same system message
  /save FILE      append the conversation to a JSONL file, for sft;
                  again, replace what was last saved there
  /tokens         show how full the context is
  /help           show this list
  /quit           quit, as Ctrl-D does
A line that ends in \\ continues on the next one. On a terminal Alt-Enter starts
a new line, pasted text is one message, and Ctrl-C stops an answer. A space
before / sends a command as a message."""
COMMANDS = tuple(re.findall(r"^  (/[a-z]+)", HELP, re.MULTILINE))
BARE = (*re.findall(r"^  (/[a-z]+)  ", HELP, re.MULTILINE), "/exit")  # take no text


class Chat:
    """One conversation.

    max_tokens  per answer; None: until the model stops or the context is full
    seed        of the random numbers; each turn, and each retry of it, draws its own
    greedy      whether decoding is greedy, so that a retry gives the same answer
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        greedy: bool = False,
    ) -> None:
        self._greedy, self._sampler, self._chat, self._context = greedy, sampler, sampler.chat, sampler.context
        self.max_tokens, self.seed = max_tokens, seed
        self.turns: list[Message] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Start over, with a system message or without one."""
        self.turns = [] if system is None else [message("system", system)]
        self._first = len(self.turns)  # index of the first turn after the system message that the model sees
        self.last_message: str | None = None  # answered or not
        self._answered = False
        self._tries = 0  # retries of it
        self._saved: dict[str, bytes] = {}  # file -> the line that /save wrote there

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else None

    def ask(self, text: str, write: Say, say: Say = lambda line: None) -> str:
        """Send a message, stream the answer to `write`, and return it; `say` gets tool calls, results and an unusual
        end.

        An interrupted answer stays in the conversation up to the interrupt, which propagates. Raises UserError if the
        message alone is longer than the context.
        """
        return self._ask(text, 0, write, say)

    def retry(self, write: Say, say: Say) -> str:
        """Send the last message again, with other random numbers. Raises UserError if there is none."""
        if self._greedy and self._answered:
            say("at --temperature 0 the answer is always the same; a higher temperature varies it")
        return self._ask(self.take_back(), self._tries + 1, write, say)

    def take_back(self) -> str:
        """Remove the last message and its answer, and return the message. Raises UserError if there is none."""
        if self.last_message is None:
            raise UserError("there is no message yet")
        last = max((index for index, turn in enumerate(self.turns) if turn.role == "user"), default=0)
        if self._answered:
            del self.turns[last:]
            self._answered = False
        return self.last_message

    def _ask(self, text: str, tries: int, write: Say, say: Say) -> str:
        self.last_message, self._tries = text, tries
        self.turns.append(message("user", text))
        answer: list[Part] = []
        calls: list[Part] = []  # waiting for their results

        def take(request: int, sample: int, piece: str) -> None:
            if answer and answer[-1].kind == "text":
                answer[-1] = Part("text", answer[-1].text + piece)
            else:
                answer.append(Part("text", piece))
            write(piece)

        def show_call(request: int, sample: int, call: Mapping[str, Any], seen: str | None) -> None:
            if seen is None:
                calls.append(call_part(call["tool"], call["input"]))
                say(f"calls {call['tool']}: {_shortened(call['input'])}")
            else:
                answer.extend((*calls, Part(RESULT, seen)))
                calls.clear()
                say(f"{call['tool']} {'fails' if call.get('failed') else 'answers'}: {_shortened(call['result'])}")

        number = sum(turn.role == "user" for turn in self.turns)
        left_out = self._sampler.usage.left_out
        before = dict(left_out)
        try:
            request = Request(self._prompt(say), 1, self.max_tokens, self.seed + tries, number)
            (samples,) = self._sampler.complete([request], on_text=take, on_call=show_call)
            if not samples:
                raise UserError(f"the conversation is longer than the context of {self._sampler.name}")
            write("\n")  # end the line of the answer before the notes
            for kind in left_out:
                if kind != "reasoning" and left_out[kind] > before.get(kind, 0):
                    say(f"left out: the server's {kind}")
            if samples[0].thought:
                say(f"thinks: {_shortened(samples[0].thought)}")
            if reason := self._reason(samples[0], bool(answer)):
                say(reason)
        finally:
            self._answered = bool(answer)
            if answer:
                self.turns.append(Message("assistant", tuple(answer)))
            else:
                self.turns.pop()
        return self.turns[-1].text if answer else ""

    def _reason(self, completion: Completion, answered: bool) -> str | None:
        """Say why an answer is empty or was not ended by the model; None for a normal end."""
        tools = self._sampler.tools
        if completion.finish_reason == "no_tool" and isinstance(tools, ToolUse):
            tool, text = tools.last_call(completion.token_ids)
            return f"calls {tool}, which is not enabled: {_shortened(text)}; restart with {tools_flag(tool)}"
        if completion.finish_reason == "tool_limit" and tools is not None:
            return f"stopped at tool call {tools.max_calls + 1}; --max-tool-calls allows more"
        if completion.finish_reason == "length":
            if self.max_tokens is not None and sum(completion.sampled) >= self.max_tokens:
                return f"cut after {counted(self.max_tokens, 'token')}; --max-tokens allows more"
            if self._context is None:
                return f"cut by --max-tokens {self.max_tokens} or by the server's own limit"
            return f"cut: the context of {self._context} tokens is full"
        if completion.finish_reason == "tool_calls":
            called = ", ".join(call["tool"] for call in completion.tool_calls)
            return f"calls {called}, which is not enabled; --tools enables tools"
        if completion.finish_reason != "stop":
            return f"ended by {completion.finish_reason or 'the server, which gave no reason'}"
        return None if answered else "no answer, so the message was removed; /retry sends it again"

    def _shown(self, first: int) -> list[Message]:
        return [*self.turns[: self.system is not None], *self.turns[first:]]

    def _prompt(self, say: Say) -> Prompt:
        """Encode the conversation so far, without its oldest turns if they do not fit."""
        first = self._first
        while True:
            ids = self._sampler.encode(self._shown(first))
            if self._context is None or len(ids) + LEAST_ANSWER <= self._context:
                break
            following = (i for i in range(first + 1, len(self.turns)) if self.turns[i].role == "user")
            cut = next(following, None)
            if cut is None:
                if len(ids) < self._context:
                    break
                raise UserError(
                    f"the message is {counted(len(ids), 'token')} long and the model's context is {self._context}"
                )
            first = cut
        if left := first - self._first:
            longer = f"the conversation is longer than the context of {self._context} tokens"
            say(f"{longer}: the model no longer sees its oldest {counted(left, 'message')}")
        self._first = first
        return ids

    def tokens(self) -> str:
        """Describe the length of the conversation in one line."""
        if self._chat is None:
            return f"{counted(len(self.turns), 'message')}; the server tokenizes them and reports no count"
        shown = self._shown(self._first)
        count = len(self._chat.encode(shown)) if shown else 0
        older = len(self.turns) - len(shown)
        left = f"; {counted(older, 'older message')} not shown to the model" if older else ""
        context = "" if self._context is None else f" of {self._context}"
        return f"{count}{context} tokens in {counted(len(shown), 'message')}{left}"

    def save(self, path: str) -> None:
        """Append the conversation to a JSONL file, for sft, or replace what it last saved there. Raises UserError or
        OSError."""
        if not any(turn.role == "assistant" for turn in self.turns):
            raise UserError("there is no answer to save yet")
        if path.endswith(PACKED):
            raise UserError("expected a plain JSONL file, not .gz, .zst or .parquet")
        text = json.dumps({"messages": as_record(self.turns)}, ensure_ascii=False) + "\n"
        line = text.encode("utf-8", "replace")
        folder = os.path.dirname(path)
        if folder and not os.path.isdir(folder):
            raise UserError(f"expected a folder {folder}, found none; create it or choose another name")
        former = Path(path).read_bytes() if os.path.exists(path) else b""
        if former.strip():
            try:
                first = json.loads(former.lstrip().split(b"\n", 1)[0])
            except ValueError:
                first = None
            if not isinstance(first, dict) or "messages" not in first:
                raise UserError("expected a JSONL file of conversations or a new file; choose another name")
        if former and not former.endswith(b"\n"):
            former += b"\n"
        lines, real = former.splitlines(keepends=True), os.path.realpath(path)
        if (saved := self._saved.get(real)) in lines:
            lines.remove(saved)
        with atomic_file(path) as handle:
            handle.write(b"".join([*lines, line]))
        self._saved[real] = line


def _shortened(text: Any) -> str:
    """Return a call or a result as one line, cut after SHOWN characters."""
    line = " | ".join(str(text).splitlines())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]} ..."


def talk(
    chat: Chat,
    lines: Iterator[str],
    write: Say,
    say: Say,
    edit: Callable[[str], str | None] | None = None,
    fail: Callable[[UserError], object] | None = None,
) -> None:
    """Run a conversation: messages and commands from `lines`, answers to `write`, everything else to `say`.

    edit  lets the user change a text, and returns None if they give up; None without a keyboard
    fail  receives errors; by default they go to `say`
    """
    fail = fail or (lambda error: say(f"error: {error}"))

    def answer(ask: Callable[[], object]) -> None:
        try:
            ask()
        except (KeyboardInterrupt, UserError) as error:
            write("\n")
            fail(error) if isinstance(error, UserError) else say("stopped")

    for text in lines:
        while text.endswith("\\"):
            text = text[:-1] + "\n" + next(lines, "")
        if not text.strip():
            continue
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        command = command.lower() if re.fullmatch(r"/[A-Za-z]*", command) else command
        if not re.fullmatch(r"/[a-z]*\s*", command):  # not a path, which begins with a slash too
            answer(lambda text=text: chat.ask(text, write, say))
        elif rest and command in BARE:
            fail(UserError(f"there is no command {text!r}, only {command}; a space before it sends it as a message"))
        elif command in ("/quit", "/exit"):
            return
        elif command == "/retry":
            answer(lambda: chat.retry(write, say))
        else:
            try:
                changed = _run_command(chat, command, rest, edit, say)
            except UserError as error:
                fail(error)
            else:
                if changed is not None:
                    answer(lambda text=changed: chat.ask(text, write, say))


def _run_command(chat: Chat, command: str, rest: str, edit: Callable[[str], str | None] | None, say: Say) -> str | None:
    """Run a command; return the message to send next, or None."""
    if command == "/edit":
        if chat.last_message is None:
            raise UserError("there is no message yet")
        if not rest and edit is None:
            raise UserError("/edit TEXT: expected the message to send in place of the last one")
        changed = rest or (edit(chat.last_message) if edit is not None else None)
        if changed is None or not changed.strip():
            return None
        chat.take_back()
        return changed
    if command == "/reset":
        chat.reset(chat.system)
        say("a new conversation")
    elif command == "/system":
        chat.reset(rest or None)
        say("a new conversation, " + ("with that system message" if rest else "without a system message"))
    elif command == "/tokens":
        say(chat.tokens())
    elif command == "/help":
        say(HELP)
    elif command == "/save":
        path = os.path.expanduser(rest)
        try:
            if not path:
                raise UserError("expected a file name, such as /save chats.jsonl")
            chat.save(path)
            say(f"saved in {path}")
        except (OSError, UserError) as error:
            raise UserError(f"/save{' ' * bool(rest)}{rest}: {getattr(error, 'strerror', None) or error}") from None
    else:
        raise UserError(f"there is no command {command}; /help lists them, and a space before it sends it as a message")
    return None
