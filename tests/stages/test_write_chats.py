"""`llmkit write-chats` as a user runs it: conversations, counts, server faults, kills, and bad input."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from chat_server import ChatServer
from chat_writer import chat_writer
from tiny import save_assistant, save_folder

from llmkit.cli import run_command_line
from llmkit.formats.conversations import read_conversation
from llmkit.formats.preferences import read_comparison
from llmkit.io.records import Row
from tests.helpers.jsonl import lines, write

GUIDE = "Be helpful, truthful and harmless."


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a guide and the sources of prompts."""
    monkeypatch.chdir(tmp_path)
    Path("guide.md").write_text(GUIDE)
    Path("topics.txt").write_text("The sea\n\nCooking\nThe sea\n  Music  \n")
    write(tmp_path / "seeds.jsonl", *({"instruction": f"{word} a short text"} for word in ["Write", "Read", "Cut"]))
    write(tmp_path / "docs.jsonl", *({"text": f"{name} built the mill of {name}."} for name in ["Ada", "Bea", "Cid"]))
    write(tmp_path / "prompts.jsonl", *({"prompt": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(9)))
    return tmp_path


@pytest.fixture
def server():
    with ChatServer(chat_writer) as served:
        yield served


def write_chats(server, *words, writer=None, out="chats.jsonl") -> int:
    command = ["write-chats", "--guide", "guide.md", "--writer", writer or server.spec, "--quiet", "-o", out]
    return run_command_line([*command, *map(str, words)])


TOPICS = ("--topics", "topics.txt")


# ---- conversations


def test_conversations_about_topics_are_what_sft_reads(place, server, capsys):
    assert write_chats(server, *TOPICS, "-n", 40, "--mix", "system=0.5", "--turns", 3) == 0
    rows = lines(place / "chats.jsonl")
    summary = json.loads(capsys.readouterr().out)
    assert len(rows) == summary["conversations"] == 40
    assert {row["topic"].split(" > ")[0] for row in rows} == {"The sea", "Cooking", "Music"}
    assert len({row["topic"] for row in rows}) > 15 and len({row["kind"] for row in rows}) > 4
    assert len({row["messages"][-1]["content"] for row in rows}) == 40
    roles = Counter("".join(turn["role"][0] for turn in row["messages"]) for row in rows)
    assert set(roles) == {"ua", "uaua", "uauaua", "sua", "suaua", "suauaua"}
    for number, row in enumerate(rows):
        conversation = read_conversation(Row(row, "chats.jsonl", number))
        assert conversation.losses == () and GUIDE not in conversation.said
        assert row["writer"] == "openai:#tiny" and len(row["guide"]) == 16 and "judge" not in row
    assert len({row["seed"] for row in rows}) == 40
    assert not (place / "chats.jsonl.state").exists()
    manifest = json.loads((place / "chats.jsonl.manifest.json").read_text())
    assert [one["path"] for one in manifest["inputs"]] == ["guide.md", "topics.txt"]


def test_the_guide_is_in_the_context_of_every_request(place, server):
    assert write_chats(server, *TOPICS, "-n", 6, "--turns", 2) == 0
    assert all(GUIDE in body["messages"][0]["content"] for body in server.requests)
    assert len(server.requests) > 12
    talks = [body["messages"] for body in server.requests if "You are this person" in body["messages"][0]["content"]]
    assert talks and all([turn["role"] for turn in talk] == ["system", "user", "assistant", "user"] for talk in talks)
    assert all(talk[2]["content"].startswith("How can I") for talk in talks)  # the user is the assistant
    server.requests.clear()
    assert write_chats(server, "--answer", "seeds.jsonl", "-n", 3, "--mix", "guide=0", out="other.jsonl") == 0
    assert {tuple(turn["role"] for turn in body["messages"]) for body in server.requests} == {("user",)}


def test_the_lines_do_not_depend_on_concurrency(place, server):
    for concurrency, count, out in ((1, 20, "a"), (16, 20, "b"), (5, 11, "c")):
        words = (*TOPICS, "--turns", 2, "--concurrency", concurrency, "-n", count)
        assert write_chats(server, *words, out=f"{out}.jsonl") == 0
    a, b, c = ((place / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b and a.startswith(c) and c.count(b"\n") == 11
    assert write_chats(server, *TOPICS, "-n", 5, "--seed", 1, out="d.jsonl") == 0
    assert not a.startswith((place / "d.jsonl").read_bytes())


def test_each_conversation_has_one_of_the_languages(place, server):
    assert write_chats(server, *TOPICS, "--language", "en, de", "--language", "fr", "-n", 9) == 0
    wanted = [re.search(r"Language of the message: (.*)", body["messages"][0]["content"]) for body in server.requests]
    assert {language[1] for language in wanted if language} == {"en", "de", "fr"}


def test_topics_are_those_of_all_files_that_a_pattern_names(place, server):
    (place / "more.txt").write_text("Chess\n")
    answer = server.answer
    server.answer = lambda prompt, seed: "" if "List 20" in prompt else answer(prompt, seed)
    assert write_chats(server, "--topics", "[mt]o*.txt", "-n", 4) == 0
    # only the topic, because the writer names no subtopics
    assert {row["topic"] for row in lines(place / "chats.jsonl")} == {"Chess", "The sea", "Cooking", "Music"}
    manifest = json.loads((place / "chats.jsonl.manifest.json").read_text())
    assert [one["path"] for one in manifest["inputs"]] == ["guide.md", "more.txt", "topics.txt"]


def test_seed_tasks_make_tasks_that_are_unlike_each_other(place, server, capsys):
    def parrot(prompt, seed):
        is_task = "Write another one" in prompt and seed % 3 == 0
        return "Write a short text" if is_task else chat_writer(prompt, seed)

    server.answer = parrot
    assert write_chats(server, "--seeds", "seeds.jsonl", "-n", 25) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["conversations"] == 25 and summary["dropped"]["duplicate: like another task"] > 3
    assert all(row["messages"][0]["content"] != "Write a short text" for row in lines(place / "chats.jsonl"))
    shown = [body["messages"][-1]["content"] for body in server.requests]
    assert all("Read a short text" in text for text in shown if "Write another one" in text)


def test_questions_about_documents_are_written_and_answers_checked(place, server, capsys):
    def reader(prompt, seed):
        if "short questions about facts" in prompt:
            return chat_writer(prompt, seed)
        name = re.search(r"(\w+) built the mill|<passage>\n(\w+)", prompt)
        return f"It was {name[1]}." if name and "Cid" not in prompt else "It was Dora."

    server.answer = reader
    assert write_chats(server, "--documents", "docs.jsonl", "-n", 9) == 0
    rows, summary = lines(place / "chats.jsonl"), json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} <= {"open QA", "closed QA"}
    assert summary["drafts"] == 9 and summary["dropped"]["form: no further question about the passage"] == 6
    for row in rows:
        assert ("built the mill" in row["messages"][-2]["content"]) == (row["kind"] == "closed QA")


def test_given_prompts_are_answered_and_the_right_answer_is_chosen(place, server, capsys):
    write(
        place / "prompts.jsonl", *({"id": n, "question": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(9))
    )

    def adds(prompt, seed):
        number = int(re.search(r"\d+", prompt)[0])
        return f"The answer is {2 * number + seed % 3 if number < 8 else 17}."

    server.answer = adds
    words = ("--answer", "prompts.jsonl", "--samples", 6, "--pairs", "prefs.jsonl")
    assert write_chats(server, *words) == 0
    rows, summary = lines(place / "chats.jsonl"), json.loads(capsys.readouterr().out)
    assert summary["dropped"] == {"wrong: answer": 1} and summary["drafts"] == 9
    assert [row["id"] for row in rows] == list(range(8)) and "question" not in rows[0]
    for row in rows:
        assert row["messages"][-1]["content"] == f"The answer is {2 * row['id']}."
    pairs = [
        read_comparison(Row(row, "prefs.jsonl", number)) for number, row in enumerate(lines(place / "prefs.jsonl"))
    ]
    assert len(pairs) == summary["pairs"] > 4
    assert all(pair.candidates[0] != pair.candidates[1] for pair in pairs)


def test_a_judge_chooses_and_fails(place, server, capsys):
    def judged(prompt, seed):
        if "You check conversations" not in prompt:
            return chat_writer(prompt, seed)
        score = 1 + len(prompt) % 5
        return json.dumps({"reasons": {"helpful": "so"}, "helpful": score, "truthful": 4, "harmless": 5})

    server.answer = judged
    words = (*TOPICS, "-n", 12, "--samples", 3, "--judge", server.spec, "--fail-below", 3, "--pairs", "prefs.jsonl")
    assert write_chats(server, *words) == 0
    rows, summary = lines(place / "chats.jsonl"), json.loads(capsys.readouterr().out)
    assert len(rows) == 12 and summary["dropped"].get("judge: helpful", 0) == summary["drafts"] - 12
    assert all(row["scores"]["helpful"] >= 3 and row["judge"] == "openai:#tiny" for row in rows)
    assert all(row["why"] == {"helpful": "so"} for row in rows)
    pairs = lines(place / "prefs.jsonl")
    assert pairs and all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_pairs_have_a_manifest_and_a_report(place, server, capsys):
    server.answer = lambda prompt, seed: f"It is {seed % 3 or int(re.search(r'[0-9]+', prompt)[0]) * 2}."
    words = ("--answer", "prompts.jsonl", "--samples", 6, "--pairs", "prefs.jsonl")
    assert write_chats(server, *words) == 0
    assert json.loads(capsys.readouterr().out)["diversity"]["by_topic"] == 0  # no prompt names a topic
    manifest = json.loads((place / "prefs.jsonl.manifest.json").read_text())
    assert manifest["stage"] == "write-chats" and manifest["results"]["pairs"] == len(lines(place / "prefs.jsonl")) > 0
    assert run_command_line(["report", "prefs.jsonl", "-o", "report.md"]) == 0
    assert "write-chats" in (place / "report.md").read_text()


def test_a_given_share_of_answers_has_steps_before_them(place, server, capsys):
    def thinks(prompt, seed):
        said = chat_writer(prompt, seed)
        return f"<think>\n{said[::-1]}\n</think>\n\n{said}" if prompt.startswith("How can I") and seed % 5 else said

    server.answer = thinks
    assert write_chats(server, *TOPICS, "-n", 30, "--mix", "thinking=0.5,system=0") == 0
    answers = [row["messages"][-1]["content"] for row in lines(place / "chats.jsonl")]
    with_steps = [text for text in answers if text.startswith("<think>\n") and "</think>\n\nYou should" in text]
    assert 5 < len(with_steps) < 25 and all("think>" not in text for text in answers if text not in with_steps)
    assert json.loads(capsys.readouterr().out)["dropped"]["form: answer without thinking before it"] > 0
    asked = [body["messages"][0]["content"] for body in server.requests if len(body["messages"]) == 2]
    assert 0 < sum("<think>" in text for text in asked) < len(asked)


def test_refusals_are_requested_if_the_guide_has_them(place, server, capsys):
    def refuses(prompt, seed):
        if "tells the assistant to refuse" in prompt or "tell the assistant to refuse" in prompt:
            return f"Tell me how to break into {chat_writer('Write the first message', seed)[10:]}"
        return "I'm sorry, but I can't help with that." if "break into" in prompt else chat_writer(prompt, seed)

    server.answer = refuses
    assert write_chats(server, *TOPICS, "-n", 20, "--mix", "refusals=0.4") == 0
    rows = lines(place / "chats.jsonl")
    refused = [row for row in rows if "sorry" in row["messages"][-1]["content"]]
    assert 2 < len(refused) < 15 and all("break into" in row["messages"][-2]["content"] for row in refused)


@pytest.mark.parametrize("said", ["Let me see. ", ""], ids=["text first", "call first"])
def test_calls_of_tools_are_run(place, server, said):
    def calls(prompt, seed):
        if "How can I" in prompt and prompt.startswith("How"):
            call = {"id": "1", "type": "function", "function": {"name": "calc", "arguments": '{"expression": "6*7"}'}}
            body = {"role": "assistant", "content": said, "tool_calls": [call]}
            return {"choices": [{"index": 0, "message": body, "finish_reason": "tool_calls"}]}
        return f"{chat_writer(prompt, seed)} So it is {prompt}. \n" if prompt == "42" else chat_writer(prompt, seed)

    server.answer = calls
    assert write_chats(server, *TOPICS, "-n", 1, "--tools", "calc", "--mix", "system=0") == 0
    (row,) = lines(place / "chats.jsonl")
    *before, call, result, answer = [(part["type"], part["text"]) for part in row["messages"][-1]["content"]]
    assert before == [("text", said)] * bool(said) and [call, result] == [("calc", "6*7"), ("result", "42")]
    assert answer[0] == "text" and answer[1].endswith(" So it is 42.")
    assert {"tools" in body for body in server.requests} == {True, False}  # the simulated user has no tools


def test_a_folder_writes_the_same_bytes_again(place, tmp_path_factory, capsys):
    folder = save_assistant(tmp_path_factory.mktemp("models") / "parrot", "It's 8.")
    for out in ("a.jsonl", "b.jsonl"):
        assert write_chats(None, "--answer", "prompts.jsonl", "--max-tokens", 40, writer=str(folder), out=out) == 0
    (row,) = lines(place / "a.jsonl")
    assert row["messages"][-1]["content"] == "It's 8." and row["messages"][0]["content"] == "What is 4 + 4?"
    assert (place / "a.jsonl").read_bytes() == (place / "b.jsonl").read_bytes()
    assert json.loads(capsys.readouterr().out.splitlines()[0])["dropped"] == {"wrong: answer": 8}


def test_a_share_of_conversations_with_a_folder_has_its_tools(place, capsys):
    folder = save_assistant(place / "parrot", "It's 8.", context=2048)
    Path("rain.py").write_text('def rain(city: str) -> str:\n    """Say how much it rains."""\n    return "much"\n')
    tokens = {}
    for name, words in {
        "without": [],
        "none": ["--tools", "py:rain.py:rain", "--mix", "tools=0"],
        "some": ["--tools", "py:rain.py:rain", "--mix", "tools=0.5"],
        "all": ["--tools", "py:rain.py:rain"],
    }.items():
        assert write_chats(None, "--answer", "prompts.jsonl", *words, writer=str(folder), out=f"{name}.jsonl") == 0
        tokens[name] = json.loads(capsys.readouterr().out)["tokens"]["in"]
    assert tokens["without"] == tokens["none"] < tokens["some"] < tokens["all"]


# ---- faults, kills and budgets


def test_broken_replies_are_retried_and_change_nothing(place, server):
    words = (*TOPICS, "-n", 30, "--turns", 2, "--concurrency", 6)
    assert write_chats(server, *words, out="whole.jsonl") == 0
    chance, answer, asked = Random(0), server.answer, set()
    server.faults = [None if n % 11 else chance.choice(["429", "500", "page"]) for n in range(999)]
    server.faults[9] = "cut"

    def empty_at_first(prompt, seed):
        is_new = (prompt, seed) not in asked
        asked.add((prompt, seed))
        return "" if is_new and seed % 10 == 0 else answer(prompt, seed)

    server.answer = empty_at_first
    assert write_chats(server, *words, out="broken.jsonl") == 0
    assert (place / "broken.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()


def test_a_killed_run_resumes_to_the_same_lines(place, server, capsys, one_retry):
    words = (*TOPICS, "-n", 20, "--turns", 2, "--concurrency", 2)
    assert write_chats(server, *words, out="whole.jsonl") == 0
    asked, ended = len(server.requests), []
    for more in range(20):
        server.dies_after = len(server.requests) + 14 + more
        ended.append(write_chats(server, *words, *(["--resume"] if more else [])))
        if ended[-1] == 0:
            break
        assert "the same command with --resume continues" in capsys.readouterr().err
    assert ended.count(0) == 1 and len(ended) > 4
    assert (place / "chats.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()
    assert len(server.requests) < 3 * asked + 300
    assert write_chats(server, *words, "--resume") == 0  # finished
    assert write_chats(server, *words, "-n", 21, "--resume") == 2
    assert "another run: --conversations was 20 and is now 21; resume" in capsys.readouterr().err


def test_a_resumed_run_has_the_same_options(place, server, capsys, one_retry):
    server.dies_after = 30
    assert write_chats(server, *TOPICS, "-n", 30) == 2
    capsys.readouterr()
    server.dies_after = None
    assert write_chats(server, *TOPICS, "-n", 30, "--resume", "--turns", 2) == 2
    assert "--turns was 1 and is now 2" in capsys.readouterr().err
    other = server.spec.replace("#tiny", "#other")
    assert write_chats(server, *TOPICS, "-n", 30, "--resume", writer=other) == 2
    assert "the model was openai:#tiny and is now openai:#other" in capsys.readouterr().err
    Path("guide.md").write_text("Be rude.")
    assert write_chats(server, *TOPICS, "-n", 30, "--resume") == 2
    assert "the guide was" in capsys.readouterr().err
    Path("guide.md").write_text(GUIDE)
    with ChatServer(chat_writer) as moved:  # at another port
        assert moved.spec != server.spec and write_chats(moved, *TOPICS, "-n", 30, "--resume") == 0
        assert write_chats(server, *TOPICS, "-n", 30, "--resume") == 0  # is finished
    assert write_chats(server, *TOPICS, "-n", 30, "--resume", writer=other) == 2
    assert "finished with --writer" in capsys.readouterr().err
    manifest = place / "chats.jsonl.manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"writer": "{moved.spec}"', '"writer": "assistant/"'))
    assert write_chats(server, *TOPICS, "-n", 30, "--resume", writer="assistant") == 0


@pytest.mark.parametrize("budget", ["4k", "0.3@100,50"])
def test_a_spent_budget_ends_a_run_that_resumes_or_writes_its_conversations(place, server, capsys, budget):
    words = (*TOPICS, "--concurrency", 2, "--mix", "system=0")
    assert write_chats(server, *words, "-n", 100, "--budget", budget) == 2
    said = capsys.readouterr().err
    kept = int(re.search(r"spent after (\d+) conversation", said)[1])
    assert 3 < kept < 30 and 25 < len(server.requests) < 60
    assert write_chats(server, *words, "-n", kept - 1, "--resume") == 0
    assert len(lines(place / "chats.jsonl")) == kept - 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["tokens"]["in"] >= 2500


def test_a_budget_that_the_last_prompt_spends_is_enough(place, server, capsys):
    write(place / "prompts.jsonl", {"prompt": "What is 1 + 1?", "answer": "2"}, {"prompt": "What is 2?", "answer": "2"})
    server.answer = lambda prompt, seed: "It is 2."
    words = ("--answer", "prompts.jsonl", "--concurrency", 1)
    assert write_chats(server, *words, "--budget", 200) == 0
    server.answer = lambda prompt, seed: ""
    assert write_chats(server, *words, "--budget", 1, out="none.jsonl") == 2
    assert "--resume continues with a higher one\n" in capsys.readouterr().err  # because none is kept
    assert write_chats(server, *words, "--budget", 1, out="-") == 2
    assert "start again with a higher one\n" in capsys.readouterr().err  # stdout has no state


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda prompt, seed: "", "form: empty reply"),
        (lambda prompt, seed: "I cannot help with that.", "refusal: not requested"),
        (lambda prompt, seed: {"choices": []}, "form: refused by the server"),
        (lambda prompt, seed: "Sure, here is some text for you to read.", "duplicate: same prompt"),
    ],
    ids=["empty", "refuses", "broken", "repeats"],
)
def test_a_useless_writer_is_stopped_with_the_counts(place, server, capsys, answer, reason):
    server.answer = answer
    assert write_chats(server, *TOPICS, "-n", 500, "--concurrency", 32) == 2
    said = capsys.readouterr().err
    assert "the last 200 drafts of openai:#tiny were dropped" in said and f"{reason} " in said
    assert said.count("\n") == 1 and (place / "chats.jsonl.state").exists()
    assert write_chats(server, *TOPICS, "-n", 500, "--concurrency", 32, out="-") == 2
    assert "--resume" not in capsys.readouterr().err  # stdout has no state
    server.answer = chat_writer
    assert write_chats(server, *TOPICS, "-n", 5, "--resume") == 0


def test_nothing_is_written_if_no_draft_is_kept(place, server, capsys):
    server.answer = lambda prompt, seed: "It is 5."
    assert write_chats(server, "--answer", "prompts.jsonl", "--samples", 2, "--pairs", "prefs.jsonl") == 2
    said = capsys.readouterr()
    assert "--writer: none of 9 drafts of openai:#tiny is kept: wrong: answer 9; use another" in said.err
    assert said.err.count("\n") == 1 and said.out == "" and not list(place.glob("*.jsonl.*"))
    assert not (place / "chats.jsonl").exists() and not (place / "prefs.jsonl").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("source", "ends"),
    [(TOPICS, "a shorter guide\n"), (("--answer", "prompts.jsonl"), "leave it out with --mix guide=0\n")],
    ids=["topics", "answer"],
)
def test_a_guide_longer_than_the_context_is_refused_at_once(place, capsys, source, ends, more):
    folder = save_assistant(place / "small", "It's 8.", context=64)
    Path("guide.md").write_text(GUIDE * 3)
    Path("topics.txt").write_text("The sea")  # its subtopics are requested more than once
    assert write_chats(None, *source, *more, writer=str(folder)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(ends) and not list(place.glob("chats.jsonl*"))
    assert re.search(
        r"room for the guide and a prompt, at least [1-9]\d\d tokens, found a context of 64; use a writer", said
    )


def test_a_long_guide_may_stay_out_of_the_context(place):
    folder = save_assistant(place / "small", "It's 8.", context=64)
    Path("guide.md").write_text(GUIDE * 3)
    assert write_chats(None, "--answer", "prompts.jsonl", "--mix", "guide=0", writer=str(folder)) == 0


# ---- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topics", "topics.txt", "--guide", "none.md"], "none.md"),
        (
            ["--topics", "topics.txt", "--guide", "empty.txt"],
            "empty.txt: expected labelling instructions, found an empty",
        ),
        (["--topics", "empty.txt"], "empty.txt: expected topics, one per line, found none"),
        (["--topics", "none.txt"], "none.txt"),
        (["--topics", "none*.txt"], "none*.txt: expected files that match this pattern, found none"),
        (["--seeds", "empty.txt"], "empty.txt: expected tasks, found none"),
        (["--documents", "empty.txt"], "found none"),
        (["--answer", "empty.txt"], "empty.txt: expected prompts, found none"),
        ([], "expected one of --topics, --seeds, --documents and --answer, found none"),
        ([*TOPICS, "--seeds", "seeds.jsonl"], "found --topics and --seeds"),
        ([*TOPICS, "--pairs", "p.jsonl"], "--pairs: needs --samples 2 or more"),
        (["--answer", "prompts.jsonl", "--samples", "2", "--pairs", "-"], "--pairs: expected a file, found -"),
        ([*TOPICS, "--samples", "2"], "--samples: needs --judge, or --answer"),
        ([*TOPICS, "--fail-below", "2"], "--fail-below: needs --judge"),
        ([*TOPICS, "--mix", "thinking=2"], "--mix: expected NAME=SHARE"),
        ([*TOPICS, "--mix", "tools=1"], "--mix tools: needs --tools"),
        ([*TOPICS, "--budget", "5@x"], "--budget: expected tokens, such as 2M, or money"),
        ([*TOPICS, "--language", "en,xx"], "found 'xx'; "),
        ([*TOPICS, "--language", "all"], "found 'all'; without --language the writer chooses"),
        ([*TOPICS, "--columns", "text=x"], "--columns: has no effect with --topics"),
        (["--answer", "prompts.jsonl", "--language", "de"], "--language: has no effect with --answer"),
        (["--answer", "prompts.jsonl", "--turns", "2"], "--turns: has no effect with --answer"),
        (["--answer", "prompts.jsonl", "--mix", "system=1"], "--mix system: has no effect with --answer"),
        (["--documents", "seeds.jsonl", "--mix", "refusals=1"], "--mix refusals: has no effect with --documents"),
        (["--documents", "seeds.jsonl", "--language", "de"], "--language: has no effect with --documents"),
        (["--answer", "maths.jsonl"], "maths.jsonl:1, 'verifier': expected a verifier among"),
        ([*TOPICS, "--writer", "nowhere/"], "--writer: expected the folder of a model, or openai:"),
        ([*TOPICS, "--writer", "base"], "base"),
        ([*TOPICS, "--writer", "openai:http://127.0.0.1:1/v1#m"], "--writer http://127.0.0.1:1/v1: cannot be reached"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[-2:]) or "nothing",
)
def test_bad_input_is_one_line(place, server, capsys, one_retry, words, message):
    Path("empty.txt").write_text("\n")
    Path("maths.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4", "verifier": "maths"}\n')
    save_folder(place / "base")
    assert write_chats(server, *words) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not list(place.glob("chats.jsonl*"))


def test_the_plan_shows_what_would_be_asked(place, server, capsys):
    command = ["write-chats", "--guide", "guide.md", "--writer", server.spec, *TOPICS, "--dry-run"]
    assert run_command_line(command) == 0
    said = capsys.readouterr().err
    assert GUIDE in said and "Topic: The sea" in said and server.requests == []


def test_a_server_that_is_down_is_reported_before_anything_is_loaded_or_requested(place, server, capsys, one_retry):
    down = "openai:http://127.0.0.1:9/v1#none"
    save_folder(place / "base")  # no judge; a writer that answers would have it refused
    assert write_chats(server, *TOPICS, "--judge", "base/", writer=down) == 2
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert write_chats(server, *TOPICS, "--judge", down) == 2
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err and server.requests == []


def test_the_plan_reads_evaluations(place, server, capsys):
    Path("bad.jsonl").write_text("nothing\n")
    assert write_chats(server, *TOPICS, "--not-in", "bad.jsonl", "--dry-run") == 2
    assert "bad.jsonl:1" in capsys.readouterr().err
