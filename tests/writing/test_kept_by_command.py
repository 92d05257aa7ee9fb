"""`llmkit write-chats` drops planted duplicates, evaluation items and bad replies for the right reasons."""

from __future__ import annotations

import json
import re
from random import Random

import pytest
from chat_server import ChatServer
from chat_writer import sentence

from llmkit.cli import run_command_line
from llmkit.rewards.verifiers import VerifierReward
from tests.helpers.jsonl import lines, write

ITEM = "Which of these rivers is the longest that ends in the Black Sea?"
PLANTED = {  # edited copies of other prompts, whose replies are edited in the same way
    "case": str.upper,
    "punctuation": lambda text: text.replace(",", " -").replace("?", "!"),
    "a word": lambda text: text.replace("?", " please?"),
}
BAD = {  # replies by a word in the prompt
    "looping": ("Well " * 40, "repetition: few different words"),
    "refusing": ("I'm sorry, but I can't help with that.", "refusal: not requested"),
    "running": ("It floats.\nUser: And why?", "form: stray marks or further turns"),
    "leaking": ("It floats.<|im_end|>", "form: stray marks or further turns"),
}


def answer(prompt: str, seed: int) -> str:
    """Return the same reply for all edits of a prompt, with the same edit as the prompt."""
    for word, (reply, _) in BAD.items():
        if word in prompt:
            return reply
    key = re.sub(r"please|[^a-z]", "", prompt.lower())
    said = f"{sentence(Random(key))}, {sentence(Random(key[::-1]))}."
    return said.upper() if prompt.isupper() else said


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guide.md").write_text("Be helpful.")
    write(tmp_path / "eval.jsonl", {"question": ITEM, "answer": "The Danube"})
    prompts = [f"How do I {sentence(Random(number))[11:]}, and why?" for number in range(30)]
    edited = [edit(prompt) for edit in PLANTED.values() for prompt in prompts[:10]]
    held = [f"{prompts[3][:-1]}, and {ITEM.lower()}", f"A riddle. {ITEM.upper()} Tell me."]
    every = [*prompts, *edited, *prompts[:5], *held, *(f"Is the boat {word}?" for word in BAD)]
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in every))
    return tmp_path


def test_planted_conversations_are_dropped_with_the_right_reason(place, capsys, one_retry):
    with ChatServer(answer) as server:
        command = [
            "write-chats",
            "--guide",
            "guide.md",
            "--writer",
            server.spec,
            "--answer",
            "prompts.jsonl",
            "--quiet",
        ]
        command += ["--not-in", "eval.jsonl", "--concurrency", "3", "-o"]
        assert run_command_line([*command, "whole.jsonl"]) == 0
        summary = json.loads(capsys.readouterr().out)
        server.dies_after = len(server.requests) + 40
        assert run_command_line([*command, "chats.jsonl"]) == 2
        server.dies_after = None
        assert run_command_line([*command, "chats.jsonl", "--resume"]) == 0
    dropped = summary["dropped"]
    assert summary["conversations"] == 30 and len(lines(place / "whole.jsonl")) == 30
    assert sum(count for reason, count in dropped.items() if reason.startswith("duplicate: ")) == 35
    assert dropped["not_in: evaluation item"] == 2
    for _, reason in BAD.values():
        assert dropped[reason] == sum(reason == other for _, other in BAD.values())
    assert (place / "chats.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()
    results = [
        json.loads((place / f"{name}.jsonl.manifest.json").read_text())["results"] for name in ("whole", "chats")
    ]
    funnels = [[{**row, "seconds": 0} for row in result["funnel"]] for result in results]
    assert funnels[0] == funnels[1] and funnels[0][0]["in"] == 71 and funnels[0][-1]["kept"] == 30
    assert results[0]["diversity"] == results[1]["diversity"] and results[0]["diversity"]["prompts"] == 30


def test_unit_tests_of_a_draft_run_once(place, monkeypatch):
    write(place / "prompts.jsonl", *({"prompt": f"Say {n}", "answer": str(n)} for n in range(3)))
    checked = []
    monkeypatch.setattr(VerifierReward, "score", lambda self, attempts: checked.extend(attempts) or [1.0])
    with ChatServer(lambda prompt, seed: f"It is {prompt}.") as server:
        command = ["write-chats", "--guide", "guide.md", "--writer", server.spec, "--answer", "prompts.jsonl"]
        assert run_command_line([*command, "--samples", "2", "-o", "chats.jsonl"]) == 0
    assert len(checked) == 6


def test_pairs_without_a_difference_are_counted(place, capsys):
    write(place / "prompts.jsonl", *({"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(8)))

    def add(prompt: str, seed: int) -> str:
        number = int(re.findall(r"\d+", prompt)[0])
        return str(number + 1 if number < 4 else number + seed % 2)

    with ChatServer(add) as server:
        command = ["write-chats", "--guide", "guide.md", "--writer", server.spec, "--answer", "prompts.jsonl"]
        assert run_command_line([*command, "--samples", "8", "--pairs", "pairs.jsonl", "-o", "chats.jsonl"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert summary["pairs"] == len(lines(place / "pairs.jsonl")) > 0
    alike = summary["conversations"] - summary["pairs"]
    reason = "the answers are equally good, or only one is kept"
    assert alike >= 4 and f"{alike} of {summary['conversations']} conversations gave no pair: {reason}" in said.err
