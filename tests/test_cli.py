"""The command line's contract from a user's view: streams, exit codes, errors, options from flags, TOML and defaults.

`toy` is a stage for these tests (toy.py); rules for every stage are also tested on the real ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest

from llmkit import __version__, cli
from llmkit.cli import COMMANDS
from llmkit.config import DROPPED, option_fields, option_of, value_type
from llmkit.errors import UserError

TOY = [sys.executable, str(Path(__file__).parent.joinpath("helpers", "toy.py")), "toy"]
RECORD = '{"a":1}\n'


def toy(*arguments: str | Path, stdin: str | None = RECORD, **details) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TOY, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=60, **details
    )


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `toy` is the command."""
    script = f"set -o pipefail; toy() {{ '{TOY[0]}' '{TOY[1]}' toy \"$@\"; }}; {script}"
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


def mistake(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Check that a command failed with one line on stderr and nothing on stdout; return the message."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(r"llmkit: error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr.removeprefix("llmkit: error: ").rstrip("\n")


def summary(done: subprocess.CompletedProcess[str]) -> dict:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


# ---- streams


def test_a_stage_that_writes_a_file_prints_one_line_with_its_path(tmp_path: Path) -> None:
    found = summary(toy("-", "-o", tmp_path / "out.jsonl"))
    assert (found["path"], found["records"]) == (str(tmp_path / "out.jsonl"), 1)
    assert "nothing" not in found
    assert (tmp_path / "out.jsonl").read_text() == RECORD


@pytest.mark.parametrize("arguments", [[], ["-"], ["-", "-o", "-"]])
def test_dashes_are_stdin_and_stdout(arguments: list[str]) -> None:
    done = toy(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, RECORD, "")


def test_pipes_and_process_substitution_work(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(RECORD * 3)
    done = shell("toy d.jsonl | toy - | toy <(cat d.jsonl) - -o >(cat >&2) --quiet", tmp_path)
    assert done.stderr == RECORD * 6, done
    assert json.loads(done.stdout)["records"] == 6


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["--version"], 0, f"llmkit {__version__}"),
        (["-h"], 0, "Usage: llmkit"),
        (["help"], 0, "Usage: llmkit"),
        (["help", "sft"], 0, "Usage: llmkit sft"),
        (["crawl-filter", "--help"], 0, "[INPUT...]"),
        ([], 2, "Usage: llmkit"),
        (["crawl-filte"], 2, "no such command 'crawl-filte'; did you mean 'crawl-filter'? See --help"),
        (["chat", "m/"], 2, "no such command 'chat'; see llmkit sample MODEL --chat"),
        (["dpo"], 2, "sft --loss dpo"),
    ],
)
def test_help_and_the_version_go_to_stdout_and_hints_to_stderr(llmkit, words, code, shown) -> None:
    done = llmkit(*words)
    assert done.returncode == code and (done.stderr if code else done.stdout).find(shown) >= 0
    assert not (done.stdout if code else done.stderr)


def test_help_shows_brackets_as_they_are_off_and_on_a_terminal(on_terminal) -> None:
    for shown in (toy("--help").stdout, on_terminal(*TOY, "--help")):
        for words in ("llmkit toy [more]", "Records [JSONL]", "[how it ends]", "Next: llmkit toy out.jsonl [again]"):
            assert words in shown
        assert "--no-tie" in shown and "--no-force" not in shown


# ---- exits


def test_the_exit_codes(tmp_path: Path) -> None:
    assert toy("-", "--act", "fork").stderr == ""  # pool processes end silently
    assert mistake(toy("-", "--act", "gate"), 3) == "accuracy 0.2 is under 0.5"
    assert "not enough memory" in mistake(toy("-", "--act", "memory"))
    for act, words in (("bug", "RuntimeError: oops"), ("eof", "EOFError: not an interrupt")):
        done = toy("-", "--act", act)
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr and "a bug in llmkit; please report" in done.stderr


@pytest.mark.parametrize(
    "script", ["yes '{\"a\":1}' | head -100000 | toy - | head -1", "yes '{\"a\":1}' | toy | head -1"]
)
def test_a_reader_that_goes_away_ends_it_in_silence(tmp_path: Path, script: str) -> None:
    done = shell(f"{script}; echo ${{PIPESTATUS[@]: -2:1}}", tmp_path)
    assert (done.stdout, done.stderr) == (RECORD + "141\n", "")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "llmkit", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up_and_exits_130(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / "in.jsonl").write_text(RECORD)
    command = [*TOY, "in.jsonl", "-o", "out.jsonl", "--force", "--act", "wait"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        assert (tmp_path / "out.jsonl.partial").exists()
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "llmkit: error: interrupted\n")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"


WAITS = """
import atexit, sys, time
from llmkit import __main__, cli
def wait():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
def cleaning():
    try:
        yield 0
    finally:
        wait()
sys.argv = ["llmkit", "--version"]
cli._interrupt_on_signals()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment",
    [
        "cli.run_command_line = lambda words: next(cleaning())",
        "cli._fail = lambda message, code: wait(); cli.COMMANDS = {}; sys.argv = ['llmkit', 'convert']",
        "atexit.register(wait)",
    ],
)
def test_a_second_signal_at_the_end_prints_no_traceback(moment: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", f"{WAITS}{moment}\n__main__.main()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode in (0, 130, -number)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    assert mistake(toy("-", "-o", "/dev/full")) == "/dev/full: no space left on disk; free some and run it again"
    assert mistake(shell(f"echo '{RECORD.strip()}' | toy > /dev/full", tmp_path)) == "output: no space left on disk"


def test_closed_streams_are_one_line(tmp_path: Path) -> None:
    assert "stdin: closed" in mistake(shell("toy - <&-", tmp_path))
    assert "stdout: closed" in mistake(shell("echo | toy - >&-", tmp_path))
    (tmp_path / "d.jsonl").write_text(RECORD)
    assert shell("toy d.jsonl -o out.jsonl >&-", tmp_path).returncode == 0


# ---- user errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sise", "3"], ["no such option: --sise", "--size", "--help"]),
        (["--size"], ["--size", "argument"]),
        (["--size", "2M"], ["--size: expected at most 1,000,000, found '2M'"]),
        (["--config", "no.toml"], ["no.toml: cannot read the config file: no such file or directory"]),
        (["--force=yes"], ["--force", "does not take a value"]),
        (["no such.jsonl"], ["no such.jsonl: expected a readable file: no such file"]),
        (["."], [".: expected a readable file: found a folder"]),
        (["-", "-"], ["stdin: '-' can be read only once"]),
        (["-", "-o", "thesis.tex/x"], ["thesis.tex/x: expected a folder at ", "found a file"]),
        (["-", "-o", ".", "--force"], [".: expected the name of a new file or folder"]),
    ],
)
def test_a_user_error_is_one_line_that_says_what_to_do(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    message = mistake(toy(*arguments, cwd=tmp_path, stdin=""))
    for word in words:
        assert word in message
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    assert mistake(toy("-", "-o", out)) == f"{out}: already exists; --force replaces it, or choose another place"
    assert out.read_text() == "old"
    assert summary(toy("-", "-o", out, "--force"))["records"] == 1
    assert summary(toy("-o", tmp_path / "f", "--act", "folder"))["records"] == 0
    assert "already exists" in mistake(toy("-o", tmp_path / "f", "--act", "folder"))
    assert summary(toy("-o", tmp_path / "f", "--act", "folder", "--force"))["records"] == 0
    assert sorted(os.listdir(tmp_path)) == ["f", "out.jsonl"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_two_runs_do_not_write_one_output(tmp_path: Path, force: list[str]) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text(RECORD)
    command = [*TOY, "in.jsonl", "-o", "out.jsonl", "--act", "wait"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        assert mistake(toy("-", "-o", out, *force)) == (
            f"{out}: another run is writing it (process {process.pid}); wait for it, or choose another place"
        )
        assert toy("-", "-o", out, "--dry-run").returncode == 0
        assert toy("-", "-o", tmp_path / "other.jsonl").returncode == 0
        process.kill()
    assert summary(toy("-", "-o", out))["records"] == 1
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "other.jsonl", "out.jsonl"]


def test_a_place_that_takes_no_lock_is_written(tmp_path: Path) -> None:
    no_locks = (
        "import fcntl, errno\ndef lockf(*given): raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.lockf = lockf"
    )
    (tmp_path / "sitecustomize.py").write_text(no_locks)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = toy("-", "-o", tmp_path / "out.jsonl", env={**os.environ, "PYTHONPATH": path})
    assert summary(done)["records"] == 1
    assert not list(tmp_path.glob("*.lock"))


def test_a_dry_run_writes_nothing_but_finds_errors(tmp_path: Path) -> None:
    done = toy("-", "-o", "out.jsonl", "--dry-run", cwd=tmp_path)
    assert (done.returncode, os.listdir(tmp_path)) == (0, [])
    (tmp_path / "out.jsonl").write_text("old")
    assert "already exists" in mistake(toy("-", "-o", "out.jsonl", "--dry-run", cwd=tmp_path))


# ---- options from flags, a file and defaults


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    toml, out = tmp_path / "c.toml", tmp_path / "out"
    toml.write_text(f'size = "2k"\nstop = ["x", "y"]\nquiet = true\ntie = false\nout = "{out}"\nforce = true\n')
    found = summary(toy("-", "--config", toml))
    assert {name: found[name] for name in ("path", "size", "stop", "quiet", "tie", "rate")} == {
        "path": str(out), "size": 2000, "stop": ["x", "y"], "quiet": True, "tie": False, "rate": 0.5,
    }  # fmt: skip
    flags = ["--size", "30k", "--stop", "z", "--no-quiet", "--tie", "--rate", "none"]
    found = summary(toy("-", "--config", toml, *flags))
    assert (found["size"], found["stop"], found["quiet"], found["tie"]) == (30_000, ["z"], False, True)
    assert "rate" not in found
    assert "already exists" in mistake(toy("-", "--config", toml, "--no-force"))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("pretrain docs.jsonl --gpu-price 2", "--gpu-price: was removed; --dry-run"),
        ("pretrain docs.jsonl --gpu-price=2", "--gpu-price: was removed; --dry-run"),
        ("pretrain docs.jsonl --config old.toml", "old.toml: 'gpu-price': was removed; --dry-run"),
        ("sft chats.jsonl --tensor-parallel 2", "--tensor-parallel: was removed; FSDP2"),
        *(
            (f"{command} a --seed 1", "--seed: was removed; the command uses no random numbers")
            for command in ("crawl-filter", "train-bpe", "export", "report")
        ),
        ("sample model --top-p", "option '--top-p' requires an argument; see --help"),
        ("train-bpe docs.jsonl --top-p 0.9", "no such option: --top-p"),
        ("sample model --gpus 2", "no such option: --gpus"),
    ],
)
def test_only_the_command_that_had_an_option_says_what_to_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text("gpu-price = 2\n")
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        cli.parse(typed.split())


def test_no_command_has_an_option_that_it_says_was_removed() -> None:
    configs = {config: getattr(import_module(module), config) for module, config, _ in COMMANDS.values()}
    configs |= {base.__name__: base for config in configs.values() for base in config.__mro__}
    for names, (owners, _) in DROPPED.items():
        for owner in owners.split():
            assert not set(names.split()) & {item.name for item in option_fields(configs[owner])}, f"{owner}: {names}"


# ---- completion


def test_a_shell_completes_commands_options_and_choices() -> None:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        env = {"_LLMKIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        done = subprocess.run(TOY[:2], capture_output=True, text=True, timeout=60, env={**os.environ, **env})
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    assert complete("llmkit to") == ["toy"]
    assert complete("llmkit toy --si") == ["--size"]
    assert complete("llmkit toy --act me") == ["memory"]


# ---- every real subcommand


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unknown.toml").write_text("no_such_option = 1")
    module, config_name, _ = COMMANDS[name]
    has_seed = "seed" in {item.name for item in option_fields(getattr(import_module(module), config_name))}
    for typed, words in (
        ("--no-such-option", "no such option: --no-such-option"),
        ("--seed x", "--seed: expected a whole number, found 'x'" if has_seed else "--seed: was removed"),
        ("--config missing.toml", "missing.toml: cannot read the config file"),
        ("--config unknown.toml", "unknown.toml: unknown key 'no_such_option'"),
        ("nothing-here -o out", None),
    ):
        with pytest.raises(UserError, match=words and re.escape(words)) as caught:
            cli.parse([name, *typed.split()])()  # pyright: ignore[reportCallIssue]
        assert "\n" not in str(caught.value)
    assert os.listdir() == ["unknown.toml"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "sample"])
def test_every_command_that_reads_documents_gives_help_at_a_terminal(monkeypatch, capsys, name: str) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert cli.parse([name]) == 2
    assert f"Usage: llmkit {name}" in capsys.readouterr().err


# ---- inputs are not overwritten

READING = [
    (name, item.name)
    for name, (module, config_name, _) in COMMANDS.items()
    for item in option_fields(getattr(import_module(module), config_name))
    if option_of(item).reads
]
WAYS = {"reward": "rm:{}", "gold": "rm:{}:2", "tools": "calc,search:py:{}:answer", "data": "{}:0.5"}


@pytest.mark.parametrize(("command", "name"), READING)
def test_no_command_writes_over_what_an_option_reads(command: str, name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for file in ("config.json", "deeper/notes.txt"):
        (model / file).write_text("{}")
    module, config_name, _ = COMMANDS[command]
    config_class = getattr(import_module(module), config_name)
    text = WAYS.get(name, "{}").format(model)
    value = (text,) if value_type(get_type_hints(config_class)[name])[2] else text
    for out, words in (
        (model, "is an input"),
        (tmp_path / "link", "is an input"),
        (tmp_path, "is an input"),
        (model / "deeper/notes.txt", f"is inside the input {model}"),
    ):
        config = config_class(**{name: value, "out": str(out), "force": True})
        with pytest.raises(UserError, match=f"{out}: {words} and would be lost; choose another place"):
            cli._run_alone(lambda config: None, config)


def test_outputs_that_no_option_reads_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "config.json").write_text("{}")
    sft, sample = (import_module(f"llmkit.stages.{name}") for name in ("sft", "sample"))
    for config in (
        sft.SftConfig(model="base", system="out", prompt=("out",), sample_every=1, out="out", force=True),
        sample.SampleConfig(model=str(tmp_path), out=str(tmp_path / "said.jsonl")),
    ):
        cli._run_alone(lambda config: None, config)
