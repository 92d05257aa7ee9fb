"""docs/extending.md is correct: its files are written verbatim, and its commands run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from archives import members, page
from documented import commands_of
from tiny import END, certain, make_model, save_assistant

from llmkit.model.folder import save_model
from llmkit.tokenizer.encoding import load_tokenizer
from tests.helpers.jsonl import lines, write

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
LONGEST_EXAMPLE = 30  # lines


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def files_of(text: str) -> dict[str, str]:
    """Return the fenced blocks that start with a comment with a file name, by that name."""
    return {name: body for body, name in re.findall(r"```\w+\n(# ([\w.]+).*?\n)```", text, re.DOTALL)}


@pytest.fixture
def follow(tmp_path):
    """Write the files of a section into the test's folder, and run its commands there."""

    def run(heading: str) -> list[subprocess.CompletedProcess[str]]:
        text = section(heading)
        for name, body in files_of(text).items():
            (tmp_path / name).write_text(body)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        done = []
        for command in commands_of(text, heading):
            shell = ["bash", "-euo", "pipefail", "-c", command.text]
            one = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert one.returncode == 0, f"{command}\n{one.stderr}"
            done.append(one)
        assert done
        return done

    return run


def write_rows(path: Path, *rows: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    write(path, *rows)


def test_examples_are_short():
    found = files_of(PAGE)
    assert len(found) == 7
    for name, body in found.items():
        assert len(body.splitlines()) <= LONGEST_EXAMPLE, name


def test_a_reward(follow, tmp_path):
    save_assistant(tmp_path / "chat")
    write_rows(tmp_path / "problems.jsonl", *({"prompt": f"{n} + 1", "answer": str(n + 1)} for n in range(8)))
    follow("A reward")
    attempts = lines(tmp_path / "policy" / "rollouts.jsonl")
    assert {one["step"] for one in attempts} == {1, 2} and (tmp_path / "policy" / "model.safetensors").exists()
    for one in attempts:
        words = one["completion"].split()
        assert one["reward"] == pytest.approx((one["answer"] in words) - 0.02 * len(words), abs=1e-6)


QUIET = """The mill stands by the river, and nobody in the village knows how old it is. Some say that it was built
when the bridge was still made of wood. Others have heard from their grandmothers that a monk laid its first stone.
In the spring the wheel turns day and night, for then there is more water than the farmers can use. The miller sleeps
little, eats his bread standing, and grumbles at everyone who comes with a single sack. By the end of summer the river
is low, and he has time to talk. He will tell you that flour should smell of hazelnuts, that a good stone lasts longer
than a good marriage, and that he has never once been to the sea. His daughter has been there twice. She came back with
a jar of sand, which stands on the shelf above the stove, and which nobody is allowed to touch."""
LOUD = """This shop sells lamps of every kind, and you will not find them cheaper in any other street of the city. We
have lamps for the kitchen, where one must see what one is cutting. We have small ones for the bed, with a shade of
paper that keeps the light from whoever sleeps beside you. There are tall ones for the corner of a room, which cost more
but make it look larger than it is. If a lamp breaks within two years, bring it back, and we shall mend it or give you
another. Ask for the owner, who has worked here since he was a boy and knows which bulb belongs to what. On Saturdays
there is coffee for everybody who comes in, whether they buy or only look around and warm their hands."""


def test_a_filter_of_pages(follow, tmp_path):
    (tmp_path / "crawl").mkdir()
    told = [(text, f"http://{name}.example/") for name, text in (("quiet", QUIET), ("loud", LOUD.replace(".", "!")))]
    archive = members([page(text.replace("\n", " ").encode(), url=url) for text, url in told])
    (tmp_path / "crawl" / "pages.warc.gz").write_bytes(archive)
    (done,) = follow("A filter of pages")
    assert [row["url"] for row in lines(tmp_path / "docs.jsonl")] == ["http://quiet.example/"]
    (dropped,) = lines(tmp_path / "rejects.jsonl")
    assert (dropped["url"], dropped["step"], dropped["reason"]) == ("http://loud.example/", "own", "exclamations")
    assert re.search(r"^own +2 +1 +1 ", done.stderr, re.MULTILINE)  # in the funnel


def test_a_tool(follow, tmp_path):
    folder = tmp_path / "chat"
    save_assistant(folder)
    tokenizer = load_tokenizer(folder)
    names = ["<|im_sep|>", "<|search_start|>", *"comet", "<|search_end|>", "<|result_end|>", "<|im_end|>"]
    chain = [tokenizer.specials[name] if len(name) > 1 else tokenizer.encode(name)[0] for name in names]
    model = make_model(vocab_size=tokenizer.vocab_size, eos_token_id=(END, chain[-1]), context=256)
    save_model(certain(model, *chain), folder)
    write_rows(tmp_path / "questions.jsonl", {"messages": [{"role": "user", "content": "When does Varrow return?"}]})
    (done,) = follow("A tool")
    (call,) = json.loads(done.stdout)["tool_calls"]
    assert call == {"tool": "search", "input": "comet", "result": "The comet Varrow returns every 76 years."}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_kernel(follow):
    checked, _ = follow("A kernel")
    assert len(re.findall(r"torch\.\w+ (?:value|gradient): relative error", checked.stdout)) == 6
