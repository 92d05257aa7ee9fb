"""The documentation is correct: generated parts match the code, and every command parses and runs.

Commands that are not run are listed in NOT_RUN with a reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from documented import Command, all_commands, commands_of
from small_world import make_small_world
from warm import WarmPrograms

from llmkit.cli import COMMANDS, parse
from llmkit.config import flag_of, option_fields

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def generate():
    spec = spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_what_the_code_says(generate):
    page = (DOCS / "options.md").read_text()
    assert page == generate.options_page(), "run python docs/generate.py (make docs does)"
    for name, (module, config_name, _) in COMMANDS.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        config_class = getattr(import_module(module), config_name)
        assert all(f"`{flag_of(item)}` |" in section for item in option_fields(config_class))


def test_the_figures_of_the_readme_are_those_of_the_demo(generate):
    assert (ROOT / "README.md").read_text() == generate.readme_page(), "run python docs/generate.py (make docs does)"


def test_a_row_of_the_demo_is_read_as_it_was_printed(generate):
    rows = generate.demo_rows()
    printed = (DOCS / "demo.md").read_text()
    assert len(rows) == printed.split("```")[1].strip().count("\n")
    for (stage, figure), (value, beside) in rows.items():
        assert re.search(rf"^{re.escape(stage)} +{re.escape(figure)} +{re.escape(value)}\b", printed, re.MULTILINE)
        assert math.isfinite(float(value)) and (not beside or math.isfinite(float(beside.rsplit(" ", 1)[1])))


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in navigation] == []


# options of other programs on the pages: torchrun, servers, Ray, llama.cpp, nanochat, our benchmarks, an example
# reward, pip, and the script that makes a small world
FOREIGN = """--config --help --install-completion --no- --index-url --quick
    --nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint --max-restarts --address --head --port
    --alias --enable-deterministic-inference --logprobs-mode --model --model-path --served-model-name
    --enable-auto-tool-choice --jinja --tool-call-parser
    --cache-type-k --cache-type-v --max-per-task --fast
    --forms --hf-trainer --litgpt-python --models --peer-python --peers --requests --rounds --save --seeds --steps
    --folds --long --threads --work --written"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_and_file_that_a_page_names_exists(page):
    text, known = page.read_text(), set(FOREIGN.split())
    for module, config_name, _ in COMMANDS.values():
        known |= {flag_of(item) for item in option_fields(getattr(import_module(module), config_name))}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= known
    files = re.findall(r"(?<![\w/.-])(?:benchmarks|docs|examples|kernels|llmkit|tests)/[\w./-]+\.[a-z]+\b", text)
    assert [name for name in files if not (ROOT / name).exists() and "/NAME." not in name] == []


# ---- commands

NOT_RUN = {
    r"^docs/extending.md": "tests/test_extending.py runs them, with the files of that page",
    r"py:weather\.py": "a function of one's own; tests/generation/test_tool_calls.py calls one",
    r"torchrun ": "several processes; tests/training/test_distributed.py runs such",
    r"--engine ray": "a cluster; tests/crawl/test_on_ray.py runs one where Ray is installed",
    r"llama-cli": "a program of another project",
    r"pythia-160m/": "a folder of another family; tests/stages/test_transformers_backend.py runs such",
    r"--peer-python peers/": "a peer's virtual environment",
    r"benchmarks/serve\.py chat/ --long": "minutes, of a model with a longer context than the small world's",
    r"llmkit write-chats ": "what a tiny model writes is dropped; tests/stages/test_write_chats.py has better ones",
    r"llmkit serve ": "goes on until it is stopped; tests/serving/ has servers",
    r"hf://": "a network; tests/io/test_hub.py has a hub of its own",
    r"s3://": "a bucket; tests/io/test_upload.py has one of its own",
}
MAY_END = {"| head": 141, "--fail-under": 3}  # a closed pipe; a gate that a tiny judge fails
ALL = all_commands()


def is_excepted(command: Command) -> bool:
    return any(re.search(what, str(command)) for what in NOT_RUN)


RUN = {command.text: command for command in ALL if not is_excepted(command)}
SERVER = "openai:http://localhost:8000/v1#"


def shape(command: Command) -> object:
    """Return what similar commands have in common: the stages and their options, without the values."""
    return [(words[0], sorted(word for word in words if word.startswith("-"))) for words in command.stages]


def each_that_runs() -> list[object]:
    """Return the commands to run; of similar ones only the first is a quick test."""
    found, seen = [], []
    for command in RUN.values():
        again = bool(command.stages) and shape(command) in seen
        seen.append(shape(command))
        found.append(pytest.param(command, marks=[pytest.mark.slow] if again else [], id=command.place))
    return found


def server_of(folder: Path):
    """Serve the model in a folder, with scripted questions and judgements for requests of those."""
    from chat_server import ChatServer
    from model_server import ModelServer

    class Server(ModelServer):
        def respond(self, path: str, body: dict) -> tuple[int, object]:
            asked = body["messages"][-1]["content"] if body and "messages" in body else ""
            if "Passage:" not in asked:
                return super().respond(path, body)
            word = asked.split("Passage:")[1].split()[3].strip(".,")
            question = {"question": "Which is the fourth word?", "answer": word}
            self.answer = lambda *_: "VERDICT: right" if "VERDICT" in asked else json.dumps({"questions": [question]})
            return ChatServer.respond(self, path, body)

    return Server(folder)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A function that runs a line of shell in a copy of the small world, with an llmkit that starts at once."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "bin").mkdir()
    (folder / "world").mkdir()
    with ExitStack() as stack:
        programs = stack.enter_context(WarmPrograms(folder / "bin"))
        environment = {**os.environ, "PATH": programs.path, "OMP_NUM_THREADS": "1", "EXAMPLES": str(ROOT / "examples")}
        make_small_world(folder / "world", environment)
        server: list = []

        def run(text: str) -> subprocess.CompletedProcess[str]:
            shutil.rmtree(folder / "copy", ignore_errors=True)
            shutil.copytree(folder / "world", folder / "copy", symlinks=True)
            if SERVER in text and not server:
                server.append(stack.enter_context(server_of(folder / "world" / "chat")))
            if SERVER in text:
                text = re.sub(SERVER + r"\w+", server[0].spec, text)
            line = ["bash", "-euo", "pipefail", "-c", text]
            return subprocess.run(
                line, cwd=folder / "copy", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=120,
            )  # fmt: skip

        yield run


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.place)
def test_every_command_is_understood(command: Command):
    """Its options exist and their values are accepted."""
    for arguments in command.stages:
        assert callable(parse(arguments)), command.text
    for program in command.programs:
        if program[:1] == ["python"] and re.match("(benchmarks|examples)/", program[1]):
            assert (ROOT / program[1]).exists(), command.text


@pytest.mark.parametrize("command", each_that_runs())
def test_a_command_runs(small_world, command: Command):
    done = small_world(command.text)
    also = [code for sign, code in MAY_END.items() if sign in command.text]
    assert done.returncode in (0, *also), f"{command.text}\n{done.stderr}"


def test_the_first_commands_of_the_readme_run_one_after_another(small_world):
    """Up to the first assistant; later commands are tested separately."""
    first = commands_of(
        (ROOT / "README.md").read_text().split("\n## A first assistant\n")[1].split("\n## ")[0], "README.md"
    )
    made = [command.text for command in first[:5]]
    done = small_world(
        "rm -r * && ln -s $EXAMPLES examples\n" + "\n".join(made).replace("world/\n", "world/ --quick\n")
    )
    assert done.returncode == 0, done.stderr


def test_every_exception_is_of_a_command():
    assert [what for what in NOT_RUN if not any(re.search(what, str(command)) for command in ALL)] == []
