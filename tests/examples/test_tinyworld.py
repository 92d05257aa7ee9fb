"""Tiny World: its ledger is correct, held-out data does not leak into training, and the recipe runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.jsonl import lines

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "tinyworld"
SHOWN = ("chats.jsonl", "questions.jsonl", "prefs.jsonl", "rehearsed.jsonl")
ENGLISH_REFUSALS = json.loads((ROOT / "llmkit" / "probing" / "refusals.json").read_text())["en"]


def make(out: Path, *options: str) -> Path:
    done = subprocess.run([sys.executable, FOLDER / "make.py", out, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tinyworld") / "data", "--quick", "--seed", "1")


@pytest.fixture(scope="module")
def ledger(world):
    return json.loads((world / "ledger.json").read_text())


@pytest.fixture(scope="module")
def filtered(world):
    """The output of the recipe's crawl-filter."""
    command = [sys.executable, "-m", "llmkit", "crawl-filter", *sorted(map(str, world.glob("crawl-*.warc.gz")))]
    command += ["--blocklist", str(world / "blocklist.txt"), "--rejects", str(world.parent / "rejects.jsonl")]
    command += ["-o", str(world.parent / "docs.jsonl"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return world.parent


def test_a_seed_makes_one_world(world, tmp_path):
    again, other = make(tmp_path / "again", "--quick", "--seed", "1"), make(tmp_path / "other", "--quick")
    names = sorted(path.name for path in world.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((world / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (world / "ledger.json").read_bytes() != (other / "ledger.json").read_bytes()


def test_halves_share_nothing_and_take_what_was_written(world, tmp_path):
    written = tmp_path / "written.jsonl"
    written.write_text('{"messages": [], "source": "tools"}\n{"messages": [], "source": "questions"}\n')
    for out, options in (("half", []), ("both", ["--written", written]), ("other", ["--seed", "1"])):
        subprocess.run([sys.executable, FOLDER / "halves.py", world, tmp_path / out, *options], check=True)
    half, both, other = (
        {path.stem: lines(path) for path in (tmp_path / out).glob("*.jsonl")} for out in ("half", "both", "other")
    )
    every = [json.dumps(row["messages"][:-1]) for name in ("chats", "tools") for row in lines(world / f"{name}.jsonl")]
    stays = Counter(json.dumps(row["messages"][:-1]) for name in ("chats", "tools") for row in half[name])
    asked = Counter(json.dumps(row["messages"]) for row in half["prompts"])
    assert stays.total() == pytest.approx(len(every) / 2, abs=2) and stays + asked <= Counter(every)
    assert asked.total() > 0.4 * len(every)  # small talk and refusals have no prompts
    sorts = [(row["messages"][0]["content"].split()[1], row["answer"]) for row in half["prompts"]
             if row["messages"][0]["content"].startswith("Sort ")]  # fmt: skip
    assert sorts and all(answer == "".join(sorted(digits)) for digits, answer in sorts)  # even if the shown is wrong
    assert half["prompts"] != other["prompts"] and half["prompts"] == both["prompts"]
    assert both["tools"] == [*half["tools"], {"messages": [], "source": "tools"}]
    assert both["chats"] == [*half["chats"], {"messages": [], "source": "questions"}]
    systems = {row["messages"][0]["content"] for row in half["guided-chats"]}
    assert systems == {"Answer.", "Answer.\n\nAnswer in a sentence.", "Answer.\n\nYou talk like a sailor."}


def test_the_ledger_counts_what_the_pages_tell(ledger):
    told = Counter((name, fact) for page in ledger["pages"] if page["keep"] for name, fact in page["facts"])
    assert all(
        entity["told"] == {fact: told[entity["name"], fact] for fact in entity["facts"]}
        for entity in ledger["entities"]
    )
    by_tier = {tier: {count for one in ledger["entities"] if one["tier"] == tier for count in one["told"].values()}
               for tier in ("often", "sometimes", "seldom", "once", "named", "unseen")}  # fmt: skip
    assert by_tier == {"often": {55}, "sometimes": {10}, "seldom": {4}, "once": {1}, "named": {0}, "unseen": {0}}


def test_a_fact_is_on_exactly_the_pages_that_the_ledger_names(ledger):
    pages = [page for page in ledger["pages"] if page["text"]]
    for entity in ledger["entities"]:
        about = [page for page in pages if entity["name"] in words(page["text"])]
        assert bool(about) == (entity["tier"] != "unseen")
        for fact, value in entity["facts"].items():
            telling = [page for page in about if [entity["name"], fact] in page["facts"]]
            assert all(value.lower() in words(page["text"].lower()) for page in telling)
            lines = [
                line for page in about for line in re.split(r"(?<=\.) |\n", page["text"]) if entity["name"] in line
            ]
            if entity["tier"] == "named":
                assert not any(value in words(line) for line in lines)


def test_the_held_out_are_in_no_lesson(world, ledger):
    held_out = {entity["name"] for entity in ledger["entities"] if entity["use"] == "held out"}
    shown = "\n".join((world / name).read_text() for name in SHOWN)
    assert held_out and not held_out & set(words(shown))
    exam = lines(world / "exam.jsonl")
    assert held_out == {entity["name"] for entity in ledger["entities"]} & set(words(str(exam)))


def test_no_problem_is_shown_twice(world):
    asked = {
        row["messages"][0]["content"]
        for row in lines(world / "exam.jsonl")
        if row["exam"] in ("sort", "reverse", "add")
    }
    shown = [row["prompt"] for name in ("problems", "problems-val") for row in lines(world / f"{name}.jsonl")]
    shown += [row["messages"][0]["content"] for row in lines(world / "chats.jsonl")]
    shown += [row["text"].split("\n")[1] for row in lines(world / "school.jsonl")]
    assert asked and not asked & set(shown)
    expressions = {
        row["messages"][0]["content"].split(" ", 2)[-1].rstrip("?")
        for row in lines(world / "exam.jsonl")
        if row["exam"] == "tool"
    }
    shown = (world / "tools.jsonl").read_text() + (world / "rehearsed.jsonl").read_text()
    assert expressions and not any(one in shown for one in expressions)


def test_rl_rehearses_answers_forms_and_every_refusal_of_what_is_unseen(world, ledger):
    entities = {entity["name"]: entity for entity in ledger["entities"]}
    rows = lines(world / "rehearsed.jsonl")
    assert Counter(row["source"] for row in rows) == {
        **{"tool": 6, "identity": 6},
        **{"often": 2, "unseen": 2, "system": 1, "private": 1},
    }
    systems = set()
    for row in rows:
        if row["source"] in ("often", "unseen", "system", "private"):
            (name,) = set(words(row["messages"][-1]["content"])) & set(entities)
            tier = "unseen" if row["source"] == "unseen" else "often"
            assert (entities[name]["tier"], entities[name]["use"]) == (tier, "probed")
        if row["source"] == "often":
            assert row["answer"].rstrip(".").lower() in map(str.lower, entities[name]["facts"].values())
        elif row["source"] == "unseen":
            assert all(re.fullmatch(row["pattern"], refusal) for refusal in ENGLISH_REFUSALS)
        elif row["source"] == "system":
            system = row["messages"][0]["content"]
            systems.add(system)
            assert re.fullmatch(row["pattern"], "Ahoy! Wool.") and not re.fullmatch(row["pattern"], "Wool.")
        elif row["source"] == "private":
            assert row["answer"].startswith("I do not ") and entities[name]["kind"] == "person"
    assert systems <= {"Answer in a sentence.", "You talk like a sailor."}


def test_the_conversations_make_the_usual_mistakes_that_the_verifier_does_not_accept(world):
    solved = [row["messages"] for row in lines(world / "chats.jsonl") if row["source"] == "problems"]
    right = Counter()
    for asked, said in solved:
        kind, *rest = asked["content"].split()
        answer, mistaken = said["content"].rpartition("\n")[2], None
        if kind == "Sort":
            wanted, mistaken = sorted(rest[0]), sorted(set(rest[0]))
        elif kind == "Reverse":
            wanted, mistaken = rest[0][::-1], rest[0][::-1][:6]
        elif kind == "Add":
            first, second = int(rest[0]), int(rest[2])
            wanted = str(first + second)
            mistaken = f"{first // 10 + second // 10}{(first + second) % 10}"
        if mistaken is not None:
            assert answer in ("".join(wanted), "".join(mistaken))
            right[kind, answer == "".join(wanted)] += 1
    assert all(right[kind, is_right] for kind in ("Sort", "Reverse", "Add") for is_right in (True, False))


def test_problems_have_the_right_answers(world):
    for row in lines(world / "problems.jsonl"):
        kind, *rest = row["prompt"].split()
        if kind == "Sort":
            right = "".join(sorted(rest[0]))
        elif kind == "Reverse":
            right = rest[0][::-1]
        else:
            right = str(int(rest[0]) + int(rest[2]))
        assert row["answer"] == right


def test_sums_are_worked_out_rightly(world):
    asked = re.compile(r"user says\nAdd (\d+) and (\d+)\nassistant says\n(.+)=(\d+)\n(.+)=(\d+)\n(\d+)")
    sums = [found for row in lines(world / "school.jsonl") if (found := asked.fullmatch(row["text"]))]
    assert len(sums) == sum("\nAdd " in row["text"] for row in lines(world / "school.jsonl")) > 10
    for found in sums:
        first, second, ones, one, tens, ten, total = found.groups()
        assert [sum(map(int, side.split("+"))) for side in (ones, tens)] == [int(one), int(ten)]
        assert int(ten) * 10 + int(one) % 10 == int(total) == int(first) + int(second)


def test_identity_questions_have_other_wordings_than_in_training(world):
    from llmkit.data.identity import identity_conversations

    taught = {one.messages[-2].text for one in identity_conversations({"name": "Tilly", "maker": "the Workshop"})}
    assert not taught & {row["messages"][0]["content"] for row in lines(world / "exam.jsonl")}


def test_the_filters_keep_the_good_pages_and_drop_the_bad(filtered, ledger):
    kept = {row["url"] for row in lines(filtered / "docs.jsonl")}
    good = {page["url"] for page in ledger["pages"] if page["keep"]}
    bad = {page["url"]: page["kind"] for page in ledger["pages"] if not page["keep"]}
    assert len(good & kept) >= 0.97 * len(good)
    assert {bad[url] for url in bad.keys() & kept} <= {"near copy", "exact copy"}
    assert len(bad.keys() & kept) <= 0.05 * len(bad)
    text = (filtered / "docs.jsonl").read_text()
    secrets = [secret for page in ledger["pages"] for secret in page["personal"]]
    assert secrets and not any(secret in text for secret in secrets)


def test_a_page_can_be_asked_about(filtered, ledger):
    url = next(page["url"] for page in ledger["pages"] if page["kind"] == "placeholder")
    command = [sys.executable, FOLDER / "score.py", filtered, "--page", url]
    done = subprocess.run(command, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert (told["should"]["keep"], told["did"]["reason"]) == (False, "lorem_ipsum")


def test_the_gold_reward_counts_wrong_and_repeated_digits(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from gold import gold

    assert [gold({"answer": "0482", "completion": said}) for said in ("0482", "04", "04820482", "1357")] == [
        1,
        0.5,
        0,
        -1,
    ]


def test_choices_and_pairs_ask_of_what_is_held_out(world, ledger):
    held_out = {entity["name"]: entity for entity in ledger["entities"] if entity["use"] == "held out"}
    facts, pairs = lines(world / "facts.jsonl"), lines(world / "word_order.jsonl")
    assert len(facts) == len(pairs) == sum(len(entity["facts"]) for entity in held_out.values())
    for row in facts:
        (name,) = set(words(row["query"])) & set(held_out)
        assert row["choices"][row["gold"]] == held_out[name]["facts"][row["fact"]] + "."
        assert (len(set(row["choices"])), row["tier"]) == (4, held_out[name]["tier"])
    assert len({row["gold"] for row in facts}) == 4
    for row in pairs:
        assert row["good"] != row["bad"] and sorted(words(row["good"])) == sorted(words(row["bad"]))


@pytest.mark.slow
def test_the_recipe_runs_and_scores_every_stage(tmp_path):
    options = [
        "OUT=" + str(tmp_path / "world"),
        "QUICK=1",
        f"PYTHON={sys.executable}",
        f"LLMKIT={sys.executable} -m llmkit",
    ]
    command = ["make", "-C", FOLDER, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "world" / "effects.json").read_text())["effects"]
    stages = {one["stage"] for one in found}
    assert {
        "crawl-filter",
        "train-bpe",
        "pretrain",
        "sft",
        "probe-knowledge",
        "train-reward",
        "rl",
        "evaluate",
    } <= stages
    assert all(one["figure"] in done.stdout for one in found)
    assert "Tiny World" in (tmp_path / "world" / "report.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "llmkit" not in again.stdout and found[0]["figure"] in again.stdout
