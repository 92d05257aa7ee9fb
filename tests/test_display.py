"""Output for people: no secrets, no control characters from foreign text, and nothing on closed streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import ChatServer

from llmkit.display import printable, redacted
from tests.helpers.jsonl import write

SECRET = "sk-Marker8Secret"
EVIL = "\x1b]0;PWNED\x07\x1b[31m\x1b]52;c;cm0=\x07\x9b31m"
COMMAND = [sys.executable, "-m", "llmkit"]


def everything_of(folder: Path) -> str:
    """Return the text of all files in a folder and its subfolders."""
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def run(folder: Path, *arguments: str, key: str | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if key is None else {"OPENAI_API_KEY": key})}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, env=environment, timeout=120
    )


# ---- secrets


@pytest.mark.parametrize("end", ["\r\n", " "])
def test_a_key_may_end_as_the_file_it_came_from(tmp_path, end):
    with ChatServer(lambda prompt, seed: f"a {prompt}") as server:
        write(tmp_path / "in.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
        done = run(tmp_path, "sample", "--engine", server.spec, "--jsonl", "in.jsonl", key=SECRET + end)
    assert done.returncode == 0, done.stderr
    assert server.keys == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("OPENAI_API_KEY", f"{SECRET}\nX-Other: 1"),
        ("OPENAI_ORG_ID", f"a\x00{SECRET}"),
        ("OPENAI_PROJECT_ID", f"{SECRET}é"),
    ],
)
def test_a_key_that_no_header_holds_is_refused_by_its_name(monkeypatch, name, key):
    from llmkit.errors import UserError
    from llmkit.generation.served_models import parse_address

    monkeypatch.setattr(os, "environ", {**os.environ, name: key})  # os.environ itself refuses NUL
    with pytest.raises(UserError, match=f"^{name}: expected printable ASCII") as raised:
        parse_address("openai:http://localhost/v1#m", "--engine")
    assert "Marker" not in str(raised.value)


def test_a_key_that_a_server_repeats_is_not_shown(tmp_path):
    with ChatServer(lambda prompt, seed: "") as server:
        server.faults, server.refusal = ["401"] * 9, {"error": {"message": f"Incorrect API key provided: {SECRET}"}}
        done = run(tmp_path, "sample", "--engine", server.spec, "-p", "Hi", key=SECRET)
        server.faults, server.refusal = ["400"], {"error": {"message": f"no {SECRET} here {EVIL}"}}
        other = run(tmp_path, "sample", "--engine", server.spec, "-p", "Hi", key=SECRET)
    assert (done.returncode, other.returncode) == (2, 2)
    assert SECRET not in done.stderr + other.stderr
    assert "no *** here \\u001b]0;PWNED" in other.stderr and "\x1b" not in other.stderr


def test_a_secret_in_an_option_is_in_no_file_and_no_message(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"text": "The lighthouse stands on the cliff above the town."}\n' * 9)
    address = f"http://ada:{SECRET}@127.0.0.1:1/s"
    (tmp_path / "bad.toml").write_text(f'tools = "search:{address}"\nhumbug = "{SECRET}"\n')
    tools = f"search:{address}?apikey={SECRET}&other={SECRET}"
    model = f"openai:{address}?token={SECRET}#m"
    runs = [
        run(tmp_path, "train-bpe", "docs.jsonl", "--vocab-size", "300", "--pattern", r"\w+|\W", "-o", "tok"),
        run(tmp_path, "crawl-filter", "docs.jsonl", "--only", "pii", "--explain", address),
        run(tmp_path, "sample", "none/", "--tools", tools, "-p", "Hi"),
        run(tmp_path, "sample", "none/", "--config", "bad.toml", "-p", "Hi"),
        run(tmp_path, "sample", "--engine", model, "-p", "Hi"),
        run(tmp_path, "sample", tools, "-p", "Hi"),
        run(tmp_path, "probe-knowledge", "none/", "--judge", model, "--questions", "docs.jsonl", "-o", "x.jsonl"),
        run(tmp_path, "rl", "none/", "--data", "docs.jsonl", "--tools", tools, "-o", "rl"),
    ]
    for done in runs[1:]:
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr, done.stderr
    assert SECRET not in "".join(done.stdout + done.stderr for done in runs)


def test_a_manifest_has_no_secret_of_the_command_or_its_options(tmp_path, monkeypatch):
    from llmkit.config import as_options, lasting_options
    from llmkit.io.manifest import write_manifest
    from llmkit.stages.sample import SampleConfig

    tools = f"search:https://ada:{SECRET}@host/s?q={SECRET},calc"
    config = SampleConfig(tools=(tools,), prompt="Hi")
    monkeypatch.setattr(sys, "argv", ["llmkit", "sample", "--tools", tools, f"--engine=openai:http://h/?k={SECRET}#m"])
    write_manifest(tmp_path, "sample", as_options(config))
    assert SECRET not in everything_of(tmp_path) + str(lasting_options(config))
    assert json.loads((tmp_path / "manifest.json").read_text())["options"]["tools"] == [
        "search:https://***@host/s?q=***,calc"
    ]


# ---- control characters


def test_text_without_secrets_and_control_characters_is_unchanged() -> None:
    for text in ("http://a.b/c?page=2", "a@b.c, x://y", "openai:http://h:1/v1#m", "mail me@x.org http://x.org/~me"):
        assert redacted(text) == text
    text = "a\tb\nc é 日本 🦙 👩\u200d👧 עברית"
    assert printable(text) == text
    assert printable("\r\x7f\x9b\u202e\ud800") == "\\u000d\\u007f\\u009b\\u202e\\ud800"


def test_foreign_text_cannot_control_the_terminal(tmp_path, on_terminal, monkeypatch):
    write(tmp_path / "docs.jsonl", {"text": f"Good text. {EVIL}", "id": EVIL, "source": EVIL})
    (tmp_path / "bad.toml").write_text('"k\\u001b]0;PWNED\\u0007" = 1\n')
    (tmp_path / "own.py").write_text(f"def keep(page):\n    raise ValueError({EVIL!r})\n")
    (tmp_path / f"x{EVIL}.jsonl").write_text("[]\n")
    monkeypatch.chdir(tmp_path)
    with ChatServer(lambda prompt, seed: f"hello {EVIL}") as server:
        chat = tmp_path / "chat.jsonl"
        write(chat, {"messages": [{"role": "user", "content": "Hi"}], "note": EVIL})
        commands = [
            ["crawl-filter", "docs.jsonl", "--only", "pii"],
            ["crawl-filter", "docs.jsonl", "--only", "pii", "--explain", EVIL],
            ["crawl-filter", f"x{EVIL}.jsonl", "--only", "pii"],
            ["sample", "none/", "--config", "bad.toml"],
            ["sample", "none/", "--dtype", EVIL],
            ["sample", "--engine", server.spec, "--jsonl", "chat.jsonl"],
            ["sample", "--engine", server.spec, "--chat"],
        ]
        for command in commands:
            typed = "Hi" if "--chat" in command else ""
            shown = on_terminal("sh", "-c", f'echo {typed} | "$@"', "sh", *COMMAND, *command)
            assert "PWNED" in shown, (command, shown)
            assert not {"\x1b]", "\x9b", "\x07"} & {shown[i : i + n] for n in (1, 2) for i in range(len(shown))}, (
                command
            )


# ---- closed streams


@pytest.mark.parametrize("closed", ["2>&-", "2>&- <&-", "2>&- >&-", ">&-"])
def test_messages_do_not_go_where_data_belong(tmp_path, closed):
    (tmp_path / "docs.jsonl").write_text('{"text": "Good text."}\n')
    line = f"{' '.join(COMMAND)} crawl-filter docs.jsonl --only pii -o out.jsonl 2>&- >&- <&-"
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, timeout=60).returncode == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "Good text."  # not stderr's descriptor
    for arguments in ("crawl-filter docs.jsonl --only pii", "sample none/ -p Hi", "sample"):
        line = f"{' '.join(COMMAND)} {arguments} {closed}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        is_good = "docs" in arguments and ">&-" not in closed.replace("2>&-", "")
        assert done.returncode == (0 if is_good else 2), (line, done)
        assert [json.loads(row)["text"] for row in done.stdout.splitlines()] == (["Good text."] if is_good else [])
        assert (done.stderr == "") == ("2>&-" in closed), done.stderr
        assert "Traceback" not in done.stderr
