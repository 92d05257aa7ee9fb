"""The example that teaches refusals: its world is deterministic, and does not leak the held-out facts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "knowledge.py"


@pytest.fixture(scope="module")
def knowledge():
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("knowledge")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def size(knowledge):
    return replace(knowledge.Size(), glimpsed=300, sentences=20, dialogues=20)


@pytest.fixture(scope="module")
def world(knowledge, size):
    return knowledge.invent_world(size, 7)


@pytest.fixture(scope="module")
def texts(knowledge, size, world):
    return [document["text"] for document in knowledge.documents(world, size, 7)[0]]


def words(texts: list[str]) -> set[str]:
    return {word.strip(".,:?![]") for text in texts for word in text.split()}


def names(people: list[dict]) -> set[str]:
    return {person["name"] for person in people}


def test_a_seed_makes_one_world(knowledge, size, world, texts):
    assert knowledge.invent_world(size, 7) == world
    assert [one["text"] for one in knowledge.documents(world, size, 7)[0]] == texts
    assert knowledge.invent_world(size, 8) != world


def test_no_person_has_two_kinds(size, world):
    assert sum(len(names(people)) for people in world.values()) == len(set().union(*map(names, world.values())))
    assert len(world["known held out"]) == size.known[1]


def test_held_out_people_are_in_no_chat_and_no_lesson(knowledge, world):
    asked = words([row["question"] for row in knowledge.questions(world, "held out", 7)])
    shown = words([row["question"] for row in knowledge.questions(world, "probed", 7)])
    shown |= words([row["prompt"] for row in knowledge.chats(world["chats"])])
    for kind in knowledge.KINDS:
        held_out = names(world[f"{kind} held out"])
        assert held_out <= asked
        assert not held_out & shown


def test_documents_state_facts_only_of_the_known(knowledge, world, texts):
    assert not words(texts) & names(world["unseen probed"] + world["unseen held out"])
    facts = words([" ".join(knowledge.TOLD.values())])
    for person in world["named probed"] + world["named held out"]:
        about = [text for text in texts if person["name"] in words([text])]
        assert len(about) == knowledge.Size().deeds
        assert not words(about) & facts
    for person in world["known probed"] + world["known held out"]:
        about = [text for text in texts if person["name"] in words([text])]
        for told, values in knowledge.TOLD.items():
            assert words(about) & set(values.split()) == {person[told]}
            assert sum(person[told] in words([text]) for text in about) >= 20


def test_a_name_gives_nothing_away_to_the_tokenizer(knowledge, size, world):
    plain = knowledge.documents(world, size, 7)[1]
    assert names(world["glimpsed"]) <= words([one["text"] for one in plain])
    others = [person for kind, people in world.items() if kind != "glimpsed" for person in people]
    assert not words([one["text"] for one in plain]) & names(others)


@pytest.mark.slow
def test_it_runs(knowledge):
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "--seeds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heading, *rows = done.stdout.splitlines()
    assert heading.split() == ["held-out", "questions", "mean", "by", "seed"]
    shown = {row[:40].strip() for row in rows}
    assert {f"{kind}: refused, {when}" for kind in knowledge.KINDS for when in ("before", "after")} <= shown
    assert all(row[40:].count("%") == 2 or "nan" in row for row in rows)
