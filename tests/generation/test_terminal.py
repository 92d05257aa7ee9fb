"""`llmkit sample --chat` with typed input: pasted text, Ctrl-C and Ctrl-D, tools, stdout and stderr."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import END, certain, make_model, save_tokenizer

from llmkit.model.folder import save_model
from llmkit.tokenizer.chat import write_chat_tokenizer
from llmkit.tokenizer.encoding import load_tokenizer

pytest.importorskip("prompt_toolkit", reason="prompt_toolkit is not installed: pip install -e .")
READY = b"\x1b[?2004h"  # the prompt is ready, with bracketed paste
EMOJI = "\N{GRINNING FACE}"


class Typist:
    """A user at a terminal of 200 columns who waits for each prompt."""

    def __init__(self, *arguments: str | Path, stdout: int | None = None, **environment: str) -> None:
        self.fd, follower = pty.openpty()
        self.seen, self.read = b"", 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmkit", "sample", *map(str, arguments)],
            stdin=follower, stdout=follower if stdout is None else stdout, stderr=follower, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50", "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        os.close(follower)

    def until(self, wanted: bytes = READY) -> str:
        """Wait until `wanted` is shown; return the output since the last wait, without cursor movements."""
        deadline = time.monotonic() + 120
        while wanted not in self.seen[self.read :]:
            assert time.monotonic() < deadline and self._more(), f"expected {wanted!r}, found {self.seen!r}"
        start, self.read = self.read, self.seen.index(wanted, self.read) + len(wanted)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen[start : self.read].decode("utf-8", "replace"))

    def _more(self) -> bool:
        if not select.select([self.fd], [], [], 60)[0]:
            return False
        try:
            block = os.read(self.fd, 65536)
        except OSError:  # Linux's end of file
            return False
        self.seen += block
        return bool(block)

    def type(self, text: str, key: str = "\r") -> str:
        """Type a line; return the output up to the next prompt."""
        os.write(self.fd, (text + key).encode())
        return self.until()

    def end(self) -> int:
        """Press Ctrl-D; return the exit status."""
        os.write(self.fd, b"\x04")
        while self._more():
            pass
        os.close(self.fd)
        return self.process.wait(120)


def folder_of(place: Path, *chain: str, context: int = 512, then: dict[str, str] | None = None) -> Path:
    """Write an assistant that always answers with the tokens of `chain`."""
    place.mkdir()
    save_tokenizer(place)
    tokenizer = write_chat_tokenizer(load_tokenizer(place), place)
    ids = tokenizer.specials
    model = make_model(context=context, vocab_size=tokenizer.vocab_size, eos_token_id=(END, ids["<|im_end|>"]))

    def numbers(name: str) -> list[int]:
        return [ids[name]] if name in ids else tokenizer.encode(name)

    certain(model, *(token for name in ("<|im_sep|>", *chain) for token in numbers(name)))
    for channel, (last, following) in enumerate((then or {}).items(), 40):
        model.embed_tokens.data[numbers(last)[0], channel] = 1.0
        model.lm_head.data[numbers(following)[0], channel] = 10.0
    save_model(model, place)
    return place


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> Path:
    """An assistant that calls the calculator for 7 and then says x."""
    place = tmp_path_factory.mktemp("caller") / "chat"
    answer = {"<|result_end|>": "x", "x": "<|im_end|>"}
    return folder_of(place, "<|calc_start|>", "7", "<|calc_end|>", then=answer)


def test_pasted_lines_are_one_message_and_tools_are_seen_and_saved(caller, tmp_path):
    kept = tmp_path / "kept.jsonl"
    at = Typist(caller, "--chat", "--tools", "calc", "--temperature", "0")
    assert "/help lists the commands; Ctrl-D quits" in at.until()
    shown = at.type("\x1b[200~one\ntwo\nthree\x1b[201~")
    assert "calls calc: 7" in shown and "calc answers: 7" in shown and "x\r\n" in shown
    assert "tokens in 2 messages" in at.type("/tokens")
    assert "there is no command /what" in at.type("/what")
    shown = at.type("wh\x1b[31my\x1b[0m\x1b[1;3m\x1b[<1M")  # colours of other programs
    assert "> why" in shown and "x\r\n" in shown and "Unhandled" not in shown
    at.type("ha\x1b[D\x1b[Do")  # the left arrow: oha
    at.type("\x1b[A")  # history: the same line
    assert "saved in" in at.type(f"/save {kept}")
    assert at.end() == 0
    turns = json.loads(kept.read_text())["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["one\ntwo\nthree", "why", "oha", "oha"]
    said = [{"type": "calc", "text": "7"}, {"type": "result", "text": "7"}, {"type": "text", "text": "x"}]
    assert all(turn["content"] == said for turn in turns[1::2])


def test_ctrl_c_stops_an_answer_and_takes_a_line_back(tmp_path):
    babbler = folder_of(tmp_path / "chat", "a", "b", "a", context=1 << 17)
    at = Typist(babbler, "--chat", "--max-tokens", "none", "--temperature", "0")
    at.until()
    os.write(at.fd, b"go\r")
    at.until(b"\x1b[?2004l")
    while len(at.seen) < at.read + 200:  # it is answering
        assert at._more()
    at.process.send_signal(signal.SIGINT)
    assert "stopped" in at.until()
    at.type("half a line", "\x03")
    at.type("/edit")
    at.until(b"go")  # the last message, for editing
    at.type("", "\x03")  # cancelled
    assert "2 messages" in at.type("/tokens")
    assert at.end() == 0


def test_text_pasted_during_an_answer_appears_at_the_next_prompt(tmp_path):
    babbler = folder_of(tmp_path / "chat", "a", "b", "a", context=1 << 15)
    at = Typist(babbler, "--chat", "--max-tokens", "3000", "--temperature", "0")
    at.until()
    os.write(at.fd, b"go\r")
    at.until(b"\x1b[?2004l")
    os.write(at.fd, "one\rtwo \x1b[Cé\rthree".encode())
    at.until()
    at.until(b"three")
    at.type("!")
    os.write(at.fd, b"next\r")
    at.until(b"\x1b[?2004l")
    os.write(at.fd, b"typed\r")
    at.until()
    at.until()  # the answer to it
    at.type(f"/save {tmp_path / 'kept.jsonl'}")
    at.type(f"/save {tmp_path / 'kept.jsonl'}")
    assert at.end() == 0
    (kept,) = (tmp_path / "kept.jsonl").read_text().splitlines()
    said = [turn["content"] for turn in json.loads(kept)["messages"] if turn["role"] == "user"]
    assert said == ["go", "one\ntwo é\nthree!", "next", "typed"]


def test_ctrl_d_during_an_answer_ends_the_chat_after_it(tmp_path):
    babbler = folder_of(tmp_path / "chat", "a", "b", "a", context=1 << 15)
    at = Typist(babbler, "--chat", "--max-tokens", "2000", "--temperature", "0")
    at.until()
    os.write(at.fd, b"go\r")
    at.until(b"\x1b[?2004l")
    assert at.end() == 0


def test_a_piped_stdout_has_the_answers_alone(caller):
    reading, writing = os.pipe()
    at = Typist(caller, "--chat", "--temperature", "0", stdout=writing)
    os.close(writing)
    at.until()
    assert "calls calc, which is not enabled: 7; restart with --tools calc" in at.type("go")
    assert at.end() == 0
    with os.fdopen(reading) as out:
        assert out.read() == "\n"


def test_lines_of_a_pipe_without_an_answer_are_named_at_the_end(tmp_path, llmkit):
    folder = folder_of(tmp_path / "chat", "a", "b", "a", context=64)
    words = ["sample", folder, "--chat", "--max-tokens", "4", "--temperature", "0"]
    done = llmkit(*words, stdin=f"hi\n{'long ' * 40}\nhi\n/sav x\n")
    assert done.returncode == 2 and done.stdout.splitlines()[0] == done.stdout.splitlines()[-1] != ""
    said = done.stderr.splitlines()[-1]
    assert said.startswith("llmkit: error: stdin:2: ") and "; stdin:4: there is no command /sav;" in said
    done = llmkit(*words, "-p", "long " * 40)
    assert done.returncode == 2 and "error: --prompt: " in done.stderr
    assert llmkit(*words, stdin="hi\n").returncode == 0


@pytest.mark.parametrize("piped", [False, True])
def test_a_terminal_without_the_characters_of_an_answer(tmp_path, piped):
    folder = folder_of(tmp_path / "chat", EMOJI, "<|im_end|>")
    narrow = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    if piped:
        done = subprocess.run(
            [sys.executable, "-m", "llmkit", "sample", str(folder), "--chat", "-p", "hi", "--temperature", "0"],
            stdin=subprocess.DEVNULL, capture_output=True, env={**os.environ, **narrow}, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stdout.decode()) == (0, f"{EMOJI}\n")
        return
    at = Typist(folder, "--chat", "--temperature", "0", **narrow)
    at.until()
    assert "?" in at.type("hi") and at.end() == 0
